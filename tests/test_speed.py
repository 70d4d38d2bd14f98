"""Timing without timed assertions: structure, order, memory and messages."""

import itertools
import statistics
import weakref

import pytest
import torch
from torch.utils.benchmark import Measurement
from torch.utils.benchmark.utils.common import TaskSpec

from helpers import speed


class Recorder:
    """A function that notes who was called, and whether an earlier result still lives."""

    def __init__(self):
        self.calls, self.alive, self.overlaps = [], weakref.WeakSet(), 0

    def make(self, name, seconds=0.002):
        def function(*arguments):
            self.overlaps += len(self.alive) > 0
            self.calls.append(name)
            spin(seconds)
            result = torch.empty(8)
            self.alive.add(result)
            return result

        return function


def spin(seconds):
    import time

    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_benchmark_reports_a_distribution_of_seconds():
    timing = speed.benchmark(torch.matmul, torch.eye(8), torch.eye(8), min_run_time=0.02)
    times = timing.blocks.times
    assert timing.name == "matmul"
    assert 0 < min(times) <= timing.median <= max(times)
    quartiles = statistics.quantiles(times, n=4, method="inclusive")
    assert timing.median == pytest.approx(statistics.median(times))
    assert timing.iqr == pytest.approx(quartiles[2] - quartiles[0])
    assert timing.calls >= len(times) >= len(timing.rounds) == 3
    assert str(timing) == repr(timing)
    assert "matmul: " in str(timing) and "per call" in str(timing) and "calls" in str(timing)


def test_threads_are_the_ones_torch_uses_and_stay_so():
    before = torch.get_num_threads()
    seen = []
    try:
        torch.set_num_threads(2)
        timing = speed.benchmark(lambda: seen.append(torch.get_num_threads()), min_run_time=0.01)
        assert set(seen) == {2} and "2 threads" in str(timing)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_slow_function_is_called_a_handful_of_times():
    recorder = Recorder()
    timing = speed.benchmark(recorder.make("slow", 0.02), min_run_time=0.001, rounds=3)
    assert timing.calls == len(timing.blocks.times) == 3
    assert len(recorder.calls) <= 7


@pytest.mark.parametrize("rounds", [1, 4])
def test_candidates_take_turns(rounds):
    recorder = Recorder()
    functions = {name: recorder.make(name) for name in "AB"}
    comparison = speed.compare(functions, min_run_time=0.004, rounds=rounds)
    turns = [name for name, _ in itertools.groupby(recorder.calls)]
    assert "".join(turns) == "AB" * (1 + rounds)  # one warm-up each, then the rounds
    assert all(len(comparison[name].rounds) == rounds for name in "AB")


def test_no_result_is_alive_while_the_next_is_computed():
    recorder = Recorder()
    speed.compare({name: recorder.make(name) for name in "AB"}, min_run_time=0.02)
    assert len(recorder.calls) > 4 and recorder.overlaps == 0


def test_arguments_reach_every_candidate():
    seen = set()
    functions = {
        "first": lambda *a: seen.add(("first", a)),
        "b": lambda *a: seen.add(("b", a)),
    }
    speed.compare(functions, 1, "two", min_run_time=0.001)
    assert seen == {("first", (1, "two")), ("b", (1, "two"))}


def timing(name, *seconds):
    """What one call per round would give."""
    task = TaskSpec(stmt=name, setup="")
    return speed.Timing(name, tuple(Measurement(1, [s], task) for s in seconds))


def test_ratios_tables_and_their_text():
    comparison = speed.Comparison(
        {"slow": timing("slow", 0.02, 0.03, 0.04), "fast": timing("fast", 0.01, 0.01, 0.02)}
    )
    table = comparison.table()
    assert list(table.index) == ["slow", "fast"]
    assert table["time per call"].tolist() == pytest.approx([0.03, 0.01])
    assert table["spread (IQR)"].tolist() == pytest.approx([0.01, 0.005])
    assert table["calls"].tolist() == [3, 3]
    assert table["× first"].tolist() == pytest.approx([1, 1 / 3])
    assert table["× fastest"].tolist() == pytest.approx([3, 1])
    assert table.loc["fast", "in each round"] == pytest.approx((1 / 3, 1 / 2))
    for text in (str(comparison), repr(comparison), comparison._repr_html_()):
        assert "30.0 ms" in text and "0.333" in text and "0.333 to 0.5" in text


def test_noise_is_said_aloud():
    assert "noisy" in repr(timing("f", 1.0, 1.5, 2.0))
    assert "noisy" not in repr(timing("f", 1.0, 1.01, 1.02))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2, "2.00 s"),
        (123.4, "123 s"),
        (0.9996, "1.00 s"),
        (0.0123, "12.3 ms"),
        (9.9996e-4, "1.00 ms"),
        (4.5e-6, "4.50 µs"),
        (25e-9, "25.0 ns"),
    ],
)
def test_durations_choose_their_unit(seconds, text):
    said = str(timing("f", seconds))
    assert f"f: {text} per call" in said and "IQR 0.00 ns" in said


def test_what_the_function_raises_comes_through():
    with pytest.raises(ZeroDivisionError):
        speed.benchmark(lambda: 1 / 0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: speed.benchmark(42), TypeError, r"must be something to call.*int 42"),
        (
            lambda: speed.benchmark(len, [], min_run_time=0),
            ValueError,
            "min_run_time.*not 0",
        ),
        (
            lambda: speed.benchmark(len, [], min_run_time="1"),
            ValueError,
            "min_run_time.*'1'",
        ),
        (lambda: speed.benchmark(abs, 1, rounds=0), ValueError, "rounds.*not 0"),
        (
            lambda: speed.compare([len, abs]),
            TypeError,
            "must be a dictionary.*list",
        ),
        (lambda: speed.compare({1: len, 2: abs}), TypeError, "dictionary.*'name': function"),
        (
            lambda: speed.compare({"only": len}),
            ValueError,
            "two.*only.*benchmark",
        ),
        (
            lambda: speed.compare({"a": len, "b": 3}),
            TypeError,
            "'b' must be something to call.*int 3",
        ),
    ],
)
def test_wrong_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.gpu
def test_cuda_work_is_waited_for():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA card: run `python -m pytest -m gpu` where there is one")
    x = torch.randn(4096, 4096, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    x @ x
    start.record()
    for _ in range(20):
        x @ x
    end.record()
    torch.cuda.synchronize()
    by_events = start.elapsed_time(end) / 20 / 1000
    # A launch that is not waited for is a hundred times shorter than the product.
    assert speed.benchmark(torch.matmul, x, x).median > by_events / 3
