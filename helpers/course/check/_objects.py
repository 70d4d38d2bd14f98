"""What the names in a piece of code stand for: the libraries' own objects, nothing run.

Names are followed through imports and assignments to modules, classes and functions. What
a call gives is read from the return annotation, or told by a short list; whether such a
thing has an attribute is asked of its class, and of a small real example where instances
grow attributes of their own.
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
from importlib.util import find_spec
from typing import Any

# Whose objects are looked at. Importing them runs nothing of the code that is read.
LIBRARIES = (
    *("transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate"),
    *("huggingface_hub", "torch", "numpy", "pandas", "helpers"),
)
SAME = ("eval", "train", "to", "cpu", "cuda", "float", "half", "bfloat16", "requires_grad_")
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


# ── reading code ─────────────────────────────────────────────────────────────────────────
Scope = ast.AST
UNKNOWN = None


@dataclass(frozen=True)
class Missing:
    """An import or an attribute that is not there; `error` is what Python will say."""

    node: ast.AST
    name: str
    error: str


class Program:
    """The names of one source: `value(node)` says what an expression stands for."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        self.missing: list[Missing] = []
        self._names: dict[Scope, dict[str, list[tuple[tuple[int, int], Any]]]] = {}
        self.above: dict[ast.AST, tuple[ast.AST, Scope]] = {}
        self._values: dict[ast.AST, Any] = {}
        self._open: set[ast.AST] = set()
        self._bind(tree, tree)

    # ── who is bound to what, and where ──────────────────────────────────────────────────
    def _bind(self, node: ast.AST, scope: Scope) -> None:
        names = self._names.setdefault(scope, {})

        def bind(name: str, value: Any, at: ast.AST) -> None:
            names.setdefault(name, []).append((_end(at), value))

        for child in ast.iter_child_nodes(node):
            self.above[child] = (node, scope)
            inner = scope
            match child:
                case ast.Import(names=aliases):
                    for alias in aliases:
                        first = alias.name if alias.asname else alias.name.split(".")[0]
                        self.above[alias] = (child, scope)
                        bind(alias.asname or first, self._module(alias, alias.name, first), child)
                case ast.ImportFrom(module=str(module), names=aliases, level=0):
                    for alias in aliases:
                        self.above[alias] = (child, scope)
                        found = self._imported(alias, module, alias.name)
                        bind(alias.asname or alias.name, found, child)
                case ast.ImportFrom(names=aliases):
                    for alias in aliases:
                        bind(alias.asname or alias.name, FOREIGN, child)
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    bind(name, child, child)
                    inner = child
                case ast.Lambda():
                    inner = child
                case ast.ClassDef(name=name):
                    bind(name, child, child)
                    inner = child
                case ast.arg(arg=name):
                    bind(name, Parameter(name), child)
                case ast.Assign(targets=targets, value=value):
                    for target in targets:
                        self._assign(bind, target, value, child)
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    bind(name, value, child)
                case ast.NamedExpr(target=ast.Name(id=name), value=value):
                    bind(name, value, child)
                case ast.With(items=items) | ast.AsyncWith(items=items):
                    for item in items:
                        if isinstance(item.optional_vars, ast.Name):
                            bind(item.optional_vars.id, item.context_expr, item.optional_vars)
                case ast.For(target=target) | ast.comprehension(target=target):
                    for part in ast.walk(target):
                        if isinstance(part, ast.Name):
                            bind(part.id, UNKNOWN, part)
                case ast.AugAssign(target=ast.Name(id=name)):
                    bind(name, UNKNOWN, child)
                case ast.ExceptHandler(name=str(name)):
                    bind(name, UNKNOWN, child)
            self._names.setdefault(inner, {})
            self._bind(child, inner)

    def _assign(self, bind: Any, target: ast.expr, value: ast.expr, at: ast.AST) -> None:
        match target, value:
            case ast.Name(id=name), _:
                bind(name, value, at)
            case ast.Tuple(elts=names), ast.Tuple(elts=values) if len(names) == len(values):
                for one, part in zip(names, values, strict=True):
                    self._assign(bind, one, part, at)
            case ((ast.Tuple(elts=names) | ast.List(elts=names)), _):
                for one in names:
                    if isinstance(one, ast.Name):
                        bind(one.id, UNKNOWN, at)

    def _module(self, node: ast.AST, name: str, wanted: str) -> Any:
        top = name.split(".")[0]
        if top not in LIBRARIES:
            return self._elsewhere(node, name)
        try:
            importlib.import_module(name)
            return importlib.import_module(wanted)
        except Exception as error:  # whatever a library does when its parts are missing
            self._miss(node, name, f"{type(error).__name__}: {error}")
            return FOREIGN

    def _imported(self, node: ast.AST, module: str, name: str) -> Any:
        if module.split(".")[0] not in LIBRARIES:
            return self._elsewhere(node, module)
        try:
            home = importlib.import_module(module)
        except Exception as error:  # as above; said once for all names
            self._miss(self.above[node][0], module, f"{type(error).__name__}: {error}")
            return FOREIGN
        if name == "*":
            return UNKNOWN
        try:
            return getattr(home, name)
        except AttributeError:
            pass
        except Exception as error:  # a lazy module that fails at its part
            self._miss(node, name, f"{type(error).__name__}: {error}")
            return FOREIGN
        try:
            return importlib.import_module(f"{module}.{name}")
        except ImportError:
            self._miss(node, name, f"ImportError: cannot import name '{name}' from '{module}'")
            return FOREIGN

    def _elsewhere(self, node: ast.AST, name: str) -> Any:
        top = name.split(".")[0]
        try:
            there = top in ("__main__",) or find_spec(top) is not None
        except (ImportError, ValueError):
            there = False
        if not there:
            self._miss(node, top, f"ModuleNotFoundError: No module named '{top}'")
        return FOREIGN

    def _miss(self, node: ast.AST, name: str, error: str) -> None:
        if not self.guarded(node):
            self.missing.append(Missing(node, name, error))

    def guarded(self, node: ast.AST) -> bool:
        """Whether the code itself expects this import or name to fail."""
        while node in self.above:
            node, child = self.above[node][0], node
            if isinstance(node, ast.Try) and child in node.body:
                caught = {n.id for h in node.handlers for n in _names(h.type)}
                bare = any(handler.type is None for handler in node.handlers)
                if bare or caught & {"ImportError", "ModuleNotFoundError", "Exception"}:
                    return True
        return False

    # ── what an expression is ────────────────────────────────────────────────────────────
    def scope(self, node: ast.AST) -> Scope:
        """The module, function or class that a node stands in."""
        return self.above[node][1] if node in self.above else self.tree

    def binding(self, name: str, node: ast.AST) -> tuple[Any, bool]:
        """What a name was last bound to before a place; False where it is not bound."""
        use, inner = _start(node), self.scope(node)
        scope = inner
        while True:
            if found := self._names[scope].get(name):
                before = [bound for bound in found if bound[0] <= use]
                if before or scope is not inner:
                    return (before or found)[-1][1], True
            if scope is self.tree:
                return UNKNOWN, False
            scope = self.scope(scope)

    def value(self, node: ast.AST) -> Any:
        """A module, class or function, an `Instance`, a `Method`, or UNKNOWN."""
        if node in self._values:
            return self._values[node]
        if node in self._open:  # x = x.to(...) in a loop
            return UNKNOWN
        self._open.add(node)
        try:
            found = self._value(node)
        finally:
            self._open.discard(node)
        self._values[node] = found
        return found

    def _value(self, node: ast.AST) -> Any:
        match node:
            case ast.Name(id=name):
                bound, there = self.binding(name, node)
                if isinstance(bound, Parameter) or not there:
                    return usual(name) if name in USUAL else UNKNOWN
                if isinstance(bound, ast.ClassDef):
                    return self.derived(bound)
                if isinstance(bound, ast.FunctionDef | ast.AsyncFunctionDef):
                    return UNKNOWN
                return self.value(bound) if isinstance(bound, ast.AST) else bound
            case ast.Attribute(value=value, attr=attr):
                return attribute(self.value(value), attr)
            case ast.Call():
                return self._made(node)
            case ast.Subscript(value=value):
                return _item(self.value(value))
            case ast.IfExp(body=body, orelse=other):
                return self.value(body) or self.value(other)
            case ast.Await(value=value):
                return UNKNOWN
        return UNKNOWN

    def derived(self, node: ast.ClassDef) -> Any:
        """A class of the code's own: the library's class that it is derived from."""
        bases = [self.value(base) for base in node.bases]
        kinds = [base for base in bases if inspect.isclass(base)]
        kinds += [base.base for base in bases if isinstance(base, Derived)]
        return Derived(node, kinds[0]) if kinds and known(kinds[0]) else UNKNOWN

    def _made(self, node: ast.Call) -> Any:
        target = self.value(node.func)
        if isinstance(target, Derived):
            return UNKNOWN  # what its own methods add is not followed
        if isinstance(target, Method):
            if target.name in SAME and _is_module(target.owner):
                return target.owner
            if target.name == "train_test_split":
                return usual_datasets()
        if target is None or target is FOREIGN:
            return UNKNOWN
        return result(target, {word.arg for word in node.keywords})


def _is_module(thing: Any) -> bool:
    import torch

    return isinstance(thing, Instance) and issubclass(thing.kind, torch.nn.Module)


def usual_datasets() -> Instance:
    """What `train_test_split` and `load_dataset` without a split give."""
    return instance(type(example("datasets")))


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


def _item(owner: Any) -> Any:
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


# ── small things ─────────────────────────────────────────────────────────────────────────
def _start(node: ast.AST) -> tuple[int, int]:
    return node.lineno, node.col_offset  # type: ignore[attr-defined]


def _end(node: ast.AST) -> tuple[int, int]:
    return node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]


def _names(node: ast.AST | None) -> list[ast.Name]:
    return [n for n in ast.walk(node) if isinstance(n, ast.Name)] if node else []


def source_of(function: Any) -> str:
    """The source of a function, without its indentation; '' where there is none."""
    try:
        found = inspect.getsource(inspect.unwrap(getattr(function, "__func__", function)))
    except (OSError, TypeError):
        return ""
    return textwrap.dedent(found)
