"""The decoder of the LVM: whole pictures after a prompt that a batch of queries shares.

The prompt is read once and its keys and values are kept once; every row of the batch attends to them and to a part of
its own, in one softmax over both. So a step multiplies the prompt's keys by the queries of all rows at a time, instead
of reading a copy for each. How the tokens of a batch are then written is a strategy of its own; ``sampling.decoder``
names it.

Results do not depend on the batch: prompt and queries are read one by one, and passes have one padded shape, so that a
query's tokens are the same to the bit (on one thread of a CPU) alone and among others. A row's random numbers are its
own, too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from covray.config import SamplingConfig
from covray.models.lvm.decoding.base import (
    GREEDY,
    Decoded,
    DecodedImage,
    FinishedImage,
    PendingRows,
    collect,
    require_context,
)
from covray.models.lvm.decoding.block_diffusion import require_block_diffusion, write_blocks
from covray.models.lvm.decoding.jacobi import WIDTHS, fastest_window, write_jacobi
from covray.models.lvm.decoding.reader import KeysValues, Reader
from covray.models.lvm.decoding.sequential import write_sequentially
from covray.models.lvm.model import Lvm
from covray.models.sampling import BatchNoise, RowNoise


class LvmDecoder:
    """Writes pictures with ``model``, ``batch`` rows at a time; see ``base.Decoder``. Fewer rows are padded."""

    def __init__(self, model: Lvm, codes: int, tokens_per_image: int, batch: int = 16):
        """Take the model; nothing of it is changed.

        Args:
            model: The backbone, with or without an adapter.
            codes: Image codes of the vocabulary; ids from there on are never written.
            tokens_per_image: Tokens of a picture.
            batch: Rows of a pass.
        """
        self.codes, self.tokens_per_image, self.batch = codes, tokens_per_image, batch
        self._reader = Reader(model, codes, batch)
        self._diffusion = None if model.lora is None else model.lora.diffusion
        self.context_tokens = self._reader.context_tokens
        self._windows: dict[tuple[int, int, bool], int] = {}

    @property
    def passes(self) -> int:
        """Passes over the model so far, without those that read prompts and queries."""
        return self._reader.passes

    def decode(
        self,
        prompt: np.ndarray,
        queries: np.ndarray,
        images: int,
        sampling: SamplingConfig = GREEDY,
        seeds: Sequence[int] | None = None,
    ) -> Decoded:
        """Write ``images`` pictures after each of ``queries``; see ``base.Decoder.decode``."""
        shape = (len(queries), sampling.candidates, images, self.tokens_per_image)
        return collect(self.stream(prompt, queries, images, sampling, seeds), shape, sampling)

    @torch.inference_mode()
    def stream(
        self,
        prompt: np.ndarray,
        queries: np.ndarray,
        images: int,
        sampling: SamplingConfig = GREEDY,
        seeds: Sequence[int] | None = None,
    ) -> Iterator[DecodedImage]:
        """Yield each picture as soon as it is finished; see ``base.Decoder.stream``."""
        strategy = self._strategy(sampling)
        steps = images * self.tokens_per_image
        before = len(prompt) + queries.shape[1]
        require_context(before + steps, self.tokens_per_image, self.context_tokens)
        seeds = [0] * len(queries) if seeds is None else seeds
        rows = [(query, candidate) for query in range(len(queries)) for candidate in range(sampling.candidates)]
        if not rows or not steps:
            return
        reader = self._reader
        ahead = 0  # slots behind the last token that is read one by one
        if strategy == "jacobi":
            ahead = max(WIDTHS) if sampling.window == "auto" else sampling.window
        elif strategy == "block_diffusion":
            ahead = 1
        buffer = reader.take_buffer(queries.shape[1] + steps - 1 + ahead)
        caches = reader.read_prompt(prompt, buffer)

        @functools.lru_cache(maxsize=1)  # candidates of a query are neighbours: they share its reading
        def read(query: int) -> tuple[Tensor, list[KeysValues]]:
            return reader.read_alone(queries[query], len(prompt), caches if len(prompt) else None)

        for start in range(0, len(rows), self.batch):
            some = rows[start : start + self.batch]
            last = []
            for row, (query, _) in enumerate(some):
                hidden, kept = read(query)
                last.append(hidden)
                for cache, (keys, values) in zip(caches, kept, strict=True):
                    cache.keys[:, row, : keys.shape[1]] = keys
                    cache.values[:, row, : values.shape[1]] = values
            noise = None
            if not sampling.is_greedy:
                of_rows = [RowNoise(seeds[query], candidate, self.codes) for query, candidate in some]
                noise = BatchNoise(of_rows, self.batch, reader.device)
            pending = PendingRows(
                caches=caches,
                hidden=reader.padded(torch.stack(last)),
                rows=len(some),
                before=before,
                steps=steps,
                tokens_per_image=self.tokens_per_image,
                sampling=sampling,
                noise=noise,
            )
            for each in self._write(pending):
                query, candidate = some[each.row]
                yield DecodedImage(query, candidate, each.image, each.ids, each.token_log_p)
        reader.give_back(buffer)

    def _strategy(self, sampling: SamplingConfig) -> str:
        """Return the name of the strategy that ``sampling`` asks for, or that the model was trained for."""
        if sampling.decoder is not None:
            strategy = sampling.decoder
        else:
            strategy = "sequential" if self._diffusion is None else "block_diffusion"
        if strategy == "block_diffusion":
            require_block_diffusion(self._diffusion, sampling, self.tokens_per_image)
        return strategy

    def _write(self, pending: PendingRows) -> Iterator[FinishedImage]:
        """Write a batch by the strategy that its sampling names."""
        strategy = self._strategy(pending.sampling)
        if strategy == "block_diffusion":
            diffusion = require_block_diffusion(self._diffusion, pending.sampling, self.tokens_per_image)
            return write_blocks(self._reader, pending, diffusion)
        window = self._window(pending) if strategy == "jacobi" else 1
        if window == 1:
            return write_sequentially(self._reader, pending)
        return write_jacobi(self._reader, pending, window)

    def _window(self, pending: PendingRows) -> int:
        """Return the window of a Jacobi decoding; ``auto`` is decided once for every length of prompt and answer."""
        if pending.sampling.window != "auto":
            return pending.sampling.window
        shape = pending.before, pending.steps, pending.noise is None
        if shape not in self._windows:
            self._windows[shape] = fastest_window(self._reader, pending)
        return self._windows[shape]
