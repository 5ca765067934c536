"""The draft adapter: a LoRA that only masks feel, which predict what the model itself is going to write.

Behind a token at place p stand masks at p + 1, p + 2, ...; the one at p + i predicts the token at p + i + 1. So the
first of them predicts the token after the next: the next one is what the token at p itself predicts.

    place              p      p + 1   p + 2   p + 3
    read               token  mask    mask    mask
    predicts place     p + 1  p + 2   p + 3   p + 4      a mask sees the tokens up to p and the masks before it

The update is gated (Samragh et al., arXiv:2507.11851): it is added where a mask is read, and nowhere else. Tokens never
see masks. So the model computes the same bits for tokens with and without the draft adapter, and can verify the drafts
that its own masks propose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Draft:
    """What is known of a draft adapter: W x + (alpha / rank) B A x on masks."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Projections that get an update, by their names in transformers."""
    mask_id: int
    """The special id of a mask; the draft adapter holds its row of the embedding."""
    tokens: int
    """Masks behind a token, as trained."""


@dataclass(frozen=True)
class MaskRows:
    """Which tokens of a flat row are masks of a draft."""

    rows: int
    """Equal parts of the flat row."""
    first: int
    """The first mask of each part; all tokens behind it are masks, too."""


class DraftUpdate(nn.Module):
    """The updates of linear maps of one input: ``A`` is [targets * rank, width], and each ``B`` [size, rank]."""

    def __init__(self, width: int, sizes: dict[str, int], draft: Draft):
        """Allocate parameters.

        Args:
            width: Of the input.
            sizes: Widths of the outputs, by the name of the projection, in order.
            draft: The draft adapter, which targets some of them.
        """
        super().__init__()
        self._names = tuple(sizes)
        self._targets = tuple(name for name in sizes if name in draft.targets)
        self._rank, self._scale = draft.rank, draft.alpha / draft.rank
        self.A = nn.Parameter(torch.empty(len(self._targets) * draft.rank, width))
        self.B = nn.ParameterDict({name: nn.Parameter(torch.empty(sizes[name], draft.rank)) for name in self._targets})

    def add_to(self, parts: tuple[Tensor, ...], x: Tensor, masks: MaskRows) -> tuple[Tensor, ...]:
        """Return ``parts`` with the updates of the masks; what is not of a mask stays the same bits.

        Args:
            parts: The outputs of the maps, each [T, size].
            x: Their input, [T, width].
            masks: Which tokens are masks.
        """
        # A row of the window is tokens, then masks from place ``first`` on: only the masks' part is changed.
        first = masks.first
        # All maps share one product with A; ``lows`` is [rows, masks, maps * rank], a map's share after another's.
        lows = F.linear(x.view(masks.rows, -1, x.shape[-1])[:, first:], self.A.to(x.dtype)).mul(self._scale)
        updated = dict(zip(self._names, parts, strict=True))
        for name, low in zip(self._targets, lows.split(self._rank, -1), strict=True):
            part = updated[name]
            whole = part.view(masks.rows, -1, part.shape[-1])
            changed = whole[:, first:] + F.linear(low, self.B[name].to(x.dtype))
            # Put together rather than adding zeros to the tokens, whose bits must not be touched.
            updated[name] = torch.cat((whole[:, :first], changed), 1).view(part.shape)
        return tuple(updated.values())

    def views(self) -> dict[str, Tensor]:
        """Return detached views of the matrices as ``<projection>.lora_A`` and ``.lora_B``."""
        tensors = {}
        for name, low in zip(self._targets, self.A.detach().split(self._rank), strict=True):
            tensors[f"{name}.lora_A"] = low
            tensors[f"{name}.lora_B"] = self.B[name].detach()
        return tensors


def draft_update(width: int, sizes: dict[str, int], draft: Draft | None) -> DraftUpdate | None:
    """Return the update of linear maps of one input; None where none of them is a target.

    Args:
        width: Of the input.
        sizes: Widths of the outputs, by the name of the projection, in order.
        draft: The draft adapter, if there is one.
    """
    if draft is None or not set(sizes) & set(draft.targets):
        return None
    return DraftUpdate(width, sizes, draft)
