"""Hand a notebook's recipe to `trl sft` and `accelerate launch` (Chapter 5).

A notebook is for finding a recipe; several GPUs want a script and a file. TRL has the
script. This writes the files, from the very objects the notebook trained with.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import yaml

BACKENDS = ("single", "ddp", "fsdp2", "deepspeed")
# Decided by the machine or the folder, or of no use in a file.
LEFT_OUT = {
    "output_dir",
    "run_name",
    "logging_dir",
    "hub_token",
    "per_device_train_batch_size",
    "gradient_checkpointing",  # the old name of activation_checkpointing
}
# What a LoraConfig notes about itself; not a choice.
NOTES = {"peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode"}
NOTES |= {"base_model_name_or_path", "revision"}


@dataclass(frozen=True)
class Recipe:
    """The folder that was written, and the command that runs it, as one types it."""

    folder: Path
    command: list
    note: str = ""

    def __str__(self):
        files = ", ".join(sorted(path.name for path in self.folder.iterdir()))
        lines = [f"{self.folder}: {files}", " ".join(self.command)]
        return "\n".join([*lines, self.note] if self.note else lines)

    __repr__ = __str__


def export_recipe(
    folder,
    *,
    model,
    args,
    dataset,
    lora=None,
    quantization=None,
    dtype="float32",
    tokenizer=None,
    backend="single",
    processes=1,
):
    """Write recipe.yaml, accelerate.yaml and the data; returns a `Recipe` (Chapter 5).

    folder: made anew; refused when it exists. model: a Hub id or a folder. args: the
    SFTConfig; what differs from its defaults is written. dataset: rows with 'prompt' and
    'completion', or 'messages'. lora: a LoraConfig. quantization: None, 'int8', 'fp4',
    'nf4' (double quantization). tokenizer: its chat template, EOS and padding token follow.
    backend: 'single', 'ddp', 'fsdp2', 'deepspeed' (ZeRO 2). processes: how many; the
    batch of `args` is divided among them, so that an update sees the same rows.
    Raises ValueError for choices that contradict each other, for settings that the files
    cannot say, and for more processes than this machine has GPUs (it writes for another
    one when it shows none: CUDA_VISIBLE_DEVICES="").
    """
    folder = Path(folder)
    _check(folder, args, lora, quantization, backend, processes)
    if cards := _visible_cards():
        _check_cards(processes, args.use_cpu, cards)
    recipe = {
        "model_name_or_path": str(model),
        "dtype": str(dtype).removeprefix("torch."),
        "datasets": [{"path": "json", "data_files": str(folder / "train.jsonl")}],
        "output_dir": str(folder / "trained"),
        "per_device_train_batch_size": args.per_device_train_batch_size // processes,
    }
    recipe |= _arguments(args) | _adapter(lora) | _quantization(quantization, dtype, backend)
    if tokenizer is not None:
        recipe |= {"eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token}
        if tokenizer.chat_template:
            recipe["chat_template_path"] = str(folder / "chat_template.jinja")
    parent = folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=parent))
    try:
        dataset.to_json(partial / "train.jsonl")
        if "chat_template_path" in recipe:
            (partial / "chat_template.jinja").write_text(tokenizer.chat_template, "utf-8")
        _write(partial / "recipe.yaml", recipe)
        _write(partial / "accelerate.yaml", _accelerate(backend, processes, args))
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _recipe(folder, backend, processes)


def run_recipe(recipe, *, threads=1, limit_s=1800, leave_s=60):
    """Run a recipe's command; returns the losses it logged, a list of float (Chapter 5).

    threads: CPU threads for each process. limit_s: after so many seconds it is stopped.
    leave_s: its processes are stopped when training has ended and for so long nothing was
    written. PyTorch 2.13's gloo can wait for itself for good while the interpreter shuts
    down: its destructor holds the lock that its own thread needs.
    Raises ValueError when its files want more GPUs than there are here, RuntimeError with
    the end of the output if it fails, TimeoutError at the limit.
    """
    environment = _environment(recipe.folder) | {"OMP_NUM_THREADS": str(threads)}
    log = recipe.folder / "log.txt"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, *recipe.command[1:]],  # this Python, whatever `python` is
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    started = time.monotonic()
    what = f"{' '.join(recipe.command)}, whose output is in {log},"
    try:
        while (status := process.poll()) is None:
            time.sleep(0.2)
            trained = "'train_runtime'" in _text_of(log)
            if trained and time.time() - _last_written(recipe.folder) > leave_s:
                break
            if time.monotonic() - started > limit_s:
                raise TimeoutError(
                    f"{what} was stopped after limit_s={limit_s} seconds. Its end:\n"
                    + _text_of(log)[-1500:]
                )
    finally:
        _stop(process)
    if status:
        raise RuntimeError(f"{what} failed. Its end:\n{_text_of(log)[-1500:]}")
    return [float(loss) for loss in re.findall(r"'loss': '?([^',}]+)", _text_of(log))]


def _environment(folder):
    """The variables of a run, after a look at what its files want of this machine."""
    # From the files, which a reader may have changed; each of them can say CPU.
    settings, launch = (
        yaml.safe_load((folder / name).read_text(encoding="utf-8"))
        for name in ("recipe.yaml", "accelerate.yaml")
    )
    use_cpu = settings.get("use_cpu", False) or launch["use_cpu"]
    _check_cards(launch["num_processes"], use_cpu, _visible_cards())
    environment = dict(os.environ)
    if launch["num_processes"] == 1 and _visible_cards() > 1:  # or TRL refuses nn.DataParallel
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
    return environment


def _visible_cards():
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _check_cards(processes, use_cpu, cards):
    # NCCL stops two processes on one card, with words that do not say so.
    if processes > 1 and not use_cpu and processes > cards:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "" if shown is None else f" (CUDA_VISIBLE_DEVICES={shown} shows no more)"
        raise ValueError(
            f"processes={processes} with use_cpu=False needs {processes} GPUs, and torch "
            f"sees {cards}{why}; use SFTConfig(use_cpu=True), which runs them on the CPU, "
            "fewer processes, or a machine with as many GPUs"
        )


def _stop(process):
    """End a process that may still run, and all that it started."""
    import psutil

    if process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        for each in (process, *family):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


def _last_written(folder):
    """When anything in a folder was last changed, in seconds since 1970."""
    return max(path.stat().st_mtime for path in folder.rglob("*"))


def _text_of(log):
    return log.read_text(encoding="utf-8", errors="replace")


def _check(folder, args, lora, quantization, backend, processes):
    if folder.exists():
        raise ValueError(f"folder={str(folder)!r} exists; choose a new one or remove it")
    for name, value, choices in (
        ("backend", backend, BACKENDS),
        ("quantization", quantization, (None, "int8", "fp4", "nf4")),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}, not {value!r}")
    if isinstance(processes, bool) or not isinstance(processes, int) or processes < 1:
        raise ValueError(f"processes must be a whole number of at least 1, not {processes!r}")
    if backend == "single" and processes > 1:
        raise ValueError(f"backend='single' is one process, not {processes}; use 'ddp' or 'fsdp2'")
    batch = args.per_device_train_batch_size
    if batch % processes:
        raise ValueError(
            f"processes={processes} cannot share a batch of {batch} rows equally; choose "
            "a per_device_train_batch_size that divides"
        )
    if quantization and lora is None:
        raise ValueError(
            f"quantization={quantization!r} needs lora: a quantized model cannot be "
            "trained by itself"
        )
    if quantization and args.fp16 and not args.use_cpu:
        raise ValueError(
            f"quantization={quantization!r} with fp16=True: `trl sft` makes the adapters "
            "bfloat16, which fp16's gradient scaler does not take. Use bf16=True on a card "
            "that has it, leave out the quantization, or train with LeanSFTTrainer"
        )


def _arguments(args):
    """The fields of an SFTConfig that differ from its defaults."""
    from transformers.trainer_pt_utils import AcceleratorConfig

    found = {}
    for name, value in _changed(args):
        if name in LEFT_OUT or value in ([], {}) or value == AcceleratorConfig():
            continue
        if not isinstance(value, str | int | float | bool | None | list | dict):
            raise ValueError(f"args.{name}={value!r} cannot be written into a file")
        found[name] = value
    return found


def _changed(config):
    """(name, value) of the fields of a dataclass that differ from their defaults."""
    for field in dataclasses.fields(config):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        value = getattr(config, field.name)
        value = value.value if isinstance(value, Enum) else value
        default = default.value if isinstance(default, Enum) else default
        if field.init and value != default:
            yield field.name, value


def _adapter(lora):
    if lora is None:
        return {}
    chosen = {
        "use_peft": True,
        "lora_r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "lora_target_modules": _targets(lora.target_modules),
        "lora_modules_to_save": lora.modules_to_save and list(lora.modules_to_save),
    }
    said = NOTES | set(chosen) | {name.removeprefix("lora_") for name in chosen}
    unsaid = [f"{name}={value!r}" for name, value in _changed(lora) if name not in said]
    if unsaid:
        raise ValueError(
            f"lora has {', '.join(unsaid)}, which `trl sft` has no setting for: the recipe "
            "would train another model. Leave it out, or train with a script of your own"
        )
    return {name: value for name, value in chosen.items() if value is not None}


def _targets(modules):
    if modules is None or isinstance(modules, str):
        return modules and [modules]
    # TRL takes a list of one for a pattern that must match a module's whole name.
    alone = [rf"(.*\.)?{re.escape(name)}" for name in modules]
    return alone if len(alone) == 1 else sorted(modules)


def _quantization(quantization, dtype, backend):
    if quantization is None:
        return {}
    if quantization == "int8":
        return {"load_in_8bit": True}
    chosen = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quantization,
        "use_bnb_nested_quant": True,
    }
    if backend == "fsdp2":  # shards are cut from tensors of one type
        chosen["bnb_4bit_quant_storage"] = str(dtype).removeprefix("torch.")
    return chosen


def _accelerate(backend, processes, args):
    kinds = {"single": "NO", "fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}
    kinds["ddp"] = "MULTI_CPU" if args.use_cpu else "MULTI_GPU"
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": kinds[backend],
        "num_machines": 1,
        "num_processes": processes,
        "machine_rank": 0,
        "mixed_precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "no",
        "use_cpu": bool(args.use_cpu),
    }
    if backend == "fsdp2":
        config["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": True,
            "fsdp_state_dict_type": "FULL_STATE_DICT",
            "fsdp_cpu_ram_efficient_loading": False,
            "fsdp_activation_checkpointing": False,
        }
    if backend == "deepspeed":
        config["deepspeed_config"] = {
            "zero_stage": 2,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "offload_optimizer_device": "none",
            "offload_param_device": "none",
            "zero3_init_flag": False,
        }
    return config


def _recipe(folder, backend, processes):
    recipe = str(folder / "recipe.yaml")
    # By module: where scripts like `trl` lie differs, and on Colab not beside Python.
    train = ["-m", "trl.scripts.sft", "--config", recipe]
    if backend == "single":
        return Recipe(folder, ["python", *train])
    launch = ["-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(folder / "accelerate.yaml")]
    note = "DeepSpeed has not been run by this course." if backend == "deepspeed" else ""
    return Recipe(folder, ["python", *launch, *train], note)


def _write(path, content):
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
