"""Reads code as a machine with a card would run it, and says what would break there.

The tests run on a CPU, where every tensor lies beside every other. So the cells of a
notebook are followed in order with values that are known or unknown: text, numbers, and
where models and tensors lie. `here.device` is 'cuda', and a model lies on the card unless
it was told otherwise. Functions are followed where they are called; those never called are
read with unknown arguments. What is unknown is left in peace.
"""

import ast
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import nbformat
from following import Follower, dotted, is_a
from IPython.core.inputtransformer2 import TransformerManager
from packaging.specifiers import SpecifierSet

from helpers.course import notebooks

ADVICE = {
    "device": "tensors of the CPU meet those of the card: .to(model.device)",
    "name": "takes another model on another machine: give a name or a chapter",
    "processes": "several processes would share one card: use_cpu=True",
    "dtype": "a T4 only emulates bfloat16: here.compute_dtype",
    "profile": "the rate follows the machine, not the model: name == models.EMBEDDED",
    "budget": "a constant, where the allocator's total decides: measure a row first",
    "script": "scripts need not lie beside the interpreter: sys.executable, '-m', ...",
    "cores": "counts the host's cores, not this container's: runtime.usable_cores()",
    "extract": "no filter= before Python 3.11.4: ask hasattr(tarfile, 'data_filter')",
}
BARE = ("load_model", "load_tokenizer", "default_model")
RATES = re.compile(r"(^|_)(lr|rate|weight_decay|momentum|alpha)$")
SCRIPTS = ("trl", "accelerate", "pip", "jupyter", "torchrun", "hf")


@dataclass(frozen=True)
class Finding:
    """What would break elsewhere: `cell` is the notebook's index, None in a module."""

    name: str
    cell: int | None
    line: int
    kind: str
    text: str

    def __str__(self):
        place = f"{self.name}:{self.line}"
        if self.cell is not None:
            place = f"{self.name} [{self.cell}], line {self.line}"
        return f"{place}: {self.kind}: {self.text} ({ADVICE[self.kind]})"


def check_notebook(notebook, name="notebook"):
    """The findings in a notebook's cells, in order; cells that are meant to fail are left.

    notebook: a path or what `nbformat.read` gives.
    """
    if isinstance(notebook, str | Path):
        name, notebook = Path(notebook).stem, nbformat.read(notebook, as_version=4)
    body = []
    for number, cell in enumerate(notebook.cells):
        fails = "raises-exception" in cell.metadata.get("tags", [])
        if cell.cell_type == "code" and not fails:
            tree = ast.parse(TransformerManager().transform_cell(cell.source))
            for node in ast.walk(tree):
                node.cell = number
            body += tree.body
    return check(ast.Module(body, []), name, usual=True)


def check_source(path, usual=True):
    """The findings in a module. usual: whether a parameter `model` lies on the card."""
    path = Path(path).resolve()
    inside = path.is_relative_to(notebooks.root())
    name = path.relative_to(notebooks.root()).as_posix() if inside else path.name
    return check(ast.parse(path.read_text("utf-8")), name, usual)


def check(tree, name="code", usual=True):
    """The findings in a syntax tree: patterns first, then what following values shows."""
    found = {}

    def report(kind, node):
        cell, text = getattr(node, "cell", None), ast.unparse(node)
        text = text if len(text) < 80 else text[:77] + "..."
        finding = Finding(name, cell, node.lineno, kind, text)
        found.setdefault((cell, node.lineno, kind), finding)

    patterns(tree, report)
    Follower(report, usual).module(tree)
    return sorted(found.values(), key=lambda f: (f.cell or 0, f.line, f.kind))


# ── patterns ─────────────────────────────────────────────────────────────────────────────
def patterns(tree, report):
    """What is wrong wherever it stands, whatever the values are."""
    by_machine = set()  # names whose value says which machine this is
    said = [n for n in ast.walk(tree) if is_a(n, ast.JoinedStr | ast.Compare)]
    shown = {part for node in said for part in ast.walk(node)}  # or only compared with
    source = ast.unparse(tree)
    filters = all_take_filter() or "data_filter" in source
    affinity = "sched_getaffinity" in source  # what it falls back to elsewhere
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                if is_a(value, ast.Compare) and asks_machine(value, by_machine):
                    by_machine.add(name)
                named_rate(name, value, by_machine, report)
            case ast.keyword(arg=str(name), value=value):
                named_rate(name, value, by_machine, report)
            case ast.Dict(keys=keys, values=values):
                for key, value in zip(keys, values, strict=True):
                    named_rate(getattr(key, "value", ""), value, by_machine, report)
            case ast.If(test=test) if asks_machine(test, by_machine):
                for part in (p for p in node.body + node.orelse if is_a(p, ast.Assign)):
                    target = getattr(part.targets[0], "id", "")
                    if RATES.search(target) and is_a(part.value, ast.Constant):
                        report("profile", part)
            case ast.Call(func=func, args=args, keywords=keywords):
                last = dotted(func).rpartition(".")[2]
                given = {keyword.arg for keyword in keywords}
                if last in BARE and not args and not given & {"name", "chapter", None}:
                    report("name", node)
                if last == "cpu_count" and node not in shown and not affinity:
                    report("cores", node)
                if last in ("extractall", "extract") and "filter" in given and not filters:
                    report("extract", node)
                if last == "dirname" and "sys.executable" in map(dotted, args):
                    report("script", node)
            case ast.Attribute(value=ast.Call(args=args), attr="parent" | "with_name"):
                if "sys.executable" in map(dotted, args):
                    report("script", node)
            case ast.List(elts=[ast.Constant(value=str(first)), *more]):
                words = [str(getattr(part, "value", "")) for part in more]
                if first in SCRIPTS and any(word.startswith("-") for word in words):
                    report("script", node)


def named_rate(name, value, by_machine, report):
    # Sizes may follow the machine; what makes a model learn follows the model.
    if RATES.search(str(name)) and is_a(value, ast.IfExp):
        constant = all(is_a(side, ast.Constant) for side in (value.body, value.orelse))
        if constant and asks_machine(value.test, by_machine):
            report("profile", value)


def all_take_filter():
    """Whether every Python that the course allows has tarfile's `filter=`."""
    project = tomllib.loads((notebooks.root() / "pyproject.toml").read_text("utf-8"))
    return "3.11.3" not in SpecifierSet(project["project"]["requires-python"])


def asks_machine(test, by_machine=()):
    """Whether an expression depends on the machine's profile or device."""
    return any(
        dotted(n).endswith((".profile", "here.device", "cuda.is_available"))
        or getattr(n, "id", None) in by_machine
        for n in ast.walk(test)
    )
