"""Operations of the LVM with gradients of their own, which keep less and compute less than autograd would.

Weights of the backbone are frozen: none of these has a gradient for them where it is not asked for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2048
"""Positions whose logits exist at a time: 2048 x 8292 in float32 is 68 MB."""


class AdaptedLinear(torch.autograd.Function):
    """Frozen linear maps of one input, each with its LoRA update or none.

    part = x W' + low B', with low = scale x A' [T, targets * rank] computed once for all parts. Its gradients, for the
    upstream gradient g of each part: dx = sum g W + d_low A, dA = d_low' x, dB = g' low, d_low = scale [g B of each].
    Autograd would concatenate the gradients of the parts, to multiply them by the fused weight at once; here the
    products are added in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sizes: tuple[int, ...],
        adapted: tuple[bool, ...],
        scale: float,
        lora_a: Tensor,
        *lora_b: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return a part [T, n] for every one of ``sizes``, whose rows of ``weight`` lie one after another.

        Args:
            ctx: Of autograd.
            x: [T, width].
            weight: Frozen, [sum of sizes, width].
            bias: [sum of sizes], or None.
            sizes: Outputs of every part.
            adapted: Whether LoRA adapts the part.
            scale: Of the update: alpha / rank.
            lora_a: A of all adapted parts, [targets * rank, width].
            *lora_b: B of every adapted part, [n, rank].
        """
        # Scaled where it is narrow: rank columns in place of the outputs'.
        low = F.linear(x, lora_a.to(x.dtype)).mul_(scale)  # [T, targets * rank]
        lows, ups = iter(low.chunk(len(lora_b), -1)), iter(lora_b)
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        parts = []
        for rows, offset, has in zip(weight.split(sizes), biases, adapted, strict=True):
            part = F.linear(x, rows, offset)
            if has:
                part.addmm_(next(lows), next(ups).to(x.dtype).t())
            parts.append(part)
        ctx.save_for_backward(x, weight, low, lora_a, *lora_b)
        ctx.sizes, ctx.adapted, ctx.scale = sizes, adapted, scale
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        """Return the gradients of x, A and every B."""
        x, weight, low, lora_a, *lora_b = ctx.saved_tensors
        lows, ups = iter(low.chunk(len(lora_b), -1)), iter(lora_b)
        to_b, to_lows = [], []
        to_x = None
        for rows, has, above in zip(weight.split(ctx.sizes), ctx.adapted, upstream, strict=True):
            if ctx.needs_input_grad[0]:
                to_x = above @ rows if to_x is None else to_x.addmm_(above, rows)
            if has:
                up = next(ups)
                to_lows.append(above @ up.to(x.dtype))  # [T, rank]
                low_of_part = next(lows)
                # A frozen adapter, beside a draft that is learned, gets no gradient.
                gradient = None
                if ctx.needs_input_grad[6]:
                    gradient = (above.t() @ low_of_part).to(up.dtype)
                to_b.append(gradient)
        # Back through the scale, once for all parts.
        to_low = torch.cat(to_lows, -1).mul_(ctx.scale)
        if to_x is not None:
            to_x.addmm_(to_low, lora_a.to(x.dtype))
        to_a = (to_low.t() @ x).to(lora_a.dtype) if ctx.needs_input_grad[6] else None  # None beside a draft adapter
        return to_x, None, None, None, None, None, to_a, *to_b


class FrozenRmsNorm(torch.autograd.Function):
    """RMS norm whose weight gets no gradient; on a CPU autograd's own is computed in several passes.

    With r = 1 / rms(x) and s = g * weight: dx = r (s - x r^2 mean(s x)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return ``x`` [T, width] divided by the root mean square of its rows, times ``weight``."""
        # The operator behind F.rms_norm, called for the inverse rms that it returns as well.
        normed, inverse_rms = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight, eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        return normed

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of x."""
        x, weight, inverse_rms = ctx.saved_tensors
        scaled = upstream[0] * weight
        # A mean over a wide row needs more digits than bfloat16 has.
        along = (scaled * x).mean(-1, keepdim=True, dtype=torch.float32) * inverse_rms.square()
        return scaled.sub_(x * along.to(x.dtype)).mul_(inverse_rms.to(x.dtype)), None, None


class Rotate(torch.autograd.Function):
    """Rotation of the two halves of every head; its gradient is rotated back by the same angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Return ``x`` [T, heads, d], rotated by the angles of ``rotary``."""
        ctx.save_for_backward(cosine, sine)
        return rotated_pairs(x, cosine, sine)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of x."""
        cosine, sine = ctx.saved_tensors
        # The transpose of a rotation is the rotation by minus its angle.
        return rotated_pairs(upstream[0], cosine, -sine), None, None


def rotated_pairs(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Return [x1 cos - x2 sin, x2 cos + x1 sin] for the halves x1, x2 of ``x`` [..., d]."""
    half = x.shape[-1] // 2
    # In the memory of one product: torch.cat of the halves would copy them all again.
    turned = x * cosine
    turned[..., :half].addcmul_(x[..., half:], sine[..., :half], value=-1)
    turned[..., half:].addcmul_(x[..., :half], sine[..., half:])
    return turned


class ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy of the logits ``hidden @ weight.T``.

    Logits exist for one chunk of positions at a time, and their gradient, softmax - one hot, is taken on the spot.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of losses in nats, each times its weight where there are ``weights``, and each loss [P].

        Args:
            ctx: Of autograd.
            hidden: [P, width].
            weight: The head, [vocabulary, width].
            targets: The right id at each position, [P].
            weights: Of each position in the sum, or None.
        """
        to_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        matrix = weight.to(hidden.dtype)
        losses = torch.empty(len(hidden), device=hidden.device, dtype=torch.float32)
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            chunk, target = hidden[rows], targets[rows, None]
            # In float32 from here on: bfloat16 has no digits for the differences that make a loss.
            logits = (chunk @ matrix.t()).float()
            normaliser = logits.logsumexp(-1, keepdim=True)
            losses[rows] = (normaliser - logits.gather(-1, target))[:, 0]
            if to_hidden is not None or to_weight is not None:
                error = logits.sub_(normaliser).exp_()  # the softmax, in the memory of the logits
                error.scatter_add_(-1, target, torch.full_like(target, -1, dtype=error.dtype))
                if weights is not None:
                    error.mul_(weights[rows, None])
                low = error.to(hidden.dtype)
                if to_hidden is not None:
                    to_hidden[rows] = low @ matrix
                if to_weight is not None:
                    to_weight += low.t() @ chunk
        ctx.save_for_backward(to_hidden, to_weight)
        # For metrics only: a gradient through each loss would need the logits again.
        ctx.mark_non_differentiable(losses)
        total = losses.sum() if weights is None else (losses * weights).sum()
        return total, losses

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden and weight."""
        to_hidden, to_weight = ctx.saved_tensors
        scaled_hidden = None if to_hidden is None else to_hidden * upstream[0].to(to_hidden.dtype)
        scaled_weight = None if to_weight is None else to_weight * upstream[0].to(to_weight.dtype)
        return scaled_hidden, scaled_weight, None, None
