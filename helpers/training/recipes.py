"""Hand a notebook's recipe to `trl sft` and `accelerate launch` (Chapter 5).

A notebook is for finding a recipe; several GPUs want a script and a file. TRL has the
script. This writes the files, from the very objects the notebook trained with.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from helpers._checks import one_of, whole_number
from helpers._files import atomic_path
from helpers._report import Shown

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

__all__ = ["Recipe", "export_recipe", "run_recipe"]

# How `accelerate` and `trl sft` call what is chosen here.
_WORDS = json.loads(Path(__file__).with_name("recipes.json").read_text(encoding="utf-8"))


@dataclass(frozen=True, repr=False)
class Recipe(Shown):
    """The folder that was written, and the command that runs it, as one types it.

    Example:
        >>> Recipe(Path("run"), ["python", "-m", "trl.scripts.sft"]).command[0]
        'python'
    """

    folder: Path
    command: list[str]
    note: str = ""

    def __str__(self) -> str:
        files = ", ".join(sorted(path.name for path in self.folder.iterdir()))
        lines = [f"{self.folder}: {files}", " ".join(self.command), self.note]
        return "\n".join(filter(None, lines))


def export_recipe(
    folder: str | Path,
    *,
    model: str | Path,
    args: SFTConfig,
    dataset: Dataset,
    lora: LoraConfig | None = None,
    quantization: str | None = None,
    dtype: str | torch.dtype = "float32",
    tokenizer: PreTrainedTokenizerBase | None = None,
    backend: str = "single",
    processes: int = 1,
) -> Recipe:
    """Write recipe.yaml, accelerate.yaml and the data (Chapter 5).

    Args:
        folder: made anew; refused when it exists.
        model: a Hub id or a folder.
        args: what differs from SFTConfig's defaults is written.
        dataset: rows with 'prompt' and 'completion', or 'messages'.
        lora: the adapter; None trains all weights.
        quantization: None, 'int8', 'fp4' or 'nf4' (with double quantization).
        dtype: what the model is loaded in.
        tokenizer: its chat template, EOS and padding token are written too.
        backend: 'single', 'ddp', 'fsdp2' or 'deepspeed' (ZeRO 2).
        processes: they share the batch of `args`, so that an update sees the same rows.

    Returns:
        The folder and the command.

    Raises:
        ValueError: for choices that contradict each other, settings that the files cannot
            say, and more processes than this machine has GPUs (for another machine, write
            with CUDA_VISIBLE_DEVICES="").
        TypeError: when `processes` is no whole number.

    Example:
        >>> export_recipe(
        ...     "recipe", model="facebook/opt-350m", args=SFTConfig("out", max_steps=9),
        ...     dataset=rows, lora=LoraConfig(), backend="fsdp2", processes=2,
        ... )  # doctest: +SKIP
        recipe: accelerate.yaml, recipe.yaml, train.jsonl
        python -m accelerate.commands.launch --config_file recipe/accelerate.yaml -m ...
    """
    folder = Path(folder)
    _check(folder, args, lora, quantization, backend, processes)
    dtype = str(dtype).removeprefix("torch.")
    recipe = {
        "model_name_or_path": str(model),
        "dtype": dtype,
        "datasets": [{"path": "json", "data_files": str(folder / "train.jsonl")}],
        "output_dir": str(folder / "trained"),
        "per_device_train_batch_size": args.per_device_train_batch_size // processes,
    }
    recipe |= _arguments(args) | (_adapter(lora) if lora else {})
    if quantization:
        recipe |= _WORDS["quantization"][quantization]
    if quantization in ("fp4", "nf4") and backend == "fsdp2":  # cuts shards of one type
        recipe["bnb_4bit_quant_storage"] = dtype
    files = {}
    if tokenizer is not None:
        recipe |= {"eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token}
        if tokenizer.chat_template:
            files["chat_template.jinja"] = tokenizer.chat_template
            recipe["chat_template_path"] = str(folder / "chat_template.jinja")
    launch = _launch(backend, processes, args)
    for name, content in (("recipe.yaml", recipe), ("accelerate.yaml", launch)):
        files[name] = yaml.safe_dump(content, sort_keys=False)
    with atomic_path(folder) as partial:
        partial.mkdir()
        dataset.to_json(partial / "train.jsonl")
        for name, text in files.items():
            (partial / name).write_text(text, encoding="utf-8")
    # By module: where scripts like `trl` lie differs, and on Colab not beside Python.
    train = ["-m", "trl.scripts.sft", "--config", str(folder / "recipe.yaml")]
    if backend == "single":
        return Recipe(folder, ["python", *train])
    launcher = ["-m", "accelerate.commands.launch", "--config_file"]
    note = "DeepSpeed has not been run by this course." if backend == "deepspeed" else ""
    return Recipe(folder, ["python", *launcher, str(folder / "accelerate.yaml"), *train], note)


def run_recipe(
    recipe: Recipe, *, threads: int = 1, limit_s: float = 1800, leave_s: float = 60
) -> list[float]:
    """Run a recipe's command and wait for it (Chapter 5).

    Args:
        recipe: what `export_recipe` returned.
        threads: CPU threads for each process.
        limit_s: after so many seconds it is stopped.
        leave_s: after training, its processes are stopped when nothing was written for so
            many seconds: PyTorch 2.13's gloo can wait for itself for good at the end.

    Returns:
        The losses it logged.

    Raises:
        ValueError: when its files want more GPUs than there are here.
        RuntimeError: when it fails, with the end of its output.
        TimeoutError: at the limit.

    Example:
        >>> run_recipe(recipe, threads=2)  # doctest: +SKIP
        [3.023, 2.256, 1.61]
    """
    environment = _environment(recipe.folder) | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, *recipe.command[1:]]  # this Python, whatever `python` is
    with open(recipe.folder / "log.txt", "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    deadline = time.monotonic() + limit_s
    try:
        while (status := process.poll()) is None and not _is_left(recipe.folder, leave_s):
            if time.monotonic() > deadline:
                raise TimeoutError(f"stopped after limit_s={limit_s} seconds: {_end(recipe)}")
            time.sleep(0.2)
    finally:
        _stop(process)
    if status:
        raise RuntimeError(f"failed with status {status}: {_end(recipe)}")
    # `trl sft` leaves a trainer_state.json only where it saves checkpoints.
    return [float(x) for x in re.findall(r"'loss': '?([^',}]+)", _output(recipe.folder))]


def _output(folder: Path) -> str:
    return (folder / "log.txt").read_text(encoding="utf-8", errors="replace")


def _end(recipe: Recipe) -> str:
    said = _output(recipe.folder)[-1500:]
    return f"{' '.join(recipe.command)}\n{recipe.folder / 'log.txt'} ends with:\n{said}"


def _is_left(folder: Path, seconds: float) -> bool:
    """Whether training has ended and for so long nothing in the folder was written."""
    last = max(path.stat().st_mtime for path in folder.rglob("*"))
    return time.time() - last > seconds and "'train_runtime'" in _output(folder)


def _stop(process: subprocess.Popen) -> None:
    """End a process that may still run, and all that it started (in sessions of their own)."""
    import psutil

    if process.poll() is None:
        parent = psutil.Process(process.pid)
        for each in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


def _environment(folder: Path) -> dict[str, str]:
    """The variables of a run, after a look at what its files want of this machine."""
    # From the files, which a reader may have changed; each of them can say CPU.
    settings, launch = (
        yaml.safe_load((folder / name).read_text(encoding="utf-8"))
        for name in ("recipe.yaml", "accelerate.yaml")
    )
    processes, use_cpu = launch["num_processes"], settings.get("use_cpu") or launch["use_cpu"]
    cards = torch.cuda.device_count()
    _check_cards(processes, use_cpu, cards)
    environment = dict(os.environ)
    if processes == 1 and cards > 1:  # or TRL refuses nn.DataParallel
        first = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        environment["CUDA_VISIBLE_DEVICES"] = first
    return environment


def _check_cards(processes: int, use_cpu: bool, cards: int) -> None:
    # NCCL stops two processes on one card, with words that do not say so.
    if processes > 1 and not use_cpu and processes > cards:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "" if shown is None else f" (CUDA_VISIBLE_DEVICES={shown} shows no more)"
        raise ValueError(
            f"processes={processes} with use_cpu=False needs {processes} GPUs, and torch sees "
            f"{cards}{why}; use fewer, or SFTConfig(use_cpu=True), or another machine"
        )


def _check(
    folder: Path, args: SFTConfig, lora: Any, quantization: str | None, backend: str, processes: int
) -> None:
    one_of("backend", backend, _WORDS["backend"])
    one_of("quantization", quantization, (None, *_WORDS["quantization"]))
    whole_number("processes", processes)
    batch, quantized = args.per_device_train_batch_size, f"quantization={quantization!r}"
    if folder.exists():
        raise ValueError(f"folder={str(folder)!r} exists; choose a new one or remove it")
    if backend == "single" and processes > 1:
        raise ValueError(f"backend='single' is one process, not {processes}; use 'ddp' or 'fsdp2'")
    if batch % processes:
        raise ValueError(f"processes={processes} cannot share a batch of {batch} rows equally")
    if quantization and lora is None:
        raise ValueError(f"{quantized} needs lora: only adapters can be trained")
    if quantization and args.fp16 and not args.use_cpu:
        raise ValueError(
            f"{quantized} with fp16=True: `trl sft` makes bfloat16 adapters, which the gradient "
            "scaler does not take; use bf16=True where a card has it, or LeanSFTTrainer"
        )
    if cards := torch.cuda.device_count():  # where there is none, it is for another machine
        _check_cards(processes, args.use_cpu, cards)


def _arguments(args: SFTConfig) -> dict[str, Any]:
    """The fields of an SFTConfig that differ from its defaults."""
    from transformers.trainer_pt_utils import AcceleratorConfig

    found = {}
    # Decided by the machine or the folder, of no use in a file, or an old name.
    left_out = _WORDS["arguments left out"]
    for name, value in _changed(args):
        if name in left_out or value in ([], {}, AcceleratorConfig()):
            continue
        if not isinstance(value, str | int | float | bool | None | list | dict):
            raise ValueError(f"args.{name}={value!r} cannot be written into a file")
        found[name] = value
    return found


def _changed(config: SFTConfig | LoraConfig) -> Iterator[tuple[str, Any]]:
    """(name, value) of the fields of a dataclass that differ from their defaults."""
    for field in fields(config):
        make = field.default_factory
        default = field.default if make is MISSING else make()
        pair = getattr(config, field.name), default
        value, usual = (x.value if isinstance(x, Enum) else x for x in pair)
        if field.init and value != usual:
            yield field.name, value


def _adapter(lora: LoraConfig) -> dict[str, Any]:
    known = {*_WORDS["lora"], *_WORDS["lora notes about itself"]}
    if unsaid := [f"{name}={value!r}" for name, value in _changed(lora) if name not in known]:
        raise ValueError(
            f"lora has {', '.join(unsaid)}, which `trl sft` has no setting for: the recipe "
            "would train another model. Leave it out, or train with a script of your own"
        )
    chosen = {theirs: getattr(lora, name) for name, theirs in _WORDS["lora"].items()}
    targets = lora.target_modules
    if targets and not isinstance(targets, str):
        # TRL takes a list of one for a pattern that must match a module's whole name.
        alone = [rf"(.*\.)?{re.escape(name)}" for name in targets]
        chosen["lora_target_modules"] = alone if len(alone) == 1 else sorted(targets)
    elif targets:
        chosen["lora_target_modules"] = [targets]
    return {"use_peft": True} | {n: value for n, value in chosen.items() if value is not None}


def _launch(backend: str, processes: int, args: SFTConfig) -> dict[str, Any]:
    config = _WORDS["launch"] | _WORDS["backend"][backend] | {"num_processes": processes}
    config["mixed_precision"] = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    config["use_cpu"] = bool(args.use_cpu)
    if backend == "ddp" and args.use_cpu:
        config["distributed_type"] = "MULTI_CPU"
    if backend == "deepspeed":
        accumulation = {"gradient_accumulation_steps": args.gradient_accumulation_steps}
        config["deepspeed_config"] = config["deepspeed_config"] | accumulation
    return config
