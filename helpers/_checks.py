"""Bad input in one sentence: the argument, what came, what would work."""

import numbers
from collections.abc import Iterable
from typing import Any


def one_of(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        listing = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {listing}, not {value!r}")


def whole_number(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """`value` as an int of [least, most]; TypeError for another type, ValueError outside."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    number = int(value)
    if number < least or (most is not None and number > most):
        span = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {span}, not {value}")
    return number
