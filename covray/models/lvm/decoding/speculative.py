"""Speculative decoding: the model's own draft adapter proposes, and the model verifies.

A pass reads the window of Jacobi decoding, the last final token and W - 1 drafts, and behind each of these tokens m
masks of the draft adapter (see ``models.lvm.draft``):

    f d d d                          verified causally, as by Jacobi decoding
    m m m, m m m, m m m, m m m       masks behind f, behind the first draft, ...; they see what stands before them

However many drafts turn out to be right, masks stand behind the last token that counts, and what they predict are the
drafts of the next pass. The places behind those have the tokens of this pass as drafts, as in Jacobi decoding. So
verification is the same, and so are the tokens: those of the sequential decoder, greedy and sampled. A draft is chosen
with the Gumbel noise of its place, as the token itself will be, which makes them agree more often than chance would.

A pass has W x (1 + m) tokens. On a GPU that reads weights all the time they are nearly free; on a CPU they are not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from covray.config import SamplingConfig
from covray.models.lvm.decoding.base import FinishedImage, PendingRows
from covray.models.lvm.decoding.jacobi import Rows, write_windows
from covray.models.lvm.decoding.reader import Reader, WindowMasks
from covray.models.lvm.draft import Draft


def window_of(draft: Draft, sampling: SamplingConfig) -> int:
    """Return the tokens that a pass verifies: those of ``sampling``, or one more than drafts were trained."""
    return draft.tokens + 1 if sampling.window == "auto" else sampling.window


def window_slots(draft: Draft, sampling: SamplingConfig) -> int:
    """Return the tokens that a pass reads a row, masks included."""
    window = window_of(draft, sampling)
    return window * (1 + _masks(draft, window))


def _masks(draft: Draft, window: int) -> int:
    """Return the masks behind each token of a window: more than drafts fit in it are of no use."""
    return min(draft.tokens, window - 1)


def write_speculatively(reader: Reader, pending: PendingRows, window: int, draft: Draft) -> Iterator[FinishedImage]:
    """Write the pictures of a batch, and yield each once its row has finished it.

    Args:
        reader: The model, with its draft adapter.
        pending: The batch; its caches have room for the tokens and masks of a pass behind those that are written.
        window: Tokens of a row that are verified in a pass, at least 2.
        draft: What is known of the draft adapter.
    """
    yield from write_windows(_DraftedRows(reader, pending, window, draft), pending)


class _DraftedRows(Rows):
    """Rows whose next drafts are what the masks of the last pass predict."""

    def __init__(self, reader: Reader, pending: PendingRows, window: int, draft: Draft):
        super().__init__(reader, pending, window)
        self._masks = _masks(draft, window)
        group = torch.arange(window, device=reader.device).repeat_interleave(self._masks)  # the token before each mask
        number = torch.arange(self._masks, device=reader.device).repeat(window)
        tokens = torch.arange(window, device=reader.device)
        of_tokens = torch.cat((tokens, group))[:, None] >= tokens
        same_group = (group[:, None] == group) & (number[:, None] >= number)
        unseen = torch.zeros((window, len(group)), dtype=torch.bool, device=reader.device)
        self._visible = torch.cat((of_tokens, torch.cat((unseen, same_group))), 1)
        self._layout = WindowMasks(torch.cat((tokens, group + 1 + number)), window)
        self._mask_ids = torch.full((reader.batch, len(group)), draft.mask_id, device=reader.device)
        self._mask_states: Tensor | None = None
        """Of the last pass, [batch, window, masks, width]; None before the first."""

    def read(self) -> None:
        """Read the window of every row, and masks behind each of its tokens."""
        pending = self._pending
        last = self._first() - 1
        places = last[:, None] + torch.arange(self._window, device=last.device)
        ids = torch.cat((self.ids[self._number, places], self._mask_ids), 1)
        hidden = self._reader.read_window(pending.caches, ids, pending.own + last, self._visible, self._layout)
        self._logits = self._reader.logits(hidden[:, : self._window])
        self._mask_states = hidden[:, self._window :].reshape(len(ids), self._window, self._masks, -1)

    def _draft_behind(self, known: Tensor, accepted: Tensor) -> None:
        """Draft by the masks behind the last token that counts; see ``Rows``."""
        super()._draft_behind(known, accepted)
        if self._mask_states is None:
            return
        pending = self._pending
        states = self._mask_states[self._number[:, 0], accepted - 1]  # [batch, masks, width]
        padding = [0] * (self._reader.batch - pending.rows)
        begin = torch.tensor(self.final + padding, device=known.device)
        places = begin[:, None] + torch.arange(self._masks, device=known.device)
        # As many as the next pass verifies, so that none is drawn twice.
        noise = None if pending.noise is None else pending.noise.read(self._starts(), self._window)
        of_drafts = None if noise is None else noise[:, : self._masks]
        self.ids[self._number, places] = pending.choose(self._reader.logits(states), places, of_drafts)
