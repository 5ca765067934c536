"""What the scores of a set of episodes allow to say: intervals of means, and differences between two methods.

The episode is the unit. None (or NaN) is an episode for which the metric is undefined; it is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95
_AT_ONCE = 4_000_000  # numbers drawn at a time: 32 MB

Values = Sequence[float | None] | NDArray[np.floating]


@dataclass(frozen=True)
class Mean:
    """A mean with its interval; the bounds are None for a single episode, which says nothing of the spread."""

    mean: float
    low: float | None
    high: float | None
    episodes: int


@dataclass(frozen=True)
class Difference(Mean):
    """The mean of the differences, first method minus second, episode by episode."""

    p_value: float
    """Two-sided: how often chance alone would make the mean difference as large."""


def mean_interval(values: Values, seed: int = 0, resamples: int = RESAMPLES) -> Mean | None:
    """The mean of ``values`` [episodes] with its 95% percentile bootstrap interval (Efron & Tibshirani 1993, ch. 13).

    None when no episode has a value. The same seed gives the same interval.
    """
    numbers = _numbers(values)
    return _mean(numbers[~np.isnan(numbers)], seed, resamples)


def paired_difference(first: Values, second: Values, seed: int = 0, resamples: int = RESAMPLES) -> Difference | None:
    """How much ``first`` exceeds ``second`` over the episodes that have a value by both; same episodes, same order.

    The interval is the bootstrap's of the differences. The p value is of the sign-flip test (Fisher 1935): were the
    methods alike, every difference might as well have the other sign; counted with the observed one among the draws
    (Phipson & Smyth 2010), so it is never 0. None when no episode has both values. Raises ValueError for lists of
    different lengths.
    """
    ours, theirs = _numbers(first), _numbers(second)
    if ours.shape != theirs.shape:
        raise ValueError(f"{len(ours)} and {len(theirs)} episodes do not pair")
    differences = ours - theirs
    differences = differences[~np.isnan(differences)]
    observed = _mean(differences, seed, resamples)
    if observed is None:
        return None
    generator = np.random.default_rng([seed, 1])
    # Sums in another order differ in their last bits: what is equal must not count as smaller.
    bound = abs(differences.sum()) - 1e-12 * np.abs(differences).sum()
    as_large = sum(
        int((np.abs((2.0 * generator.integers(2, size=(count, len(differences))) - 1) @ differences) >= bound).sum())
        for count in _portions(resamples, len(differences))
    )
    return Difference(**vars(observed), p_value=(as_large + 1) / (resamples + 1))


def _numbers(values: Values) -> NDArray[np.float64]:
    return np.array(values, dtype=np.float64)  # None becomes NaN


def _mean(numbers: NDArray[np.float64], seed: int, resamples: int) -> Mean | None:
    if not numbers.size:
        return None
    if numbers.size == 1:
        return Mean(float(numbers[0]), None, None, 1)
    generator = np.random.default_rng([seed, 0])
    means = np.concatenate(
        [
            numbers[generator.integers(numbers.size, size=(count, numbers.size))].mean(axis=1)
            for count in _portions(resamples, numbers.size)
        ]
    )
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Mean(float(numbers.mean()), float(low), float(high), numbers.size)


def _portions(resamples: int, episodes: int) -> Iterator[int]:
    """``resamples`` in portions that fit in memory."""
    at_once = max(1, _AT_ONCE // episodes)
    for done in range(0, resamples, at_once):
        yield min(at_once, resamples - done)
