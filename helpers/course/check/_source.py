"""Someone's notebook, script or pasted cell, as Python that can be parsed and shell lines.

Magics and `!` lines are no Python: they are taken out, so that each other line keeps its
place. A cell that still cannot be parsed is named and left out; the rest is read.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from helpers.course.check._lines import names

_SHELL = re.compile(r"^(\s*)(?:[\w., ]+=\s*)?!+\s*(.*)$")
_MAGIC = re.compile(r"^(\s*)(?:[\w., ]+=\s*)?%{1,2}([\w./]+)\s*(.*)$")
_HELP = re.compile(r"^(\s*)(?:\?{1,2}[\w.]+|[\w.]+\?{1,2})\s*$")
_SHELL_MAGICS = ("sh", "bash", "script", "system", "sx", "!")
_OTHER_LANGUAGES = ("html", "javascript", "js", "latex", "markdown", "svg", "perl", "ruby")
_MAGICS = names(
    "alias autoawait autocall automagic autoreload bookmark cat cd clear code_wrap colors "
    "conda config connect_info cp debug dhist dirs edit env gui history hist killbgscripts "
    "ldir less load load_ext loadpy logoff logon logstart lf ll ls lx macro magic mamba man "
    "matplotlib mkdir more mv notebook page pastebin pdb pdef pdoc pfile pinfo pinfo2 pip "
    "popd pprint precision prun psearch psource pushd pwd pycat pylab qtconsole quickref "
    "recall rehashx reload_ext rep rerun reset reset_selective rm rmdir run save sc set_env "
    "store sx system tb tensorboard time timeit unalias unload_ext uv who who_ls whos xdel "
    "xmode capture writefile file bash sh script"
)
_RUN_AS_SHELL = ("pip", "conda", "cd", "system", "sx", "mamba", "uv")


@dataclass(frozen=True)
class Place:
    """Where a line stands: `cell` counts code cells from 1, None in a script."""

    cell: int | None
    line: int

    def __str__(self) -> str:
        return f"line {self.line}" if self.cell is None else f"cell {self.cell}, line {self.line}"


@dataclass(frozen=True)
class ShellLine:
    """A command that the notebook hands to the shell, continuation lines joined."""

    place: Place
    text: str


@dataclass
class Source:
    """All that was read of one file: `tree` holds the cells behind one another."""

    name: str
    tree: ast.Module = field(default_factory=lambda: ast.Module([], []))
    shell: list[ShellLine] = field(default_factory=list)
    written: list[tuple[Place, str]] = field(default_factory=list)  # a Modelfile, a table
    no_magics: list[tuple[Place, str, str]] = field(default_factory=list)  # name, line
    unread: list[tuple[Place, str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)  # of each line of `lines`

    def at(self, node: ast.AST) -> tuple[Place, str]:
        """Where a node of `tree` begins, and the text of that line."""
        number = node.lineno - 1  # type: ignore[attr-defined]
        return self.places[number], self.lines[number]

    def add(self, text: str, cell: int | None) -> None:
        """Read one more cell, or a whole script (cell None)."""
        start = len(self.lines)
        raw = re.sub(r"\r\n?", "\n", text).removesuffix("\n").split("\n")  # as Python counts
        self.lines += raw
        self.places += [Place(cell, number) for number in range(1, len(raw) + 1)]
        python = self._without_shell(raw, cell)
        try:
            found = ast.parse("\n".join(python))
        except (SyntaxError, ValueError, RecursionError) as error:
            line = getattr(error, "lineno", None) or 1
            said = getattr(error, "msg", None) or str(error)
            self.unread.append((Place(cell, line), f"is no Python that can be read: {said}"))
            return
        ast.increment_lineno(found, start)
        self.tree.body += found.body

    def _without_shell(self, raw: list[str], cell: int | None) -> list[str]:
        first = next((i for i, line in enumerate(raw) if line.strip()), None)
        if first is None:
            return raw
        if head := re.match(r"\s*%%(!|\w+)\s*(.*)", raw[first]):
            name, rest = head[1], head[2]
            if name in _SHELL_MAGICS:
                self._command(raw[first + 1 :], first + 2, cell)
                return []
            if name in ("writefile", "file") and not rest.strip().endswith(".py"):
                body = raw[first + 1 :]
                if rest.strip().endswith(".sh"):
                    self._command(body, first + 2, cell)
                else:
                    self.written.append((Place(cell, first + 2), "\n".join(body)))
                return []
            if name in _OTHER_LANGUAGES:
                return []
            raw = [*[""] * (first + 1), *raw[first + 1 :]]  # time, capture, a script
        try:
            ast.parse("\n".join(raw))
        except (SyntaxError, ValueError, RecursionError):
            return self._line_by_line(raw, cell)
        return raw

    def _line_by_line(self, raw: list[str], cell: int | None) -> list[str]:
        python, skip = [], 0
        for number, line in enumerate(raw):
            if skip:
                skip -= 1
                python.append("")
            elif match := _SHELL.match(line):
                skip = self._command(raw[number:], number + 1, cell, one=True) - 1
                python.append(f"{match[1]}{_assigned(line, '!')}")
            elif match := _MAGIC.match(line):
                if match[2] not in _MAGICS:
                    self.no_magics.append((Place(cell, number + 1), match[2], line))
                if match[2] in _RUN_AS_SHELL or match[2] not in _MAGICS:
                    skip = self._command(raw[number:], number + 1, cell, one=True) - 1
                timed = match[2] in ("time", "timeit", "prun")
                rest = re.sub(r"^(-\w+\s*\d*\s+)+", "", match[3])
                python.append(f"{match[1]}{rest if timed else _assigned(line, '%')}" or "pass")
            elif match := _HELP.match(line):
                python.append(f"{match[1]}pass")
            else:
                python.append(line)
        return python

    def _command(self, raw: list[str], first: int, cell: int | None, one: bool = False) -> int:
        """Note the commands of some lines, or of one with its continuation; lines used."""
        number = 0
        while number < len(raw):
            start, text = number, raw[number]
            while text.rstrip().endswith("\\") and number + 1 < len(raw):
                number += 1
                text = text.rstrip()[:-1] + " " + raw[number].strip()
            if one:
                text = re.sub(r"^\s*(?:[\w., ]+=\s*)?(?:!+|%)\s*", "", text)
            if text.strip() and not text.lstrip().startswith("#"):
                self.shell.append(ShellLine(Place(cell, first + start), text.strip()))
            number += 1
            if one:
                break
        return number


def _assigned(line: str, mark: str) -> str:
    """What stands in Python for a line that the shell runs: `files = !ls` binds a name."""
    names = line.split(mark)[0].strip()
    return f"{names} None" if names.endswith("=") else "pass"


def read(path: str | Path) -> Source:
    """Read a notebook or a script.

    Raises:
        ValueError: the file is no notebook or no text.
        FileNotFoundError: there is none.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text in UTF-8: check reads .ipynb and .py files") from None
    source = Source(path.name)
    if path.suffix != ".ipynb":
        source.add(text, None)
        return source
    try:
        cells = list(_cells(json.loads(text)))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is no notebook: its cells cannot be found") from None
    for number, cell in enumerate(cells, 1):
        source.add(cell, number)
    return source


def _cells(notebook: dict) -> Iterator[str]:
    """The code cells of a notebook of format 4, or of the sheets of format 3.

    Empty for a cell with the tag `raises-exception`: it is meant to fail.
    """
    sheets = notebook.get("worksheets")
    for cell in [c for s in sheets for c in s["cells"]] if sheets else notebook["cells"]:
        if cell["cell_type"] == "code":
            text = cell.get("source", cell.get("input", ""))
            meant = "raises-exception" in cell.get("metadata", {}).get("tags", [])
            yield "" if meant else text if isinstance(text, str) else "".join(text)


def pasted(text: str) -> Source:
    """Read pasted code: a cell, a fenced block of a page, or lines behind `>>>`."""
    if not isinstance(text, str):
        raise TypeError(f"text must be code as a str, not {type(text).__name__}")
    if fenced := re.findall(r"(?ms)^```[^\n]*\n(.*?)^```", text):
        text = "\n".join(fenced)
    lines = text.splitlines()
    if any(line.startswith(">>> ") for line in lines):
        lines = [line[4:] for line in lines if re.match(r"(>>>|\.\.\.)( |$)", line)]
    source = Source("cell")
    source.add("\n".join(lines), None)
    return source
