"""Progress: what is written counts, a command is never silent for long, and the figures are those of the reports."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from covray.distributed import progress
from covray.distributed.progress import (
    BlockReport,
    PoolCounts,
    PoolProgress,
    PoolUsage,
    ProgressActor,
    time_left,
)
from covray.progress import current, stage


def block(actor: str, started: float, finished: float, rows: int = 8, **stats: int) -> BlockReport:
    return BlockReport(actor, started, finished, rows, **{"rejected": 0, "evaluations": 1, **stats})


def test_an_actor_that_never_waits_is_busy_all_the_time() -> None:
    actor = ProgressActor()
    actor.join("a")
    assert actor.counts() == PoolCounts(rows=0, rejected=0, actors=1)
    for number in range(4):
        actor.report(block("a", 10.0 * number, 10.0 * (number + 1), 5, rejected=1, evaluations=90, padded=10))
    usage = actor.usage()
    assert usage.busy_share == 1.0
    assert usage.chains_per_s == pytest.approx(15 / 30), "the first block is warm-up"
    assert usage.padded_share == pytest.approx(0.1)
    assert usage.unet_evaluations == 360
    assert actor.counts() == PoolCounts(rows=20, rejected=4, actors=1)


def test_waiting_between_blocks_counts_against_it_and_actors_add_up() -> None:
    actor = ProgressActor()
    for name in ("a", "b"):
        actor.report(block(name, 0, 100))  # warm-up, however long
        actor.report(block(name, 100, 103))
        actor.report(block(name, 107, 110))
    usage = actor.usage()
    assert usage.busy_share == pytest.approx(0.6)
    assert usage.chains_per_s == pytest.approx(32 / 10)
    assert usage.actors == 2


def test_nothing_reported_is_nothing_claimed() -> None:
    assert ProgressActor().usage() == PoolUsage(actors=0, unet_evaluations=0)
    assert PoolUsage().busy_share is None


def test_an_actor_with_a_single_block_is_counted_with_it() -> None:
    actor = ProgressActor()
    actor.report(block("a", 0, 4))
    assert actor.usage().chains_per_s == pytest.approx(2)


def test_the_time_until_an_actor_computes_at_full_speed_is_told_from_its_rows() -> None:
    actor = ProgressActor()
    actor.created = 1000.0
    actor.report(block("a", 1030, 1050))  # its first block takes 20 s, of which 12 are warm-up
    actor.report(block("a", 1050, 1058))
    actor.report(block("b", 1040, 1054, 4))
    actor.report(block("b", 1054, 1062))
    usage = actor.usage()
    assert usage.row_s == pytest.approx(1)
    assert usage.load_s == pytest.approx((42 + 50) / 2)
    assert usage.last_block_s == pytest.approx(62)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds become hundredths."""
    for name, seconds in {"POLL_S": 0.005, "LINE_EVERY_S": 0.1}.items():
        monkeypatch.setattr(progress, name, seconds)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_progress_counts_what_is_written_not_what_is_computed(fast: None, capfd: pytest.CaptureFixture[str]) -> None:
    written, counts, said = 4, PoolCounts(0, 0, 0), ""

    def seen(text: str) -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return text in said

    with stage("building"), PoolProgress(20, "pairs", lambda: written, lambda: counts):
        assert current() is None, "it shows itself what the command does"
        wait_until(lambda: seen("4/20 pairs written, starting actors\n"))
        counts = PoolCounts(rows=8, rejected=1, actors=2)
        wait_until(lambda: seen("4/20 pairs written, 2 actors, 8 computed, 1 rejected\n"))
        written = 8
        wait_until(lambda: seen("8/20 pairs written, 2 actors, 1 rejected\n"))
        written = 16
        wait_until(lambda: seen("16/20 pairs written, 2 actors, "))
        wait_until(lambda: seen(" left\n"))
    assert said.startswith("continuing: 4 of 20 pairs are written already\n")


def test_progress_goes_on_while_the_storage_is_away(fast: None, capfd: pytest.CaptureFixture[str]) -> None:
    calls = 0

    def written() -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError("away")
        return 3

    with PoolProgress(9, "episodes", written, lambda: PoolCounts(3, 0, 1)):
        wait_until(lambda: calls > 3)
        wait_until(lambda: "3/9 episodes written, 1 actor" in capfd.readouterr().err)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s left"), (89, "89 s left"), (100, "2 min left"), (7200, "2.0 h left")]
)
def test_what_is_left_is_said_in_the_unit_one_waits_in(seconds: float, text: str) -> None:
    assert time_left(seconds) == text
