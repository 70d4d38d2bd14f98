"""What a folder must hold before llama.cpp's converters see it (Chapter 6).

They end a file that is missing, broken or of another kind with a traceback, and some
adapters they convert into something else without a word: here it is said first.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

MERGE = (
    "Merge it instead: load the base in float32 or 16 bits, `PeftModel.from_pretrained`, "
    "`merge_and_unload()`, save, `gguf.convert_model`"
)
TIED = (
    "LoRA on one of the two, or on both, cannot be converted, nor merged: they are one matrix, "
    "and each would change with the other. Train them with `trainable_token_indices`, or with "
    "`modules_to_save` and `ensure_weight_tying=True`; those can be merged"
)
# Settings of LoRA that need nothing beyond a low-rank pair of weights. Any other that is on,
# of a later PEFT too, is refused by its name.
PLAIN = (
    *("alora_invocation_tokens", "auto_mapping", "base_model_name_or_path", "bias"),
    *("corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out"),
    *("inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform"),
    *("loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config"),
    *("megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version"),
    *("qalora_group_size", "r", "rank_pattern", "revision", "target_modules", "task_type"),
    *("trainable_token_indices", "velora_config"),
)
WHY = {
    "alpha_pattern": "llama.cpp knows one alpha for all layers",
    "use_dora": "DoRA's magnitudes are unknown to llama.cpp",
    "use_rslora": "the converter would scale by alpha/r instead of alpha/sqrt(r)",
}
# Beginnings that leave the base as it is; the others take what they begin with out of it.
HARMLESS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")


def find(name: str, value: str | Path, needed: str) -> Path:
    """The folder `value`, with the file `needed` in it; `name` is the argument's."""
    folder = Path(value)
    if not (folder / needed).is_file():
        what = "has no" if folder.is_dir() else "is not a folder; wanted is one with"
        raise ValueError(f"{name}={str(value)!r} {what} {needed}")
    return folder


def read(path: Path) -> Any:
    """A JSON file of a folder."""
    _refuse_pointer(path)
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} is no JSON ({error}): save or download the folder again"
        ) from None


def check_model(folder: Path) -> None:
    """ValueError, with the cure, for a model's folder that cannot become GGUF."""
    where = f"folder={str(folder)!r}"
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{where} holds an adapter: use `convert_adapter`, or merge it "
            "(`model.merge_and_unload()`), save the whole model and convert that"
        )
    config = read(folder / "config.json")
    for name in ("tokenizer_config.json", "generation_config.json"):
        if (folder / name).is_file():
            read(folder / name)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((folder / name).is_file() for name in names):
        raise ValueError(
            f"{where} has no tokenizer ({', '.join(names)}), and a GGUF file carries it: call "
            "`tokenizer.save_pretrained(folder)` first"
        )
    if config.get("quantization_config"):
        raise ValueError(
            f"{where} holds a quantized model: load the base in float32 or 16 bits, merge the "
            "adapter into that, and save it again"
        )
    if not config.get("architectures"):
        raise ValueError(
            f'{where}: its config.json has no "architectures", by which a converter is '
            "chosen: `model.save_pretrained(folder)` writes it, such as "
            '["LlamaForCausalLM"]'
        )
    _check_weights(folder, where)
    _check_tokens(folder, where, config)


def _check_weights(folder: Path, where: str) -> None:
    index = folder / "model.safetensors.index.json"
    names = {path.name for path in folder.glob("*.safetensors")}
    names |= set(read(index)["weight_map"].values()) if index.is_file() else set()
    others = [*folder.glob("pytorch_model*.bin"), *folder.glob("*.pth")]
    for path in [*(folder / name for name in sorted(names)), *others]:
        weights(path)
    if not names and not others:
        raise ValueError(f"{where} has no weights: call `model.save_pretrained(folder)`")


def weights(path: Path) -> dict[str, list[int]]:
    """The shapes in a safetensors file; ValueError for one that is not whole."""
    from safetensors import SafetensorError, safe_open

    find("folder", path.parent, path.name)
    _refuse_pointer(path)
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} is cut short or damaged ({error}): save or download it again"
        ) from None


def _check_tokens(folder: Path, where: str, config: dict[str, Any]) -> None:
    rows = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    # Beside a tokenizer.model the converter passes over ids without a row (Gemma 3's).
    if not rows or (folder / "tokenizer.model").is_file():
        return
    if not (folder / "tokenizer.json").is_file():
        return
    content = read(folder / "tokenizer.json")
    vocabulary, added = content["model"]["vocab"], content.get("added_tokens") or []
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    count = 1 + max([*ids, *(token["id"] for token in added)], default=-1)
    if count > rows:
        raise ValueError(
            f"{where}: its tokenizer has {count:,} tokens and the model {rows:,} rows for them: "
            "`chat.prepare_model(model, tokenizer)` adds the rows (before training, or they "
            "stay untrained); then save both again"
        )


def check_adapter(adapter: Path, base: Path) -> None:
    """ValueError for an adapter that llama.cpp would not apply as PEFT does."""
    where = f"adapter={str(adapter)!r}"
    config = read(adapter / "adapter_config.json")
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise ValueError(f"{where} is of the type {kind}, and llama.cpp knows LoRA only. {MERGE}")
    start = str(config.get("init_lora_weights", True))
    if start.lower() not in HARMLESS:
        raise ValueError(
            f"{where} has init_lora_weights={start!r}, which changed the base's weights, so it "
            "does not fit the base's GGUF. Save it once more as a plain one, with "
            "`save_pretrained(…, path_initial_model_for_weight_conversion=…)`; or: " + MERGE
        )
    for name in sorted(config.keys() - set(PLAIN)):
        if config[name]:
            why = WHY.get(name, "llama.cpp knows low-rank pairs of weights and nothing else")
            raise ValueError(f"{where} has {name}: {why}. {MERGE}")
    _check_pairs(weights(adapter / "adapter_model.safetensors"), where, base, config)


def _check_pairs(
    shapes: dict[str, list[int]], where: str, base: Path, config: dict[str, Any]
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    read(base / "config.json")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(base, local_files_only=True)
        )
    layers = dict(model.named_modules())
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    tied = model.config.get_text_config().tie_word_embeddings
    for name in shapes:
        found = re.match(r"base_model\.model\.(.+)\.lora_", name)
        if tied and found and any(layers.get(found[1]) is end for end in ends):
            raise ValueError(f"{where} holds {name}, and the base's head is its embedding. {TIED}")
    for name, shape in shapes.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        if not match:
            raise ValueError(
                f"{where} holds {name}, which is no low-rank pair: llama.cpp cannot apply "
                "embeddings, heads, norms and `modules_to_save` (norms it would drop without a "
                f"word). {MERGE}"
            )
        side, axis = ("in_features", 1) if match[2] == "A" else ("out_features", 0)
        expected = getattr(layers.get(match[1]), side, "no")
        if expected != shape[axis]:
            raise ValueError(
                f"{where} was trained on another model than base={str(base)!r}: {match[1]} has "
                f"{expected} features there, and the adapter wants {shape}"
            )


def _refuse_pointer(path: Path) -> None:
    with open(path, "rb") as file:
        if file.read(23) == b"version https://git-lfs":
            raise ValueError(
                f"{str(path)!r} is a Git LFS pointer, not the file itself: run `git lfs pull` in "
                "its folder, or fetch the model with `huggingface_hub.snapshot_download`"
            )
