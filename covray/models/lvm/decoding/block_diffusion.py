"""Block diffusion: blocks of tokens written in a few passes each, with the cache of all blocks before.

    block = D masks
    S times: read the block, every token seeing all of it and the cache  ->  write the surest of the masked places
    once:    read the finished block causally                           ->  keys and values that later blocks see

The S passes leave the cache as it is: what they write behind its end is overwritten by the next pass. The last one
gives the autoregressive likelihood of the block's tokens, too, which is what ``DecodedImage.token_log_p`` promises.

The tokens of a pass are drawn independently of each other, so fewer passes are another distribution: S = D writes one
token a pass, fewer are faster and worse. A place keeps its Gumbel noise over the passes (see ``sampling``).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from covray.config import SamplingConfig
from covray.errors import ConfigError
from covray.models.lvm.decoding.base import FinishedImage, PendingRows
from covray.models.lvm.decoding.reader import Reader
from covray.models.lvm.lora import Diffusion
from covray.models.masking import choose_unmasked, pass_counts
from covray.models.sampling import allowed

_THRESHOLDS = {"confidence": 0.85, "entropy": 1.0}
"""``sampling.threshold`` where it is null: a probability (DiffusionVL's), and nats."""


def require_block_diffusion(diffusion: Diffusion | None, sampling: SamplingConfig, tokens_per_image: int) -> Diffusion:
    """Return what the model knows of masks, with the length of blocks that ``sampling`` asks for.

    Args:
        diffusion: Of the adapter, if it is one of block diffusion.
        sampling: The sampling.
        tokens_per_image: Tokens of a picture.

    Raises:
        ConfigError: The model was not trained for it, or blocks or passes do not fit.
    """
    if diffusion is None:
        raise ConfigError(
            "sampling.decoder: block_diffusion needs a run trained with objective=block_diffusion; take jacobi or "
            "sequential"
        )
    block = sampling.block or diffusion.block
    if tokens_per_image % block:
        raise ConfigError(f"sampling.block: {block} does not divide the {tokens_per_image} tokens of a picture")
    if (sampling.passes or 1) > block:
        raise ConfigError(
            f"sampling.passes: {sampling.passes} passes of a block of {block} tokens; give at most {block}"
        )
    return Diffusion(diffusion.mask_id, block)


def write_blocks(reader: Reader, pending: PendingRows, diffusion: Diffusion) -> Iterator[FinishedImage]:
    """Write the pictures of a batch block by block, and yield them picture by picture.

    Args:
        reader: The model.
        pending: The batch; its caches have a slot for every place.
        diffusion: The mask, and the tokens of a block, which divide a picture's.
    """
    block = diffusion.block
    ids = torch.full((reader.batch, pending.steps), diffusion.mask_id, dtype=torch.int64, device=reader.device)
    log_p = torch.zeros((reader.batch, pending.steps), device=reader.device)
    causal = torch.ones((block, block), dtype=torch.bool, device=reader.device).tril()
    last = pending.hidden[:, None]  # after the token before the block
    for start in range(0, pending.steps, block):
        places = slice(start, start + block)
        ids[:, places] = _denoise(reader, pending, diffusion, start)
        own = torch.full((reader.batch,), pending.own + start, device=reader.device)
        hidden = reader.read_window(pending.caches, ids[:, places], own, causal)
        logits = reader.logits(torch.cat((last, hidden[:, :-1]), 1))  # a token is predicted at the place before it
        last = hidden[:, -1:]
        log_p[:, places] = logits.gather(2, ids[:, places, None])[..., 0] - logits.logsumexp(2)
        if (start + block) % pending.tokens_per_image == 0:
            yield from pending.finish(start // pending.tokens_per_image, range(pending.rows), ids, log_p)


def _denoise(reader: Reader, pending: PendingRows, diffusion: Diffusion, start: int) -> torch.Tensor:
    """Return the tokens of the block that begins at place ``start``, int64 [batch, D]; the cache stays as it is."""
    sampling, block = pending.sampling_at(start), diffusion.block
    shape = (reader.batch, block)
    ids = torch.full(shape, diffusion.mask_id, dtype=torch.int64, device=reader.device)
    masked = torch.ones(shape, dtype=torch.bool, device=reader.device)
    own = torch.full((reader.batch,), pending.own + start, device=reader.device)
    visible = torch.ones((block, block), dtype=torch.bool, device=reader.device)
    noise = None if pending.noise is None else pending.noise.read([start] * pending.rows, block)
    threshold = _THRESHOLDS.get(sampling.unmask, 0.0) if sampling.threshold is None else sampling.threshold
    counts = [1] * block  # by entropy a pass decides by itself, and writes at least one
    if sampling.unmask != "entropy":
        counts = pass_counts(block, sampling.passes or block, sampling.unmask)
    for count in counts:
        logits = reader.logits(reader.read_window(pending.caches, ids, own, visible))  # [batch, D, codes]
        chosen = pending.choose_by(sampling, logits, noise)
        is_greedy = noise is None or sampling.temperature == 0
        scaled = logits if is_greedy else allowed(logits, sampling)
        written = choose_unmasked(scaled.softmax(-1), chosen, masked, count, sampling.unmask, threshold)
        ids = torch.where(written, chosen, ids)
        masked &= ~written
        if not masked[: pending.rows].any():  # rows that are done wait for the others, unchanged
            break
    return torch.where(masked, 0, ids)  # only rows of padding can have a mask left
