"""The plain way to write: one token a row and pass. All other decoders are measured by it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from covray.models.lvm.decoding.base import FinishedImage, PendingRows
from covray.models.lvm.decoding.reader import Reader
from covray.models.sampling import PLACES


def write_sequentially(reader: Reader, pending: PendingRows) -> Iterator[FinishedImage]:
    """Write the pictures of a batch token by token, and yield them picture by picture."""
    ids = torch.empty((reader.batch, pending.steps), dtype=torch.int64, device=reader.device)
    log_p = torch.empty((reader.batch, pending.steps), device=reader.device)
    hidden, noise = pending.hidden, None
    for step in range(pending.steps):
        if step:  # the last token is never read
            place = step - 1
            hidden = reader.read_token(pending.caches, ids[:, place], pending.before + place, pending.own + place)
        logits = reader.logits(hidden)  # [batch, codes]
        if pending.noise is not None and step % PLACES == 0:
            noise = pending.noise.read([step] * pending.rows, PLACES)
        of_place = None if noise is None else noise[:, step % PLACES]
        chosen = pending.choose_by(pending.sampling_at(step), logits, of_place)
        ids[:, step] = chosen
        log_p[:, step] = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(1)
        if (step + 1) % pending.tokens_per_image == 0:
            yield from pending.finish(step // pending.tokens_per_image, range(pending.rows), ids, log_p)
