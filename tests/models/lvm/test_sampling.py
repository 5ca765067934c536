"""Sampling: the inverse of the distribution function, and random numbers that are a row's own."""

import torch

from covray.models.lvm.sampling import invert_distribution, noise


def test_a_token_of_probability_zero_is_never_met() -> None:
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64)
    uniform = torch.tensor([[0.0], [0.25 - 2**-53], [0.25], [1 - 2**-53]], dtype=torch.float64)
    assert invert_distribution(weights.expand(4, -1).contiguous(), uniform)[:, 0].tolist() == [1, 1, 3, 3]


def test_random_numbers_depend_on_seed_and_candidate_alone() -> None:
    assert torch.equal(noise(3, 1, 5), noise(3, 1, 9)[:5])
    assert not torch.equal(noise(3, 1, 5), noise(3, 2, 5))
    assert not torch.equal(noise(3, 1, 5), noise(4, 1, 5))
