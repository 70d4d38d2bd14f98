"""The library is typed and documented; a type checker reads the notebooks with it.

What mypy is blind to (keywords behind `**`, what a `**kwargs` takes, deprecations, objects
that nobody annotates) is `helpers.course.check`'s to see.
"""

import importlib
import inspect
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import helpers
from helpers._report import Shown
from helpers.course import notebooks

HOUSE = Path(helpers.__file__).parent


# ── every public thing ───────────────────────────────────────────────────────────────────
def public_modules():
    for path in sorted(HOUSE.rglob("*.py")):
        parts = path.relative_to(HOUSE).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if "exercises" not in parts and not any(part.startswith("_") for part in parts):
            yield ".".join(("helpers", *parts))


def things(module):
    """(name, function or class) of what a module itself defines and shows."""
    for name, thing in vars(module).items():
        own = getattr(thing, "__module__", None) == module.__name__
        if own and not name.startswith("_") and (callable(thing) or inspect.isclass(thing)):
            yield f"{module.__name__}.{name}", thing


def methods(owner):
    """(name, function) of what a class itself defines and shows, and of how it is made."""
    for name, thing in vars(owner).items():
        thing = getattr(thing, "fget", None) or getattr(thing, "func", thing)  # properties
        thing = inspect.unwrap(getattr(thing, "__func__", thing))
        written = inspect.isfunction(thing) and thing.__qualname__.startswith(owner.__qualname__)
        made = hasattr(owner, "__dataclass_fields__")
        if written and (not name.startswith("_") or (name == "__init__" and not made)):
            yield name, thing


def without_types(function):
    """The parameters (and 'return') of a function that have no annotation."""
    signature = inspect.signature(inspect.unwrap(function))
    found = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
    returns = signature.return_annotation is signature.empty
    return [n for n in found if n not in ("self", "cls")] + ["return"] * returns


def handed_out(owner):
    """Whether a class is an exception or a result, which nobody makes by hand."""
    return issubclass(owner, (BaseException, Shown)) or hasattr(owner, "__dataclass_fields__")


def asks_nothing(thing):
    """Whether a function has no parameters: an example would only repeat its name."""
    return inspect.isfunction(thing) and not inspect.signature(thing).parameters


def faults(module):
    """What a module's public things lack, each with its name."""
    for name, thing in things(module):
        is_class = inspect.isclass(thing)
        text = thing.__doc__ or ""
        if not text:
            yield f"{name} has no docstring"
        elif ">>>" not in text and not (handed_out(thing) if is_class else asks_nothing(thing)):
            yield f"{name} has no example (>>>)"
        if not is_class and (missing := without_types(thing)):
            yield f"{name} has no type for {', '.join(missing)}"
        for method, function in methods(thing) if is_class else ():
            if missing := without_types(function):
                yield f"{name}.{method} has no type for {', '.join(missing)}"
            if method != "__init__" and not inspect.getdoc(getattr(thing, method)):
                yield f"{name}.{method} has no docstring"


@pytest.mark.parametrize("name", list(public_modules()))
def test_public_things_are_typed_and_documented_with_an_example(name):
    found = list(faults(importlib.import_module(name)))
    assert not found, "\n".join(["", *found])


def test_what_is_missing_is_found(tmp_path, monkeypatch):
    (tmp_path / "lacking.py").write_text(
        "import functools\n"
        "def bare(x): pass\n"
        "def half(x: int, *more) -> int:\n    'Says.'\n"
        "@functools.cache\ndef kept(x: int):\n    '>>> 1'\n"
        "class Thing:\n    '>>> 1'\n    def __init__(self, x): pass\n"
        "    def ask(self, y: int): return self._own(y)\n    def _own(self, y): pass\n"
        "    @property\n    def size(self) -> int: return 1\n"
        "class Failure(ValueError):\n    'Needs no example.'\n"
        "class Sound:\n    '>>> 1'\n    def ask(self, y: int) -> int:\n        'Asks.'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert list(faults(importlib.import_module("lacking"))) == [
        "lacking.bare has no docstring",
        "lacking.bare has no type for x, return",
        "lacking.half has no example (>>>)",
        "lacking.half has no type for more",
        "lacking.kept has no type for return",
        "lacking.Thing.__init__ has no type for x, return",
        "lacking.Thing.ask has no type for return",
        "lacking.Thing.ask has no docstring",
        "lacking.Thing.size has no docstring",
    ]


# ── a type checker ───────────────────────────────────────────────────────────────────────
# Cells reuse names and build `**` dictionaries freely; what counts in them are wrong
# keywords (call-arg) and names that a library does not have (attr-defined).
HEAD = (
    "# mypy: allow-redefinition, disable-error-code="
    '"arg-type,assignment,call-overload,dict-item,index,list-item,misc,name-defined,no-redef,'
    'operator,type-var,union-attr,var-annotated"\n'
)
FALSE = [  # (notebook, words): where a stub knows less than the cell
    ("Chapter1", '"nlargest" of "DataFrame"'),
]
IMPORTS = """
import bitsandbytes as bnb
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer
from helpers import data, models, quantization
model = models.load_model()
"""
PLANTED = [
    "SFTTrainer(model, tokenizer=1)",
    "SFTConfig('out', max_seq_length=9)",
    "SFTConfig('out', evaluation_strategy='no')",
    "LoraConfig(rank=8)",
    "bnb.functional.quantize_4bit(model, kind='nf4')",
    "bnb.functional.quantize_five_bit(model)",
    "from trl import DataCollatorForCompletionOnlyLM",
    "SFTTrainer(model).tokenizer",
    "class Mine(SFTTrainer):\n    def f(self):\n        super().lossy(1)",
    "class Mine(SFTTrainer):\n    def f(self):\n        self.tokenizer(1)",
    "data.load_yoda('train', shape='messages')",
    "quantization.quantize_nf5",
]


def code(name):
    """A notebook's code, without the cells that are meant to fail."""
    cells = json.loads(notebooks.find(name).read_text("utf-8"))["cells"]
    return "\n".join(
        "".join(cell["source"])
        for cell in cells
        if cell["cell_type"] == "code"
        and "raises-exception" not in cell["metadata"].get("tags", [])
    )


@pytest.fixture(scope="module")
def said(tmp_path_factory, request):
    """What mypy says in one run, {file's stem or 'helpers': [messages]}."""
    pytest.importorskip("mypy", reason="the type checker: pip install mypy")
    folder = tmp_path_factory.mktemp("cells")
    for name in notebooks.written():
        (folder / f"{name}.py").write_text(HEAD + code(name))
    for number, source in enumerate(PLANTED):
        head = "" if "super" in source else HEAD  # for helpers every code counts
        (folder / f"planted{number}.py").write_text(head + IMPORTS + source)
    cache = request.config.cache.mkdir("mypy")
    command = [sys.executable, "-m", "mypy", "--cache-dir", cache, "helpers", *folder.iterdir()]
    run = subprocess.run(command, cwd=notebooks.root(), capture_output=True, text=True)
    assert run.returncode in (0, 1), run.stdout + run.stderr
    found = defaultdict(list)
    for line in run.stdout.splitlines():
        if match := re.match(r"(.+?):\d+: error: ", line):
            path = Path(match[1])
            found["helpers" if path.parts[0] == "helpers" else path.stem].append(line)
    return found


@pytest.mark.slow
def test_helpers_are_clean(said):
    assert not said["helpers"], "\n".join(["", *said["helpers"]])


@pytest.mark.slow
@pytest.mark.parametrize("name", notebooks.written())
def test_a_notebook_is_clean(name, said):
    known = [words for notebook, words in FALSE if notebook == name]
    found = [line for line in said[name] if not any(words in line for words in known)]
    assert not found, "\n".join(["", *found])


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(PLANTED)), ids=PLANTED)
def test_a_planted_fault_is_found(number, said):
    assert len(said[f"planted{number}"]) == 1, said[f"planted{number}"]
