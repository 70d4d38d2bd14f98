"""The configs the predictor knows without a network, and how to find others (Chapter 5)."""

import copy
import functools
import json
from importlib import resources
from pathlib import Path

from helpers import models

EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # where the embedded model comes from


@functools.cache
def _catalog():
    text = resources.files("helpers.memory").joinpath("catalog.json").read_text("utf-8")
    return json.loads(text)


def catalogue():
    """The models whose configs ship with the course, as a table.

    Name, layers, width, where the numbers are from.
    """
    import pandas as pd

    rows = []
    for name, entry in _catalog().items():
        config = load_config(name)
        shape = (config.num_hidden_layers, config.hidden_size, config.vocab_size)
        rows.append((name, config.model_type, *shape, entry["source"]))
    columns = ["model", "type", "layers", "width", "vocabulary", "source"]
    return pd.DataFrame(rows, columns=columns).set_index("model")


def load_config(model):
    """A transformers config from a config, a dict, a catalogue name, a path, or a Hub id.

    Raises ValueError when the name is none of these, or the Hub cannot be reached, with the
    nearest known names.
    """
    from transformers import AutoConfig, PretrainedConfig

    if isinstance(model, PretrainedConfig):
        return model
    if hasattr(model, "config") and isinstance(model.config, PretrainedConfig):
        return model.config
    if isinstance(model, dict):
        return AutoConfig.for_model(**model)
    if not isinstance(model, str | Path):
        raise TypeError(
            f"model must be a config, a name, a path or a Hub id, not {type(model).__name__}"
        )
    if model in models.CATALOG:  # the course's short names
        model = models.CATALOG[model][0] or EMBEDDED_ID
    wanted = str(model).lower()
    for name, entry in _catalog().items():
        if wanted in (name.lower(), name.split("/")[-1].lower()):
            return AutoConfig.for_model(**copy.deepcopy(entry["config"]))
    path = Path(model)
    if path.suffix == ".json" and path.is_file():
        return AutoConfig.for_model(**json.loads(path.read_text("utf-8")))
    try:
        return AutoConfig.from_pretrained(model, local_files_only=not _hub_answers(model))
    except (OSError, ValueError) as error:
        import difflib

        names = {name.split("/")[-1].lower(): name for name in _catalog()}
        close = difflib.get_close_matches(wanted.split("/")[-1], names, 3, 0.3)
        hint = ", ".join(names[name] for name in close) or ", ".join(list(_catalog())[:6])
        raise ValueError(
            f"model={str(model)!r} is not in the catalogue, and no config was found at "
            "that path or on the Hub; "
            f"known names like it: {hint} (memory.catalogue() lists all)"
        ) from error


def _hub_answers(name):
    """Whether asking the Hub makes sense.

    A Hub id has a slash, and a dead network costs half a minute.
    """
    from helpers import runtime

    return "/" in str(name) and not runtime.detect().offline
