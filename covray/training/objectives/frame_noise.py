"""Frames as a model meets them: noise in the query's frames of a training's input, with loss on the clean tokens.

A model that is trained on the dataset's frames trusts them, and at inference reads its own (exposure bias). The cures
differ in what they put in place of a frame's tokens:

- random codes and codebook neighbours: noisy context learning (xAR, arXiv:2502.20388)
- the model's own guesses in a first pass: scheduled sampling in two passes (Mihaylova & Martins, ACL SRW 2019)
- frames that the model has written: on-policy frames (Self Forcing, arXiv:2506.08009); see ``own_frames``

Which tokens are replaced follows from the seed and the sentence's index alone, so that neither workers nor a restart
change a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from covray.chains.compatibility import require_same_tokens
from covray.chains.dataset import ChainDataset
from covray.chains.sentences import Sentences
from covray.config import EngineConfig, TokenizerConfig, TrainConfig
from covray.models.lvm.model import Batch, Lvm
from covray.models.tokenizer.vqgan import codebook_neighbours, load_tokenizer
from covray.seeds import seed_of
from covray.training.objectives.own_frames import OwnFrames

NEIGHBOURS = 8
"""Codes that ``neighbour`` chooses from."""
_CHUNK = 2048
"""Positions whose logits exist at a time."""


class FrameNoise:
    """Replaces tokens of the query's frames in the input of a training."""

    def __init__(self, config: TrainConfig, sentences: Sentences, codes: int):
        """Set up the noise.

        Args:
            config: Of the training.
            sentences: The stream that is trained on.
            codes: Image codes that a picture of the dataset can have.

        Raises:
            CovrayError: The dataset's tokenizer is needed and cannot be used.
        """
        self._seed, self._noise = config.seed, config.sentences.frame_noise
        self._sentences, self._codes = sentences, codes
        self.own: OwnFrames | None = None
        """Of ``own``: the frames that are written."""
        self._neighbours: np.ndarray | None = None
        if self._noise.kind == "neighbour":
            self._neighbours = codebook_neighbours(load_codebook(ChainDataset(config.data)), NEIGHBOURS)

    def add(self, batch: Batch, indices: Sequence[int]) -> Batch:
        """Return ``batch``, of the sentences ``indices``, with noise in its input and the same targets."""
        ids = batch.ids.numpy().copy()
        guessed = []
        start = 0
        # Noise stands in the query's frames only: examples are read as the dataset has them.
        for index, length in zip(indices, batch.lengths, strict=True):
            places = start + self._sentences.frames_at(index)
            start += length
            # Frames that are not written yet stay the dataset's.
            if self.own is not None:
                written = self.own.frames_of(index)
                if written is not None:
                    ids[places] = written
                continue
            generator = np.random.default_rng(seed_of(self._seed, "frame noise", index))
            chosen = places[generator.random(len(places)) < self._noise.share]
            if self._noise.kind == "random":
                ids[chosen] = generator.integers(self._codes, size=len(chosen))
            elif self._neighbours is not None:
                ids[chosen] = self._neighbours[ids[chosen], generator.integers(NEIGHBOURS, size=len(chosen))]
            # Guessed by the model itself, in the step that reads them.
            else:
                guessed.append(chosen)
        noisy = replace(batch, ids=torch.from_numpy(ids), target_ids=batch.ids)
        if guessed:
            noisy = replace(noisy, guessed=torch.from_numpy(np.concatenate(guessed)))
        return noisy

    def fill_guesses(self, model: Lvm, batch: Batch) -> Batch:
        """Return ``batch`` with the model's likeliest codes at the positions ``guessed``, by one pass over the input.

        Args:
            model: With its weights as they are.
            batch: On the model's device.
        """
        if batch.guessed is None:
            return batch
        ids = batch.ids.clone()
        ids[batch.guessed] = guess(model, batch, batch.guessed, self._codes)
        return replace(batch, ids=ids, guessed=None)


@torch.no_grad()
def guess(model: Lvm, batch: Batch, positions: Tensor, codes: int) -> Tensor:
    """Return the model's likeliest image code at each of ``positions``, given the input before it, int64 [G].

    Args:
        model: With its weights as they are.
        batch: The input.
        positions: int64 [G].
        codes: Ids below this are image codes; others are never guessed.
    """
    # Read as the dataset has them: two passes, not one for each token (Mihaylova & Martins).
    hidden = model.hidden(batch.ids, batch.lengths)[positions - 1]
    head = model.head.weight[:codes].to(hidden.dtype)
    guesses = []
    for chunk in hidden.split(_CHUNK):  # logits of all positions at once would take gigabytes
        guesses.append(F.linear(chunk, head).argmax(-1))
    return torch.cat(guesses)


def load_codebook(dataset: ChainDataset) -> np.ndarray:
    """Return the codebook of the tokenizer that a dataset was built with, float32 [codes, dimensions].

    Raises:
        CovrayError: The tokenizer is not where it was, or is another one.
    """
    config = TokenizerConfig.model_validate(dataset.config["tokenizer"])
    tokenizer = load_tokenizer(config, EngineConfig(device="cpu"))
    require_same_tokens(dataset, tokenizer, f"sentences.frame_noise: the dataset's tokenizer {config.path}")
    return tokenizer.codebook
