"""The choice of the next token from the model's logits: the likeliest, the expected, or one sampled.

A sampled token is chosen by random numbers of its place's own.

Sampling adds Gumbel noise to the logits and takes the largest sum (Gumbel 1954; Maddison et al., arXiv:1411.0030):

    token = argmax_v(logit_v / temperature + G_v),  G_v = -log(-log(u_v)),  u_v uniform in (0, 1)

has the distribution softmax(logits / temperature). The noise belongs to (seed, candidate, place), so that every decoder
draws the same token at a place from the same logits, in whatever order it computes them. Two slightly different
distributions mostly give the same token, which is what parallel decoding lives on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from covray.seeds import seed_of

PLACES = 16
"""Places whose noise is drawn at a time. The noise follows from this number: it cannot change."""


class Sampling(Protocol):
    """What decides the choice, as ``covray.config.SamplingConfig`` does."""

    @property
    def temperature(self) -> float:
        """0: greedy."""

    @property
    def top_k(self) -> int | None:
        """Sample only from this many likeliest tokens."""

    @property
    def top_p(self) -> float:
        """Sample only from the likeliest tokens that together reach this probability."""


class RowNoise:
    """The Gumbel noise of one candidate of one query, over places and codes.

    It is made on the CPU, so that every device has the same, and depends on seed, candidate and place alone: the first
    candidates of a query are the same however many there are.
    """

    def __init__(self, seed: int, candidate: int, codes: int, begin: int = 0):
        """Draw nothing yet.

        Args:
            seed: Of the query.
            candidate: Number of the candidate.
            codes: Tokens of the vocabulary.
            begin: Places before the first that is read here: their noise has been used.
        """
        self._seed = seed_of(seed, candidate)
        self._codes = codes
        self._begin = begin
        self._drawn: dict[int, Tensor] = {}

    def read(self, first: int, count: int) -> Tensor:
        """Return the noise of the places ``first`` to ``first + count``, float32 [count, codes].

        What lies before ``first`` is dropped from memory; it would be drawn again.
        """
        first += self._begin
        numbers = range(first // PLACES, (first + count - 1) // PLACES + 1)
        drawn = {}
        for number in numbers:
            known = self._drawn.get(number)
            drawn[number] = self._draw(number) if known is None else known
        self._drawn = drawn
        whole = torch.cat(list(drawn.values()))
        start = first - numbers[0] * PLACES
        return whole[start : start + count]

    def _draw(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of(self._seed, number))
        uniform = torch.rand(PLACES, self._codes, generator=generator)
        # u is a multiple of 2^-24; 0, of which the logarithm is infinite, becomes half of that.
        return uniform.clamp_(min=2.0**-25).log_().neg_().log_().neg_()


class BatchNoise:
    """The noise of the rows of a batch, each at a place of its own."""

    def __init__(self, rows: Sequence[RowNoise], batch: int, device: torch.device):
        """Collect ``rows``; behind them the batch is padded to ``batch`` rows without noise."""
        self._rows, self._batch, self._device = rows, batch, device

    def read(self, first: Sequence[int], count: int) -> Tensor:
        """Return the noise of ``count`` places from ``first[row]`` on, float32 [batch, count, codes]."""
        known = torch.stack([row.read(start, count) for row, start in zip(self._rows, first, strict=False)])
        padded = known.new_zeros(self._batch, *known.shape[1:])
        padded[: len(known)] = known
        return padded.to(self._device)


def choose_tokens(logits: Tensor, sampling: Sampling, noise: Tensor | None) -> Tensor:
    """Choose a token at every place.

    Args:
        logits: Float32 [..., codes].
        sampling: Temperature, ``top_k`` and ``top_p``.
        noise: Gumbel noise of the places, float32 [..., codes]; None, like the temperature 0: greedy.

    Returns:
        int64 [...].
    """
    if noise is None or sampling.temperature == 0:
        return logits.argmax(-1)
    return (allowed(logits, sampling) + noise).argmax(-1)


def expected_tokens(logits: Tensor, codebook: Tensor) -> Tensor:
    """Return the codes with the least expected squared distance to what ``logits`` say: those nearest to the mean code.

    Where a code between two others means something between, as in depth, this errs less than the likeliest code, which
    ignores how much lies on each side of it (minimum Bayes risk).

    Args:
        logits: Float32 [..., codes].
        codebook: Float32 [codes, width].

    Returns:
        int64 [...].
    """
    mean = logits.softmax(-1) @ codebook
    # |code - mean|^2 without the square of the mean, which is the same for all codes.
    return (codebook.square().sum(-1) - 2 * mean @ codebook.T).argmin(-1)


def allowed(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the logits over the temperature, and -inf for the codes that ``top_k`` and ``top_p`` leave out.

    First the temperature is applied, then ``top_k``, then ``top_p`` of what that leaves, as transformers does.

    Args:
        logits: Float32 [..., codes].
        sampling: Temperature, which is not 0, ``top_k`` and ``top_p``.

    Returns:
        Float32 [..., codes].
    """
    scaled = logits / sampling.temperature
    if sampling.top_k is None and sampling.top_p == 1:
        return scaled
    count = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    likeliest, ids = scaled.topk(count)  # descending
    exact = likeliest.cpu() if likeliest.device.type == "mps" else likeliest  # Metal has no float64
    p = exact.double().softmax(-1)
    before = p.cumsum(-1) - p
    kept = before < sampling.top_p
    kept[..., 0] = True  # the likeliest always stays
    left = likeliest.masked_fill(~kept.to(likeliest.device), -torch.inf)
    return torch.full_like(scaled, -torch.inf).scatter_(-1, ids, left)
