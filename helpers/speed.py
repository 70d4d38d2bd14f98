"""Fair timing: a median with its spread, and comparisons that take turns (Chapters 2, 5).

`time.time()` around one call misleads: a GPU returns before it has finished, the first call
pays for everyone, one sample hides its noise, and a machine that slows down half-way
punishes whoever ran second. `torch.utils.benchmark` synchronizes and chooses the block
sizes; this module warms up, takes turns and prints.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.benchmark import Measurement, Timer, select_unit, trim_sigfig

from helpers._checks import whole_number
from helpers._report import Shown, counted, shorten

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Timing(Shown):
    """How long one call takes: a distribution of seconds.

    Attributes:
        name: what was timed.
        rounds: torch's `Measurement` of each round, in order.
    """

    name: str
    rounds: tuple[Measurement, ...]

    @property
    def blocks(self) -> Measurement:
        """All rounds as one `Measurement`, whose `.times` are seconds per call."""
        return Measurement.merge(self.rounds)[0]

    @property
    def calls(self) -> int:
        """How many were timed."""
        return sum(m.number_per_run * len(m.raw_times) for m in self.rounds)

    @property
    def median(self) -> float:
        """Seconds per call: half of the timed blocks were faster."""
        return self.blocks.median

    @property
    def iqr(self) -> float:
        """Seconds between the quartiles: the width of the middle half of the blocks."""
        return self.blocks.iqr

    def __str__(self) -> str:
        effort = f"{counted(self.calls, 'call')}, {counted(self.blocks.num_threads, 'thread')}"
        noisy = "" if self.blocks.meets_confidence() else ", noisy: something else runs here"
        time, spread = _in_units(self.median), _in_units(self.iqr)
        return f"{self.name}: {time} per call (IQR {spread}; {effort}){noisy}"


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """Timings taken turn by turn; prints as a table, and `comparison["name"]` is a Timing.

    Attributes:
        timings: {name: Timing} in the order given; the first one is the yardstick.
    """

    timings: dict[str, Timing]

    def __getitem__(self, name: str) -> Timing:
        return self.timings[name]

    def table(self) -> pd.DataFrame:
        """A row per candidate: seconds, calls, and ratios (2.0 takes twice as long).

        'in each round' holds the smallest and the largest ratio to the first: both halves
        were timed moments apart, so a machine that slows down moves both.
        """
        import pandas as pd

        first = next(iter(self.timings.values()))
        fastest = min(timing.median for timing in self.timings.values())
        rows = []
        for timing in self.timings.values():
            pairs = zip(timing.rounds, first.rounds, strict=True)
            ratios = [mine.median / yardstick.median for mine, yardstick in pairs]
            row = [timing.median, timing.iqr, timing.calls, timing.median / first.median]
            rows.append([*row, (min(ratios), max(ratios)), timing.median / fastest])
        columns = ["time per call", "spread (IQR)", "calls", "× first", "in each round"]
        return pd.DataFrame(rows, index=list(self.timings), columns=[*columns, "× fastest"])

    def __str__(self) -> str:
        return self.table().to_string(formatters=_FORMATS)

    def _repr_html_(self) -> str:
        return self.table().to_html(formatters=_FORMATS, border=0)


def benchmark(
    function: Callable[..., object],
    *arguments: object,
    min_run_time: float = 0.5,
    rounds: int = 3,
    name: str | None = None,
) -> Timing:
    """Time `function(*arguments)`: median, spread, number of calls (Chapter 2).

    Args:
        function: what to call; whatever it raises comes through.
        arguments: what to call it with.
        min_run_time: seconds of timed calls in all; a call that takes longer is still timed
            once per round, after one untimed call.
        rounds: how many turns to spread them over.
        name: what to call it in print; default: the function's own.

    Raises:
        TypeError: `function` cannot be called.
        ValueError: `min_run_time` or `rounds` is not positive.

    Example:
        >>> benchmark(sorted, [3, 1, 2], min_run_time=0.001).median < 1
        True
    """
    name = name or str(getattr(function, "__name__", type(function).__name__))
    return _take_turns({name: function}, arguments, min_run_time, rounds)[name]


def compare(
    functions: Mapping[str, Callable[..., object]],
    *arguments: object,
    min_run_time: float = 0.5,
    rounds: int = 5,
) -> Comparison:
    """Time several functions on the same arguments, in turns: A, B, A, B ... (Chapter 2).

    Args:
        functions: {name: function}, two or more; the first is the yardstick of the ratios.
        arguments: what to call each of them with.
        min_run_time: seconds of timed calls for each of them, over all rounds.
        rounds: how many turns each gets; a machine that slows down slows them all alike.

    Raises:
        TypeError: `functions` is no such dictionary.
        ValueError: it holds fewer than two, or a number is not positive.

    Example:
        >>> functions = {"sorted": sorted, "sum": sum}
        >>> compare(functions, [3, 1, 2], min_run_time=0.001).table().loc["sorted", "× first"]
        np.float64(1.0)
    """
    if not isinstance(functions, Mapping) or not all(isinstance(k, str) for k in functions):
        what = f"{type(functions).__name__} {shorten(functions, 60)}"
        raise TypeError(f"functions must be a dictionary {{'name': function}}, not {what}")
    if len(functions) < 2:
        alone = f"not {list(functions)}; for one function there is speed.benchmark(function)"
        raise ValueError(f"functions must hold at least two candidates, {alone}")
    return Comparison(_take_turns(functions, arguments, min_run_time, rounds))


def _take_turns(
    functions: Mapping[str, Any], arguments: tuple[object, ...], min_run_time: float, rounds: int
) -> dict[str, Timing]:
    whole_number("rounds", rounds)
    real = isinstance(min_run_time, numbers.Real) and not isinstance(min_run_time, bool)
    if not real or not 0 < min_run_time < math.inf:
        raise ValueError(f"min_run_time must be seconds such as 0.5, not {min_run_time!r}")
    for name, function in functions.items():
        if not callable(function):
            advice = f"such as `lambda: model(x)`, not {type(function).__name__} {function!r}"
            raise TypeError(f"function {name!r} must be something to call, {advice}")
    timers = {}
    for name, function in functions.items():
        function(*arguments)  # the first call pays for lazy loading, and is not counted
        timers[name] = Timer(
            # A bare expression: its result is dropped before the next call begins, so two
            # outputs never share the memory, and none is handed from one call to the next.
            stmt="function(*arguments)",
            globals={"function": function, "arguments": arguments},
            num_threads=torch.get_num_threads(),  # torch's default, 1, is not how you train
        )
    measured: dict[str, list[Measurement]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            measured[name].append(timer.blocked_autorange(min_run_time=min_run_time / rounds))
    return {name: Timing(name, tuple(turns)) for name, turns in measured.items()}


def _in_units(seconds: float) -> str:
    """'12.3 ms': three digits and the unit that suits them."""
    unit, size = select_unit(trim_sigfig(seconds, 3)) if seconds else ("ns", 1e-9)
    return f"{seconds / size:#.3g}".removesuffix(".") + f" {unit.replace('us', 'µs')}"


_FORMATS: dict[str, Any] = {
    "time per call": _in_units,
    "spread (IQR)": _in_units,
    "× first": "{:.3g}".format,
    "in each round": lambda ends: "{:.3g} to {:.3g}".format(*ends),
    "× fastest": "{:.3g}".format,
}
