"""Keys and values of what a decoder has read: a prompt that all rows of a batch share, and a part of each row's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, for a prompt of P tokens and up to N tokens of each row after it."""

    shared_keys: Tensor
    """[heads, P, head width]."""
    shared_values: Tensor
    """[heads, P, head width]."""
    keys: Tensor
    """What each row has read and written after the prompt, [heads, batch, N, head width]."""
    values: Tensor
    """[heads, batch, N, head width]."""

    def attend(self, query: Tensor, count: int) -> Tensor:
        """Attend with one token a row to the prompt and to the row's own tokens.

        Matrix products of all rows with the shared part and of each row with its own, then one softmax over both.

        Args:
            query: [batch, heads, head width].
            count: How many of the row's own tokens there are, the same for all rows.

        Returns:
            The mixed values, [batch, heads * head width].
        """
        rows, heads, size = query.shape
        query = (query * size**-0.5).transpose(0, 1).contiguous()  # [heads, batch, size]
        keys, values = (part[:, :, :count].flatten(0, 1) for part in (self.keys, self.values))
        shared = torch.bmm(query, self.shared_keys.mT)  # [heads, batch, P]
        own = torch.bmm(query.view(heads * rows, 1, size), keys.mT).view(heads, rows, count)
        weights = torch.cat((shared, own), -1).softmax(-1, dtype=torch.float32).to(query.dtype)
        mixed = torch.bmm(weights[..., : shared.shape[2]], self.shared_values)  # [heads, batch, size]
        own_weights = weights[..., shared.shape[2] :].reshape(heads * rows, 1, count)
        mixed += torch.bmm(own_weights, values).view(heads, rows, size)
        return mixed.transpose(0, 1).reshape(rows, -1)
