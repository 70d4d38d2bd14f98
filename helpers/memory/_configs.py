"""The configs the predictor knows without a network, and how to find others (Chapter 5)."""

from __future__ import annotations

import copy
import difflib
import functools
import json
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
        return AutoConfig.for_model(**model)
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
        return AutoConfig.for_model(**json.loads(path.read_text("utf-8")))
    try:
        return AutoConfig.from_pretrained(model, local_files_only=not _hub_answers(str(model)))
    except (OSError, ValueError) as error:
        close = difflib.get_close_matches(wanted.split("/")[-1], names, 3, 0.3)
        raise ValueError(
            f"model={str(model)!r} is not in the catalog, and no config was found at that path "
            f"or on the Hub; known names like it: "
            f"{', '.join(names[name] for name in close or list(names)[:6])} "
            "(memory.catalog() lists all)"
        ) from error


def _hub_answers(name: str) -> bool:
    """Whether asking makes sense: a Hub id has a slash, a dead network costs half a minute."""
    from helpers import runtime

    return "/" in name and not runtime.detect().offline


# ------------------------------------------------------------------ what a trace may assume
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_RECURRENT = {"linear_attention", "mamba", "conv", "state_size", "mamba_d_state"}


def refuse(config: Any) -> None:
    """Raise ValueError for what cannot be modelled honestly: better no number than a wrong one."""
    from transformers import AutoModelForCausalLM

    has = functools.partial(getattr, config)
    kind = has("model_type", type(config).__name__)
    if has("is_encoder_decoder", False):
        reason = "it is an encoder-decoder; only decoder-only language models are traced"
    elif type(config) not in AutoModelForCausalLM._model_mapping:
        reason = "transformers has no causal language model for it"
    elif any((has(name, None) or 0) > 1 for name in _EXPERTS):
        reason = "it is a mixture of experts, whose buffers depend on where tokens are routed"
    elif _RECURRENT & {*(has("layer_types", None) or ()), *vars(config)}:
        reason = "its recurrent layers run CUDA kernels that have no CPU twin to trace"
    elif kind in ("bert", "roberta", "electra") and not has("is_decoder", False):
        reason = "it is an encoder"
    else:
        return
    raise ValueError(
        f"model: cannot predict {kind!r}: {reason}. Dense causal models work: Llama, Mistral, "
        "Phi, Qwen, Gemma, OPT, Falcon, GPT-2, SmolLM and their kin."
    )


_OF_SOME_LAYERS = (
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "layer_replication",
)  # fmt: skip


def irregular(config: Any, lora: Any) -> bool:
    """Whether layers may differ, so that only a full trace is honest."""
    lora, layers = getattr(lora, "value", lora), config.num_hidden_layers
    lists = (v for v in config.to_dict().values() if isinstance(v, list | tuple))
    return any(getattr(lora, name, None) for name in _OF_SOME_LAYERS) or any(
        len(values) == layers and len(set(map(str, values))) > 1 for values in lists
    )


def config_with(config: Any, layers: int) -> Any:
    """A copy with another number of decoder layers; lists of one entry per layer follow."""
    config, old = copy.deepcopy(config), config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == old:
            setattr(config, name, [value[i % old] for i in range(layers)])
    config.num_hidden_layers = layers
    return config
