"""Notebooks in the style of 2024: `check` names what fails, warns or means something else.

They lie in era2024/, and expected.toml there says what was seen when they were run with the
versions of then and of now. The slow tests run them again with what is installed.
"""

import json
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import nbformat
import pytest

from helpers.course import check, doctor, notebooks

ERA = Path(__file__).parent / "era2024"
EXPECTED = tomllib.loads((ERA / "expected.toml").read_text("utf-8"))
NOTES, FOLLOWS = EXPECTED.pop("notes"), EXPECTED.pop("follows")
NAMES = sorted(path.stem for path in ERA.glob("*.ipynb"))
ROWS = [
    pytest.param(name, row, id=f"{name}-{row['cell']}-{row['kind']}-{row['word']}")
    for name in NAMES
    for row in EXPECTED[name]
]
SAID = [row for row in ROWS if "says" in row.values[1]]
# Said by what follows from an empty machine, not by the code: no GPU here.
NO_GPU = "You need to assign use_cpu"


@cache
def found(name):
    return check.notebook(ERA / f"{name}.ipynb")


@cache
def cells(name):
    read = nbformat.read(ERA / f"{name}.ipynb", as_version=4)
    return [cell.source for cell in read.cells if cell.cell_type == "code"]


def matching(name, row):
    return [
        finding
        for finding in found(name)
        if (finding.cell, finding.kind, finding.word) == (row["cell"], row["kind"], row["word"])
    ]


def test_all_notebooks_are_expected_to_say_something():
    assert set(EXPECTED) == set(NAMES) == {f"Chapter{number}" for number in range(7)}


@pytest.mark.parametrize("name, row", ROWS)
def test_change_is_named(name, row):
    beside = [(f.kind, f.word) for f in found(name) if f.cell == row["cell"]]
    assert len(matching(name, row)) == 1, f"named in that cell: {beside}"


@pytest.mark.parametrize("name, row", ROWS)
def test_change_comes_with_what_to_write_today(name, row):
    for finding in matching(name, row):
        assert finding.symptom != doctor.UNKNOWN.name, finding.today
        assert finding.what and finding.today
        assert finding.chapter == "" or finding.chapter in notebooks.written()


@pytest.mark.parametrize("name", NAMES)
def test_place_and_code_are_those_of_the_notebook(name):
    for finding in found(name):
        source = cells(name)[finding.cell - 1]
        rest = "\n".join(source.splitlines()[finding.line - 1 :])
        # A shell line is shown joined, a long one cut.
        start = finding.code.split("…")[0].split(" --out")[0].strip()
        assert start[:40] in rest.replace("!", "").strip()
        assert finding.kind in check.KINDS


@pytest.mark.parametrize("name", NAMES)
def test_nothing_else_is_said_to_fail(name):
    expected = {(row["cell"], row["word"]) for row in EXPECTED[name] if row["kind"] == "fails"}
    named = {(f.cell, f.word): f.what for f in found(name) if f.kind == "fails"}
    assert {place: what for place, what in named.items() if place not in expected} == {}


@pytest.mark.parametrize("name", NOTES)
def test_pins_and_companions_are_noted(name):
    for wanted in NOTES[name]:
        assert any(wanted in note for note in found(name).notes)


@pytest.mark.parametrize("name, row", SAID)
def test_doctor_knows_the_message(name, row):
    said = row["says"].removeprefix("log: ")
    assert doctor.explain(said).name != doctor.UNKNOWN.name, said


@cache
def run_today(name, folder):
    """What prove.py sees in a notebook with what is installed."""
    out = Path(folder) / f"{name}.json"
    subprocess.run([sys.executable, ERA / "prove.py", "run", out, name], check=True, cwd=folder)
    return json.loads(out.read_text("utf-8"))["notebooks"][name]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_expected_is_what_happens(name, tmp_path_factory):
    cells_now = run_today(name, tmp_path_factory.mktemp("era"))
    for row in EXPECTED[name]:
        if "unseen" in row:
            continue
        now = cells_now[row.get("seen", row["cell"]) - 1]
        if "says" in row:
            heard = [*now["errors"], *now["warnings"]]
            assert any(row["says"] in line for line in heard), row
        if "now" in row:
            assert row["now"] in now["output"], row
    known = [row["says"] for row in EXPECTED[name] if "says" in row] + FOLLOWS.get(name, [])
    for number, now in enumerate(cells_now, 1):
        for error in now["errors"]:
            excused = NO_GPU in error or error.startswith("follows: ")
            assert excused or any(says in error for says in known), f"cell {number}: {error}"
