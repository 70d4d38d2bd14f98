"""What an attribute, a call or an index of a known thing gives.

A thing is a module, class or function of the libraries, an `Instance`, a `Method`; UNKNOWN
where that cannot be told, FOREIGN where it comes from a library that is not followed.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import textwrap
import types
import typing
import warnings
from dataclasses import dataclass
from typing import Any

from helpers.course.check._examples import Instance, example, instance, usual

# Whose objects are looked at. Importing them runs nothing of the code that is read.
LIBRARIES = (
    *("transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate"),
    *("huggingface_hub", "torch", "numpy", "pandas", "helpers"),
)
UNKNOWN = None


def is_module(thing: Any) -> bool:
    import torch

    return isinstance(thing, Instance) and issubclass(thing.kind, torch.nn.Module)


def usual_datasets() -> Instance:
    """What `train_test_split` and `load_dataset` without a split give."""
    return instance(type(example("datasets")))


# Names that have gone, and what has their calls now: the rest of a call is looked at, too.
SUCCESSORS = {
    "prepare_model_for_int8_training": "peft.prepare_model_for_kbit_training",
    "AutoModelWithLMHead": "transformers.AutoModelForCausalLM",
    "LLaMATokenizer": "transformers.LlamaTokenizer",
    "LLaMAForCausalLM": "transformers.LlamaForCausalLM",
    "AdamW": "torch.optim.AdamW",
    "ORPOConfig": "trl.experimental.orpo.ORPOConfig",
    "ORPOTrainer": "trl.experimental.orpo.ORPOTrainer",
    "CPOConfig": "trl.experimental.cpo.CPOConfig",
    "CPOTrainer": "trl.experimental.cpo.CPOTrainer",
}


def successor(name: str) -> Any:
    """What a name that has gone became, or FOREIGN."""
    if name not in SUCCESSORS:
        return FOREIGN
    module, _, last = SUCCESSORS[name].rpartition(".")
    with warnings.catch_warnings():  # "experimental": that is not the reader's doing
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(module), last)


def public(name: str) -> Any:
    """What a name that is nowhere bound means where a cell stands by itself."""
    if not re.match(r"[A-Z]\w+[a-z]|get_peft_model$|load_dataset$|pipeline$|prepare_model_", name):
        return UNKNOWN
    for module in ("transformers", "trl", "peft", "datasets"):
        home = importlib.import_module(module)
        if name in dir(home):
            return getattr(home, name)
    return UNKNOWN


FOREIGN = object()  # stands for what comes from a library that is not followed


@dataclass(frozen=True)
class Parameter:
    """An argument of a function that the code defines."""

    name: str


@dataclass(frozen=True, eq=False)
class Derived:
    """A class that the code derives from a library's."""

    node: ast.ClassDef
    base: type


@dataclass(frozen=True)
class Method:
    """A method looked up on an object or a class that is known."""

    owner: Any  # an Instance or a class
    name: str
    function: Any


def attribute(owner: Any, name: str) -> Any:
    """What `owner.name` stands for; UNKNOWN, too, where there is no such thing."""
    if owner is None or owner is FOREIGN or isinstance(owner, Derived):
        return UNKNOWN
    if isinstance(owner, Method):
        return UNKNOWN
    if isinstance(owner, Instance):
        found = getattr(owner.kind, name, None)
        if found is None and owner.example is not None:
            found = getattr(owner.example, name, None)
            found = getattr(found, "__func__", None)
        if inspect.isroutine(found):
            return Method(owner, name, found)
        if isinstance(found, property):
            return returned(found.fget)
        return _grown(owner, name)
    try:
        found = getattr(owner, name)
    except Exception:  # a lazy module may fail in any way; `missing` says it elsewhere
        return UNKNOWN
    if inspect.isclass(owner) and inspect.isroutine(found):
        return Method(owner, name, found)
    return found


def _grown(owner: Instance, name: str) -> Any:
    """The few attributes of trainers that everybody uses."""
    from transformers import Trainer

    if issubclass(owner.kind, Trainer):
        if name in ("model", "model_wrapped"):
            return usual("model")
        if name in ("train_dataset", "eval_dataset"):
            return usual("dataset")
        if name == "processing_class":
            return usual("tokenizer")
    return UNKNOWN


def item(owner: Any) -> Any:
    from datasets import DatasetDict

    if isinstance(owner, Instance) and issubclass(owner.kind, DatasetDict):
        return usual("dataset")
    return UNKNOWN


def known(thing: Any) -> bool:
    """Whether a thing comes from a library that is followed."""
    if thing is None or thing is FOREIGN:
        return False
    if isinstance(thing, Instance):
        thing = thing.kind
    if isinstance(thing, Method):
        thing = thing.function
    thing = getattr(thing, "__func__", thing)
    home = getattr(thing, "__module__", None) or getattr(thing, "__name__", None) or ""
    return isinstance(home, str) and home.split(".")[0] in LIBRARIES


def result(target: Any, words: set[str | None]) -> Any:
    """What calling a thing gives. words: the keywords of the call."""
    if inspect.isclass(target):
        if not known(target) or "Dummy" in type(target).__name__:
            return UNKNOWN
        return instance(target)
    if isinstance(target, Method):
        owner = target.owner if inspect.isclass(target.owner) else None
        if owner and target.name in ("from_pretrained", "from_config", "from_checkpoint"):
            return loaded(owner)
        found = returned(target.function)
        if found == "self":
            if isinstance(target.owner, Instance):
                return target.owner
            return instance(target.owner)
        return found
    if not known(target):
        return UNKNOWN
    if getattr(target, "__name__", "") == "load_dataset":
        streamed = "streaming" in words
        return UNKNOWN if streamed else usual("dataset") if "split" in words else usual_datasets()
    name = getattr(target, "__name__", "")
    if name in ("get_peft_model", "get_peft_model_with_adapters"):
        return instance(type(example("adapted")))
    if name in ("prepare_model_for_kbit_training", "prepare_model_for_int8_training"):
        return usual("model")
    if name == "concatenate_datasets":
        return usual("dataset")
    found = returned(target)
    return UNKNOWN if found == "self" else found


def loaded(owner: type) -> Any:
    """What `from_pretrained` of a class gives."""
    import peft
    import transformers

    name = owner.__name__
    if name.startswith("AutoPeftModel") or issubclass(owner, peft.PeftModel):
        return instance(type(example("adapted")))
    if name == "AutoTokenizer":
        return instance(type(example("tokenizer")))
    if name == "AutoModelForCausalLM":
        return instance(type(example("model")))
    if name.startswith("AutoModel"):
        return Instance(transformers.PreTrainedModel, example("model"))
    if name.startswith("Auto") or issubclass(owner, transformers.PreTrainedConfig):
        return UNKNOWN
    return instance(owner) if known(owner) else UNKNOWN


@functools.cache
def returned(function: Any) -> Any:
    """The class that a function's annotation promises: an Instance, 'self' or UNKNOWN."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    note = getattr(function, "__annotations__", {}).get("return")
    if isinstance(note, str):
        spelled = note.strip("\"'")
        if spelled == "Self":
            return "self"
        if not re.fullmatch(r"[\w.]+", spelled):
            return UNKNOWN
        space = getattr(function, "__globals__", {})
        note = space.get(spelled.split(".")[0])
        for part in spelled.split(".")[1:]:
            note = getattr(note, part, None)
    if note is typing.Self or isinstance(note, typing.TypeVar):
        return "self"
    if isinstance(note, type) and not isinstance(note, types.GenericAlias) and known(note):
        return instance(note)
    return UNKNOWN


def source_of(function: Any) -> str:
    """The source of a function, without its indentation; '' where there is none."""
    try:
        found = inspect.getsource(inspect.unwrap(getattr(function, "__func__", function)))
    except (OSError, TypeError):
        return ""
    return textwrap.dedent(found)
