"""Arms beside each other: differences and gains over the queries and seeds that both have."""

from __future__ import annotations

import math

import numpy as np
import pytest

from covray.evaluation.claims.arms import ArmScores, compare, compare_gains, joined, primary_metrics, rank_correlation
from covray.evaluation.metrics import OWN

IOU = {"segmentation": "iou"}


def arm(seeds: dict[int, list[float | None]], task: str = "segmentation", metric: str = "iou") -> ArmScores:
    """An arm of one task; the values are those of the queries 0, 1, ..."""
    rows = {}
    for seed, values in seeds.items():
        rows[seed] = [
            {"task": task, "pair_id": pair_id, "values": [{"metric": metric, "value": value}]}
            for pair_id, value in enumerate(values)
        ]
    return ArmScores.of_rows(rows)


def test_a_gain_is_the_ratio_of_means_and_a_difference_their_difference() -> None:
    first, second = arm({0: [0.6, 0.4], 1: [0.7, 0.5]}), arm({0: [0.3, 0.3], 1: [0.5, 0.3]})
    result = compare(first, second, IOU)
    assert result is not None
    assert result.gain is not None
    assert result.gain.value == pytest.approx(100 * (0.55 / 0.35 - 1))
    (row,) = result.rows
    assert (row.first, row.second) == (pytest.approx(0.55), pytest.approx(0.35))
    assert row.difference.value == pytest.approx(0.2)
    assert (result.seeds, result.queries) == (2, 2)


def test_less_is_better_where_the_metric_says_so_and_nats_are_logarithms() -> None:
    result = compare(
        arm({0: [0.1] * 9}, "depth", "abs_rel"), arm({0: [0.2] * 9}, "depth", "abs_rel"), {"depth": "abs_rel"}
    )
    assert result is not None
    assert result.gain is not None
    assert result.gain.value == pytest.approx(100)
    assert result.rows[0].better is True
    nats = compare(arm({0: [2.0] * 9}, metric=OWN), arm({0: [2.5] * 9}, metric=OWN), {"segmentation": OWN})
    assert nats is not None
    assert nats.gain is not None
    assert nats.gain.value == pytest.approx(100 * math.expm1(0.5))


def test_pairing_takes_the_noise_of_queries_away() -> None:
    hard = np.random.default_rng(0).uniform(0.1, 0.9, 40)
    better, worse = arm({0: (hard + 0.02).tolist()}), arm({0: hard.tolist()})
    result = compare(better, worse, IOU)
    assert result is not None
    row = result.rows[0]
    assert row.better is True
    assert row.difference.low == pytest.approx(0.02)
    swapped = compare(worse, better, IOU)
    assert swapped is not None
    assert swapped.rows[0].better is False


def test_seeds_that_disagree_leave_a_claim_open() -> None:
    queries = np.random.default_rng(0).uniform(0.4, 0.6, 40)
    base = arm({seed: queries.tolist() for seed in range(3)})
    apart = arm({seed: (queries + shift).tolist() for seed, shift in enumerate((-0.1, 0.12, 0.0))})
    result = compare(apart, base, IOU)
    assert result is not None
    assert result.rows[0].better is None


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        noise = generator.normal(0, 0.05, (2, 60))
        result = compare(arm({0: (0.55 + noise[0]).tolist()}), arm({0: (0.5 + noise[1]).tolist()}), IOU, resamples=400)
        assert result is not None
        low, high = result.rows[0].difference.low, result.rows[0].difference.high
        assert low is not None
        assert high is not None
        covered += low <= 0.05 <= high
    assert 88 <= covered <= 100


def test_only_what_both_have_is_compared_and_an_untrained_arm_stands_beside_every_seed() -> None:
    result = compare(arm({0: [0.5, None, 0.7], 3: [0.5, 0.6, 0.7]}), arm({0: [0.4, 0.4, 0.4], 1: [0.1, 0.1, 0.1]}), IOU)
    assert result is not None
    assert (result.seeds, result.queries) == (1, 2)
    untrained = compare(arm({0: [0.5, 0.6], 3: [0.7, 0.8]}), arm({-1: [0.4, 0.4]}), IOU)
    assert untrained is not None
    assert untrained.seeds == 2
    assert compare(arm({0: [0.5]}), arm({1: [0.5]}), IOU) is None
    assert compare(arm({0: [0.5]}), arm({0: [None]}), IOU) is None
    assert primary_metrics(["depth"]) == {"depth": "abs_rel"}


def test_a_joined_arm_has_of_every_task_the_scores_of_one() -> None:
    depth, segmentation = arm({0: [0.2]}, "depth", "abs_rel"), arm({0: [0.6]})
    both = joined({"segmentation": segmentation, "depth": depth})
    assert both.tasks == ["segmentation", "depth"]
    assert (both.mean("segmentation", "iou"), both.mean("depth", "abs_rel")) == (0.6, 0.2)


def test_a_rank_correlation_sees_order_alone() -> None:
    worth = {query: float(query) ** 3 for query in range(30)}
    result = rank_correlation({query: float(query) for query in range(40)}, worth)
    assert result is not None
    assert result.value == pytest.approx(1)
    assert rank_correlation({0: 1.0, 1: 1.0, 2: 1.0}, {0: 1.0, 1: 2.0, 2: 3.0}) is None


def test_the_ratio_of_two_gains_is_what_the_one_gains_more() -> None:
    small, small_base = arm({0: [0.6] * 5, 1: [0.6] * 5}), arm({0: [0.4] * 5, 1: [0.4] * 5})
    large, large_base = arm({0: [0.75] * 5}), arm({0: [0.6] * 5})
    result = compare_gains((small, small_base), (large, large_base), IOU)
    assert result is not None
    assert result.gain is not None
    assert result.gain.value == pytest.approx(100 * (1.5 / 1.25 - 1))
    assert result.gain.low == pytest.approx(20)
    assert result.seeds == 1
    assert compare_gains((small, small_base), (arm({7: [0.1]}), large_base), IOU) is None


def test_one_query_of_one_seed_is_no_evidence() -> None:
    result = compare(arm({0: [0.6]}), arm({0: [0.3]}), IOU)
    assert result is not None
    (row,) = result.rows
    assert (row.difference.low, row.difference.high, row.better) == (None, None, None)
    assert result.gain is not None
    assert result.gain.value == pytest.approx(100)
    assert (result.gain.low, result.gain.high) == (None, None)
    # A second task that can be resampled has its own interval; that of the mean gain stays unknown.
    many = [joined({"segmentation": arm({0: [value]}), "depth": arm({0: [value] * 5}, "depth", "abs_rel")})
            for value in (0.6, 0.3)]  # fmt: skip
    both = compare(many[0], many[1], IOU | {"depth": "abs_rel"})
    assert both is not None
    assert both.gain is not None
    assert [each.better for each in both.rows] == [None, False]
    assert both.gain.low is None


def test_a_score_that_is_not_a_number_is_undefined() -> None:
    first, second = arm({0: [0.6, math.nan, 0.5]}), arm({0: [0.3, 0.4, 0.2]})
    result = compare(first, second, IOU)
    assert result is not None
    assert result.queries == 2
    assert result.rows[0].better is True
    assert first.mean("segmentation", "iou") == pytest.approx(0.55)
