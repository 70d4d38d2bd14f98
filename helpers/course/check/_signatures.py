"""What a function takes beyond its signature, and what its documentation calls old."""

from __future__ import annotations

import functools
import inspect
import re
import typing
from pathlib import Path
from typing import Any

from helpers.course.check._examples import Instance
from helpers.course.check._values import Method, source_of

# Taken without a word in the documentation, with one in the log.
LOGGED = ("torch_dtype",)
# Ways to generate that have left the library for repositories of the Hub.
ELSEWHERE = ("penalty_alpha", "constraints", "force_words_ids", "dola_layers")
_GONE_FROM_LOADING = ("use_auth_token", "task", "ignore_verifications", "script_version")
# Their instances have attributes that no Python source tells.
WITHOUT_SOURCE = ("torch", "numpy", "pandas")
# Arguments that any model of `generate` may hand to its forward pass.
_TENSORS = re.compile(
    r"\w+_(ids|mask|values|embeds|outputs|features|grid_thw|sizes)|labels|pixel\w*"
)


# ── what a `**kwargs` takes ──────────────────────────────────────────────────────────────
def passed_on(target: Any, rest: inspect.Parameter | None, word: str) -> bool:
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
        or kind.__name__.startswith(("AutoModel", "AutoPeftModel"))
    )
    if name == "from_pretrained" and is_model:
        return word in named(from_pretrained) | config_words() | set(LOGGED)
    if name == "generate":
        given = vars(transformers.GenerationConfig())
        return (word in given and word not in ELSEWHERE) or bool(_TENSORS.fullmatch(word))
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
    starts = [vars(base)["__init__"] for base in target.__mro__[1:-1] if "__init__" in vars(base)]
    return {word for start in starts for word in inspect.signature(start).parameters}


@functools.cache
def named(*functions: Any) -> frozenset[str]:
    """The keywords of functions: those of their signatures and those they pop."""
    taken = r"""kwargs(?:\.pop|\.get)\(\s*["'](\w+)["']"""
    found: set[str] = set()
    for function in functions:
        source = source_of(function)
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


def is_old(function: Any) -> str:
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
