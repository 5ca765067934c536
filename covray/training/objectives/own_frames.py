"""Frames that a model in training has written itself, for the sentences of the next steps.

Every ``refresh_tokens`` trained tokens the decoder writes the frames of a share of the queries that the steps until the
next refresh show: greedily, with the adapter as it is, each query after its own examples. Every checkpoint holds the
frames, because a training that continues between two refreshes no longer has the adapter that wrote them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from covray.chains.sentences import Sentences
from covray.config import FrameNoiseConfig
from covray.models.lvm.decoding.decoder import LvmDecoder
from covray.models.lvm.model import Lvm
from covray.seeds import seed_of
from covray.training.worker import WorkerContext

_ROWS = 32
"""Rows of the decoder's batch. It decides bits, so it does not follow the micro-batch."""
_PREFIX = "own_frames."  # no parameter's name begins so


class OwnFrames:
    """The ``Rewriter`` of ``sentences.frame_noise.kind: own``."""

    def __init__(
        self,
        config: FrameNoiseConfig,
        sentences: Sentences,
        model: Lvm,
        codes: int,
        *,
        step_end: Callable[[int], int],
        end: int,
        seed: int,
    ):
        """Set up; nothing is written before ``refresh_tokens`` tokens are trained.

        Args:
            config: Share and period.
            sentences: The stream that is trained on.
            model: The model that is trained.
            codes: Image codes that a picture of the dataset can have.
            step_end: Returns where the step that begins at a cursor ends.
            end: The cursor at the end of the training.
            seed: Decides which queries get frames of the model's own.
        """
        self._config, self._sentences, self._model, self._codes = config, sentences, model, codes
        self._step_end, self._end, self._seed = step_end, end, seed
        self._next = self._next_refresh(0)  # the cursor that the frames last to
        self._frames: dict[int, np.ndarray] = {}  # by index of the sentence, flat

    def frames_of(self, index: int) -> np.ndarray | None:
        """Return the frames written for a sentence, uint16 [frames x tokens]; None where it keeps the dataset's."""
        return self._frames.get(index)

    def is_due(self, cursor: int) -> bool:
        """See ``Rewriter``."""
        return cursor >= self._next

    def rewrite(self, cursor: int, worker: WorkerContext) -> None:
        """See ``Rewriter``; every worker writes a share of the frames, and gets all of them."""
        started = time.monotonic()
        self._next = self._next_refresh(cursor)
        chosen = [index for index in range(cursor, self._next) if self._is_chosen(index)]
        self._frames = {}
        # A worker writes every world-th of the chosen sentences.
        own = self._write(chosen[worker.rank :: worker.world_size])
        sizes = [len(self._sentences.frames_at(index)) for index in chosen]
        # Every worker fills in what it wrote and leaves zeros elsewhere: the sum over the workers is all of it.
        tokens = torch.zeros(sum(sizes), dtype=torch.int32)  # collectives know no uint16
        for index, part in zip(chosen, tokens.split(sizes), strict=True):
            if index in own:
                part.copy_(torch.from_numpy(own[index].astype(np.int32)))
        self._keep(chosen, worker.sum_tensor(tokens.to(worker.device)).cpu())
        if worker.is_first:
            worker.log(f"the frames of {len(chosen)} queries are written in {time.monotonic() - started:.1f} s")

    def tensors(self) -> dict[str, Tensor]:
        """See ``Rewriter``."""
        flat = np.concatenate([np.empty(0, np.uint16), *self._frames.values()])
        return {
            f"{_PREFIX}next": torch.tensor([self._next]),
            f"{_PREFIX}indices": torch.tensor([*self._frames], dtype=torch.int64),
            f"{_PREFIX}tokens": torch.from_numpy(flat.astype(np.int32)),
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See ``Rewriter``."""
        self._next = int(tensors[f"{_PREFIX}next"])
        self._keep(tensors[f"{_PREFIX}indices"].tolist(), tensors[f"{_PREFIX}tokens"])

    def _keep(self, indices: list[int], tokens: Tensor) -> None:
        """Take the frames of the sentences ``indices``, laid end to end in ``tokens``, int32."""
        self._frames = {}
        start = 0
        for index in indices:
            stop = start + len(self._sentences.frames_at(index))
            self._frames[index] = tokens[start:stop].numpy().astype(np.uint16)
            start = stop

    def _next_refresh(self, cursor: int) -> int:
        """Return the cursor of the step that begins ``refresh_tokens`` tokens after ``cursor``, or of the end."""
        tokens = 0
        while cursor < self._end and tokens < self._config.refresh_tokens:
            following = self._step_end(cursor)
            for index in range(cursor, following):
                tokens += self._sentences.tokens(index)
            cursor = following
        return cursor

    def _is_chosen(self, index: int) -> bool:
        generator = np.random.default_rng(seed_of(self._seed, "frame noise", index))
        return bool(len(self._sentences.frames_at(index)) and generator.random() < self._config.share)

    def _write(self, indices: list[int]) -> dict[int, np.ndarray]:
        """Return the frames that the model writes for the sentences ``indices``, flat, by index."""
        # Prompts of a batch are equally long.
        by_shape: dict[tuple[int, int], list[int]] = {}
        for index in indices:
            by_shape.setdefault(self._sentences.shape(index), []).append(index)
        decoder = LvmDecoder(self._model, self._codes, self._sentences.chains.tokens_per_image, _ROWS)
        written = {}
        for (length, _), group in by_shape.items():
            prompts = []
            for index in group:
                first_frame = self._sentences.frames_at(index)[0]
                # All that stands before the query's first frame.
                prompts.append(self._sentences.sentence(index).ids[:first_frame])
            decoded = decoder.decode(np.empty(0, np.uint16), np.stack(prompts), length - 2)
            for index, frames in zip(group, decoded.ids, strict=True):
                written[index] = frames.reshape(-1)
        return written
