"""Masking tokens and taking masks away: noise of block diffusion, and the order in which blocks are written.

Block diffusion (Arriola et al., BD3-LM, arXiv:2503.09573; for vision-language models DiffusionVL, arXiv:2512.15713)
masks some tokens of a block and learns all masked ones at once from the rest and from what stands before the block. The
loss is the negative evidence lower bound (NELBO) of the block's D tokens, of which a level t in (0, 1] decides how many
are masked. Two estimates of it are known:

- ``level``: every token is masked with probability t, and its cross-entropy is weighed by 1 / t.
- ``masked``: m = ceil(t D) tokens are masked, drawn without order, and weighed by D / m. It is the sum over a random
  order of the tokens (Hoogeboom et al., arXiv:2110.02037), varies less, and never leaves a block without a mask.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Weight = Literal["masked", "level"]
Unmasking = Literal["even", "cosine", "confidence", "entropy"]


def noise_levels(blocks: int, low: float, high: float, generator: np.random.Generator) -> NDArray[np.float64]:
    """Return a level for every block, [blocks], one from each of so many equal parts of ``low`` to ``high``, shuffled.

    Strata halve the variance of the loss against levels drawn one by one (SDAR-VL, arXiv:2512.14068).
    """
    strata = generator.permutation(blocks) + generator.random(blocks)
    levels: NDArray[np.float64] = high - (high - low) * strata / blocks  # in (low, high]
    return levels


def mask_blocks(
    levels: NDArray[np.float64], block: int, weight: Weight, generator: np.random.Generator
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Decide which tokens of every block are masked, and what their cross-entropy weighs.

    Args:
        levels: Share of masked tokens, in (0, 1], [blocks].
        block: Tokens of a block.
        weight: The estimate of the NELBO; see the module.
        generator: Where the random numbers come from.

    Returns:
        Masked tokens, bool [blocks, block], and the weight of a token of each block, [blocks].
    """
    uniform = generator.random((len(levels), block))
    if weight == "level":
        return uniform < levels[:, None], 1 / levels
    counts = np.ceil(levels * block).clip(1, block)
    # The tokens with the smallest of independent numbers are a draw without order.
    rank = uniform.argsort(1).argsort(1)
    return rank < counts[:, None], block / counts


def pass_counts(block: int, passes: int, schedule: Unmasking) -> list[int]:
    """Return how many tokens of a block every pass writes: none is negative, and they sum to ``block``.

    Args:
        block: Tokens of a block.
        passes: Passes of a block, 1 to ``block``.
        schedule: ``cosine`` writes few tokens in the first passes and many in the last (MaskGIT, arXiv:2202.04200), at
            least one in each; all others write equally many, a remainder in the first passes.
    """
    if schedule != "cosine":
        return [block // passes + (number < block % passes) for number in range(passes)]
    counts, left = [], block
    for number in range(1, passes + 1):
        keep = math.floor(block * math.cos(math.pi / 2 * number / passes))
        # At least one token in this pass, and one for each of those to come.
        keep = max(min(keep, left - 1), passes - number)
        counts.append(left - keep)
        left = keep
    return counts


def choose_unmasked(
    probabilities: Tensor, chosen: Tensor, masked: Tensor, count: int, rule: Unmasking, threshold: float
) -> Tensor:
    """Choose which masked places of every row a pass writes: the surest first.

    A row's choice depends on that row only; where any of its places is masked, at least one is chosen.

    Args:
        probabilities: What the tokens were drawn from, float32 [batch, D, codes].
        chosen: The drawn tokens, int64 [batch, D].
        masked: Places without a token yet, bool [batch, D].
        count: Places to write by ``even`` and ``cosine``, and at least by ``confidence``.
        rule: ``confidence`` writes all tokens of a probability above ``threshold`` (Fast-dLLM, arXiv:2505.22618).
            ``entropy`` writes as many as keep the sum of their entropies, but for the largest, within ``threshold``
            nats: an upper bound of how far the product of their distributions is from their joint one (Ben-Hamu et al.,
            arXiv:2505.24857).
        threshold: Of ``confidence`` and ``entropy``.

    Returns:
        bool [batch, D].
    """
    if rule == "entropy":
        entropy = torch.special.entr(probabilities).sum(-1).masked_fill(~masked, torch.inf)
        ascending, order = entropy.sort(dim=1, stable=True)
        # Ascending, so that the largest of the first k is the k-th itself.
        within = ascending.cumsum(1) - ascending <= threshold
        # Or a block whose tokens are all unsure would never end.
        within[:, 0] = True
        return torch.zeros_like(masked).scatter_(1, order, within) & masked
    # -1 is below any probability: places that have a token rank last.
    confidence = probabilities.gather(2, chosen[..., None])[..., 0].masked_fill(~masked, -1)
    rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(1)
    best = (rank < count) & masked
    if rule != "confidence":
        return best
    sure = (confidence > threshold) & masked
    enough = sure.sum(1, keepdim=True) >= count
    return torch.where(enough, sure, best)
