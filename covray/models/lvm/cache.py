"""Keys and values of what a decoder has read: a prompt that all rows of a batch share, and a part of each row's own.

The layout is "cascade attention" (Juravsky et al., Hydragen, arXiv:2402.05099): the scores of all rows with the shared
prompt are one matrix product, those of each row with its own part another, and one softmax joins them.

    slots of a row's own part   0 ........ own-1 | own ... own+W-1 | .... N-1
                                read for good    | the window      | stale or never written: masked

Nothing is ever deleted: a row forgets what it read behind ``own`` by saying a smaller ``own`` at the next read, which
masks the stale slots and overwrites them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """Where W tokens a row stand that are read in one pass; the rows may stand at different places."""

    slots: Tensor
    """Slots of the tokens in their row's own part, int64 [batch, W]."""
    hidden_slots: Tensor
    """Slots of the own part that a token does not see, bool [batch, W, N]."""

    @classmethod
    def at(cls, own: Tensor, visible: Tensor, length: int) -> Window:
        """Place a window behind the first ``own`` tokens of each row.

        Args:
            own: Tokens of the row's own part that count, int64 [batch].
            visible: Which tokens of the window (columns) each of its tokens (rows) sees, bool [W, W].
            length: N, the slots of an own part. It must not depend on the progress of any row: the order of the
                additions in a softmax, and so its last bits, follow from it.
        """
        width = len(visible)
        # The slots of each row's window, [batch, W].
        slots = own[:, None] + torch.arange(width, device=own.device)
        offset = torch.arange(length, device=own.device) - own[:, None]  # [batch, N], 0 at the window's first slot
        inside = (offset >= 0) & (offset < width)
        of_window = visible[:, offset.clamp(0, width - 1)].transpose(0, 1)  # [batch, W, N]
        # What lies before the window, and of the window what ``visible`` says; slots behind it hold what was given
        # up.
        seen = (offset < 0)[:, None] | (inside[:, None] & of_window)
        return cls(slots, ~seen)


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
        # As scaled_dot_product_attention scales; heads first, for one product with the keys that all rows share.
        query = (query * size**-0.5).transpose(0, 1).contiguous()  # [heads, batch, size]
        keys, values = (part[:, :, :count].flatten(0, 1) for part in (self.keys, self.values))
        shared = torch.bmm(query, self.shared_keys.mT)  # [heads, batch, P]
        own = torch.bmm(query.view(heads * rows, 1, size), keys.mT).view(heads, rows, count)
        # One softmax over both parts, in float32.
        weights = torch.cat((shared, own), -1).softmax(-1, dtype=torch.float32).to(query.dtype)
        mixed = torch.bmm(weights[..., : shared.shape[2]], self.shared_values)  # [heads, batch, size]
        # The weights of the row's own tokens, with values of its own.
        own_weights = weights[..., shared.shape[2] :].reshape(heads * rows, 1, count)
        mixed += torch.bmm(own_weights, values).view(heads, rows, size)
        return mixed.transpose(0, 1).reshape(rows, -1)

    def attend_window(self, query: Tensor, key: Tensor, value: Tensor, window: Window) -> Tensor:
        """Store the keys and values of a window, and attend with its tokens to the prompt, the own part and each other.

        Args:
            query: [batch * W, heads, head width], rotated; a row's tokens lie together.
            key: [batch * W, heads, head width], rotated.
            value: [batch * W, heads, head width].
            window: Where the tokens stand, and what they see.

        Returns:
            The mixed values, [batch * W, heads * head width].
        """
        rows, width = window.slots.shape
        tokens, heads, size = query.shape
        number = torch.arange(rows, device=query.device)[:, None]
        # Stored before they are read: a window's tokens see each other.
        for stored, new in ((self.keys, key), (self.values, value)):
            stored[:, number, window.slots] = new.view(rows, width, heads, size).permute(2, 0, 1, 3)
        query = (query * size**-0.5).transpose(0, 1).contiguous()  # [heads, batch * W, size]
        slots = self.keys.shape[2]
        shared = torch.bmm(query, self.shared_keys.mT)  # [heads, batch * W, P]
        own = torch.bmm(query.view(heads * rows, width, size), self.keys.flatten(0, 1).mT)
        own = own.view(heads, rows, width, slots).masked_fill_(window.hidden_slots, -torch.inf)
        scores = torch.cat((shared, own.view(heads, tokens, slots)), -1)
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)  # exactly 0 where masked
        mixed = torch.bmm(weights[..., : shared.shape[2]], self.shared_values)
        own_weights = weights[..., shared.shape[2] :].reshape(heads * rows, width, slots)
        mixed += torch.bmm(own_weights, self.values.flatten(0, 1)).view(heads, tokens, size)
        return mixed.transpose(0, 1).reshape(tokens, -1)
