"""Noisy tokens beside clean ones: how block diffusion is learned in one pass over a sentence.

A sentence's loss-bearing pictures stand there twice: clean, as the autoregressive model reads them, and noisy, cut into
blocks of D tokens with some tokens masked. The mask (rows see columns; two blocks, a and b, after a prompt):

               prompt  a  b    noisy a  noisy b
    prompt     causal
    a          1       causal
    b          1       1  causal
    noisy a    1                1
    noisy b    1       1                 1

Clean tokens are causal and never see noisy ones: they compute what the model computes without any noise, so that one
causal pass over a finished block gives the keys and values that the next block sees (Fast-dVLM, arXiv:2604.06832;
DiffusionVL lets clean tokens of a block see each other both ways). A noisy token sees its whole block and every clean
token before the block; it predicts the token at its own place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class NoisyBlocks:
    """The noisy tokens of a batch of T clean ones."""

    ids: Tensor
    """Token ids, the mask's where a token is masked, int64 [M]; sentence after sentence, in whole blocks."""
    places: Tensor
    """Where in the batch's ``ids`` each of them stands, int64 [M]."""
    counts: tuple[int, ...]
    """Noisy tokens of each sentence; they sum to M."""
    block: int
    """Tokens of a block."""
    masked: Tensor
    """Which of ``ids`` are masked, as indices, int64 [K]."""
    weights: Tensor
    """What the cross-entropy of each of ``masked`` weighs, float32 [K]."""
    clean_weight: float
    """What the cross-entropy of each of the batch's own ``positions`` weighs."""
    drafts: bool = False
    """Whether they are masks of a draft adapter: a mask sees those of its block before it, not those behind it, and
    predicts the token after its place, not at its place."""

    @property
    def predicted(self) -> Tensor:
        """Where in the batch's ``ids`` the token stands that each of ``masked`` predicts, int64 [K]."""
        places = self.places[self.masked]
        return places + 1 if self.drafts else places

    def to(self, device: torch.device) -> NoisyBlocks:
        """Return the same blocks on ``device``."""
        return NoisyBlocks(
            ids=self.ids.to(device),
            places=self.places.to(device),
            counts=self.counts,
            block=self.block,
            masked=self.masked.to(device),
            weights=self.weights.to(device),
            clean_weight=self.clean_weight,
            drafts=self.drafts,
        )


@dataclass(frozen=True)
class NoisyAttention:
    """The attention of noisy tokens: neighbouring sentences of one shape are a batch of the attention kernel."""

    groups: tuple[tuple[int, int, int, Tensor], ...]
    """Sentences, clean and noisy tokens of each, and their mask, bool [sentences, 1, noisy, clean + noisy]."""
    drafts: bool
    """Of the noisy tokens."""

    @classmethod
    def of(cls, noisy: NoisyBlocks, lengths: Sequence[int]) -> NoisyAttention:
        """Make the masks once for all layers.

        Args:
            noisy: The noisy tokens.
            lengths: Clean tokens of each sentence of the batch.
        """
        groups = []
        first_clean = first_noisy = 0
        # Neighbours of equal lengths are one group: one call of the attention for all of them.
        for (length, count), same in groupby(zip(lengths, noisy.counts, strict=True)):
            masks = []
            for _ in same:
                places = noisy.places[first_noisy : first_noisy + count] - first_clean
                masks.append(visible(places, length, noisy.block, noisy.drafts))
                first_clean, first_noisy = first_clean + length, first_noisy + count
            if count:
                groups.append((len(masks), length, count, torch.stack(masks)[:, None]))
            else:
                groups.append((len(masks), length, 0, noisy.places.new_zeros(0, dtype=torch.bool)))
        return cls(tuple(groups), noisy.drafts)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend with the noisy tokens.

        Args:
            query: [T + M, heads, d], rotated; the clean tokens come first.
            key: [T + M, heads, d], rotated.
            value: [T + M, heads, d].

        Returns:
            The mixed values of the noisy tokens, [M, heads * d].
        """
        # Clean tokens of all sentences stand first, then the noisy ones of all.
        clean, noisy = 0, sum(sentences * length for sentences, length, _, _ in self.groups)
        mixed = []
        for sentences, length, count, mask in self.groups:
            of_clean = slice(clean, clean + sentences * length)
            of_noisy = slice(noisy, noisy + sentences * count)
            clean, noisy = of_clean.stop, of_noisy.stop
            if not count:
                continue
            # [sentences, tokens, heads, d]; noisy tokens see the keys of both.
            shape = (sentences, -1, *query.shape[1:])
            keys = torch.cat((key[of_clean].view(shape), key[of_noisy].view(shape)), 1).transpose(1, 2)
            values = torch.cat((value[of_clean].view(shape), value[of_noisy].view(shape)), 1).transpose(1, 2)
            queries = query[of_noisy].view(shape).transpose(1, 2)
            out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
            mixed.append(out.transpose(1, 2).reshape(sentences * count, -1))
        return torch.cat(mixed)


def visible(places: Tensor, clean: int, block: int, causal: bool = False) -> Tensor:
    """Return what the noisy tokens of one sentence see, bool [M, clean + M]; see the module.

    Args:
        places: Where each noisy token stands in its sentence, int64 [M], in whole blocks.
        clean: Clean tokens of the sentence.
        block: Tokens of a block.
        causal: Whether a token sees only those of its block that stand before it.
    """
    number = torch.arange(len(places), device=places.device) // block  # the block of each noisy token, [M]
    start = places[number * block]  # where that block begins in the sentence, [M]
    # All clean tokens before their block, and of the noisy ones only those of the same block.
    before = torch.arange(clean, device=places.device) < start[:, None]
    same_block = number[:, None] == number
    if causal:
        same_block = same_block.tril()
    return torch.cat((before, same_block), 1)
