"""A call against the signature that is installed: what it does not take, and what is old.

Each complaint carries the message that Python will raise, word for word where it can be
known, so that the doctor's catalog explains it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from helpers.course.check import _signatures as signatures
from helpers.course.check._examples import Instance
from helpers.course.check._program import Program
from helpers.course.check._values import Derived, Method, known, source_of

_GIVEN = object()


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
    if not known(owner) or program.guarded(node):
        return
    if isinstance(owner, Instance):
        parent = program.above[node][0]
        is_called = isinstance(parent, ast.Call) and parent.func is node
        if owner.kind.__module__.startswith(signatures.WITHOUT_SOURCE) or owner.has(name):
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
    return frozenset(line for line in text.splitlines() if line.isidentifier())


# ── calls ────────────────────────────────────────────────────────────────────────────────
def _called(program: Program, node: ast.Call) -> Iterator[Problem]:
    target = program.value(node.func)
    if isinstance(target, Derived):
        own = {part.name for part in target.node.body if isinstance(part, ast.FunctionDef)}
        made = "__init__" in own or target.node.decorator_list  # a dataclass makes its own
        target = None if made else target.base
    if not known(target):
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
    takes = {p.name for p in named if p.kind is not p.POSITIONAL_ONLY} | signatures.tolerated(
        function
    )
    rest = next((p for p in parameters if p.kind is p.VAR_KEYWORD), None)
    unknown = []
    for word, place in words.items():
        if word in takes:
            yield from _old(function, spelled, word, place)
            yield from _value(spelled, word, place)
        elif not signatures.passed_on(target, rest, word):
            unknown.append(word)
            yield _unexpected(spelled, word, place, takes)
        elif word in signatures.LOGGED and spelled.startswith("Auto") and not _is_auto(place):
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
    if message := signatures.is_old(function):
        yield Problem(node.func, "warns", message, spelled, spelled.split(".")[-1])


def _is_auto(place: ast.AST) -> bool:
    """Whether a keyword's value is the word "auto", which nothing is said about."""
    given = place.value if isinstance(place, ast.keyword) else None
    return isinstance(given, ast.Constant) and given.value == "auto"


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
    if word in signatures.ELSEWHERE:
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


# ── what is still taken, and old ─────────────────────────────────────────────────────────
def _old(function: Any, spelled: str, word: str, place: ast.AST) -> Iterator[Problem]:
    if word in signatures.tolerated(function) or signatures.documented_as_old(function, word):
        yield Problem(place, "warns", f"`{word}` is deprecated in {spelled}()", spelled, word)


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
        for node in ast.walk(ast.parse(source_of(base) or "")):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=name)):
                    words = tuple(k.arg for k in node.keywords if k.arg)
                    if name == method and not any(isinstance(a, ast.Starred) for a in node.args):
                        found.add((len(node.args), words))
    return tuple(sorted(found))
