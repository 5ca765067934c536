"""The LoRA adapter of an LVM: what it is made of, and the fused projections that compute with it.

In all shapes here, T is the number of tokens of all sentences together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covray.models.lvm.draft import Draft, MaskRows, draft_update
from covray.models.lvm.functions import AdaptedLinear
from covray.models.lvm.verifier import Verifier

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The projections of a layer that LoRA can adapt, by their names in transformers."""


@dataclass(frozen=True)
class Diffusion:
    """What block diffusion adds to an adapter."""

    mask_id: int
    """The special id that stands for a masked token; the adapter holds its row of the embedding."""
    block: int
    """Tokens of a block, as trained."""


@dataclass(frozen=True)
class Lora:
    """A low-rank update: W x + (alpha / rank) B A x on the projections ``targets`` (Hu et al., arXiv:2106.09685)."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS
    diffusion: Diffusion | None = None
    """Of an adapter that was trained by block diffusion."""
    draft: Draft | None = None
    """A draft adapter beside it."""
    # Left out of ``==``: two reads of one file are two networks.
    verifier: Verifier | None = field(default=None, compare=False)
    """A verifier of its answers beside it; it changes nothing that the model computes."""

    @property
    def mask_id(self) -> int | None:
        """The special id of a mask; None where there are no masks."""
        known = self.diffusion or self.draft
        return None if known is None else known.mask_id


class Projection(nn.Module):
    """Linear maps of one input, as one matrix, each with its LoRA update if it is a target.

    ``weight`` is [sum of sizes, width]; ``lora_A`` is [targets * rank, width], and each ``lora_B`` [size, rank].
    """

    def __init__(self, width: int, sizes: dict[str, int], bias: bool, lora: Lora | None):
        """Allocate parameters.

        Args:
            width: Of the input.
            sizes: Widths of the outputs, by the name of the projection, in their order in ``weight``.
            bias: Whether the maps have biases.
            lora: The adapter; projections that it does not target are left as they are.
        """
        super().__init__()
        self.sizes, self._widths = sizes, tuple(sizes.values())
        self.weight = nn.Parameter(torch.empty(sum(sizes.values()), width))
        self.bias = nn.Parameter(torch.empty(sum(sizes.values()))) if bias else None
        self.adapted = tuple(name for name in sizes if lora and name in lora.targets)
        self.draft = None if lora is None else draft_update(width, sizes, lora.draft)
        if lora and self.adapted:
            self.requires_grad_(False)  # an adapted map is frozen: its backward pass gives the base no gradient
            self.rank, self.scale = lora.rank, lora.alpha / lora.rank
            self.lora_A = nn.Parameter(torch.empty(len(self.adapted) * lora.rank, width))
            self.lora_B = nn.ParameterDict(
                {name: nn.Parameter(torch.empty(sizes[name], lora.rank)) for name in self.adapted}
            )

    def forward(self, x: Tensor, masks: MaskRows | None = None) -> tuple[Tensor, ...]:
        """Map ``x`` [T, width] to one output [T, size] for each of ``sizes``; ``masks`` get the draft's update, too."""
        parts = self._map(x) if self.adapted else self.whole(x).split(self._widths, -1)
        return parts if masks is None or self.draft is None else self.draft.add_to(parts, x, masks)

    def whole(self, x: Tensor) -> Tensor:
        """Return the outputs side by side, [T, sum of sizes], without any update."""
        return F.linear(x, self.weight, self.bias)

    def _map(self, x: Tensor) -> tuple[Tensor, ...]:
        sizes = self._widths
        adapted = tuple(name in self.adapted for name in self.sizes)
        # B of every adapted map; A is one matrix for all of them, as they read the same input.
        ups = (self.lora_B[name] for name in self.adapted)
        parts: tuple[Tensor, ...] = AdaptedLinear.apply(
            x, self.weight, self.bias, sizes, adapted, self.scale, self.lora_A, *ups
        )
        return parts
