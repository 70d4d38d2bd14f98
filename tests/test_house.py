"""The house itself: small, every idea where one looks for it, dependencies one way."""

import ast
import pkgutil
import re
from collections import Counter
from pathlib import Path

import pytest

import helpers

HOUSE = Path(helpers.__file__).parent
ROOT = HOUSE.parent
FILES = sorted(HOUSE.rglob("*.py"))
# A room may use the rooms before it; flat files use flat files.
FLOORS = ({"chat", "memory"}, {"training", "serving"}, {"course"})


def room(module):
    """The package that a dotted name belongs to, '' for a flat file."""
    first = module.split(".")[1] if "." in module else ""
    return first if any(first in floor for floor in FLOORS) else ""


def floor(name):
    return next((number for number, rooms in enumerate(FLOORS, 1) if name in rooms), 0)


def imported(path):
    """The dotted names of `helpers` that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def counted(path):
    return "exercises" not in path.parts


def test_the_library_is_small():
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in FILES if counted(path)}
    large = {str(path): count for path, count in lines.items() if count > 350}
    assert not large, f"one idea a file, at most 350 lines: {large}"
    # What it has now. The aim is 8,000: whoever adds lines raises this with open eyes.
    assert sum(lines.values()) <= 17777


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_dependencies_point_one_way(path):
    here = room("helpers." + ".".join(path.relative_to(HOUSE).with_suffix("").parts))
    if path.name == "__main__.py":  # the command line stands on the roof
        return
    for name in imported(path):
        there = room(name) if name.startswith("helpers.") else ""
        assert there in ("", here) or floor(there) < floor(here), f"{path} imports {name}"


def test_no_two_classes_share_a_name():
    names = Counter(
        node.name
        for path in filter(counted, FILES)
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef)
    )
    assert not [name for name, count in names.items() if count > 1]


def test_every_file_is_written_by_one_writer():
    """Whoever renames a temporary file into place does it through `_files`."""
    writers = [
        path.name
        for path in FILES
        if re.search(r"os\.replace|mkstemp|NamedTemporaryFile", path.read_text("utf-8"))
    ]
    assert writers == ["_files.py"]


def public_modules():
    """The public modules in the order of README's table: flat ones by name, then rooms."""
    found = {module.name for module in pkgutil.iter_modules([str(HOUSE)])}
    rooms = [name for rooms in FLOORS for name in rooms if name in found]
    names = {name for name in found if not name.startswith("_")}
    for name in rooms:
        inside = pkgutil.iter_modules([str(HOUSE / name)])
        names |= {f"{name}.{module.name}" for module in inside if not module.name.startswith("_")}
    return names


def test_readme_names_every_public_module():
    text = (ROOT / "README.md").read_text("utf-8")
    section = text.split("\n## The library\n")[1].split("\n## ")[0]
    rows = [row.split("|")[1] for row in section.splitlines() if re.match(r"\| \**`", row)]
    named = [name for row in rows for name in re.findall(r"`([\w.]+)`", row)]
    assert sorted(named) == sorted(public_modules())
    order = ["", "chat", "training", "memory", "serving", "course"]
    rooms = [room(f"helpers.{name}") for name in named]
    assert rooms == sorted(rooms, key=order.index), "the table follows the house"
