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

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from covray.config import SamplingConfig
from covray.errors import ConfigError
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
from covray.models.lvm.decoding.jacobi import WIDTHS, Relaxation, fastest_window, write_jacobi
from covray.models.lvm.decoding.judging import CandidateReader
from covray.models.lvm.decoding.reader import KeysValues, MergedWeights, Reader
from covray.models.lvm.decoding.requirements import require_draft, require_verifier
from covray.models.lvm.decoding.sequential import write_sequentially
from covray.models.lvm.decoding.speculative import window_of, window_slots, write_speculatively
from covray.models.lvm.model import Lvm
from covray.models.lvm.verifier import Verifier
from covray.models.sampling import BatchNoise, RowNoise
from covray.models.tokenizer.vqgan import codebook_neighbours

_NEIGHBOURS = 100
"""Codes that a draft may stand for besides itself."""


@dataclass(frozen=True, eq=False)
class _Row:
    """One candidate of one query."""

    query: int
    candidate: int
    seed: int
    """Of the query."""
    ids: np.ndarray
    """What stands behind the prompt: the query, and pictures that were written before, [n]."""


class LvmDecoder:
    """Writes pictures with ``model``, ``batch`` rows at a time; see ``base.Decoder``. Fewer rows are padded."""

    def __init__(
        self, model: Lvm, codes: int, tokens_per_image: int, batch: int = 16, codebook: np.ndarray | None = None,
        weights: MergedWeights | None = None,
    ):  # fmt: skip
        """Take the model; nothing of it is changed.

        Args:
            model: The backbone, with or without an adapter.
            codes: Image codes of the vocabulary; ids from there on are never written.
            tokens_per_image: Tokens of a picture.
            batch: Rows of a pass.
            codebook: Of the tokenizer, [codes, width]; only ``sampling.relax`` and ``expected`` need it.
            weights: Memory for merged weights that decoders of other adapters share; see ``Reader``.
        """
        self.codes, self.tokens_per_image, self.batch = codes, tokens_per_image, batch
        self._reader = Reader(model, codes, batch, weights)
        self._diffusion = None if model.lora is None else model.lora.diffusion
        self._draft = None if model.lora is None else model.lora.draft
        self.context_tokens = self._reader.context_tokens
        self._verifier = None if model.lora is None else model.lora.verifier
        if self._verifier is not None:
            self._verifier.to(self._reader.device)
        self._candidates = CandidateReader(self._reader, tokens_per_image)
        self._codebook = codebook
        self._windows: dict[tuple[int, int, bool], int] = {}

    @property
    def passes(self) -> int:
        """Passes over the model so far, without those that read prompts and queries."""
        return self._reader.passes

    @contextlib.contextmanager
    def checked(self, check: Callable[[], None]) -> Iterator[None]:
        """Call ``check`` before each pass within the block; see ``base.Decoder.checked``."""
        self._reader.check = check
        try:
            yield
        finally:
            self._reader.check = None

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
        before = len(prompt) + queries.shape[1]
        require_context(before + images * self.tokens_per_image, self.tokens_per_image, self.context_tokens)
        seeds = [0] * len(queries) if seeds is None else seeds
        # Candidates of a query follow each other, so that they share its reading.
        rows = []
        for query, (ids, seed) in enumerate(zip(queries, seeds, strict=True)):
            rows += [_Row(query, candidate, seed, ids) for candidate in range(sampling.candidates)]
        verifier = None if sampling.choose_by != "verifier" else require_verifier(self._verifier)
        # Candidates are given up along the way: each picture is written by itself.
        if sampling.keep < 1:
            yield from self._choose_early(prompt, rows, images, sampling, verifier)
            return
        # The verifier judges a candidate by all of its pictures.
        pictures: dict[_Row, list[np.ndarray]] = {row: [row.ids] for row in rows}
        for row, written in self._write_rows(prompt, rows, 0, images, sampling):
            verdict = None
            if verifier is not None:
                pictures[row].append(written.ids)
                if written.image == images - 1:
                    verdict = self._judge(verifier, prompt, queries[row.query], np.concatenate(pictures.pop(row)))
            yield DecodedImage(row.query, row.candidate, written.image, written.ids, written.token_log_p, verdict)

    def _choose_early(
        self, prompt: np.ndarray, rows: list[_Row], images: int, sampling: SamplingConfig, verifier: Verifier | None
    ) -> Iterator[DecodedImage]:
        """Write picture after picture, and after each go on with the best candidates of every query only.

        Args:
            prompt: Ids [P] that precede every row.
            rows: All candidates of all queries, those of a query side by side.
            images: Pictures to write.
            sampling: Whose ``keep`` says how many go on.
            verifier: Says which are the best; None: the likeliest are.
        """
        asked = {row.query: row.ids for row in rows}
        # By row, the log p of what it has written so far.
        log_p = dict.fromkeys(rows, 0.0)
        for image in range(images):
            is_answer = image == images - 1
            of_picture = sampling.for_answer if is_answer else sampling.for_frames
            longer: dict[_Row, float] = {}
            worth: dict[_Row, float] = {}
            for row, written in self._write_rows(prompt, list(log_p), image, 1, of_picture):
                ids = np.concatenate((row.ids, written.ids))
                following = replace(row, ids=ids)
                # In float64, as the sum is over thousands of tokens.
                longer[following] = log_p[row] + float(written.token_log_p.sum(dtype=np.float64))
                verdict = None
                if verifier is not None:
                    verdict = self._judge(verifier, prompt, asked[row.query], ids)
                worth[following] = longer[following] if verdict is None else verdict
                # The verdict on a frame only decides who goes on: a decoded picture has that on its answer.
                said = verdict if is_answer else None
                yield DecodedImage(row.query, row.candidate, image, written.ids, written.token_log_p, said)
            kept = _best(worth, sampling.keep)
            log_p = {row: longer[row] for row in longer if row in kept}

    def _judge(self, verifier: Verifier, prompt: np.ndarray, query: np.ndarray, ids: np.ndarray) -> float:
        """Return what the verifier says of the last picture of a candidate.

        Args:
            verifier: The verifier.
            prompt: Ids [P] that precede the query.
            query: Ids [Q].
            ids: Of the query and of the pictures written so far.
        """
        features = self._candidates.picture_features(np.concatenate((prompt, query)), ids[len(query) :])
        return float(verifier(features)[-1])

    def _write_rows(
        self, prompt: np.ndarray, rows: list[_Row], first: int, images: int, sampling: SamplingConfig
    ) -> Iterator[tuple[_Row, FinishedImage]]:
        """Write ``images`` pictures of each row, and yield each as soon as it is finished.

        Args:
            prompt: Ids [P] that precede every row.
            rows: All of equal length.
            first: Pictures of the rows that were written before; their places have used up their random numbers.
            images: Pictures to write.
            sampling: How their tokens are chosen.
        """
        strategy = self._strategy(sampling)
        steps = images * self.tokens_per_image
        if not rows or not steps:
            return
        own = len(rows[0].ids)
        reader = self._reader
        ahead = 0  # slots behind the last token that is read one by one
        if strategy == "jacobi":
            ahead = max(WIDTHS) if sampling.window == "auto" else sampling.window
        elif strategy == "block_diffusion":
            ahead = 1
        elif strategy == "speculative":
            ahead = window_slots(require_draft(self._draft), sampling)
        # The last token that is written is never read, hence the 1.
        buffer = reader.take_buffer(own + steps - 1 + ahead)
        caches = reader.read_prompt(prompt, buffer)

        @functools.lru_cache(maxsize=1)  # candidates of a query are neighbours: they share its reading
        def read(ids: bytes) -> tuple[Tensor, list[KeysValues]]:
            tokens = np.frombuffer(ids, rows[0].ids.dtype)
            return reader.read_alone(tokens, len(prompt), caches if len(prompt) else None)

        for start in range(0, len(rows), self.batch):
            some = rows[start : start + self.batch]
            last = []
            for number, row in enumerate(some):
                hidden, kept = read(row.ids.tobytes())
                last.append(hidden)
                for cache, (keys, values) in zip(caches, kept, strict=True):
                    cache.keys[:, number, : keys.shape[1]] = keys
                    cache.values[:, number, : values.shape[1]] = values
            pending = PendingRows(
                caches=caches,
                hidden=reader.padded(torch.stack(last)),
                rows=len(some),
                before=len(prompt) + own,
                steps=steps,
                tokens_per_image=self.tokens_per_image,
                sampling=sampling,
                noise=None if sampling.is_greedy else self._noise(some, first * self.tokens_per_image),
                codebook=None if sampling.expected is None else self._code_vectors,
            )
            for each in self._write(pending):
                yield some[each.row], each
        reader.give_back(buffer)

    def _noise(self, rows: list[_Row], begin: int) -> BatchNoise:
        """Return the noise of a batch of rows from place ``begin`` on: that of places before it has been used."""
        of_rows = []
        for row in rows:
            of_rows.append(RowNoise(row.seed, row.candidate, self.codes, begin))
        return BatchNoise(of_rows, self.batch, self._reader.device)

    def _strategy(self, sampling: SamplingConfig) -> str:
        """Return the name of the strategy that ``sampling`` asks for, or that the model was trained for."""
        if sampling.decoder is not None:
            strategy = sampling.decoder
        else:
            strategy = "sequential" if self._diffusion is None else "block_diffusion"
        if strategy == "block_diffusion":
            require_block_diffusion(self._diffusion, sampling, self.tokens_per_image)
        if strategy == "speculative":
            require_draft(self._draft)
        return strategy

    def _write(self, pending: PendingRows) -> Iterator[FinishedImage]:
        """Write a batch by the strategy that its sampling names."""
        strategy = self._strategy(pending.sampling)
        if strategy == "block_diffusion":
            diffusion = require_block_diffusion(self._diffusion, pending.sampling, self.tokens_per_image)
            return write_blocks(self._reader, pending, diffusion)
        if strategy == "speculative":
            draft = require_draft(self._draft)
            return write_speculatively(self._reader, pending, window_of(draft, pending.sampling), draft)
        window = self._window(pending) if strategy == "jacobi" else 1
        if window == 1:
            return write_sequentially(self._reader, pending)
        return write_jacobi(self._reader, pending, window, self._relaxation(pending.sampling.relax))

    def _relaxation(self, mass: float) -> Relaxation | None:
        """Return when a draft may stand for another token; None: never."""
        return Relaxation(self._neighbours, mass) if mass else None

    @functools.cached_property
    def _neighbours(self) -> Tensor:
        """The codes nearest to each code, int64 [codes, n]."""
        codebook = self._require_codebook("relax")
        count = min(_NEIGHBOURS, len(codebook) - 1)
        return torch.from_numpy(codebook_neighbours(codebook, count)).to(self._reader.device)

    @functools.cached_property
    def _code_vectors(self) -> Tensor:
        """The vector of each code, float32 [codes, width]."""
        return torch.tensor(self._require_codebook("expected"), dtype=torch.float32, device=self._reader.device)

    def _require_codebook(self, name: str) -> np.ndarray:
        """Return the tokenizer's codebook. Raises ConfigError where the decoder was made without it.

        Args:
            name: Of the field of ``sampling`` that needs it.
        """
        if self._codebook is None:
            raise ConfigError(f"sampling.{name}: needs the tokenizer's codebook; leave it out")
        return self._codebook

    def _window(self, pending: PendingRows) -> int:
        """Return the window of a Jacobi decoding; ``auto`` is decided once for every length of prompt and answer."""
        if pending.sampling.window != "auto":
            return pending.sampling.window
        shape = pending.before, pending.steps, pending.noise is None
        if shape not in self._windows:
            self._windows[shape] = fastest_window(self._reader, pending)
        return self._windows[shape]


def _best(worth: Mapping[_Row, float], keep: float) -> set[_Row]:
    """Return the best share ``keep`` of every query's rows, at least one."""
    of_query: dict[int, list[_Row]] = {}
    for row in worth:
        of_query.setdefault(row.query, []).append(row)
    kept = set()
    for rows in of_query.values():
        ranked = sorted(rows, key=lambda row: worth[row], reverse=True)
        # Rounded up, so that at least one goes on.
        kept.update(ranked[: math.ceil(keep * len(rows))])
    return kept
