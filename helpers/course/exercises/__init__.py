"""Exercises that check themselves: `check`, `hint`, `show`, `progress` (all chapters).

Each chapter has one file here with a list `EXERCISES`. A check reads the answer you give,
says what is off when it is wrong, and never gives the solution away; `show` does, when
asked. Nothing needs a network; what is solved is kept in a small local file.
"""

from __future__ import annotations

import functools
import html
import importlib
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from helpers._report import Shown
from helpers.course.exercises import _progress

__all__ = ["Exercise", "Result", "Wrong", "check", "given", "hint", "progress", "show"]


class Wrong(Exception):
    """Raised by a check with feedback that says what is off."""


def one_number(answer: Any) -> float:
    """The answer as a float, whatever kind of number it came as; for checks.

    Args:
        answer: a reader's; `Wrong` when it is not one number.

    Example:
        >>> one_number("3")
        3.0
    """
    try:
        if isinstance(answer, bool):
            raise TypeError
        return float(answer)
    except (TypeError, ValueError, RuntimeError):  # the last: a tensor of many
        raise Wrong(f"The answer should be one number, not {str(answer)[:60]!r}.") from None


def near(a: float, b: float, tolerance: float = 1e-3) -> bool:
    """True when `a` is `b` but for a relative tolerance; for checks.

    Args:
        a: the answer.
        b: what it should be.
        tolerance: of `b`'s size.

    Example:
        >>> near(100.05, 100), near(101, 100)
        (True, False)
    """
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
    check: Callable[[Any], str | None]
    hints: tuple[str, ...] = ()
    solution: str = ""
    given: Callable[[], Any] | None = None


@dataclass(frozen=True, repr=False)
class Result(Shown):
    """What a check, hint or solution has to say; shows itself in a notebook."""

    number: str
    state: str  # 'right', 'wrong', 'open', 'hint', 'solution'
    message: str
    code: str = field(default="", repr=False)

    @property
    def passed(self) -> bool:
        """True when the answer was right."""
        return self.state == "right"

    def __str__(self) -> str:
        sign = {"right": "✓", "wrong": "✗", "open": "○"}.get(self.state, "·")
        text = f"{sign} {self.number}  {self.message}"
        return f"{text}\n\n{self.code}" if self.code else text

    def _repr_html_(self) -> str:
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


def _inline_code(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


@functools.cache
def catalog() -> dict[str, Exercise]:
    """All exercises by number, in order."""
    found: dict[str, Exercise] = {}
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name[0] != "_"]
    for name in sorted(names, key=lambda name: (name.startswith("appendix"), name)):
        for exercise in importlib.import_module(f"{__name__}.{name}").EXERCISES:
            if exercise.number in found:
                raise ValueError(f"exercise {exercise.number} is defined twice")
            found[exercise.number] = exercise
    return found


_hints_given: dict[str, int] = {}


def check(number: str, answer: Any) -> Result:
    """Check an answer.

    Args:
        number: of the exercise, such as '2.3'; ValueError for an unknown one.
        answer: yours; `...` counts as not answered yet.

    Returns:
        A `Result` that displays itself; `.passed` says whether the answer was right.

    Example:
        >>> check("B.1", ...).state
        'open'
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


def _solved(number: str) -> str:
    solved, note = _progress.add(number)
    bar = _progress.bar(*_count(number.split(".")[0], solved))
    return f"{bar} {note}".rstrip()


def _count(chapter: str, solved: set[str]) -> tuple[int, int]:
    numbers = [n for n in catalog() if n.split(".")[0] == chapter]
    return sum(n in solved for n in numbers), len(numbers)


def progress() -> _progress.Progress:
    """What you have solved so far, as a bar for each chapter.

    Kept as a list of numbers in the course's cache folder (`runtime.cache_folder()`); your
    answers are not. In Colab that folder lives as long as the machine does.
    """
    solved, note = _progress.load()
    chapters = dict.fromkeys(number.split(".")[0] for number in catalog())
    return _progress.Progress({c: _count(c, solved) for c in chapters}, note)


def hint(number: str) -> Result:
    """The next hint for an exercise; after the last one, the last one again.

    Args:
        number: of the exercise, such as '2.3'.
    """
    exercise = _find(number)
    if not exercise.hints:
        return Result(number, "hint", f"There is none; `show({number!r})` has a solution.")
    given_so_far = _hints_given.get(number, 0)
    index = min(given_so_far, len(exercise.hints) - 1)
    _hints_given[number] = given_so_far + 1
    return Result(number, "hint", f"({index + 1}/{len(exercise.hints)}) {exercise.hints[index]}")


def show(number: str) -> Result:
    """One solution of an exercise, as code.

    Args:
        number: of the exercise, such as '2.3'.
    """
    exercise = _find(number)
    return Result(number, "solution", exercise.title, code=exercise.solution.strip())


def given(number: str) -> Any:
    """The material an exercise starts from (a broken model, say), made afresh.

    Args:
        number: of the exercise; ValueError for one that needs none.
    """
    exercise = _find(number)
    if exercise.given is None:
        raise ValueError(f"number={number!r}: this exercise needs no material; just answer it")
    return exercise.given()


def _find(number: str) -> Exercise:
    exercises = catalog()
    if number not in exercises:
        numbers = ", ".join(exercises) or "none yet"
        raise ValueError(f"number must name an exercise ({numbers}), not {number!r}")
    return exercises[number]
