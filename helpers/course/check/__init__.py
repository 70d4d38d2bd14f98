"""Old fine-tuning code against today's libraries, read and never run (all chapters).

    from helpers.course import check
    check.notebook("their.ipynb")       # also a script; check.folder("examples")
    check.cell("SFTTrainer(model, tokenizer=tokenizer)")
    python -m helpers check their.ipynb --fix mended.ipynb

Each finding says what the installed versions do with one piece of the code: it *fails*, it
*warns*, it *silently* means something else than it did, or what it fetches has *moved*.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from helpers._report import Markup, Shown, counted, escape, shorten, table
from helpers.course import doctor
from helpers.course.check import _calls, _packages, _patterns, _program, _shell, _source
from helpers.course.check._lines import names

ON_PURPOSE = "# on purpose"  # at the end of a line that shows a mistake

__all__ = ["KINDS", "Change", "Findings", "cell", "folder", "notebook"]

KINDS = {
    "fails": "raises an error",
    "warns": "still works, with a warning",
    "silent": "runs, and means something else",
    "moved": "what it fetches or calls is somewhere else now",
}


@dataclass(frozen=True, repr=False)
class Change(Shown):
    """What today's libraries do with one piece of code.

    Attributes:
        cell: the code cell, counted from 1; None in a script or a pasted cell.
        line: the line in that cell or script, counted from 1.
        code: the piece of code that is meant.
        kind: 'fails', 'warns', 'silent' or 'moved' (`KINDS` says what they mean).
        what: what happens; for 'fails', the message that Python gives.
        today: what to write instead.
        chapter: the notebook that shows it, such as 'Chapter5'; '' where none does.
        symptom: its name in the doctor's catalog; 'unknown' where it has none.
    """

    cell: int | None
    line: int
    code: str
    kind: str
    what: str
    today: str
    chapter: str
    symptom: str
    word: str = ""  # the import, keyword or method that is meant

    def __str__(self) -> str:
        place = _source.Place(self.cell, self.line)
        shown = f"\n    shown in {self.chapter}.ipynb" if self.chapter else ""
        return f"{place}: {self.kind}: {self.code}\n    {self.what}\n    today: {self.today}{shown}"


@dataclass(frozen=True, repr=False)
class Findings(Shown, Sequence[Change]):
    """What was found in one file, in the order of its lines: a sequence that shows itself.

    Attributes:
        name: the file's name.
        found: the findings.
        notes: what could not be read, and pinned versions: worth knowing, no fault.
    """

    name: str
    found: tuple[Change, ...]
    notes: tuple[str, ...] = ()

    @overload
    def __getitem__(self, index: int) -> Change: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Change, ...]: ...
    def __getitem__(self, index: int | slice) -> Change | tuple[Change, ...]:
        return self.found[index]

    def __len__(self) -> int:
        return len(self.found)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(place, code, what happens, today) of each finding."""
        return [
            (str(_source.Place(f.cell, f.line)), f.code, f"{f.kind}: {f.what}", f.today)
            for f in self.found
        ]

    def summary(self) -> str:
        """One line: how many findings of each kind."""
        if not self.found:
            return f"{self.name}: nothing found"
        counts = {kind: sum(f.kind == kind for f in self.found) for kind in KINDS}
        told = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        return f"{self.name}: {counted(len(self), 'finding')} ({told})"

    def to_json(self) -> str:
        """The same as JSON: name, findings, notes."""
        content = {"name": self.name, "findings": [dataclasses.asdict(f) for f in self.found]}
        return json.dumps(content | {"notes": list(self.notes)}, indent=1, ensure_ascii=False)

    def __str__(self) -> str:
        return "\n".join(
            [*map(str, self.found), *(f"note: {n}" for n in self.notes), self.summary()]
        )

    def _repr_html_(self) -> str:
        head = ("where", "the code", "what happens", "today")
        words = [
            Markup(f"<code>{escape(f.word or shorten(f.code, 30))}</code>") for f in self.found
        ]
        rows = [
            (where, word, *told) for word, (where, _, *told) in zip(words, self.rows(), strict=True)
        ]
        notes = "".join(table([[note]]) for note in self.notes)
        return table(rows, head, caption=self.summary()) + notes


# Defaults that are other ones than they were. Code of today means them so: they are told only
# where the code is old.
OF_OLD_CODE = names(
    "adapter_bfloat16 add_eos_token bin_files default_dtype packing_changed report_to_none "
    "sft_defaults strings"
)


def notebook(path: str | Path, *, old: bool | None = None) -> Findings:
    """Hold a notebook, or a script, against the installed versions.

    Args:
        path: an .ipynb file of format 3 or 4, or a Python file. Its code is read as text
            and never run, nor is anything beside it imported. Cells with the tag
            `raises-exception` and lines that end in `# on purpose` are left alone.
        old: whether it was written for the libraries of before transformers 5 and trl 1. What
            only has another default today is told then. None: where something else in it shows
            its age, or a line installs a version of that time.

    Returns:
        `Findings`, empty where nothing is known to have changed.

    Raises:
        ValueError: the file holds no notebook and no text.
        FileNotFoundError: there is no such file.

    Example:
        >>> import tempfile, pathlib
        >>> script = pathlib.Path(tempfile.mkdtemp(), "old.py")
        >>> _ = script.write_text("from trl import setup_chat_format")
        >>> notebook(script)[0].kind
        'fails'
    """
    return _examined(_source.read(path), old, alone=True)


def cell(text: str, *, old: bool | None = None) -> Findings:
    """The same for pasted code: a cell, lines behind `>>>`, or a page's fenced block.

    Example:
        >>> found = cell("from trl import SFTConfig\\nSFTConfig(max_seq_length=512)")
        >>> found[0].kind, found[0].word, found[0].chapter
        ('fails', 'max_seq_length', 'Chapter4')
    """
    return _examined(_source.pasted(text), old, alone=False)


def folder(path: str | Path, *, old: bool | None = None) -> list[Findings]:
    """The same for each notebook and script in a folder and those below it.

    Raises:
        ValueError: it is no folder, or holds neither.

    Example:
        >>> import tempfile, pathlib
        >>> place = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (place / "old.py").write_text("from trl import setup_chat_format")
        >>> [found.summary() for found in folder(place)]
        ['old.py: 1 finding (1 fails)']
    """
    top = Path(path)
    if not top.is_dir():
        raise ValueError(f"path must be a folder, and {path} is none")
    files = [
        one
        for one in sorted(top.rglob("*"))
        if one.suffix in (".ipynb", ".py")
        and not any(part.startswith(".") for part in one.relative_to(top).parts)
    ]  # checkpoints and environments are not theirs to mend
    if not files:
        raise ValueError(f"{path} holds no notebook (.ipynb) and no script (.py)")
    return [notebook(one, old=old) for one in files]


def _examined(source: _source.Source, old: bool | None, alone: bool) -> Findings:
    """What is found; alone: whether nothing but the source itself can bind its names."""
    program = _program.Program(source.tree)
    found = [_explained(source, problem) for problem in _calls.problems(program)]
    for lost in program.unbound() if alone and not source.unread else ():
        said = f"NameError: name '{lost.id}' is not defined"
        found.append(_explained(source, _calls.Problem(lost, "fails", said, word=lost.id)))
    for place, magic, text in source.no_magics:
        said = f"UsageError: Line magic function `%{magic}` not found."
        found.append(_found(place, text, "fails", "magic_unknown", magic, what=said))
    pins = [f"{s.place}: {note}" for s in source.shell for note in _packages.notes(s.text)]
    brought = {name for line in source.shell for name in _packages.installed(line.text)}
    found += [
        _found(*source.at(hit.node), hit.kind, hit.symptom, hit.word)
        for hit in _patterns.hits(program)
        if _packages.canonical(hit.needs) not in brought
    ]
    for place, text in source.written:
        found += [_found(place, text, *hit) for hit in _shell.in_text(text)]
    session = _shell.Session()
    for line in source.shell:
        found += [_found(line.place, line.text, *hit) for hit in session.hits(line.text)]
    kept = [f for f in found if not (_is_brought(f, brought) or f.code.endswith(ON_PURPOSE))]
    if old is None:
        old = bool(pins) or any(_shows_age(f) for f in kept)
    kept = [f for f in kept if old or f.symptom not in OF_OLD_CODE]
    unique = {(f.cell, f.line, f.kind, f.word or f.code, f.symptom): f for f in kept}
    ordered = sorted(unique.values(), key=lambda f: (f.cell or 0, f.line))
    unread = [f"{place}: {why}" for place, why in source.unread]
    return Findings(source.name, tuple(ordered), (*unread, *pins))


def _shows_age(finding: Change) -> bool:
    """Whether a finding is of what was right once: no slip, no file that is missing here."""
    missing = finding.what.startswith(("ModuleNotFoundError", "NameError", "UsageError"))
    known = finding.symptom != doctor.UNKNOWN.name and finding.symptom not in OF_OLD_CODE
    return known and not missing


def _is_brought(finding: Change, brought: set[str]) -> bool:
    """Whether the notebook itself installs the package whose import would fail."""
    lost = re.match(r"ModuleNotFoundError: No module named '(\w+)'$", finding.what)
    return lost is not None and _packages.canonical(lost[1]) in brought


def _explained(source: _source.Source, problem: _calls.Problem) -> Change:
    symptom = doctor.explain(problem.error)
    other = {"what": problem.error}
    if symptom is doctor.UNKNOWN:
        other["today"] = _next_step(problem)
    place, text = source.at(problem.node)
    return _found(place, text, problem.kind, symptom.name, problem.word, **other)


def _found(
    place: _source.Place, text: str, kind: str, name: str, word: str, **other: str
) -> Change:
    """A finding that an entry of the catalog tells; `other` replaces what it says."""
    symptom = doctor.SYMPTOMS.get(name, doctor.UNKNOWN)
    told = {"what": symptom.cause, "today": symptom.cure} | other
    chapter = symptom.proof[0] if symptom.proof else ""
    text = shorten(text.strip())
    return Change(
        place.cell, place.line, text, kind, chapter=chapter, symptom=name, word=word, **told
    )


def _next_step(problem: _calls.Problem) -> str:
    """What to do about what the catalog does not know: names that are spelled alike."""
    if problem.error.startswith("ModuleNotFoundError"):
        return f"install what `{problem.word}` is from, or bring the file; it is not the course's"
    near = difflib.get_close_matches(problem.word, problem.alike, n=3, cutoff=0.6)
    if near:
        return f"not in the course's catalog; spelled alike: {', '.join(near)}"
    return "not in the course's catalog: leave it out, or look into the library's release notes"
