"""Exercises that check themselves: `check`, `hint`, `show`, `progress` (all chapters).

Each chapter has one file here with a list `EXERCISES`. A check reads the answer you give,
says what is off when it is wrong, and never gives the solution away; `show` does, when
asked. Nothing needs a network; what is solved is kept in a small local file.
"""

import functools
import html
import importlib
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from helpers.course.exercises import _progress

__all__ = ["Exercise", "Result", "Wrong", "check", "given", "hint", "progress", "show"]


class Wrong(Exception):
    """Raised by a check with feedback that says what is off."""


def one_number(answer):
    """The answer as a float, whatever kind of number it came as; for checks."""
    try:
        if isinstance(answer, bool):
            raise TypeError
        return float(answer)
    except (TypeError, ValueError, RuntimeError):  # the last: a tensor of many
        raise Wrong(f"The answer should be one number, not {str(answer)[:60]!r}.") from None


def near(a, b, tolerance=1e-3):
    """True when `a` is `b` but for a relative `tolerance`; for checks."""
    return abs(a - b) <= tolerance * abs(b)


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    check: takes the answer, raises `Wrong(feedback)` or returns a closing remark.
    hints: from a nudge to almost there. solution: source text that defines `answer`;
    it may use `given`, what the optional function `given()` returns.
    """

    number: str
    title: str
    check: Callable
    hints: tuple = ()
    solution: str = ""
    given: Callable | None = None


@dataclass(frozen=True)
class Result:
    """What a check, hint or solution has to say; shows itself in a notebook."""

    number: str
    state: str  # 'right', 'wrong', 'open', 'hint', 'solution'
    message: str
    code: str = field(default="", repr=False)

    @property
    def passed(self):
        """True when the answer was right."""
        return self.state == "right"

    def __str__(self):
        sign = {"right": "✓", "wrong": "✗", "open": "○"}.get(self.state, "·")
        text = f"{sign} {self.number}  {self.message}"
        return f"{text}\n\n{self.code}" if self.code else text

    __repr__ = __str__

    def _repr_html_(self):
        color = {"right": "#009E73", "wrong": "#D55E00", "hint": "#0072B2"}
        word = {
            "right": "right",
            "wrong": "not yet",
            "open": "waiting for your answer",
            "hint": "hint",
            "solution": "one solution",
        }[self.state]
        code = f"<pre>{html.escape(self.code)}</pre>" if self.code else ""
        return (
            f"<div style='border-left:4px solid {color.get(self.state, '#8C8C8C')};"
            f"padding:2px 10px'><b>{self.number}: {word}.</b> "
            f"{_inline_code(self.message)}{code}</div>"
        )


def _inline_code(text):
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


@functools.cache
def catalogue():
    """All exercises by number, in order."""
    found = {}
    names = (module.name for module in pkgutil.iter_modules(__path__))
    names = [name for name in names if not name.startswith("_")]
    for name in sorted(names, key=lambda name: (name.startswith("appendix"), name)):
        for exercise in importlib.import_module(f"{__name__}.{name}").EXERCISES:
            if exercise.number in found:
                raise ValueError(f"exercise {exercise.number} is defined twice")
            found[exercise.number] = exercise
    return found


_hints_given = {}


def check(number, answer):
    """Check an answer: `check("2.3", answer)`. `...` counts as not answered yet.

    Returns a `Result` that displays itself; `.passed` says whether the answer was right.
    Raises ValueError for an unknown number.
    """
    exercise = _find(number)
    if answer is ...:
        title = exercise.title if exercise.title[-1] in ".?!" else f"{exercise.title}."
        message = f"{title} Replace the `...`, or ask for `hint({number!r})`."
        return Result(number, "open", message)
    try:
        remark = exercise.check(answer)
    except Wrong as feedback:
        return Result(number, "wrong", str(feedback))
    except Exception as error:  # a reader's function may raise anything: say so kindly
        message = f"Your answer raised {type(error).__name__}: {error}"
        return Result(number, "wrong", message)
    return Result(number, "right", f"{remark or exercise.title} {_solved(number)}")


def _solved(number):
    solved, note = _progress.add(number)
    bar = _progress.bar(*_count(number.split(".")[0], solved))
    return f"{bar} {note}".rstrip()


def _count(chapter, solved):
    numbers = [n for n in catalogue() if n.split(".")[0] == chapter]
    return sum(n in solved for n in numbers), len(numbers)


def progress():
    """What you have solved so far, as a bar for each chapter.

    Kept as a list of numbers in the course's cache folder (`runtime.cache_folder()`); your
    answers are not. In Colab that folder lives as long as the machine does.
    """
    solved, note = _progress.load()
    chapters = dict.fromkeys(number.split(".")[0] for number in catalogue())
    return _progress.Progress({c: _count(c, solved) for c in chapters}, note)


def hint(number):
    """The next hint for an exercise; after the last one, the last one again."""
    exercise = _find(number)
    if not exercise.hints:
        return Result(number, "hint", f"There is none; `show({number!r})` has a solution.")
    given_so_far = _hints_given.get(number, 0)
    index = min(given_so_far, len(exercise.hints) - 1)
    _hints_given[number] = given_so_far + 1
    return Result(number, "hint", f"({index + 1}/{len(exercise.hints)}) {exercise.hints[index]}")


def show(number):
    """One solution of an exercise, as code."""
    exercise = _find(number)
    return Result(number, "solution", exercise.title, code=exercise.solution.strip())


def given(number):
    """The material an exercise starts from (a broken model, say), made afresh."""
    exercise = _find(number)
    if exercise.given is None:
        raise ValueError(f"number={number!r}: this exercise needs no material; just answer it")
    return exercise.given()


def _find(number):
    exercises = catalogue()
    if number not in exercises:
        numbers = ", ".join(exercises) or "none yet"
        raise ValueError(f"number must name an exercise ({numbers}), not {number!r}")
    return exercises[number]
