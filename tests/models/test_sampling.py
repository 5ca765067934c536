"""Sampling: noise that belongs to a place, and the tokens that it chooses."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from covray.config import SamplingConfig
from covray.models.sampling import PLACES, BatchNoise, RowNoise, choose_tokens, expected_tokens

CODES = 12


def test_noise_belongs_to_seed_candidate_and_place() -> None:
    whole = RowNoise(5, 1, CODES).read(0, 5 * PLACES)
    apart = RowNoise(5, 1, CODES)
    for first, count in ((0, 1), (3, PLACES), (PLACES - 1, 3 * PLACES), (2, 2)):
        assert torch.equal(apart.read(first, count), whole[first : first + count])
    assert not torch.equal(RowNoise(5, 0, CODES).read(0, 4), whole[:4])
    assert not torch.equal(RowNoise(6, 1, CODES).read(0, 4), whole[:4])
    assert len(whole.unique()) > 0.99 * whole.numel(), "no place repeats another"


def test_rows_of_a_batch_have_their_own_noise_at_their_own_places() -> None:
    batch = BatchNoise([RowNoise(0, 0, CODES), RowNoise(1, 0, CODES)], 3, torch.device("cpu")).read([4, 40], 7)
    assert torch.equal(batch[0], RowNoise(0, 0, CODES).read(4, 7))
    assert torch.equal(batch[1], RowNoise(1, 0, CODES).read(40, 7))
    assert not batch[2].any()


def test_noise_is_gumbels() -> None:
    noise = RowNoise(0, 0, 500).read(0, 2 * PLACES)
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 1e-3


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, None, 1.0), (0.7, 5, 1.0), (2.0, 8, 0.8)])
def test_chosen_tokens_follow_the_distribution(temperature: float, top_k: int | None, top_p: float) -> None:
    logits = torch.randn(CODES, generator=torch.Generator().manual_seed(0))
    sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    draws = 400 * PLACES
    chosen = choose_tokens(logits.expand(draws, -1), sampling, RowNoise(3, 0, CODES).read(0, draws))
    likeliest, ids = (logits.double() / temperature).sort(descending=True)
    p = likeliest[: top_k or CODES].softmax(0)
    p = torch.where(p.cumsum(0) - p < top_p, p, 0)
    expected = torch.zeros(CODES, dtype=torch.float64).scatter_(0, ids[: len(p)], p / p.sum()) * draws
    counts = torch.bincount(chosen, minlength=CODES)
    assert not counts[expected == 0].any()
    possible = expected > 0
    assert stats.chisquare(counts[possible].numpy(), expected[possible].numpy()).pvalue > 1e-3


def test_the_one_allowed_token_is_chosen_whatever_the_noise() -> None:
    logits = torch.randn(64, CODES, generator=torch.Generator().manual_seed(1))
    noise = torch.full_like(logits, -50.0)
    for sampling in (SamplingConfig(temperature=3.0, top_k=1), SamplingConfig(temperature=3.0, top_p=1e-9)):
        assert torch.equal(choose_tokens(logits, sampling, noise), logits.argmax(1))


def test_nearly_equal_distributions_mostly_choose_the_same_token() -> None:
    """What parallel decoding lives on; independent draws would agree in about a tenth of the places."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(4000, CODES, generator=generator)
    other = logits + 0.1 * torch.randn(4000, CODES, generator=generator)
    noise = RowNoise(0, 0, CODES).read(0, 4000)
    sampling = SamplingConfig(temperature=1.0)
    assert (choose_tokens(logits, sampling, noise) == choose_tokens(other, sampling, noise)).float().mean() > 0.9


def test_the_expected_token_errs_least() -> None:
    generator = torch.Generator().manual_seed(3)
    logits, codebook = 2 * torch.randn(200, CODES, generator=generator), torch.randn(CODES, 3, generator=generator)
    risk = logits.softmax(1) @ torch.cdist(codebook, codebook).square()  # [200, codes], of choosing each code
    chosen = expected_tokens(logits, codebook)
    assert torch.equal(chosen, risk.argmin(1))
    assert not torch.equal(chosen, logits.argmax(1))
    assert torch.equal(expected_tokens(1e4 * logits, codebook), logits.argmax(1)), "one code that is certain"


def test_between_two_depths_the_expected_token_is_the_one_between() -> None:
    metres = torch.tensor([[1.0], [2.0], [3.0]])
    assert int(expected_tokens(torch.tensor([0.45, 0.15, 0.4]).log(), metres)) == 1
