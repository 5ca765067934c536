"""The cost of writing tokens: a bound that is exact where it can be computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from covray.recipes.nano.writing import neighbour_nats


def test_a_context_that_says_all_costs_next_to_nothing_and_chance_costs_its_entropy() -> None:
    rows, columns = np.mgrid[:8, :8]
    boards = np.stack([(rows + columns + number) % 2 for number in range(400)]).astype(np.uint16)
    assert neighbour_nats(boards[:300], boards[300:], 2) < 0.9, "but for the first token, which is a coin"
    coins = np.random.default_rng(0).integers(0, 2, (2000, 8, 8)).astype(np.uint16)
    assert neighbour_nats(coins[:1500], coins[1500:], 2) == pytest.approx(64 * math.log(2), rel=0.01)


def test_the_probabilities_of_all_codes_sum_to_one() -> None:
    train = np.random.default_rng(1).integers(0, 5, (40, 1, 1)).astype(np.uint16)
    every = np.arange(5, dtype=np.uint16)[:, None, None]
    p = [math.exp(-neighbour_nats(train, every[code : code + 1], 5)) for code in range(5)]
    assert sum(p) == pytest.approx(1)
    assert neighbour_nats(train, every, 5) == pytest.approx(-np.mean(np.log(p)))


def test_codes_that_were_never_seen_have_a_price() -> None:
    train = np.zeros((10, 4, 4), np.uint16)
    new = np.full((1, 4, 4), 7, np.uint16)
    assert math.isfinite(neighbour_nats(train, new, 8))
    assert neighbour_nats(train, new, 8) > neighbour_nats(train, train[:1], 8)
