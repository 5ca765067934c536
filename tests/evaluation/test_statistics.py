"""Intervals that hold what they promise, and pairs that see what unpaired means do not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from covray.evaluation.statistics import mean_interval, paired_difference


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    trials, covered = 400, 0
    for trial in range(trials):
        interval = mean_interval(rng.gamma(4.0, 0.5, 60), seed=trial, resamples=1000)  # skewed, of mean 2
        assert interval is not None
        assert interval.low is not None
        assert interval.high is not None
        covered += interval.low <= 2.0 <= interval.high
    # Three standard errors of 400 trials are 3.3 points; the percentile bootstrap itself lacks one or two.
    assert 0.90 <= covered / trials <= 0.985


def test_the_interval_is_that_of_the_normal_approximation_for_many_episodes() -> None:
    values = np.random.default_rng(1).normal(3, 2, 1000)
    interval = mean_interval(values)
    assert interval is not None
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_the_seed_decides_and_nothing_else() -> None:
    values, other = np.random.default_rng(2).random((2, 30))
    assert mean_interval(values, seed=1) == mean_interval(list(values), seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)
    assert paired_difference(values, other, seed=1) == paired_difference(values, other, seed=1)


def test_episodes_without_a_value_are_left_out() -> None:
    first, second = [1.0, None, 3.0, float("nan"), 5.0], [0.5, 1.0, None, 2.0, 4.0]
    assert mean_interval(first) == mean_interval([1.0, 3.0, 5.0])
    assert paired_difference(first, second) == paired_difference([1.0, 5.0], [0.5, 4.0])
    for nothing in ([], [None, None]):
        assert mean_interval(nothing) is None
        assert paired_difference(nothing, nothing) is None
    with pytest.raises(ValueError, match="3 and 2 episodes"):
        paired_difference([1, 2, 3], [1, 2])


def test_one_episode_has_a_mean_and_no_interval() -> None:
    lone = paired_difference([3.0], [1.0])
    assert lone is not None
    assert (lone.mean, lone.low, lone.high, lone.episodes, lone.p_value) == (2.0, None, None, 1, 1.0)


def test_portions_of_memory_do_not_cut_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("covray.evaluation.statistics._NUMBERS_AT_ONCE", 70)  # 3 resamples of 20 at a time
    values = np.random.default_rng(3).random(20)
    whole = paired_difference(values, values + np.linspace(-1, 2, 20), resamples=2000)
    assert whole is not None
    assert whole.p_value == pytest.approx(0.02, abs=0.02)
    assert whole.p_value * 2001 == pytest.approx(round(whole.p_value * 2001))


def test_swapping_the_methods_mirrors_the_difference() -> None:
    first, second = np.random.default_rng(4).random((2, 25))
    one, other = paired_difference(first, second), paired_difference(second, first)
    assert one is not None
    assert other is not None
    assert one.mean == -other.mean
    assert one.p_value == other.p_value
    assert one.low is not None
    assert other.high is not None
    assert one.low == pytest.approx(-other.high)


def test_the_p_value_is_uniform_where_methods_are_alike() -> None:
    rng = np.random.default_rng(5)
    found = [paired_difference(*rng.normal(size=(2, 40)), seed=trial, resamples=300) for trial in range(400)]
    values = np.array([one.p_value for one in found if one is not None])
    for level in (0.05, 0.2, 0.5):
        assert abs((values <= level).mean() - level) < 3.5 * math.sqrt(level * (1 - level) / len(values))


def test_the_p_value_by_hand() -> None:
    same = paired_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert same is not None
    assert (same.mean, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    always = paired_difference([0.3] * 6, [0.1] * 6, resamples=20_000)  # 2 of the 64 choices of signs are as large
    assert always is not None
    assert always.p_value == pytest.approx(2 / 64, abs=0.005)


def test_pairs_see_what_is_hidden_in_the_spread_of_episodes() -> None:
    rng = np.random.default_rng(6)
    hard = rng.normal(0, 1, 100)  # episodes differ by far more than methods do
    first, second = hard + rng.normal(0.1, 0.1, 100), hard + rng.normal(0, 0.1, 100)
    means = mean_interval(first), mean_interval(second)
    paired = paired_difference(first, second)
    assert paired is not None
    assert means[0] is not None
    assert means[1] is not None
    assert None not in (means[0].low, means[1].high, paired.low, paired.high)
    assert means[0].low < means[1].high  # type: ignore[operator]  # the intervals overlap widely
    assert paired.low > 0  # type: ignore[operator]
    assert paired.p_value < 0.001
    unpaired = paired_difference(first, rng.permutation(second))
    assert unpaired is not None
    assert unpaired.high - unpaired.low > 5 * (paired.high - paired.low)  # type: ignore[operator]
