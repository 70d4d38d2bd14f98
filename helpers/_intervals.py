"""A mean and its 95 % interval: by bootstrap, and of a share (Chapters 0, 2 and 3)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

_RESAMPLES = 2000  # sets of sentences that a bootstrap draws


class Interval(NamedTuple):
    """A mean, and the two ends of its 95 % interval, all in the unit of the values."""

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        spec = spec or ".1f"
        low_and_high = spec.removeprefix("+")
        return f"{self.mean:{spec}} ({self.low:{low_and_high}} to {self.high:{low_and_high}})"

    def __str__(self) -> str:
        return format(self)


def interval(
    values: Sequence[float],
    *,
    over: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
) -> Interval:
    """The mean of a value per sentence and its 95 % bootstrap interval (Efron, 1979).

    2,000 times, as many sentences are drawn from these, with repetition, and their mean is
    taken; 95 % of those means lie between the two ends. The draw is always the same.

    Args:
        values: one number per sentence, such as its loss.
        over: the same sentences' values from another model. The interval is then that of the
            difference, sentence by sentence (a *paired* bootstrap), which is mostly far
            narrower than two intervals that are compared by eye. Where it does not hold 0,
            the choice of sentences does not explain the difference.
        weights: how much each sentence counts, such as its number of tokens.

    Raises:
        ValueError: no values, some that are not finite, or lists of different lengths.

    Example:
        >>> losses = [0.9, 1.1, 1.0, 1.2]
        >>> print(f"{interval([0.5, 0.8, 0.6, 0.9], over=losses):.2f}")
        -0.35 (-0.40 to -0.30)
    """
    each = np.asarray(values, dtype=float)
    others = np.zeros_like(each) if over is None else np.asarray(over, dtype=float)
    counts = np.ones_like(each) if weights is None else np.asarray(weights, dtype=float)
    if not each.shape == others.shape == counts.shape or each.ndim != 1 or not each.size:
        raise ValueError(
            "values (and over and weights) must be equally long lists, and not empty; their "
            f"shapes are {each.shape}, {others.shape} and {counts.shape}"
        )
    each = each - others
    if not np.isfinite(each).all() or not counts.min() > 0:
        raise ValueError("values must be finite numbers, and weights positive ones")
    means = [np.average(each[rows], weights=counts[rows]) for rows in draw(len(each))]
    return Interval(float(np.average(each, weights=counts)), *middle(means))


def draw(count: int) -> Iterator[np.ndarray]:
    """The sentences of each resample, by number."""
    generator = np.random.default_rng(0)
    for _ in range(_RESAMPLES):
        yield generator.integers(count, size=count)


def middle(means: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The two ends between which 95 % of the resamples' means lie."""
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def wilson(right: Sequence[float]) -> Interval:
    """The share of `right` (0 or 100 each) with Wilson's 95 % interval (1927)."""
    count, share, z = len(right), sum(right) / len(right) / 100, 1.96
    most = 1 + z * z / count
    center = (share + z * z / (2 * count)) / most
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) / most
    return Interval(100 * share, 100 * max(0.0, center - half), 100 * min(1.0, center + half))
