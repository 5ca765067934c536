"""Masks go on and come off: levels, weights, counts and orders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import BlockRefinementScheduler, EntropyBoundScheduler

from covray.models.masking import Unmasking, Weight, choose_unmasked, mask_blocks, noise_levels, pass_counts


def test_levels_are_one_from_each_stratum_in_any_order() -> None:
    levels = noise_levels(50, 0.2, 1.0, np.random.default_rng(0))
    assert sorted(np.floor((levels - 0.2) / 0.8 * 50 - 1e-9).astype(int)) == list(range(50))
    assert (np.diff(levels) < 0).any()
    assert (np.diff(levels) > 0).any()
    assert levels.min() > 0.2
    assert levels.max() <= 1


@pytest.mark.parametrize("weight", ["masked", "level"])
def test_both_weights_estimate_the_same_bound(weight: Weight) -> None:
    """Of a cross-entropy that falls with the unmasked share; the bound is its mean over a random order."""
    block, blocks = 4, 40_000
    generator = np.random.default_rng(0)
    levels = noise_levels(blocks, 0.0, 1.0, generator)
    masked, weights = mask_blocks(levels, block, weight, generator)
    counts = masked.sum(1)
    cross_entropy = np.array([0.0, 1.0, 2.0, 3.0, 4.0])  # of a token, where so many are masked
    estimate = (weights * counts * cross_entropy[counts]).mean()
    exact = sum(block / count * count * cross_entropy[count] for count in range(1, block + 1)) / block
    assert estimate == pytest.approx(exact, rel=0.02)
    if weight == "masked":
        assert counts.min() == 1, "no block without a mask"
        assert np.bincount(counts)[1:].tolist() == [blocks / block] * block, "strata: exactly as many of each count"
    shares = masked.mean(0)
    assert shares == pytest.approx(np.full(block, shares.mean()), rel=0.03), "no place is preferred"


@pytest.mark.parametrize("schedule", ["even", "cosine"])
def test_passes_write_all_of_a_block(schedule: Unmasking) -> None:
    for block in (1, 2, 7, 8, 64):
        for passes in range(1, block + 1):
            counts = pass_counts(block, passes, schedule)
            assert len(counts) == passes
            assert sum(counts) == block
            assert min(counts) >= 1
    assert pass_counts(8, 3, "even") == [3, 3, 2]
    cosine = pass_counts(64, 8, "cosine")
    assert cosine == sorted(cosine), "few at first"
    assert cosine[0] < 3 < 10 < cosine[-1]


def test_the_surest_masked_places_are_written() -> None:
    probabilities = torch.tensor(
        [[[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5]], [[0.99, 0.01], [0.97, 0.03], [0.96, 0.04], [0.5, 0.5]]]
    )
    chosen = probabilities.argmax(-1)
    masked = torch.tensor([[False, True, True, True], [True, True, True, True]])

    def written(rule: Unmasking, count: int, threshold: float = 0.0) -> list[list[int]]:
        rows = choose_unmasked(probabilities, chosen, masked, count, rule, threshold)
        return [row.nonzero()[:, 0].tolist() for row in rows]

    assert written("even", 1) == [[2], [0]]
    assert written("even", 2) == [[1, 2], [0, 1]]
    assert written("confidence", 1, 0.95) == [[2], [0, 1, 2]], "none is sure enough in the first row: the best one"
    assert written("confidence", 2, 0.75) == [[1, 2], [0, 1, 2]]
    assert written("entropy", 9, 0.0) == [[2], [0]], "one at least"
    assert written("entropy", 9, 0.3) == [[2], [0, 1, 2]]
    assert written("entropy", 9, 50.0) == [[1, 2, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize(("rule", "threshold"), [("even", 2.0), ("confidence", 0.3)])
def test_places_are_those_of_the_scheduler_of_diffusers(rule: Unmasking, threshold: float) -> None:
    """Which serves masks, but draws for a batch from one generator, so that a row would depend on the others."""
    mask_id, size, passes = 9, 8, 3
    scheduler = BlockRefinementScheduler(block_length=size)
    scheduler.set_timesteps(passes)
    generator = torch.Generator().manual_seed(0)
    ids = torch.full((5, size), mask_id)
    ids[2, 0] = ids[4, 3] = 1
    for number, count in enumerate(pass_counts(size, passes, rule)):
        logits = 3 * torch.randn(5, size, mask_id, generator=generator)
        masked = ids == mask_id
        expected = scheduler.step(logits, number, ids, mask_token_id=mask_id, threshold=threshold)
        chosen = logits.argmax(-1)
        written = choose_unmasked(logits.softmax(-1), chosen, masked, count, rule, threshold)
        assert torch.equal(written, expected.transfer_index)
        ids = torch.where(written, chosen, ids)
        assert torch.equal(ids, expected.prev_sample)


def test_entropy_is_bounded_as_by_the_scheduler_of_diffusers() -> None:
    """Which puts random tokens, not masks, at the other places."""
    scheduler = EntropyBoundScheduler(t_max=1.0, t_min=1.0)
    generator = torch.Generator().manual_seed(0)
    for bound in (0.1, 1.0, 4.0):
        logits = 3 * torch.randn(5, 8, 9, generator=generator)
        expected = scheduler.step(logits, 0, torch.zeros(5, 8, dtype=torch.int64), entropy_bound=bound)
        every = torch.ones(5, 8, dtype=torch.bool)
        written = choose_unmasked(logits.softmax(-1), logits.argmax(-1), every, 1, "entropy", bound)
        assert torch.equal(written, expected.accepted_index)
