"""Simulated builds and trainings: nothing is lost or done twice, and where a formula is known it is met."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covray.planning.simulation import (
    BuildWork,
    Fleet,
    Outcome,
    TrainWork,
    launch_times,
    simulate_build,
    simulate_training,
)

HOUR_S = 3600.0


def build(work: BuildWork, fleet: Fleet, seed: int = 0) -> Outcome:
    return simulate_build(work, fleet, np.random.default_rng(seed))


def training(work: TrainWork, fleet: Fleet, seed: int = 0) -> Outcome:
    return simulate_training(work, fleet, np.random.default_rng(seed))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 400),
    nodes=st.integers(1, 9),
    actors=st.integers(1, 4),
    life_s=st.sampled_from([math.inf, 500.0, 100.0, 40.0]),
    boot_s=st.sampled_from([0.0, 30.0]),
    idle_timeout_s=st.sampled_from([0.0, 5.0, 1000.0]),
    limit=st.sampled_from([math.inf, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_every_block_is_kept_once_whatever_is_taken_away(
    rows: int, nodes: int, actors: int, life_s: float, boot_s: float, idle_timeout_s: float, limit: float, seed: int
) -> None:
    work = BuildWork(rows, 7, 1.5, start_s=3, load_s=4, end_s=5, driver_blocks_per_s=limit)
    fleet = Fleet(nodes, actors, boot_s, 1.0, 1 / life_s, idle_timeout_s)
    outcome = build(work, fleet, seed)
    assert outcome.done == -(-rows // 7)
    assert outcome.busy_s == pytest.approx(rows * 1.5)
    assert outcome.paid_s >= outcome.busy_s + outcome.lost_s - 1e-6
    assert outcome.seconds >= rows * 1.5 / (nodes * actors)
    if life_s == math.inf:
        assert (outcome.lost_s, outcome.interruptions) == (0, 0)


def test_one_actor_takes_what_the_formula_says() -> None:
    work = BuildWork(rows=100, rows_per_block=8, row_s=2, start_s=10, load_s=20, end_s=5)
    outcome = build(work, Fleet(1, boot_s=40, idle_timeout_s=60))
    assert outcome.seconds == pytest.approx(40 + 10 + 20 + 100 * 2 + 5)
    assert outcome.paid_s == pytest.approx(40 + 10 + 20 + 100 * 2 + 60)
    assert outcome.done == 13


def test_as_many_actors_as_blocks_take_the_time_of_one() -> None:
    outcome = build(BuildWork(rows=32, rows_per_block=8, row_s=2, load_s=20), Fleet(4))
    assert outcome.seconds == pytest.approx(20 + 16)
    assert outcome.paid_s == pytest.approx(4 * 36)


def test_what_is_left_over_at_the_end_idles_and_goes() -> None:
    outcome = build(BuildWork(rows=3, rows_per_block=1, row_s=100), Fleet(2, idle_timeout_s=10))
    assert outcome.seconds == pytest.approx(200)
    assert outcome.paid_s == pytest.approx((200 + 10) + (100 + 10))


def test_nodes_come_in_waves_after_the_first_that_loads_the_models() -> None:
    work = BuildWork(rows=8, rows_per_block=1, row_s=1000)
    outcome = build(work, Fleet(8, boot_s=100))  # one; then five; then, of six allowed, the last two
    assert outcome.seconds == pytest.approx(3 * 100 + 1000)
    assert build(work, Fleet(8, boot_s=100, upscaling_speed=7)).seconds == pytest.approx(2 * 100 + 1000)
    assert launch_times(Fleet(14, boot_s=100)) == [0.0] * 5 + [100.0] * 5 + [200.0] * 4
    assert launch_times(Fleet(14, boot_s=100, upscaling_speed=2)) == [0.0] * 5 + [100.0] * 9


def test_a_driver_that_is_slower_than_its_actors_decides() -> None:
    work = BuildWork(rows=1000, rows_per_block=1, row_s=1, driver_blocks_per_s=10)
    assert build(work, Fleet(1, actors=100)).seconds == pytest.approx(999 / 10 + 1)
    assert build(work, Fleet(1, actors=5)).seconds == pytest.approx(1000 / 5 + 4 / 10)


def test_the_loss_of_a_build_is_the_expected_one() -> None:
    """A block of d seconds that begins anew at every loss takes (exp(d/life) - 1) life on average (a renewal)."""
    work, life_s = BuildWork(rows=30_000, rows_per_block=1, row_s=100), 500.0
    outcome = build(work, Fleet(1, interruptions_per_s=1 / life_s))
    expected_s = life_s * math.expm1(100 / life_s) - 100
    assert outcome.lost_s / 30_000 == pytest.approx(expected_s, rel=0.05)
    assert outcome.paid_s == pytest.approx(outcome.busy_s + outcome.lost_s)
    # Eight actors of one node lose theirs together: the same share.
    outcome = build(replace(work, rows=240_000), Fleet(1, actors=8, interruptions_per_s=1 / life_s))
    assert outcome.lost_s / 240_000 == pytest.approx(expected_s, rel=0.05)


def test_the_loss_of_a_training_is_the_expected_one() -> None:
    """As of a build, between checkpoints, and at the rate of all nodes together."""
    work, life_s = TrainWork(steps=500_000, step_s=1, checkpoint_every_steps=100), 2000.0
    outcome = training(work, Fleet(4, interruptions_per_s=1 / life_s))
    expected_s = life_s / 4 * math.expm1(100 * 4 / life_s) - 100
    assert outcome.lost_s / 4 / 5000 == pytest.approx(expected_s, rel=0.08)
    assert outcome.paid_s == pytest.approx(outcome.busy_s + outcome.lost_s)


def test_a_training_that_nothing_befalls_takes_what_the_formula_says() -> None:
    work = TrainWork(
        25, 2, start_s=30, validation_s=3, validate_every_steps=10, checkpoint_s=1, checkpoint_every_steps=5
    )
    outcome = training(work, Fleet(2, actors=4, boot_s=100, idle_timeout_s=50))
    assert outcome.seconds == pytest.approx(100 + 30 + 25 * 2 + 3 * 3 + 5 * 1)
    assert outcome.paid_s == pytest.approx(8 * (outcome.seconds + 50))
    assert outcome.busy_s == pytest.approx(8 * (25 * 2 + 3 * 3 + 5 * 1))
    assert outcome.done == 25


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 60),
    validate=st.integers(1, 70),
    save=st.integers(1, 70),
    life_s=st.sampled_from([80.0, 300.0]),
)
def test_a_training_goes_on_from_its_last_checkpoint(steps: int, validate: int, save: int, life_s: float) -> None:
    """Against the same, step by step."""
    work = TrainWork(steps, 1.0, 2.0, 0.3, validate, 0.2, save)
    ends, saved, now = [], [0.0], 0.0
    for step in range(1, steps + 1):
        last = step == steps
        now += 1.0 + 0.3 * (last or step % validate == 0) + 0.2 * (last or step % save == 0)
        ends.append(now)
        saved += [now] if last or step % save == 0 else []
    assert [work.seconds_to(step) for step in range(1, steps + 1)] == pytest.approx(ends)
    generator, kept_s, lost_s = np.random.default_rng(steps), 0.0, 0.0
    while (life := generator.exponential(life_s)) < 2.0 + now - kept_s:
        reached = kept_s + max(0.0, life - 2.0)
        kept_s = max(end for end in saved if end <= reached)
        lost_s += reached - kept_s
    assert training(work, Fleet(1, interruptions_per_s=1 / life_s), steps).lost_s == pytest.approx(lost_s, abs=1e-6)


def test_every_loss_of_a_training_is_paid_with_a_boot_and_a_start() -> None:
    work = TrainWork(2000, 1, start_s=60, checkpoint_every_steps=100)
    fleet = Fleet(2, boot_s=90, interruptions_per_s=1 / 2000)
    outcome = training(work, fleet)
    assert outcome.interruptions > 0
    least_s = 90 + 60 + 2000 + outcome.lost_s / 2 + outcome.interruptions * 90
    assert least_s < outcome.seconds <= least_s + outcome.interruptions * 60 + 1e-6, "a start may be cut short"


def test_more_interruptions_are_never_cheaper() -> None:
    built, trained = [], []
    for each_hour in (0, 1, 4, 16):
        fleet = Fleet(6, 2, 60, 1.0, each_hour / HOUR_S, 60)
        builds = [build(BuildWork(4000, 8, 3, 10, 20), fleet, seed) for seed in range(20)]
        trainings = [training(TrainWork(3000, 1, 30, checkpoint_every_steps=20), fleet, seed) for seed in range(20)]
        built.append(np.mean([outcome.paid_s for outcome in builds]))
        trained.append(np.mean([outcome.paid_s for outcome in trainings]))
    assert built == sorted(built)
    assert trained == sorted(trained)


def test_the_course_is_the_seeds() -> None:
    work, fleet = BuildWork(4000, 8, 3), Fleet(6, 2, 60, 1.0, 1 / 600, 60)
    assert build(work, fleet, 1) == build(work, fleet, 1)
    assert build(work, fleet, 1) != build(work, fleet, 2)
