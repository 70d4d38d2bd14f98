"""A copy of a notebook or script with the mechanical changes made: names that were renamed.

Only what cannot change the meaning is done: a keyword, a method or an import gets its new
name, an argument that has no successor goes. All else stays, and stays in the report.
"""

from __future__ import annotations

import ast
import json
import re
import tomllib
from functools import cache
from importlib import resources
from pathlib import Path

from helpers import _files
from helpers.course.check import _calls, _program, _source

Edit = tuple[int, int, int, int, str]  # from line and column, to line and column, new text


@cache
def _renames() -> list[tuple[re.Pattern[str], str, str]]:
    """(what the owner is called, old word, new word) of renames.toml."""
    text = (resources.files("helpers.course.check") / "renames.toml").read_text("utf-8")
    return [
        (re.compile(owner), old, new)
        for owner, words in tomllib.loads(text).items()
        for old, new in words.items()
    ]


def _new_word(problem: _calls.Problem) -> str | None:
    """The new name of what a problem is about; '' when it goes; None: not mechanical."""
    for owner, old, new in _renames():
        if old == problem.word and owner.search(problem.owner):
            return new
    return None


def write(path: str | Path, out: str | Path) -> int:
    """Write the mended copy; returns how many changes were made.

    Raises:
        ValueError: `out` is the original, or is there already, or the kind differs.
    """
    path, out = Path(path), Path(out)
    if out.suffix != path.suffix:
        raise ValueError(f"out must end in {path.suffix} as {path.name} does, not {out.name}")
    if out.exists():
        raise ValueError(f"out={str(out)!r} is there already, and nothing is overwritten")
    source = _source.read(path)
    edits = sorted(_edits(source), reverse=True)
    lines = list(source.lines)
    for edit in edits:
        _apply(lines, edit)
    if path.suffix == ".ipynb":
        text = _notebook(path, source, lines)
    else:
        text = "\n".join(line for line in lines if line != _GONE) + "\n"
    if b"\r\n" in path.read_bytes():
        text = text.replace("\n", "\r\n")
    _files.write_whole(out, text.encode())
    return len(edits)


def _notebook(path: Path, source: _source.Source, lines: list[str]) -> str:
    notebook = json.loads(path.read_text("utf-8-sig"))
    sheets = notebook.get("worksheets")
    cells = [c for s in sheets for c in s["cells"]] if sheets else notebook["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        mine = [i for i, place in enumerate(source.places) if place.cell == number]
        key = "source" if "source" in cell else "input"
        new, old = [lines[i] for i in mine], [source.lines[i] for i in mine]
        if new != old:
            text = "\n".join(line for line in new if line != _GONE)
            cell[key] = text.splitlines(keepends=True)
            cell["outputs"], cell["execution_count"] = [], None
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def _edits(source: _source.Source) -> set[Edit]:
    found = set()
    program = _program.Program(source.tree)
    for problem in _calls.problems(program):
        new = _new_word(problem)
        if new is None:
            continue
        node = problem.node
        if isinstance(node, ast.keyword):
            if new in _words(program, node):
                continue  # both are given: which one is meant, nobody knows
            if new:
                column = node.col_offset
                end = column + len(problem.word)
                found.add((node.lineno, column, node.lineno, end, new))
            else:
                found.add(_without(source, program, node))
        elif isinstance(node, ast.Attribute) and new:
            end = node.end_col_offset or 0
            found.add((node.end_lineno or 0, end - len(node.attr), node.end_lineno or 0, end, new))
        elif isinstance(node, ast.Constant) and new:  # a key of a dictionary behind **
            found.add(
                (node.lineno, node.col_offset + 1, node.lineno, (node.end_col_offset or 0) - 1, new)
            )
    return found


def _words(program: _program.Program, node: ast.keyword) -> set[str | None]:
    """The keywords beside one."""
    return {keyword.arg for keyword in getattr(program.above[node][0], "keywords", [])}


def _without(source: _source.Source, program: _program.Program, node: ast.keyword) -> Edit:
    """Take an argument out, with the comma behind it, or before it where it is the last."""
    line, column = node.end_lineno or 0, node.end_col_offset or 0
    behind = _bytes(source.lines[line - 1], column)
    start_line, start = node.lineno, node.col_offset
    if comma := re.match(r"\s*,[ \t]*", behind):
        column += len(comma[0].encode())
        before = _bytes(source.lines[start_line - 1], 0, start)
        alone = not before.strip() and not _bytes(source.lines[line - 1], column).strip()
        if alone and line < len(source.lines):  # the whole line goes
            return start_line, 0, line + 1, 0, ""
        return start_line, start, line, column, ""
    call = program.above[node][0]
    others = [*getattr(call, "args", []), *(k.value for k in getattr(call, "keywords", []))]
    earlier = [o for o in others if (o.end_lineno, o.end_col_offset) <= (start_line, start)]
    if earlier:
        last = max(earlier, key=lambda o: (o.end_lineno, o.end_col_offset))
        return last.end_lineno, last.end_col_offset, line, column, ""
    return start_line, start, line, column, ""


def _bytes(line: str, start: int, end: int | None = None) -> str:
    """A part of a line by the offsets of ast, which count bytes."""
    return line.encode()[start:end].decode()


def _apply(lines: list[str], edit: Edit) -> None:
    first, start, last, end, new = edit
    head, tail = _bytes(lines[first - 1], 0, start), _bytes(lines[last - 1], end)
    # A line that goes stays as an empty entry, so that the other cells keep their places.
    lines[first - 1] = head + new + tail
    for number in range(first, last):
        lines[number] = _GONE


_GONE = "\0"
