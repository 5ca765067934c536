"""Jacobi decoding: several tokens a pass, and exactly those of the sequential decoder.

A pass reads a window: the last final token and drafts of the places behind it. It gives the token that the model would
write after each of them. As long as the drafts are right, these tokens are right, too:

    window      final  draft 1  draft 2  draft 3         read at once, causally
    written     t 1    t 2      t 3      t 4             t k is exact if all drafts before it are
    draft k == t k for k = 1 .. a - 1, not for k = a     ->  t 1 .. t a are final, the rest are the next drafts

So every pass makes one token final at least, and drafts decide the number of passes only, never a token (Santilli et
al., arXiv:2305.10427; for image tokens Teng et al., arXiv:2410.01699). When sampling, a place keeps its Gumbel noise
over the passes (see ``sampling``): a token is then a function of its past, as in greedy decoding, and the same holds.
Speculative sampling would need the drafts' distributions; this needs none.

With ``sampling.relax`` a draft also stands where its neighbours in the codebook include the model's token (LANTERN,
arXiv:2410.03355): fewer passes, and other tokens.

Equality is that of float32 arithmetic: a pass of another shape changes the last bits of the logits, so that tokens can
differ where two sums of logit and noise are equal up to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from covray.models.lvm.decoding.base import FinishedImage, PendingRows
from covray.models.lvm.decoding.reader import Reader

WIDTHS = {1: 1.0, 4: 1.8, 8: 2.4, 16: 3.0}
"""Windows that ``auto`` chooses from, and the tokens that a pass of each makes final: measured on the nano LVM, greedy
and sampled, seven tasks. A window of 1 is the sequential decoder."""
_TIMED_PASSES = 3


@dataclass(frozen=True, eq=False)
class Relaxation:
    """When a draft may stand for the token that the model would write in its place."""

    neighbours: Tensor
    """The codes nearest to each code, the nearest first, int64 [codes, n]."""
    mass: float
    """Probability that a draft may take over from its nearest neighbours: the distribution of a token changes by as
    much in total variation, at most."""

    def accepts(self, logits: Tensor, drafts: Tensor, chosen: Tensor) -> Tensor:
        """Return which drafts stand for what was chosen, bool [batch, n].

        Args:
            logits: Of the places, float32 [batch, n, codes].
            drafts: int64 [batch, n].
            chosen: What the model would write, int64 [batch, n].
        """
        near = self.neighbours[drafts]  # [batch, n, neighbours]
        taken = logits.softmax(-1).gather(-1, near).cumsum(-1) <= self.mass
        return ((near == chosen[..., None]) & taken).any(-1)


def write_jacobi(
    reader: Reader, pending: PendingRows, window: int, relaxation: Relaxation | None = None
) -> Iterator[FinishedImage]:
    """Write the pictures of a batch by windows of ``window`` tokens, and yield each once its row has finished it.

    Args:
        reader: The model.
        pending: The batch; its caches have room for ``window - 1`` tokens more than are written.
        window: Tokens of a row that are read in a pass, at least 2.
        relaxation: When a draft may stand for another token; None: never.
    """
    yield from write_windows(Rows(reader, pending, window, relaxation), pending)


def write_windows(rows: Rows, pending: PendingRows) -> Iterator[FinishedImage]:
    """Write the pictures of a batch window by window, and yield each once its row has finished it."""
    size = pending.tokens_per_image
    while True:
        # A picture is finished once its last token is final.
        before = [count // size for count in rows.final]
        rows.advance()
        after = [count // size for count in rows.final]
        for row in range(pending.rows):
            for image in range(before[row], after[row]):
                yield from pending.finish(image, [row], rows.ids, rows.log_p)
        if min(rows.final) >= pending.steps:
            return
        rows.read()


class Rows:
    """How far each row is, its tokens, and the logits of its window."""

    def __init__(self, reader: Reader, pending: PendingRows, window: int, relaxation: Relaxation | None = None):
        """Begin where the queries end; see ``write_jacobi``."""
        self._reader, self._pending, self._window = reader, pending, window
        self._relaxation = relaxation
        batch, device = reader.batch, reader.device
        # Behind the last place lie those of the last window's drafts, which never count.
        self.ids = torch.zeros((batch, pending.steps + window), dtype=torch.int64, device=device)
        self.log_p = torch.zeros((batch, pending.steps + window), device=device)
        self.final = [0] * pending.rows
        """Places of each row whose tokens are final."""
        # The state behind the query predicts the first token.
        self._logits = reader.logits(pending.hidden)[:, None]  # [batch, places, codes] from ``final`` on
        self._visible = torch.ones((window, window), dtype=torch.bool, device=device).tril()
        self._number = torch.arange(batch, device=device)[:, None]

    def advance(self) -> None:
        """Make final what the last pass proves, and draft the places behind it."""
        pending, width = self._pending, self._logits.shape[1]
        first = self._first()
        places = first[:, None] + torch.arange(width, device=first.device)  # [batch, width]
        noise = None if pending.noise is None else pending.noise.read(self._starts(), width)
        chosen = pending.choose(self._logits, places, noise)  # [batch, width]
        # The drafts of a window are the tokens that stand at its places, but for the last place, which had none.
        drafts = self.ids[self._number, places[:, :-1]]
        if self._relaxation is not None:
            stands = self._relaxation.accepts(self._logits[:, :-1], drafts, chosen[:, :-1])
            chosen[:, :-1] = torch.where(stands, drafts, chosen[:, :-1])
        # Of the model at temperature 1, whatever the tokens were chosen with.
        likelihood = self._logits.gather(2, chosen[..., None])[..., 0] - self._logits.logsumexp(2)
        right = drafts == chosen[:, :-1]
        # All drafts up to the first wrong one are right, and so is the token chosen in its place.
        accepted = 1 + right.long().cumprod(1).sum(1)  # [batch], 1 .. width
        self.ids[self._number, places] = chosen
        self.log_p[self._number, places] = likelihood
        counts: Sequence[int] = accepted[: pending.rows].tolist()
        for row, count in enumerate(counts):
            self.final[row] = min(pending.steps, self.final[row] + count)
        self._draft_behind(first + width, accepted)

    def read(self) -> None:
        """Read the window of every row: its last final token and the drafts behind it."""
        pending = self._pending
        last = self._first() - 1
        places = last[:, None] + torch.arange(self._window, device=last.device)
        hidden = self._reader.read_window(
            pending.caches, self.ids[self._number, places], pending.own + last, self._visible
        )
        self._logits = self._reader.logits(hidden)

    def _starts(self) -> list[int]:
        """Return the first place of each row that is not final; a finished row stays at its last one."""
        return [min(count, self._pending.steps - 1) for count in self.final]

    def _first(self) -> Tensor:
        """Return ``_starts`` of all rows of the batch, int64 [batch]."""
        padding = [0] * (self._reader.batch - self._pending.rows)
        return torch.tensor(self._starts() + padding, device=self._reader.device)

    def _draft_behind(self, known: Tensor, accepted: Tensor) -> None:
        """Draft the places from ``known`` on by the token before them: a flat surface goes on.

        Args:
            known: The first place of each row that has no draft, int64 [batch].
            accepted: How many tokens of each row the pass has made final, int64 [batch].
        """
        end = self.ids.shape[1]
        behind = known[:, None] + torch.arange(self._window, device=known.device)
        repeated = self.ids[self._number, known[:, None] - 1].expand(-1, self._window)
        # What is behind the end lands on the last place, which never counts.
        self.ids[self._number, behind.clamp(max=end - 1)] = repeated


def fastest_window(reader: Reader, pending: PendingRows) -> int:
    """Return the window of ``WIDTHS`` that should write the most tokens a second with this batch.

    Passes of every width are timed on the rows as they are: a few passes, which leave no trace, as a cache knows only
    what is read into it for good.

    Args:
        reader: The model.
        pending: The batch, with room for the widest window.
    """
    best, best_rate = 1, 0.0
    for width, tokens in WIDTHS.items():
        seconds = min(_timed_pass(reader, pending, width) for _ in range(_TIMED_PASSES))
        if tokens / seconds > best_rate:
            best, best_rate = width, tokens / seconds
    return best


def _timed_pass(reader: Reader, pending: PendingRows, width: int) -> float:
    """Return the seconds of one pass of ``width`` tokens a row, the choice of its tokens included."""
    ids = torch.zeros((reader.batch, width), dtype=torch.int64, device=reader.device)
    own = torch.full((reader.batch,), pending.own, device=reader.device)
    visible = torch.ones((width, width), dtype=torch.bool, device=reader.device).tril()
    started = time.perf_counter()
    if width == 1:
        hidden = reader.read_token(pending.caches, ids[:, 0], pending.before, pending.own)[:, None]
    else:
        hidden = reader.read_window(pending.caches, ids, own, visible)
    logits = reader.logits(hidden)
    noise = None if pending.noise is None else pending.noise.read([0] * pending.rows, width)
    pending.choose(logits, torch.zeros_like(ids), noise).tolist()  # also waits for a GPU
    return time.perf_counter() - started
