"""Which exercises are solved: a small local file, and the bars made of it (all chapters).

Only the numbers of solved exercises are kept, never an answer; nothing leaves the machine.
"""

import contextlib
import json
import os
import tempfile
from dataclasses import dataclass

from helpers import runtime

FILE = "exercises.json"


def path():
    """The file, in the course's cache folder (on a pod: on the volume)."""
    return runtime.cache_folder() / FILE


def load():
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
        os.replace(file, aside)
        note = f"The progress file could not be read ({error}); it is now {aside.name}."
        return set(), note
    return set(solved), ""


def add(number):
    """Write down that an exercise is solved; returns all solved numbers and a note.

    Never in the way of a lesson: a disk that cannot be written to becomes a note.
    """
    from filelock import FileLock

    try:
        with FileLock(path().with_suffix(".lock"), timeout=5):
            solved, note = load()
            if number not in solved:
                solved.add(number)
                _write({"solved": sorted(solved)})
    except OSError as error:
        return {number}, f"Your progress could not be saved: {error}"
    return solved, note


def _write(content):
    handle, temporary = tempfile.mkstemp(prefix=FILE, dir=path().parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file)
        os.replace(temporary, path())
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@dataclass(frozen=True)
class Progress:
    """Solved exercises by chapter; shows itself as bars.

    chapters: {'0': (solved, all), ...}, in the course's order.
    """

    chapters: dict
    note: str = ""

    def __str__(self):
        lines = [
            f"{_title(chapter):10} {bar(solved, total)} {solved} of {total}"
            for chapter, (solved, total) in self.chapters.items()
        ]
        return "\n".join([*lines, self.note] if self.note else lines)

    __repr__ = __str__

    def _repr_html_(self):
        rows = "".join(
            f"<tr><td style='text-align:left'>{_title(chapter)}</td>"
            f"<td><div style='width:240px;background:#E4E4E4'><div style='width:"
            f"{100 * solved / total:.0f}%;height:12px;background:#009E73'></div></div></td>"
            f"<td style='text-align:left'>{solved} of {total}</td></tr>"
            for chapter, (solved, total) in self.chapters.items()
        )
        return f"<table>{rows}</table>" + (f"<p>{self.note}</p>" if self.note else "")


def bar(solved, total):
    """One square for each exercise: filled ones are solved."""
    return "■" * solved + "□" * (total - solved)


def _title(chapter):
    return f"Chapter {chapter}" if chapter.isdigit() else f"Appendix {chapter}"
