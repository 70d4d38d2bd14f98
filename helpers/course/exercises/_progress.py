"""Which exercises are solved: a small local file, and the bars made of it (all chapters).

Only the numbers of solved exercises are kept, never an answer; nothing leaves the machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from helpers import _files, runtime
from helpers._report import Markup, Shown, table

FILE = "exercises.json"


def path() -> Path:
    """The file, in the course's cache folder (on a pod: on the volume)."""
    return runtime.cache_folder() / FILE


def load() -> tuple[set[str], str]:
    """The numbers of the solved exercises, and a note when the file could not be read.

    A file that is no list of numbers is set aside as `exercises.json.broken`.
    """
    file = path()
    try:
        solved = json.loads(file.read_text(encoding="utf-8"))["solved"]
        if not all(isinstance(number, str) for number in solved):
            raise ValueError("not a list of exercise numbers")
    except FileNotFoundError:
        return set(), ""
    except (ValueError, KeyError, TypeError) as error:
        aside = file.with_suffix(".json.broken")
        file.replace(aside)
        note = f"The progress file could not be read ({error}); it is now {aside.name}."
        return set(), note
    return set(solved), ""


def add(number: str) -> tuple[set[str], str]:
    """Write down that an exercise is solved; returns all solved numbers and a note.

    Never in the way of a lesson: a disk that cannot be written to becomes a note.
    """
    from filelock import FileLock

    try:
        with FileLock(path().with_suffix(".lock"), timeout=5):
            solved, note = load()
            if number not in solved:
                solved.add(number)
                _files.write_whole(path(), json.dumps({"solved": sorted(solved)}))
    except OSError as error:
        return {number}, f"Your progress could not be saved: {error}"
    return solved, note


@dataclass(frozen=True, repr=False)
class Progress(Shown):
    """Solved exercises by chapter; shows itself as bars."""

    chapters: dict[str, tuple[int, int]]  # {'0': (solved, all), ...}, in the course's order
    note: str = ""

    def __str__(self) -> str:
        lines = [
            f"{_title(chapter):10} {bar(solved, total)} {solved} of {total}"
            for chapter, (solved, total) in self.chapters.items()
        ]
        return "\n".join([*lines, self.note] if self.note else lines)

    def _repr_html_(self) -> str:
        rows = []
        for chapter, (solved, total) in self.chapters.items():
            width = f"width:{100 * solved / total:.0f}%;height:12px;background:#009E73"
            track = f"<div style='width:240px;background:#E4E4E4'><div style='{width}'></div></div>"
            rows.append((_title(chapter), Markup(track), f"{solved} of {total}"))
        return table(rows, row_heads=True) + (f"<p>{self.note}</p>" if self.note else "")


def bar(solved: int, total: int) -> str:
    """One square for each exercise: filled ones are solved."""
    return "■" * solved + "□" * (total - solved)


def _title(chapter: str) -> str:
    return f"Chapter {chapter}" if chapter.isdigit() else f"Appendix {chapter}"
