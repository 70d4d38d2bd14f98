"""Objects of the libraries' own, for asking what they have: classes with a small example.

Whether a thing has an attribute is asked of its class, of what the class sets on itself, and
of a small real example where instances grow attributes of their own.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from dataclasses import dataclass
from typing import Any

# Parameters of functions that everybody names alike.
USUAL = ("model", "tokenizer", "trainer", "dataset")


@dataclass(frozen=True)
class Instance:
    """Some object of a class; `example` is a small real one, where there is one."""

    kind: type
    example: Any = None

    def has(self, name: str) -> bool:
        """Whether such an object has an attribute, as far as can be known."""
        if hasattr(self.kind, name) or hasattr(self.example, name) or name in assigned(self.kind):
            return True
        grows = getattr(self.kind, "__getattr__", None) or getattr(
            self.kind, "__getattribute__", None
        )
        return self.example is None and grows is not object.__getattribute__


@functools.cache
def assigned(kind: type) -> frozenset[str]:
    """The attributes that a class and its bases set on `self`, read from their source."""
    found: set[str] = set()
    for base in kind.__mro__[:-1]:
        found |= set(getattr(base, "__annotations__", ()))
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):  # compiled, or made while running
            continue
        found |= set(re.findall(r"\bself\.(\w+)\s*(?::[^=\n]+)?=[^=]", source))
        found |= set(re.findall(r"\bself\.(\w+)\s*,.*=", source))
        found |= set(re.findall(r"setattr\(self, [\"'](\w+)", source))
    return frozenset(found)


# ── small real examples ──────────────────────────────────────────────────────────────────
@functools.cache
def example(name: str) -> Any:
    """A 'tokenizer', a 'model', an 'adapted' one, a 'dataset' or 'datasets', in a blink."""
    if name == "tokenizer":
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(WordLevel({"<s>": 0, "a": 1}, unk_token="<s>"))
        return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<s>", pad_token="<s>")
    if name in ("dataset", "datasets"):
        import datasets

        rows = datasets.Dataset.from_dict({"text": ["a"]})
        return rows if name == "dataset" else datasets.DatasetDict(train=rows)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
    )
    model = LlamaForCausalLM(config)
    if name == "adapted":
        from peft import LoraConfig, get_peft_model

        with warnings.catch_warnings():  # peft's own old calls are not the reader's
            warnings.simplefilter("ignore")
            return get_peft_model(model, LoraConfig(r=1, task_type="CAUSAL_LM"))
    return model


def instance(kind: type) -> Instance:
    """An object of a class, with an example where its instances grow attributes."""
    from datasets import Dataset, DatasetDict
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    for base, name in (
        (PreTrainedTokenizerBase, "tokenizer"),
        (PeftModel, "adapted"),
        (PreTrainedModel, "model"),
        (DatasetDict, "datasets"),
        (Dataset, "dataset"),
    ):
        if issubclass(kind, base):
            return Instance(kind, example(name))
    return Instance(kind)


def usual(name: str) -> Instance | None:
    """What a parameter called `model`, `tokenizer`, `dataset` or `trainer` holds."""
    if name == "trainer":
        from trl import SFTTrainer

        return Instance(SFTTrainer)
    return instance(type(example(name)))
