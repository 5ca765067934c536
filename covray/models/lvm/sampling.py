"""The choice of the next token from the model's logits: the likeliest, or one sampled by numbers of the row's own."""

from __future__ import annotations

import torch
from torch import Tensor

from covray.config import SamplingConfig
from covray.seeds import seed_of


def noise(seed: int, candidate: int, count: int) -> Tensor:
    """Return the random numbers of one row, float64 [count] in [0, 1).

    They are made on the CPU, so that every device has the same, and depend on ``seed`` and ``candidate`` alone: the
    first candidates of a query are the same however many there are.
    """
    generator = torch.Generator().manual_seed(seed_of(seed, candidate))
    return torch.rand(count, dtype=torch.float64, generator=generator)


def choose_tokens(logits: Tensor, sampling: SamplingConfig, uniform: Tensor | None) -> Tensor:
    """Choose a token a row.

    First the temperature is applied, then ``top_k``, then ``top_p`` of what that leaves, as transformers does.

    Args:
        logits: Float32 [batch, codes].
        sampling: Temperature, ``top_k`` and ``top_p``.
        uniform: Float64 [batch, 1] in [0, 1), where the inverse of the distribution function is taken; None: greedy.

    Returns:
        int64 [batch, 1].
    """
    if uniform is None:
        return logits.argmax(1, keepdim=True)
    scaled = logits.double() / sampling.temperature
    if sampling.top_k is None and sampling.top_p == 1:
        return invert_distribution(scaled.softmax(1), uniform)
    count = min(sampling.top_k or logits.shape[1], logits.shape[1])
    likeliest, ids = scaled.topk(count)  # descending
    p = likeliest.softmax(1)
    before = p.cumsum(1) - p
    p = torch.where(before < sampling.top_p, p, 0)  # the first always stays
    return ids.gather(1, invert_distribution(p, uniform))


def invert_distribution(weights: Tensor, uniform: Tensor) -> Tensor:
    """Return the first index at which the running sum of ``weights`` exceeds the share ``uniform`` of the whole.

    Weights of zero are never chosen: where the sum does not rise it exceeds nothing that it did not exceed before.

    Args:
        weights: [batch, n], none negative.
        uniform: [batch, 1] in [0, 1).

    Returns:
        int64 [batch, 1].
    """
    running = weights.cumsum(1)
    # Below the whole even after rounding, or the search would end behind the last.
    wanted = torch.minimum(uniform * running[:, -1:], running[:, -1:] * (1 - 2.0**-50))
    return torch.searchsorted(running, wanted, right=True)
