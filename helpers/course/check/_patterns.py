"""What no signature tells: code that still runs and means something else, one reader each.

A pattern looks at the calls of a whole notebook and names an entry of the doctor's catalog,
where cause and cure stand. Each is held by a test that runs the libraries and sees it happen.
"""

from __future__ import annotations

from collections.abc import Iterator

from helpers.course.check import _pattern_models, _pattern_rows, _pattern_training
from helpers.course.check._program import Program
from helpers.course.check._reading import PATTERNS, Hit, Reading

__all__ = ["Hit", "hits"]
_ROOMS = (_pattern_rows, _pattern_training, _pattern_models)  # importing them registers theirs


def hits(program: Program) -> Iterator[Hit]:
    """What all patterns find."""
    reading = Reading(program)
    for one in PATTERNS:
        yield from one(reading)
