"""The tally: chains a second and the busy share are those of the spans that were reported."""

from __future__ import annotations

import pytest

from covray.distributed.progress import Tally, time_left


def test_an_actor_that_never_waits_is_busy_all_the_time() -> None:
    tally = Tally()
    tally.join("a")
    assert tally.counts() == (0, 0, 1)
    for number in range(4):
        tally.report("a", 10.0 * number, 10.0 * (number + 1), rows=5, rejected=1, evaluations=90, padded=10)
    usage = tally.usage()
    assert usage["busy_share"] == 1.0
    assert usage["chains_per_s"] == pytest.approx(15 / 30), "the first block is warm-up"
    assert usage["padded_share"] == pytest.approx(0.1)
    assert tally.counts() == (20, 4, 1)


def test_waiting_between_blocks_counts_against_it_and_actors_add_up() -> None:
    tally = Tally()
    for actor in ("a", "b"):
        tally.report(actor, 0, 100, 8, 0, 1, 0)  # warm-up, however long
        tally.report(actor, 100, 103, 8, 0, 1, 0)
        tally.report(actor, 107, 110, 8, 0, 1, 0)
    usage = tally.usage()
    assert usage["busy_share"] == pytest.approx(0.6)
    assert usage["chains_per_s"] == pytest.approx(32 / 10)
    assert usage["actors"] == 2


def test_nothing_reported_is_nothing_claimed() -> None:
    usage = Tally().usage()
    assert usage["busy_share"] is None
    assert usage["chains_per_s"] is None
    assert usage["padded_share"] is None


def test_an_actor_with_a_single_block_is_counted_with_it() -> None:
    tally = Tally()
    tally.report("a", 0, 4, 8, 0, 1, 0)
    assert tally.usage()["chains_per_s"] == pytest.approx(2)


def test_the_time_until_an_actor_computes_at_full_speed_is_told_from_its_rows() -> None:
    tally = Tally()
    tally.created = 1000.0
    tally.report("a", 1030, 1050, 8, 0, 1, 0)  # its first block takes 20 s, of which 12 are warm-up
    tally.report("a", 1050, 1058, 8, 0, 1, 0)
    tally.report("b", 1040, 1054, 4, 0, 1, 0)
    tally.report("b", 1054, 1062, 8, 0, 1, 0)
    usage = tally.usage()
    assert usage["row_s"] == pytest.approx(1)
    assert usage["load_s"] == pytest.approx((42 + 50) / 2)
    assert usage["last_block_s"] == pytest.approx(62)


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "0 s left"), (89, "89 s left"), (100, "2 min left"), (7200, "2.0 h left")]
)
def test_what_is_left_is_said_in_the_unit_one_waits_in(seconds: float, said: str) -> None:
    assert time_left(seconds) == said
