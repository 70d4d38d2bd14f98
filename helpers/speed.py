"""Fair timing: a median with its spread, and comparisons whose turns alternate.

Introduced in Chapter 2 (mixed precision, quantized layers), used again in Chapter 5.

`time.time()` around one call misleads in five ways. A GPU returns before it has finished.
The first call pays for everyone (lazy loading, memory pools, compiled kernels). A single
sample hides its noise. A machine that slows down half-way punishes whichever candidate
ran second. And a result that is still alive while the next one is computed changes what
is measured. `torch.utils.benchmark` underneath takes care of synchronization, block sizes
and the garbage collector; this module warms up, takes turns and prints.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.utils import benchmark as torch_benchmark

NOISY = 0.10  # a middle half wider than this share of the median deserves a word of warning


@dataclass(frozen=True, repr=False)
class Timing:
    """How long one call takes: seconds, as a distribution.

    name: what was timed. times: seconds per call, one entry per timed block of calls.
    rounds: the median of each round, in order, which shows a drift. runs: number of timed
    calls. threads: CPU threads that torch was allowed to use.
    """

    name: str
    times: tuple[float, ...] = field(repr=False)
    rounds: tuple[float, ...]
    runs: int
    threads: int

    @property
    def median(self):
        """Seconds per call: half of the blocks were faster, half slower."""
        return _quantile(self.times, 0.50)

    @property
    def quartiles(self):
        """Seconds per call that bound the middle half of the blocks: `(lower, upper)`."""
        return _quantile(self.times, 0.25), _quantile(self.times, 0.75)

    @property
    def iqr(self):
        """Interquartile range in seconds: the width of the middle half of the blocks."""
        lower, upper = self.quartiles
        return upper - lower

    @property
    def is_noisy(self):
        """Whether the middle half is wider than a tenth of the median."""
        return self.iqr > NOISY * self.median

    def __repr__(self):
        lower, upper = map(format_seconds, self.quartiles)
        calls, threads = _count(self.runs, "call"), _count(self.threads, "thread")
        text = f"{self.name}: {format_seconds(self.median)} per call"
        text += f" (middle half {lower} to {upper}; {calls}, {threads})"
        return text + (", noisy: something else is using this machine" * self.is_noisy)


@dataclass(frozen=True, repr=False)
class Comparison:
    """Timings taken turn by turn; prints as a table, and `comparison["name"]` is a Timing.

    timings: `{name: Timing}` in the order given; the first one is the yardstick.
    """

    timings: dict[str, Timing]

    def __getitem__(self, name):
        return self.timings[name]

    @property
    def fastest(self):
        """Name of the candidate with the smallest median."""
        return min(self.timings, key=lambda name: self.timings[name].median)

    def ratio(self, name, to=None):
        """Time of `name` over time of `to` (default: the first); 2.0 is twice as long."""
        to = next(iter(self.timings)) if to is None else to
        return self.timings[name].median / self.timings[to].median

    def ratio_range(self, name, to=None):
        """Smallest and largest ratio seen within a single round: what noise does to it.

        Both halves of such a ratio were timed moments apart, so a machine that slows down
        during the measurement moves both and leaves the ratio alone.
        """
        to = next(iter(self.timings)) if to is None else to
        pairs = zip(self.timings[name].rounds, self.timings[to].rounds, strict=True)
        ratios = [mine / yardstick for mine, yardstick in pairs]
        return min(ratios), max(ratios)

    @property
    def table(self):
        """The comparison as a `pandas.DataFrame` of numbers: seconds, calls, ratios."""
        import pandas

        ranges = [self.ratio_range(name) for name in self.timings]
        columns = {
            "median (s)": [timing.median for timing in self.timings.values()],
            "IQR (s)": [timing.iqr for timing in self.timings.values()],
            "calls": [timing.runs for timing in self.timings.values()],
            "× first": [self.ratio(name) for name in self.timings],
            "× first, lowest round": [low for low, _ in ranges],
            "× first, highest round": [high for _, high in ranges],
            "× fastest": [self.ratio(name, self.fastest) for name in self.timings],
        }
        return pandas.DataFrame(columns, index=list(self.timings))

    def _formatted(self):
        """`table` for human eyes: units that fit, three digits, one column per idea."""
        import pandas

        table, ratio = self.table, "{:.3g}".format
        lows, highs = table["× first, lowest round"], table["× first, highest round"]
        columns = {
            "time per call": table["median (s)"].map(format_seconds),
            "spread (IQR)": table["IQR (s)"].map(format_seconds),
            "calls": table["calls"],
            "× first": table["× first"].map(ratio),
            "in each round": lows.map(ratio) + " to " + highs.map(ratio),
            "× fastest": table["× fastest"].map(ratio),
        }
        return pandas.DataFrame(columns, index=table.index)

    def __repr__(self):
        return self._formatted().to_string()

    def _repr_html_(self):
        return self._formatted().to_html(border=0)


def benchmark(function, *arguments, min_run_time=0.5, rounds=3, name=None):
    """Time `function(*arguments)`: median, spread, number of calls (Chapter 2).

    min_run_time: seconds of timed calls to spend in all; a call that takes longer than that
    is still timed once per round, with one untimed call before it. The result's `.median`
    and `.iqr` are seconds per call, waiting for the GPU included where there is one.
    Raises TypeError if `function` cannot be called, ValueError for a budget that is not
    positive; what the function raises comes through unchanged.
    """
    _check_callable(function, "function")
    _check_budget(min_run_time, rounds)
    name = name or getattr(function, "__name__", type(function).__name__)
    return _take_turns({name: function}, arguments, min_run_time, rounds)[name]


def compare(functions, *arguments, min_run_time=0.5, rounds=5):
    """Time several functions on the same arguments, in turns: A, B, A, B ... (Chapter 2).

    functions: `{name: function}`, two or more; the first is the yardstick of the ratios.
    min_run_time: seconds of timed calls for each of them, spread over `rounds` turns, so
    that a machine which slows down half-way slows everyone down alike.
    Raises TypeError or ValueError as `benchmark` does, naming the candidate.
    """
    _check_budget(min_run_time, rounds)
    if not isinstance(functions, Mapping) or not all(isinstance(k, str) for k in functions):
        raise TypeError(
            "functions must be a dictionary {name: function} with text as names; "
            f"got {_describe(functions)}"
        )
    if len(functions) < 2:
        raise ValueError(
            f"functions must hold at least two candidates; got {list(functions)}. "
            "To time one function, use speed.benchmark(function)"
        )
    for name, function in functions.items():
        _check_callable(function, f"functions[{name!r}]")
    return Comparison(_take_turns(functions, arguments, min_run_time, rounds))


def format_seconds(seconds):
    """A duration with three digits and the unit that suits it: `"12.3 ms"`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * size:
            return f"{seconds / size:#.3g}".removesuffix(".") + f" {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _take_turns(functions, arguments, min_run_time, rounds):
    """Time each function once per round, in the order given: `{name: Timing}`."""
    timers, measured = {}, {name: [] for name in functions}
    for name, function in functions.items():
        function(*arguments)  # the first call pays for lazy loading, and is not counted
        timers[name] = torch_benchmark.Timer(
            # A bare expression: its result is dropped before the next call begins, so two
            # outputs never share the memory, and none is handed from one call to the next.
            stmt="function(*arguments)",
            globals={"function": function, "arguments": arguments},
            num_threads=torch.get_num_threads(),  # torch's default, 1, is not how you train
        )
    for _ in range(rounds):
        for name, timer in timers.items():
            measured[name].append(timer.blocked_autorange(min_run_time=min_run_time / rounds))
    return {
        name: Timing(
            name=name,
            times=tuple(seconds for turn in turns for seconds in turn.times),
            rounds=tuple(turn.median for turn in turns),
            runs=sum(turn.number_per_run * len(turn.raw_times) for turn in turns),
            threads=turns[0].num_threads,
        )
        for name, turns in measured.items()
    }


def _check_callable(function, argument):
    if not callable(function):
        raise TypeError(
            f"{argument} must be something to call, such as `lambda: model(x)`; "
            f"got {_describe(function)}"
        )


def _check_budget(min_run_time, rounds):
    number = isinstance(min_run_time, (int, float)) and not isinstance(min_run_time, bool)
    if not number or not 0 < min_run_time < math.inf:
        raise ValueError(
            f"min_run_time must be a positive number of seconds, such as 0.5; got {min_run_time!r}"
        )
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise ValueError(f"rounds must be a whole number of at least 1; got {rounds!r}")


def _quantile(values, share):
    """The value below which `share` of the values lie, by linear interpolation."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
    return low + (high - low) * (position % 1)


def _count(number, noun):
    return f"{number:,} {noun}" + ("s" * (number != 1))


def _describe(value):
    text = repr(value)
    return f"{type(value).__name__} {text[:57] + '...' if len(text) > 60 else text}"
