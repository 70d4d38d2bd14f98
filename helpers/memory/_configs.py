"""The configs the predictor knows without a network, and how to find others (Chapter 5)."""

from __future__ import annotations

import copy
import difflib
import functools
import json
import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import models

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PretrainedConfig

EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # where the embedded model comes from


@functools.cache
def _entries() -> dict[str, dict[str, Any]]:
    text = resources.files("helpers.memory").joinpath("catalog.json").read_text("utf-8")
    return json.loads(text)


def catalog() -> pd.DataFrame:
    """The models whose configs ship with the course: layers, width, and the numbers' source.

    Example:
        >>> int(catalog().layers["meta-llama/Llama-3.1-8B"])
        32
    """
    import pandas as pd

    rows = {}
    for name, entry in _entries().items():
        c = load_config(name)
        shape = c.num_hidden_layers, c.hidden_size, c.vocab_size
        rows[name] = c.model_type, *shape, entry["source"]
    columns = ["type", "layers", "width", "vocabulary", "source"]
    return pd.DataFrame.from_dict(rows, "index", columns=columns).rename_axis("model")


def load_config(model: Any) -> PretrainedConfig:
    """A transformers config, without a network where the catalog has it (Chapter 5).

    Args:
        model: a config, a model, a dict, a name of `catalog()`, a path, or a Hub id.

    Raises:
        ValueError: no such config here or on the Hub; the nearest known names are told.
        TypeError: another type.

    Example:
        >>> load_config("Llama-3.1-8B").hidden_size
        4096
    """
    from transformers import AutoConfig, PretrainedConfig

    for config in (model, getattr(model, "config", None)):
        if isinstance(config, PretrainedConfig):
            return config
    if isinstance(model, dict):
        return _described("a dict", model)
    if not isinstance(model, str | Path):
        kind = type(model).__name__
        raise TypeError(f"model must be a config, a name, a path or a Hub id, not {kind}")
    if model in models.CATALOG:  # the course's short names
        model = models.CATALOG[model][0] or EMBEDDED_ID
    names = {name.split("/")[-1].lower(): name for name in _entries()}
    wanted = str(model).lower()
    found = names.get(wanted) or next((n for n in names.values() if n.lower() == wanted), None)
    if found:
        return AutoConfig.for_model(**copy.deepcopy(_entries()[found]["config"]))
    path = Path(model)
    if path.suffix == ".json" and path.is_file():
        try:
            return _described(repr(str(model)), json.loads(path.read_text("utf-8-sig")))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"model={str(model)!r} is no JSON ({error})") from error
    try:
        local = not _hub_answers(str(model))
        return AutoConfig.from_pretrained(model, local_files_only=local, trust_remote_code=False)
    except Exception as error:
        if (path / "config.json").is_file() or not isinstance(error, OSError):
            raise _unreadable(repr(str(model)), error) from error
        raise ValueError(
            f"model={str(model)!r} is not in the catalog, and no config was found at that path "
            f"or on the Hub; known names like it: {', '.join(_like(wanted, names))} "
            "(memory.catalog() lists all)"
        ) from error


def _described(origin: str, entries: Any) -> PretrainedConfig:
    """The config that a config.json describes."""
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = entries.get("model_type") if isinstance(entries, dict) else None
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(
            f"model={origin} has model_type={kind!r}, which the installed transformers does not "
            "know; a causal language model's config.json works"
        )
    try:
        return AutoConfig.for_model(**copy.deepcopy(entries))
    except Exception as error:
        raise _unreadable(origin, error) from error


def _unreadable(origin: str, error: Exception) -> ValueError:
    return ValueError(f"model={origin}: transformers makes no config of it ({told(error)})")


def told(error: Exception) -> str:
    """An error of a library in one line: its type, and how its message begins."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _like(wanted: str, names: dict[str, str]) -> list[str]:
    """The catalog's names with most words (and sizes) of a name, then most of its letters."""

    def likeness(name: str) -> tuple[int, float]:
        mine, theirs = (set(re.findall(r"[a-z]+|\d[\d.]*[bmk]?", n)) for n in (wanted, name))
        return len(mine & theirs), difflib.SequenceMatcher(None, wanted, name).ratio()

    wanted = wanted.split("/")[-1]
    return [names[name] for name in sorted(names, key=likeness, reverse=True)[:3]]


def _hub_answers(name: str) -> bool:
    """Whether asking makes sense: a Hub id has a slash, a dead network costs half a minute."""
    from helpers import runtime

    return "/" in name and not runtime.detect().offline


# ------------------------------------------------------------------ what a trace may assume
class CannotPredictError(ValueError):
    """A model or a run of which there is no honest number; the message says why."""


_EXPERTS = {"num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"}
_RECURRENT = {"linear_attention", "mamba", "conv", "state_size", "mamba_d_state"}


def language_model(model: Any, quantization: str | None = None) -> tuple[Any, str]:
    """(Config of the dense causal language model in a model, its name for a report).

    Of a model with other parts (Gemma 3's eyes), the text part; the name says so. Raises
    CannotPredictError for what cannot be modelled honestly: better no number than a wrong one.
    """
    config = load_config(model)
    kind = config.model_type or type(config).__name__
    name = model if isinstance(model, str) else str(config.name_or_path or kind)
    text, whole = config, ""
    if not config.is_encoder_decoder:
        text = config.get_text_config(decoder=True)
    if text is not config:
        whole, kind = f", the text part of {kind!r}", text.model_type
        name += ", only its text part counted"
    try:
        reason = _unlike(text, kind)
    except RuntimeError as error:  # attributes that differ from layer to layer
        reason = told(error)
    if reason:
        raise CannotPredictError(
            f"model: cannot predict {kind!r}{whole}: {reason}. Dense causal models work: Llama, "
            "Mistral, Phi, Qwen, Gemma, OPT, Falcon, GPT-2, SmolLM and their kin."
        )
    stored: Any = getattr(config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(stored.get("quant_method", "")).split(".")[-1].lower().replace("_", "")
    if stored and ("bitsandbytes" not in method or quantization is None):
        raise CannotPredictError(
            f"model: the weights of {name!r} are stored quantized ({method or 'some way'}); pass "
            "the model they were made from, with quantization='nf4', 'fp4' or 'int8' and lora"
        )
    return text, name


def _unlike(config: Any, kind: str) -> str:
    """Why a config is none of a dense causal language model; empty where it is one."""
    from transformers import AutoModelForCausalLM

    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder; only decoder-only language models are traced"
    if type(config) not in AutoModelForCausalLM._model_mapping:
        return "transformers has no causal language model for it"
    nested = [config.to_dict(), *(v for v in config.to_dict().values() if isinstance(v, dict))]
    counts = [part.get(name) for part in nested for name in _EXPERTS]
    if any(isinstance(count, int | list) and count not in (0, 1) for count in counts):
        return "it is a mixture of experts, whose buffers depend on where tokens are routed"
    made = AutoModelForCausalLM._model_mapping[type(config)]
    layers = {*(getattr(config, "layer_types", None) or ()), *vars(config)}
    if getattr(made, "_is_stateful", False) or _RECURRENT & layers:
        return "its recurrent layers run CUDA kernels that have no CPU twin to trace"
    if hasattr(config, "type_vocab_size") and getattr(config, "is_decoder", None) is False:
        return "it is an encoder, of BERT's kind"
    shape = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    absent = [name for name in shape if not isinstance(getattr(config, name, None), int)]
    return f"its config has no {' and no '.join(absent)}" if absent else ""


_OF_SOME_LAYERS = (
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "layer_replication",
)  # fmt: skip
_BY_NAME = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")


def irregular(config: Any, lora: Any) -> bool:
    """Whether layers may differ, so that only a full trace is honest."""
    lora, layers = getattr(lora, "value", lora), config.num_hidden_layers
    lists = (v for v in config.to_dict().values() if isinstance(v, list | tuple))
    if config.is_heterogeneous or any(getattr(lora, name, None) for name in _OF_SOME_LAYERS):
        return True
    for name in _BY_NAME:  # a pattern, or a name with a layer's number, may mean one layer
        given = getattr(lora, name, None) or ()
        if isinstance(given, str) and given != "all-linear":
            return True
        if any(re.search(r"(^|\.)\d+(\.|$)", str(one)) for one in given):
            return True
    return any(len(values) == layers and len(set(map(str, values))) > 1 for values in lists)


def positions(config: Any) -> int | None:
    """How many positions a config declares; None: no end (ALiBi), as in Bloom."""
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


def config_with(config: Any, layers: int) -> Any:
    """A copy with another number of decoder layers; lists of one entry per layer follow."""
    config, old = copy.deepcopy(config), config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == old:
            setattr(config, name, [value[i % old] for i in range(layers)])
    config.num_hidden_layers = layers
    return config
