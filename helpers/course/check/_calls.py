"""A call against the signature that is installed: what it does not take, and what is old.

Each complaint carries the message that Python will raise, word for word where it can be
known, so that the doctor's catalog explains it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from helpers.course.check import _objects as objects
from helpers.course.check._objects import Derived, Instance, Method, Program

_GIVEN = object()
# Taken without a word in the documentation, with one in the log.
_LOGGED = ("torch_dtype",)
# Ways to generate that have left the library for repositories of the Hub.
_ELSEWHERE = ("penalty_alpha", "constraints", "force_words_ids", "dola_layers")
_GONE_FROM_LOADING = ("use_auth_token", "task", "ignore_verifications", "script_version")
# Their instances have attributes that no Python source tells.
_WITHOUT_SOURCE = ("torch", "numpy", "pandas")
# Arguments that any model of `generate` may hand to its forward pass.
_TENSORS = re.compile(
    r"\w+_(ids|mask|values|embeds|outputs|features|grid_thw|sizes)|labels|pixel\w*"
)


@dataclass(frozen=True)
class Problem:
    """What is wrong with one call: its node, the word meant, the kind, Python's message."""

    node: ast.AST
    kind: str  # 'fails', 'warns' or 'silent'
    error: str
    owner: str = ""
    word: str = ""
    alike: tuple[str, ...] = ()  # names that are there, for a guess at what was meant


def problems(program: Program) -> Iterator[Problem]:
    """What the installed versions would say to the imports, attributes and calls."""
    for lost in program.missing:
        yield Problem(lost.node, "fails", lost.error, word=lost.name)
    for node in ast.walk(program.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield from _looked_up(program, node)
        elif isinstance(node, ast.Call):
            yield from _called(program, node)
        elif isinstance(node, ast.ClassDef):
            yield from _overridden(program, node)


# ── attributes ───────────────────────────────────────────────────────────────────────────
def _looked_up(program: Program, node: ast.Attribute) -> Iterator[Problem]:
    import torch

    owner, name = program.value(node.value), node.attr
    if not objects.known(owner) or program.guarded(node):
        return
    if isinstance(owner, Instance):
        parent = program.above[node][0]
        is_called = isinstance(parent, ast.Call) and parent.func is node
        if owner.kind.__module__.startswith(_WITHOUT_SOURCE) or owner.has(name):
            return
        if _asked_for(program, node):
            return
        if issubclass(owner.kind, torch.nn.Module) and not (is_called and name in gone()):
            return  # a layer that this model may have
        said = f"AttributeError: '{owner.kind.__name__}' object has no attribute '{name}'"
        yield Problem(node, "fails", said, owner.kind.__name__, name)
    elif inspect.ismodule(owner) or inspect.isclass(owner):
        try:
            found = hasattr(owner, name)
        except Exception as error:  # a lazy module that fails at its part
            said = f"{type(error).__name__}: {error}"
            yield Problem(node, "fails", said, owner.__name__, name)
            return
        if not found and not _submodule(program, owner, name):
            what = "module" if inspect.ismodule(owner) else "type object"
            said = f"AttributeError: {what} '{owner.__name__}' has no attribute '{name}'"
            yield Problem(node, "fails", said, owner.__name__, name)


def _asked_for(program: Program, node: ast.Attribute) -> bool:
    """Whether `hasattr(thing, "name")` stands around, or the code set the attribute."""
    scope = program.tree
    for other in ast.walk(scope):
        match other:
            case ast.Call(func=ast.Name(id="hasattr"), args=[_, ast.Constant(value=word)]):
                if word == node.attr:
                    return True
            case ast.Attribute(attr=name, ctx=ast.Store()) if name == node.attr:
                return True
    return False


def _submodule(program: Program, owner: Any, name: str) -> bool:
    if not inspect.ismodule(owner):
        return False
    full = f"{owner.__name__}.{name}"
    return any(
        isinstance(other, ast.Import) and any(a.name.startswith(full) for a in other.names)
        for other in ast.walk(program.tree)
    )


@functools.cache
def gone() -> frozenset[str]:
    """Methods that models had in 2024 and have no more (removed.txt, made by a script)."""
    text = (Path(__file__).parent / "removed.txt").read_text("utf-8")
    return frozenset(line for line in text.split() if line.isidentifier())


# ── calls ────────────────────────────────────────────────────────────────────────────────
def _called(program: Program, node: ast.Call) -> Iterator[Problem]:
    target = program.value(node.func)
    if isinstance(target, Derived):
        own = {part.name for part in target.node.body if isinstance(part, ast.FunctionDef)}
        made = "__init__" in own or target.node.decorator_list  # a dataclass makes its own
        target = None if made else target.base
    if not objects.known(target):
        return
    words, complete = words_of(program, node)
    yield from against(target, node, words, complete)


def words_of(program: Program, node: ast.Call) -> tuple[dict[str, ast.AST], bool]:
    """The keywords of a call with their nodes; False where some of it cannot be known."""
    words: dict[str, ast.AST] = {}
    complete = not any(isinstance(argument, ast.Starred) for argument in node.args)
    for keyword in node.keywords:
        if keyword.arg:
            words[keyword.arg] = keyword
        else:
            keys = _keys(program, keyword.value)
            complete = complete and keys is not None
            words |= keys or {}
    return words, complete


def _keys(program: Program, node: ast.AST, depth: int = 9) -> dict[str, ast.AST] | None:
    """The keys of what stands behind `**`; None when they are not known."""
    if not depth:
        return None
    match node:
        case ast.Dict(keys=keys, values=values):
            found: dict[str, ast.AST] = {}
            for key, value in zip(keys, values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    found[key.value] = key
                    continue
                inner = _keys(program, value, depth - 1) if key is None else None
                if inner is None:
                    return None
                found |= inner
            return found
        case ast.BinOp(op=ast.BitOr(), left=left, right=right):
            first, second = _keys(program, left, depth - 1), _keys(program, right, depth - 1)
            return None if first is None or second is None else first | second
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=given):
            if all(keyword.arg for keyword in given):
                return {str(keyword.arg): keyword for keyword in given}
        case ast.Name(id=name):
            bound, _ = program.binding(name, node)
            if isinstance(bound, ast.AST):
                return _keys(program, bound, depth - 1)
    return None


def against(
    target: Any, node: ast.Call, words: dict[str, ast.AST], complete: bool
) -> Iterator[Problem]:
    """One call against the signature of its target."""
    function, spelled, skip_first = _function(target)
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # compiled code without one
        return
    parameters = list(signature.parameters.values())[skip_first:]
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    takes = {p.name for p in named if p.kind is not p.POSITIONAL_ONLY} | tolerated(function)
    rest = next((p for p in parameters if p.kind is p.VAR_KEYWORD), None)
    unknown = []
    for word, place in words.items():
        if word in takes:
            yield from _old(function, spelled, word, place)
            yield from _value(spelled, word, place)
        elif not _passed_on(target, rest, word):
            unknown.append(word)
            yield _unexpected(spelled, word, place, takes)
        elif word in _LOGGED:
            yield Problem(
                place, "warns", f"`{word}` is deprecated! Use `dtype` instead!", spelled, word
            )
    if rest and not named:  # a decorator has hidden the real ones
        return
    strict = signature.replace(parameters=[p for p in parameters if p is not rest])
    try:
        bind = strict.bind if complete and not unknown else strict.bind_partial
        positional = sum(not isinstance(a, ast.Starred) for a in node.args)
        bind(*[_GIVEN] * positional, **{w: _GIVEN for w in words if w in takes})
    except TypeError as error:
        said = str(error)
        if missing := re.fullmatch(r"missing a required (?:keyword-only )?argument: '(\w+)'", said):
            said = f"{spelled}() missing 1 required positional argument: '{missing[1]}'"
        else:
            said = f"{spelled}() takes {said.removeprefix('too many ')}"
        yield Problem(node, "fails", f"TypeError: {said}", spelled)
    if message := _is_old(function):
        yield Problem(node.func, "warns", message, spelled, spelled.split(".")[-1])


def _function(target: Any) -> tuple[Any, str, int]:
    """The function whose signature counts, its name in messages, parameters to skip."""
    import torch

    if isinstance(target, Instance):
        kind = target.kind
        name = "forward" if issubclass(kind, torch.nn.Module) else "__call__"
        found = getattr(kind, name, None)
        if getattr(found, "__name__", "") == "_forward_unimplemented":
            found = None
        return found, f"{kind.__name__}.{name}", 1
    if isinstance(target, Method):
        kind = target.owner.kind if isinstance(target.owner, Instance) else target.owner
        raw = inspect.getattr_static(kind, target.name, target.function)
        skip = isinstance(target.owner, Instance) and not isinstance(raw, staticmethod)
        if isinstance(raw, classmethod):  # already bound to its class
            return getattr(kind, target.name), f"{kind.__name__}.{target.name}", 0
        return target.function, getattr(target.function, "__qualname__", target.name), int(skip)
    if inspect.isclass(target):
        return _constructor(target), f"{target.__name__}.__init__", 0
    return target, getattr(target, "__name__", str(target)), 0


def _constructor(kind: type) -> type:
    """The class whose `__init__` names its arguments, behind those that hand all on."""
    for base in kind.__mro__[:-1]:
        start = vars(base).get("__init__")
        if start is None:
            continue
        kinds = {p.kind for p in inspect.signature(start).parameters.values()}
        if not {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds:
            return base
    return kind


def _unexpected(spelled: str, word: str, place: ast.AST, takes: set[str]) -> Problem:
    name = spelled.split(".")[-1]
    if word in _ELSEWHERE:
        said = f"ValueError: `{word}` requires `trust_remote_code=True` in your `generate` call"
    elif name == "generate":
        said = f"ValueError: The following `model_kwargs` are not used by the model: ['{word}']"
    elif name == "from_pretrained":
        said = f"TypeError: LlamaForCausalLM.__init__() got an unexpected keyword argument '{word}'"
    elif name == "load_dataset":
        said = f"ValueError: BuilderConfig doesn't have a '{word}' key."
    else:
        said = f"TypeError: {spelled}() got an unexpected keyword argument '{word}'"
    return Problem(place, "fails", said, spelled, word, tuple(takes))


# ── what a `**kwargs` takes ──────────────────────────────────────────────────────────────
def _passed_on(target: Any, rest: inspect.Parameter | None, word: str) -> bool:
    """Whether a keyword that no parameter names is taken all the same."""
    import transformers

    if inspect.isclass(target) and issubclass(target, transformers.PreTrainedConfig):
        return True  # becomes an attribute
    if rest is None:
        return False

    from_pretrained = getattr(transformers.PreTrainedModel.from_pretrained, "__func__", None)
    owner = target.owner if isinstance(target, Method) else target
    kind = owner.kind if isinstance(owner, Instance) else owner
    name = target.name if isinstance(target, Method) else ""
    is_model = inspect.isclass(kind) and (
        issubclass(kind, transformers.PreTrainedModel)
        or kind.__name__.startswith(("AutoModel", "TFAutoModel", "FlaxAutoModel"))
    )
    if name == "from_pretrained" and is_model:
        return word in named(from_pretrained) | config_words() | set(_LOGGED)
    if name == "generate":
        given = vars(transformers.GenerationConfig())
        return (word in given and word not in _ELSEWHERE) or bool(_TENSORS.fullmatch(word))
    if getattr(target, "__name__", "") == "load_dataset":
        return word not in _GONE_FROM_LOADING
    if unpacked(rest.annotation) and inspect.isclass(target):
        return word in unpacked(rest.annotation) | inherited(target)
    return True


def unpacked(annotation: Any) -> set[str]:
    """The keywords of `**kwargs: Unpack[SomeTypedDict]`."""
    found: set[str] = set()
    for part in typing.get_args(annotation):
        found |= getattr(part, "__required_keys__", set())
        found |= getattr(part, "__optional_keys__", set())
    return found


def inherited(target: type) -> set[str]:
    """The keywords that a class hands on to the class it is derived from."""
    starts = [base.__init__ for base in target.__mro__[1:-1] if "__init__" in vars(base)]
    return {word for start in starts for word in inspect.signature(start).parameters}


@functools.cache
def named(*functions: Any) -> frozenset[str]:
    """The keywords of functions: those of their signatures and those they pop."""
    taken = r"""kwargs(?:\.pop|\.get)\(\s*["'](\w+)["']"""
    found: set[str] = set()
    for function in functions:
        source = objects.source_of(function)
        found |= set(re.findall(taken, source)) | set(inspect.signature(function).parameters)
        for listed in re.findall(r"for name in \[([^\]]*)\]", source):  # ... and pops each
            found |= set(re.findall(r"\w+", listed))
    return frozenset(found)


@functools.cache
def config_words() -> frozenset[str]:
    """What any model's config is called by: `from_pretrained` hands such words on to it."""
    import transformers

    found = set(vars(transformers.PreTrainedConfig()))
    found |= {"config", "state_dict", "generation_config"}
    for path in Path(transformers.__file__).parent.glob("models/*/configuration_*.py"):
        found |= set(re.findall(r"(?m)^ {4,8}(\w+)\s*(?::[^=\n]+)?=", path.read_text("utf-8")))
        found |= set(re.findall(r"\bself\.(\w+)\s*=", path.read_text("utf-8")))
    return frozenset(found)


@functools.cache
def tolerated(function: Any) -> set[str]:
    """Old names that a decorator still takes (transformers' `deprecate_kwarg`)."""
    found = set()
    start = vars(function).get("__init__") if isinstance(function, type) else function
    while start is not None:
        code, cells = getattr(start, "__code__", None), getattr(start, "__closure__", None) or ()
        if code and "old_name" in code.co_freevars:
            found.add(cells[code.co_freevars.index("old_name")].cell_contents)
        start = getattr(start, "__wrapped__", None)
    return found


# ── what is still taken, and old ─────────────────────────────────────────────────────────
def _old(function: Any, spelled: str, word: str, place: ast.AST) -> Iterator[Problem]:
    if word in tolerated(function) or documented_as_old(function, word):
        yield Problem(place, "warns", f"`{word}` is deprecated in {spelled}()", spelled, word)


def _is_old(function: Any) -> str:
    if told := getattr(function, "__deprecated__", None):
        return f"FutureWarning: {told}"
    if documented_as_old(function):
        return f"{getattr(function, '__qualname__', function)} is deprecated"
    return ""


@functools.cache
def documented_as_old(target: Any, word: str | None = None) -> bool:
    """Whether the documentation calls a function, or one of its arguments, deprecated."""
    classes = inspect.getmro(target) if inspect.isclass(target) else (target,)
    entry = r"\A\s*" if word is None else rf"^\s*{word} \(.*\n\s+"
    documents = [getattr(part, "__doc__", None) or "" for part in classes]
    return any(re.search(entry + "Deprecated", text, re.MULTILINE) for text in documents)


# ── values that are no longer among the choices ──────────────────────────────────────────
def _choices() -> dict[str, type[Enum]]:
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
    from transformers.training_args import OptimizerNames

    return {
        "optim": OptimizerNames,
        "lr_scheduler_type": SchedulerType,
        "eval_strategy": IntervalStrategy,
        "save_strategy": SaveStrategy,
        "logging_strategy": IntervalStrategy,
    }


def _value(spelled: str, word: str, place: ast.AST) -> Iterator[Problem]:
    if not spelled.endswith(("Config.__init__", "Arguments.__init__")):
        return
    kind = _choices().get(word)
    given = place.value if isinstance(place, ast.keyword) else None
    if kind is None or not isinstance(given, ast.Constant) or not isinstance(given.value, str):
        return
    try:
        kind(given.value)
    except ValueError as error:
        yield Problem(place, "fails", f"ValueError: {error}", spelled, given.value)


# ── methods that a class of the code's own overrides ─────────────────────────────────────
def _overridden(program: Program, node: ast.ClassDef) -> Iterator[Problem]:
    """An override that does not take what the library's own code calls it with."""
    from transformers import Trainer

    derived = program.derived(node)
    if not isinstance(derived, Derived) or Trainer not in derived.base.__mro__:
        return
    for method in node.body:
        if not isinstance(method, ast.FunctionDef) or method.name.startswith("__"):
            continue
        given = method.args
        if given.kwarg:
            continue
        words = {a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)}
        places = len(given.posonlyargs) + len(given.args) - 1
        for count, used in _uses(derived.base, method.name):
            extra = [word for word in used if word not in words]
            if extra:
                said = f"got an unexpected keyword argument '{extra[0]}'"
            elif count > places and not given.vararg:
                said = f"takes {places + 1} positional arguments but {count + 1} were given"
            else:
                continue
            error = f"TypeError: {node.name}.{method.name}() {said}"
            yield Problem(method, "fails", error, "Trainer", method.name)
            break


@functools.cache
def _uses(kind: type, method: str) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """How a class and its bases call one of their own methods: (positional, keywords)."""
    found = set()
    for base in kind.__mro__[:-1]:
        if base.__module__.split(".")[0] not in ("transformers", "trl"):
            continue
        for node in ast.walk(ast.parse(objects.source_of(base) or "")):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=name)):
                    words = tuple(k.arg for k in node.keywords if k.arg)
                    if name == method and not any(isinstance(a, ast.Starred) for a in node.args):
                        found.add((len(node.args), words))
    return tuple(sorted(found))
