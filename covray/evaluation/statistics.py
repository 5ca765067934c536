"""Confidence intervals of mean scores, and tests of the difference between two methods.

The unit is the episode. None (or NaN) is an episode for which the metric is undefined; it is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95
LARGEST_NATS = 700.0
"""Nats are capped here before they become a perplexity: beyond about 709 the exponential overflows."""
_NUMBERS_AT_ONCE = 4_000_000
"""Random numbers drawn at a time: 32 MB."""

Values = Sequence[float | None] | NDArray[np.floating]


@dataclass(frozen=True)
class Mean:
    """A mean with its interval; a single episode says nothing of the spread, and its bounds are None."""

    mean: float
    low: float | None
    high: float | None
    episodes: int


@dataclass(frozen=True)
class Difference(Mean):
    """The mean over episodes of the first method's score less the second's."""

    p_value: float
    """Two-sided: the probability of a mean difference at least as large if the methods are alike."""


def mean_interval(values: Values, seed: int = 0, resamples: int = RESAMPLES) -> Mean | None:
    """Return the mean of scores and its 95% percentile bootstrap interval (Efron & Tibshirani 1993, ch. 13).

    Args:
        values: A score an episode.
        seed: Seed of the resampling; the same seed gives the same interval.
        resamples: Bootstrap samples.

    Returns:
        The mean, or None if no episode has a value.
    """
    numbers = _numbers(values)
    return _mean(numbers[~np.isnan(numbers)], seed, resamples)


def paired_difference(first: Values, second: Values, seed: int = 0, resamples: int = RESAMPLES) -> Difference | None:
    """Return the mean difference of two methods over the same episodes, its interval and its p value.

    The interval is the bootstrap's of the differences. The p value is that of the sign-flip test (Fisher 1935): if the
    methods are alike, every difference might as well have the other sign.

    Args:
        first: A score an episode by the first method.
        second: A score an episode by the second method, in the same order.
        seed: Seed of the resampling and of the signs.
        resamples: Bootstrap samples, and draws of signs.

    Returns:
        The difference, first less second; None if no episode has a value by both.

    Raises:
        ValueError: The lists differ in length.
    """
    of_first, of_second = _numbers(first), _numbers(second)
    if of_first.shape != of_second.shape:
        raise ValueError(f"{len(of_first)} and {len(of_second)} episodes do not pair")
    # NaN where either has no value: such an episode does not pair.
    differences = of_first - of_second
    differences = differences[~np.isnan(differences)]
    observed = _mean(differences, seed, resamples)
    if observed is None:
        return None
    as_large = _as_large_by_chance(differences, seed, resamples)
    # The observed signs count as one of the draws (Phipson & Smyth 2010), so that the p value is never 0.
    return Difference(**vars(observed), p_value=(as_large + 1) / (resamples + 1))


def perplexity(nats: float) -> float:
    """Return the exponent of ``nats`` a token, at most that of ``LARGEST_NATS``: a model may have diverged."""
    return math.exp(min(nats, LARGEST_NATS))


def _as_large_by_chance(differences: NDArray[np.float64], seed: int, draws: int) -> int:
    """Return in how many draws of random signs the sum of ``differences`` is at least as large as it is."""
    generator = np.random.default_rng([seed, 1])
    # Sums in another order differ in their last bits: what is equal must not count as smaller.
    bound = abs(differences.sum()) - 1e-12 * np.abs(differences).sum()
    count = 0
    for portion in _portions(draws, len(differences)):
        # Signs are -1 and 1, [draws, episodes].
        signs = 2.0 * generator.integers(2, size=(portion, len(differences))) - 1
        count += int((np.abs(signs @ differences) >= bound).sum())
    return count


def _numbers(values: Values) -> NDArray[np.float64]:
    """Return ``values`` as float64 [episodes]; None becomes NaN."""
    return np.array(values, dtype=np.float64)


def _mean(numbers: NDArray[np.float64], seed: int, resamples: int) -> Mean | None:
    """Return the mean of ``numbers``, none of which is NaN, with its bootstrap interval."""
    if not numbers.size:
        return None
    # One episode has nothing to resample.
    if numbers.size == 1:
        return Mean(float(numbers[0]), None, None, 1)
    generator = np.random.default_rng([seed, 0])
    means = []
    for portion in _portions(resamples, numbers.size):
        # [resamples, episodes], drawn with replacement.
        drawn = generator.integers(numbers.size, size=(portion, numbers.size))
        means.append(numbers[drawn].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Mean(float(numbers.mean()), float(low), float(high), numbers.size)


def _portions(resamples: int, episodes: int) -> Iterator[int]:
    """Yield ``resamples`` in portions whose random numbers fit in memory."""
    at_once = max(1, _NUMBERS_AT_ONCE // episodes)
    for done in range(0, resamples, at_once):
        yield min(at_once, resamples - done)
