"""The training of an aligner in one process, of captions in memory: which captions a step reads, and a step.

``covray.thinking.objective`` trains on features in files, by any number of workers.

    captions of a step: a pure function of (seed, step)  ->  their splits: of (seed, epoch, index)  ->  one batch, AdamW

A training that continues from a state is the uninterrupted one to the bit on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from covray.config.think import AlignmentConfig, SplitConfig
from covray.seeds import seed_of
from covray.thinking.alignment import Alignment, AlignmentBatch, collate
from covray.thinking.splits import SplitSeed, split_tokens, split_words
from covray.training.optimizers import adamw, aligner_rate


@dataclass(frozen=True)
class Caption:
    """A text with its features."""

    features: Tensor
    """Of the text's tokens, [N, width]; of a vision tower the picture's, [P, width]."""
    ids: NDArray[np.int64] | None = None
    """The text's tokens, [N]; None with a vision tower."""
    text: str = ""
    """The text; of a vision tower only."""


Batches = Callable[[Sequence[SplitSeed]], AlignmentBatch]
"""Makes the batch of some captions, each of which is named by its split's seed."""


def lvlm_batches(
    captions: Sequence[Caption], split: SplitConfig, decode: Callable[[list[int]], str], tokenizer: Any, longest: int
) -> Batches:
    """Return what makes batches of ThinkDiff-LVLM: the texts' features, parted from the tokens to write.

    Args:
        captions: Texts of the vision-language model, at least two tokens each.
        split: How they are parted.
        decode: From the vision-language model's tokens to text.
        tokenizer: The language model's.
        longest: Tokens of a text to write, at most.
    """

    def make(seeds: Sequence[SplitSeed]) -> AlignmentBatch:
        features, targets = [], []
        for seed in seeds:
            caption = captions[seed.index]
            assert caption.ids is not None
            parts = split_tokens(len(caption.ids), split.mode, split.longest, seed)
            features.append(caption.features[parts.features])
            targets.append(decode(caption.ids[parts.targets].tolist()))
        return collate(features, targets, tokenizer, longest)

    return make


def clip_batches(captions: Sequence[Caption], tokenizer: Any, longest: int) -> Batches:
    """Return what makes batches of ThinkDiff-CLIP: a picture's features and first words, and the words after them.

    Args:
        captions: Captions of pictures.
        tokenizer: The language model's.
        longest: Tokens of each of the two texts, at most.
    """

    def make(seeds: Sequence[SplitSeed]) -> AlignmentBatch:
        features, words, targets = [], [], []
        for seed in seeds:
            caption = captions[seed.index]
            read, written = split_words(caption.text, seed)
            features.append(caption.features)
            words.append(read)
            targets.append(written)
        return collate(features, targets, tokenizer, longest, words)

    return make


def captions_at(count: int, seed: int, places: range) -> list[SplitSeed]:
    """Return the captions at ``places`` of a training.

    In every epoch each caption comes once, in an order of its own.

    Args:
        count: Captions of the data set.
        seed: The orders and splits follow from it.
        places: Places of the training, counted through all epochs.
    """
    seeds = []
    orders: dict[int, NDArray[np.int64]] = {}
    for place in places:
        epoch, within = divmod(place, count)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng(seed_of("order", seed, epoch)).permutation(count)
        seeds.append(SplitSeed(seed, epoch, int(orders[epoch][within])))
    return seeds


class AlignerTraining:
    """The training of an aligner, step by step."""

    def __init__(self, alignment: Alignment, batches: Batches, count: int, config: AlignmentConfig):
        """Begin a training; nothing is computed yet.

        Args:
            alignment: The aligner before its language model.
            batches: Makes batches.
            count: Captions of the data set.
            config: The training.
        """
        self._alignment, self._batches, self._count, self._config = alignment, batches, count, config
        self._optimizer = adamw(list(alignment.aligner.parameters()), config)
        self.step = 0
        """Steps that are done."""

    @property
    def is_done(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self._config.steps

    def run_step(self) -> float:
        """Take a step, and return its loss before it: the mean of its labels in nats.

        Raises:
            FloatingPointError: The loss is not finite; the aligner is as it was before the step.
        """
        device = next(self._alignment.aligner.parameters()).device
        # Counted through all epochs: a step may lie across the end of one.
        first, size = self.step * self._config.batch, self._config.batch
        batch = self._batches(captions_at(self._count, self._config.seed, range(first, first + size))).to(device)
        self._alignment.train()
        loss = self._alignment(batch).mean()
        # Before the backward pass, so that the weights stay those of the last good step.
        if not loss.isfinite():
            raise FloatingPointError(f"step {self.step}: the loss is {float(loss)}; set a smaller learning rate")
        loss.backward()
        if self._config.clip is not None:
            nn.utils.clip_grad_norm_(self._alignment.aligner.parameters(), self._config.clip)
        # A function of the step alone: a schedule with a state of its own would have to be saved, too.
        for group in self._optimizer.param_groups:
            group["lr"] = aligner_rate(self._config, self.step)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        return float(loss.detach())

    def state(self) -> dict[str, Any]:
        """Return what a training continues from, for ``torch.save``."""
        # Copies: the next step changes the parameters in place.
        aligner = {name: tensor.clone() for name, tensor in self._alignment.aligner.state_dict().items()}
        return {"step": self.step, "aligner": aligner, "optimizer": self._optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self._alignment.aligner.load_state_dict(state["aligner"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])
