"""Hand a notebook's recipe to `trl sft` and `accelerate launch` (Chapter 5).

A notebook is for finding a recipe; several GPUs want a script and a file. TRL has the
script. This writes the files, from the very objects the notebook trained with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from helpers._checks import one_of, whole_number
from helpers._files import atomic_path
from helpers._report import Shown, shorten
from helpers.training._running import check_cards

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

__all__ = ["Recipe", "export_recipe"]

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

    Raises:
        ValueError: for choices that contradict each other, settings that the files cannot
            say, and more processes than this machine has GPUs (for another machine, write
            with CUDA_VISIBLE_DEVICES="").
        TypeError: for arguments of another type, such as a loaded model or a DPOConfig.

    Example:
        >>> export_recipe(
        ...     "recipe", model="facebook/opt-350m", args=SFTConfig("out", max_steps=9),
        ...     dataset=rows, lora=LoraConfig(), backend="fsdp2", processes=2,
        ... )  # doctest: +SKIP
        recipe: accelerate.yaml, recipe.yaml, train.jsonl
        python -m accelerate.commands.launch --config_file recipe/accelerate.yaml -m ...
    """
    folder, dtype = Path(folder), str(dtype).removeprefix("torch.")
    _check_types(model, args, dataset, lora)
    _check(folder, args, lora, quantization, backend, processes)
    one_of("dtype", dtype, ["float32", "bfloat16", "float16"] + ["auto"] * (quantization is None))
    recipe = {
        "model_name_or_path": str(model),
        "dtype": dtype,
        "datasets": [{"path": "json", "data_files": str(folder / "train.jsonl")}],
        "output_dir": str(folder / "trained"),
        "per_device_train_batch_size": args.per_device_train_batch_size // processes,
    }
    files = {}
    if tokenizer is not None:
        _check_tokens(model, tokenizer)
        recipe |= {"eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token}
        if tokenizer.chat_template:
            files["chat_template.jinja"] = tokenizer.get_chat_template()
            recipe["chat_template_path"] = str(folder / "chat_template.jinja")
    # What args say of tokens and template goes over the tokenizer's, as in SFTTrainer.
    recipe |= _arguments(args) | (_adapter(lora) if lora else {})
    if quantization:
        recipe |= _WORDS["quantization"][quantization]
    if quantization in ("fp4", "nf4") and backend == "fsdp2":  # cuts shards of one type
        recipe["bnb_4bit_quant_storage"] = dtype
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
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(folder / "accelerate.yaml"),
    ]
    if backend == "ddp" and args.use_cpu:  # accelerate would start one process, on half the batch
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    note = "DeepSpeed has not been run by this course." if backend == "deepspeed" else ""
    return Recipe(folder, ["python", *launcher, *train], note)


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
    if args.eval_strategy != "no" or args.eval_on_start:
        raise ValueError(
            f"args.eval_strategy={_plain('', args.eval_strategy)!r} and eval_on_start="
            f"{args.eval_on_start} need held-out rows, and a recipe has those for training only: "
            "use 'no' and False, and judge the trained model afterwards"
        )
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
        check_cards(processes, args.use_cpu, cards)


def _check_types(model: Any, args: Any, dataset: Any, lora: Any) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig

    # Subclasses are refused too: `trl sft` reads no further fields, and says nothing of it.
    for name, value, wanted, said in (
        ("model", model, (str, type(Path())), "a Hub id or a folder"),
        ("args", args, (SFTConfig,), "an SFTConfig"),
        ("dataset", dataset, (Dataset,), "a datasets.Dataset"),
        ("lora", lora, (LoraConfig, type(None)), "a LoraConfig or None"),
    ):
        if type(value) not in wanted:
            raise TypeError(f"{name} must be {said} for `trl sft`, not {type(value).__name__}")


def _check_tokens(model: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse tokens that were added: `trl sft` loads the tokenizer that lies by the model."""
    from huggingface_hub import try_to_load_from_cache

    text = ""
    for name in ("tokenizer.json", "vocab.json", *_WORDS["files that name more tokens"]):
        path: Any = Path(model, name)
        if not Path(model).is_dir() and str(model).count("/") < 2:
            path = try_to_load_from_cache(str(model), name)
        if isinstance(path, str | Path) and Path(path).is_file():
            text += Path(path).read_text(encoding="utf-8")
        elif name == "vocab.json" and not text:
            return  # out of reach, or a vocabulary that is no text
    added = tokenizer.get_added_vocab()
    spelled = {token: {json.dumps(token), json.dumps(token, ensure_ascii=False)} for token in added}
    if unknown := [token for token, ways in spelled.items() if not any(w in text for w in ways)]:
        raise ValueError(
            f"tokenizer has tokens that model={str(model)!r} lacks ({', '.join(unknown)}), and "
            "`trl sft` loads the model's own: save model and tokenizer, after "
            "chat.prepare_model, to a folder, and give that as model"
        )


def _arguments(args: SFTConfig) -> dict[str, Any]:
    """The fields of an SFTConfig that differ from its defaults."""
    from transformers.trainer_pt_utils import AcceleratorConfig

    found = {}
    # Decided by the machine or the folder, of no use in a file, or an old name.
    left_out = _WORDS["arguments left out"]
    for name, value in _changed(args):
        # Of lists SFTConfig notes the default, "" or "none", as an empty one.
        empty = name in _WORDS["arguments that are lists"] and not value
        if name in left_out or empty or value == AcceleratorConfig():
            continue
        found[name] = _plain(f"args.{name}", value)
    if args.push_to_hub and args.hub_model_id is None:  # else it goes by the folder's name
        found["hub_model_id"] = Path(args.output_dir or "trainer_output").absolute().name
    return found


def _plain(name: str, value: Any) -> Any:
    """A value as YAML says it; ValueError by name where it has no words for it."""
    if isinstance(value, list | tuple | set | frozenset):
        value = [x.value if isinstance(x, Enum) else x for x in value]
    value = value.value if isinstance(value, Enum) else value
    try:
        yaml.safe_dump(value)
    except yaml.YAMLError:
        raise ValueError(
            f"{name}={shorten(repr(value))} cannot be written into a file: give plain numbers, "
            "text, lists and dicts of them"
        ) from None
    return value


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
    chosen = {
        theirs: _plain(f"lora.{name}", getattr(lora, name))
        for name, theirs in _WORDS["lora"].items()
    }
    if isinstance(lora.target_modules, str):
        chosen["lora_target_modules"] = [lora.target_modules]
    elif lora.target_modules:
        # TRL takes a list of one for a pattern that must match a module's whole name.
        alone = [rf"(.*\.)?{re.escape(name)}" for name in lora.target_modules]
        chosen["lora_target_modules"] = alone if len(alone) == 1 else sorted(lora.target_modules)
    return {"use_peft": True} | {n: value for n, value in chosen.items() if value is not None}


def _launch(backend: str, processes: int, args: SFTConfig) -> dict[str, Any]:
    config = _WORDS["launch"] | _WORDS["backend"][backend] | {"num_processes": processes}
    config["mixed_precision"] = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    config["use_cpu"] = bool(args.use_cpu)
    if backend == "deepspeed":
        accumulation = {"gradient_accumulation_steps": args.gradient_accumulation_steps}
        config["deepspeed_config"] = config["deepspeed_config"] | accumulation
    return config
