"""Batches for training: clean tokens, and noisy blocks of the answer beside them.

A row is [clean | noisy]. Answers are cut into blocks of D tokens; ``start`` is where a row's first block begins, and a
token at place p is of block floor((p - start) / D), so that the prompt's blocks have negative numbers. What tokens see:

    clean -> clean   what stands before (``causal``), or all blocks up to its own (``block``)
    noisy -> clean   all that stands before its block
    noisy -> noisy   its own block
    clean -> noisy   never

With ``causal`` the clean half is the autoregressive model untouched, so that its next-token loss and likelihoods keep
their meaning (Fast-dVLM, arXiv:2604.06832); ``block`` is DiffusionVL's (arXiv:2512.15713), where prompt and pictures
are read in blocks, too. A noisy token predicts the token at its own place, or with ``shift`` the one behind it; then
the first of a block is predicted by the clean token before it (Fast-dLLM v2, arXiv:2509.26328).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from covray.models.masking import Weight, mask_blocks, noise_levels
from covray.models.vlm.prompts import Sample

Context = Literal["causal", "block"]
BlocksFrom = Literal["prompt", "sequence"]


@dataclass(frozen=True)
class Blocks:
    """How answers are cut into blocks, and what clean tokens see."""

    size: int = 8
    """Tokens of a block."""
    context: Context = "causal"
    start: BlocksFrom = "prompt"
    """Where blocks are counted from: the end of the prompt, or the sequence's first token, as DiffusionVL does; then
    the last tokens of the prompt can share a block with the first of the answer."""
    shift: bool = False
    """Whether a token is predicted at the place before it, as by the autoregressive model, or at its own."""

    def first(self, prompt: int) -> int:
        """Return the place where the first block with tokens of the answer begins, after ``prompt`` tokens."""
        return prompt if self.start == "prompt" else prompt // self.size * self.size

    def padding(self, prompt: int, tokens: int) -> int:
        """Return how many tokens are missing from ``tokens`` to the end of a block, with a prompt of ``prompt``."""
        return (self.first(prompt) - tokens) % self.size


@dataclass(frozen=True)
class NoiseLevels:
    """How many tokens are masked, and what they weigh."""

    low: float = 0.001
    high: float = 1.0
    weight: Weight = "masked"


@dataclass(frozen=True)
class Noise:
    """The noisy tokens of a batch."""

    places: Tensor
    """Where each stands in the clean half, int64 [B, M]; 0 for padding."""
    counts: Tensor
    """Noisy tokens of each row, int64 [B]."""
    masked: Tensor
    """bool [B, M]."""
    weights: Tensor
    """What the cross-entropy of a masked token weighs, float32 [B, M]."""

    def to(self, device: torch.device) -> Noise:
        """Return the same on ``device``."""
        return Noise(self.places.to(device), self.counts.to(device), self.masked.to(device), self.weights.to(device))


@dataclass(frozen=True)
class VlmBatch:
    """What a worker computes at a time."""

    ids: Tensor
    """int64 [B, L], padded on the right."""
    lengths: Tensor
    """Tokens of each row, int64 [B]."""
    images: dict[str, Tensor]
    """Pixels and grids of all pictures, as the image processor returns them."""
    next_weights: Tensor
    """What the next-token cross-entropy of ids[:, 1:] weighs, float32 [B, L - 1]."""
    starts: Tensor
    """Where each row's first block begins, int64 [B]."""
    blocks: Blocks
    noise: Noise | None = None

    def to(self, device: torch.device) -> VlmBatch:
        """Return the same on ``device``."""
        return VlmBatch(
            ids=self.ids.to(device),
            lengths=self.lengths.to(device),
            images={name: tensor.to(device) for name, tensor in self.images.items()},
            next_weights=self.next_weights.to(device),
            starts=self.starts.to(device),
            blocks=self.blocks,
            noise=None if self.noise is None else self.noise.to(device),
        )


@dataclass(frozen=True)
class NoisySample:
    """A sample with the noise of its blocks."""

    places: NDArray[np.int64]
    """The places of its blocks, [M]."""
    masked: NDArray[np.bool_]
    weights: NDArray[np.float64]


def add_noise(sample: Sample, blocks: Blocks, levels: NoiseLevels, generator: np.random.Generator) -> NoisySample:
    """Mask tokens of a sample's answer; those of the prompt never.

    Args:
        sample: Its tokens end with a block.
        blocks: The blocks.
        levels: Shares of masked tokens, and the weights. The weight ``masked`` needs blocks without prompt.
        generator: Where the random numbers come from.
    """
    places = np.arange(blocks.first(sample.prompt), len(sample.ids))
    shares = noise_levels(len(places) // blocks.size, levels.low, levels.high, generator)
    # Whole blocks are drawn: a first block that begins within the prompt is uncovered up to the answer.
    of_block, weight = mask_blocks(shares, blocks.size, levels.weight, generator)
    return NoisySample(
        places=places,
        masked=of_block.ravel() & (places >= sample.prompt),
        weights=np.repeat(weight, blocks.size),
    )


def collate(
    samples: Sequence[Sample],
    noisy: Sequence[NoisySample] | None,
    blocks: Blocks,
    next_weight: float = 1.0,
    scales: Sequence[float] | None = None,
) -> VlmBatch:
    """Return a batch.

    Args:
        samples: The rows.
        noisy: Their noise; None: next tokens only.
        blocks: The blocks.
        next_weight: What the next-token loss of the answers weighs.
        scales: What the losses of each row weigh, by default 1.
    """
    row_scales = [1.0] * len(samples) if scales is None else scales
    longest = max(len(sample.ids) for sample in samples)
    ids = torch.full((len(samples), longest), samples[0].end_id, dtype=torch.int64)
    next_weights = torch.zeros(len(samples), longest - 1)
    for row, (sample, scale) in enumerate(zip(samples, row_scales, strict=True)):
        ids[row, : len(sample.ids)] = torch.from_numpy(sample.ids)
        # A token is predicted at the place before it, the answer's first by the prompt's last.
        next_weights[row, sample.prompt - 1 : sample.end - 1] = next_weight * scale
    images: dict[str, Tensor] = {}
    with_images = [sample.images for sample in samples if sample.images]
    for name in with_images[0] if with_images else ():
        images[name] = torch.cat([own[name] for own in with_images])
    return VlmBatch(
        ids=ids,
        lengths=torch.tensor([len(sample.ids) for sample in samples]),
        images=images,
        next_weights=next_weights,
        starts=torch.tensor([blocks.first(sample.prompt) for sample in samples]),
        blocks=blocks,
        noise=None if noisy is None else _collate_noise(noisy, row_scales),
    )


def _collate_noise(noisy: Sequence[NoisySample], scales: Sequence[float]) -> Noise:
    longest = max(len(row.places) for row in noisy)
    places = torch.zeros(len(noisy), longest, dtype=torch.int64)
    masked = torch.zeros(len(noisy), longest, dtype=torch.bool)
    weights = torch.zeros(len(noisy), longest)
    for number, (row, scale) in enumerate(zip(noisy, scales, strict=True)):
        count = len(row.places)
        places[number, :count] = torch.from_numpy(row.places)
        masked[number, :count] = torch.from_numpy(row.masked)
        weights[number, :count] = torch.from_numpy(row.weights * scale)
    counts = torch.tensor([len(row.places) for row in noisy])
    return Noise(places, counts, masked, weights)


def training_mask(batch: VlmBatch) -> Tensor:
    """Return what every token sees, bool [B, 1, L + M, L + M]; see the module. Padding sees itself."""
    device = batch.ids.device
    size, start = batch.blocks.size, batch.starts[:, None]
    clean = torch.arange(batch.ids.shape[1], device=device)
    is_token = clean < batch.lengths[:, None]  # [B, L]
    # Without noise nothing is learned by blocks, and the model is the autoregressive one.
    context = "causal" if batch.noise is None else batch.blocks.context
    of_clean = clean_mask(clean - start, size, context) & is_token[:, None]
    # Padding, too, must see something: softmax over no key is NaN, which the next layer would hand on.
    of_clean = of_clean | torch.eye(len(clean), dtype=torch.bool, device=device)
    if batch.noise is None:
        return of_clean[:, None]
    noise = batch.noise
    number = (noise.places - start).div(size, rounding_mode="floor")  # [B, M]
    is_noisy = torch.arange(noise.places.shape[1], device=device) < noise.counts[:, None]
    before = clean < (start + number * size)[..., None]  # [B, M, L]
    same = (number[:, :, None] == number[:, None]) & is_noisy[:, None]
    same = same | torch.eye(same.shape[1], dtype=torch.bool, device=device)
    never = torch.zeros(len(same), len(clean), same.shape[1], dtype=torch.bool, device=device)
    upper = torch.cat((of_clean, never), 2)
    lower = torch.cat((before & is_token[:, None], same), 2)
    return torch.cat((upper, lower), 1)[:, None]


def clean_mask(places: Tensor, size: int, context: Context) -> Tensor:
    """Return what clean tokens see of each other, bool [..., n, n].

    Args:
        places: Where they stand, counted from the first block, int64 [..., n].
        size: Tokens of a block.
        context: What a token sees.
    """
    numbers = places if context == "causal" else places.div(size, rounding_mode="floor")
    return numbers[..., None, :] <= numbers[..., :, None]
