"""Visual sentences: example chains and a query chain of one task, end to end, and how workers share a step's.

A sentence is ``[pair_1 chain] ... [pair_n chain] [query chain]``. A chain is image, frames in ascending alpha, label,
without separators (the paper's <I0, R, I1>). Which pairs meet is a pure function of (seed, epoch, index), and does not
depend on workers, shards or the order of rows. Sentences are counted through all epochs, so that one number, the
cursor, says how far a training is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Protocol

import numpy as np
import torch

from covray.chains.loading import lengths_of
from covray.config import SentencesConfig
from covray.errors import ConfigError
from covray.models.lvm.model import Batch

_QUERIES_AT_ONCE = 2**18
"""Queries whose examples are drawn at a time: ten million at once would take gigabytes."""
# The chains of a sentence, and the pictures of those, that carry loss.
_LOSS: dict[str, tuple[slice | int, slice | int]] = {
    "all": (slice(None), slice(None)),
    "chains": (slice(None), slice(1, None)),
    "chain": (-1, slice(1, None)),
    "answer": (-1, -1),
}


def require_context(config: SentencesConfig, tokens_per_image: int, context_tokens: int) -> int:
    """Return the tokens of the longest sentence.

    Args:
        config: Which sentences are made.
        tokens_per_image: Tokens of a picture.
        context_tokens: The context of the backbone.

    Raises:
        ConfigError: The sentence exceeds the context.
    """
    pictures, pairs = max(lengths_of(config)), max(config.pairs)
    tokens = pictures * (pairs + 1) * tokens_per_image
    if tokens > context_tokens:
        raise ConfigError(
            f"sentences: {pictures} pictures x ({pairs} + 1) chains x {tokens_per_image} tokens = {tokens} tokens "
            f"exceed the context of {context_tokens} ({context_tokens // tokens_per_image} pictures); "
            "lower --length or --example-pairs"
        )
    return tokens


@dataclass(frozen=True)
class Sentence:
    """One visual sentence."""

    ids: np.ndarray
    """uint16 [T]."""
    loss_at: np.ndarray
    """The positions whose tokens carry loss, ascending, int64 [loss tokens]."""


class ChainSource(Protocol):
    """Chains that sentences are made of."""

    @property
    def tokens_per_image(self) -> int:
        """Tokens of one picture."""

    @property
    def starts(self) -> np.ndarray:
        """Where the rows of each task begin and those of the last one end, int64 [tasks + 1]."""

    @property
    def epoch_queries(self) -> int:
        """The queries of an epoch."""

    def __len__(self) -> int:
        """Return the rows."""

    def queries(self, seed: int, epoch: int) -> np.ndarray | None:
        """Return the rows that are queries of an epoch, [epoch_queries]; None: each row once."""

    def take(self, rows: np.ndarray, length: int) -> np.ndarray:
        """Return the chains of ``rows``, uint16 [rows, length, tokens per picture]."""


class Sentences:
    """The endless stream of visual sentences over ``chains``; every pair is the query once in ``len()`` of them.

    With weights, a pair of a dataset is the query as often as the weight says. An ``index`` counts sentences from the
    start of the first epoch.
    """

    def __init__(self, chains: ChainSource, config: SentencesConfig, context_tokens: int, seed: int):
        """Set up the stream.

        Args:
            chains: The chains of one split, such as ``Chains``.
            config: Which sentences are made of them.
            context_tokens: The context of the backbone.
            seed: All that is left to chance follows from it.

        Raises:
            ConfigError: The longest sentence exceeds the context.
        """
        # Refused here, before a worker reads a token.
        require_context(config, chains.tokens_per_image, context_tokens)
        self.chains, self.config, self.seed = chains, config, seed
        # Two epochs: a step may lie across the end of one.
        self._epoch = lru_cache(maxsize=2)(self._sample)
        self._loss_at = cache(self._find_loss)  # of every shape of sentence
        # Asked for several times a sentence: with one shape there is nothing to look up.
        shapes = list(itertools.product(lengths_of(config), config.pairs))
        self._only_shape = shapes[0] if len(shapes) == 1 else None

    def __len__(self) -> int:
        """Return the queries of an epoch."""
        return self.chains.epoch_queries

    def shape(self, index: int) -> tuple[int, int]:
        """Return the pictures of a chain and the example pairs of the sentence."""
        if self._only_shape is not None:
            return self._only_shape
        # An index counts sentences through all epochs.
        number, position = divmod(index, len(self))
        epoch = self._epoch(number)
        return int(epoch.lengths[position]), int(epoch.pairs[position])

    def tokens(self, index: int) -> int:
        """Return the tokens of the sentence."""
        length, pairs = self.shape(index)
        return length * (pairs + 1) * self.chains.tokens_per_image

    def loss_at(self, index: int) -> np.ndarray:
        """Return the positions of the sentence whose tokens carry loss, ascending, int64 [loss tokens]."""
        return self._loss_at(*self.shape(index))

    def frames_at(self, index: int) -> np.ndarray:
        """Return the positions of the query's frames in the sentence, ascending, int64 [frames x tokens]."""
        length, _ = self.shape(index)
        end, size = self.tokens(index), self.chains.tokens_per_image
        # The answer is the last picture; the frames stand before it, the query's image before those.
        return np.arange(end - (length - 1) * size, end - size)

    def rows(self, index: int) -> np.ndarray:
        """Return the rows of ``chains`` in the order of the sentence, int [pairs + 1]; the query is the last."""
        number, position = divmod(index, len(self))
        epoch = self._epoch(number)
        # Examples are stored the nearest to the query first: backwards they end with the query itself.
        return epoch.rows[position, epoch.pairs[position] :: -1]

    def sentence(self, index: int) -> Sentence:
        """Return the sentence."""
        length, _ = self.shape(index)
        ids = self.chains.take(self.rows(index), length)
        return Sentence(ids.reshape(-1), self.loss_at(index))

    def _find_loss(self, length: int, pairs: int) -> np.ndarray:
        """Return the positions that carry loss in a sentence of ``pairs`` examples, ascending, int64 [loss tokens]."""
        # [chains, pictures, tokens], in the order of the sentence.
        carries = np.zeros((pairs + 1, length, self.chains.tokens_per_image), bool)
        carries[_LOSS[self.config.loss]] = True  # which chains, and which of their pictures
        carries[0, 0, 0] = False  # nothing stands before the first token to predict it from
        return np.flatnonzero(carries)

    def _sample(self, epoch: int) -> _Epoch:
        """Return all that is left to chance in an epoch.

        Only uniform doubles are drawn, and always equally many. So configurations that differ in lengths, method or
        loss show the same pairs in the same order, and one with fewer examples lacks the first of them.
        """
        generator = np.random.default_rng([self.seed, epoch])

        queries = np.argsort(generator.random(len(self)), kind="stable")
        chosen = self.chains.queries(self.seed, epoch)
        if chosen is not None:
            queries = chosen[queries]

        lengths = self._choose(lengths_of(self.config), generator)
        pairs = self._choose(self.config.pairs, generator)
        most = max(self.config.pairs)
        row_type = np.int32 if len(self.chains) < 2**31 else np.int64
        rows = np.empty((len(self), most + 1), row_type)
        rows[:, 0] = queries
        # One example after another, for all queries: each is drawn without those that its sentence already has.
        for taken in range(1, most + 1):
            uniform = generator.random(len(self))
            for start in range(0, len(self), _QUERIES_AT_ONCE):
                portion = slice(start, start + _QUERIES_AT_ONCE)
                rows[portion, taken] = self._examples(rows[portion, :taken], uniform[portion])
        return _Epoch(rows, lengths, pairs)

    def _examples(self, present: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Return one more row of the same task for each sentence, int64 [sentences].

        Args:
            present: The rows that each sentence has, [sentences, rows].
            uniform: A number in [0, 1) for each sentence.
        """
        starts = self.chains.starts
        task = np.searchsorted(starts, present[:, 0], side="right") - 1
        # The k-th of the pairs that are not in the sentence yet: count past those that are, in ascending order.
        free = np.diff(starts)[task] - present.shape[1]
        example = starts[task] + (uniform * free).astype(np.int64)
        for row in np.sort(present, axis=1).T:
            example += example >= row
        return example

    def _choose(self, choices: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
        """Return one of ``choices`` for each query of an epoch, uint16 [queries]."""
        # Floor of a uniform number times their count: each is as likely, and as many numbers are drawn for any count.
        return np.array(choices, np.uint16)[(generator.random(len(self)) * len(choices)).astype(np.int64)]


def step_bounds(sentences: Sentences, first: int, batch_tokens: int) -> int:
    """Return the end of the step that begins at cursor ``first``, which is where the next step begins.

    A step has as many sentences as fit in ``batch_tokens``, and at least one.
    """
    # At least one sentence, however long.
    end = first + 1
    tokens_left = batch_tokens - sentences.tokens(first)
    while sentences.tokens(end) <= tokens_left:
        tokens_left -= sentences.tokens(end)
        end += 1
    return end


def micro_batches(
    sentences: Sentences,
    first: int,
    last: int,
    rank: int,
    world: int,
    micro_tokens: int,
    finish: Callable[[Batch, Sequence[int]], Batch] | None = None,
) -> list[Batch | None]:
    """Return the micro-batches of one worker in a step: every ``world``-th sentence.

    The longest sentences come first and equal lengths are adjacent, which is what attention runs fastest on. Every
    worker gets as many batches as the busiest one, the missing ones None, because the collectives of ZeRO-3 must pair
    up.

    Args:
        sentences: The stream.
        first: The first sentence of the step.
        last: The end of the step, which it does not contain.
        rank: The worker.
        world: Workers of the step.
        micro_tokens: Tokens of a batch, at most; but a batch has at least one sentence.
        finish: Returns what is made of a batch and the indices of its sentences; by default the batch.
    """
    # What every worker gets follows from the stream, so that no worker asks another.
    packs_by_rank = [_packed(sentences, range(first + start, last, world), micro_tokens) for start in range(world)]
    batches: list[Batch | None] = []
    for share in packs_by_rank[rank]:
        batch = _batch(sentences, share)
        if finish is not None:
            batch = finish(batch, share)
        batches.append(batch)
    most = max(map(len, packs_by_rank))
    return batches + [None] * (most - len(batches))


def loss_tokens(sentences: Sentences, first: int, last: int) -> int:
    """Return the tokens that carry loss in the sentences ``[first, last)``, over all workers."""
    tokens = 0
    for index in range(first, last):
        tokens += len(sentences.loss_at(index))
    return tokens


@dataclass(frozen=True)
class _Epoch:
    rows: np.ndarray  # int32 or int64 [queries, most pairs + 1]: the query, then its examples, the nearest to it first
    lengths: np.ndarray  # uint16 [queries]
    pairs: np.ndarray  # uint16 [queries]


def _packed(sentences: Sentences, share: range, micro_tokens: int) -> list[list[int]]:
    """Return the sentences of ``share``, longest first, cut into batches."""
    packs: list[list[int]] = []
    tokens_left = 0
    for index in sorted(share, key=sentences.tokens, reverse=True):  # a stable sort: equal lengths stay in order
        tokens = sentences.tokens(index)
        # Longest first: what follows is not longer, so that a pack is closed as soon as one does not fit.
        if not packs or tokens > tokens_left:
            packs.append([])
            tokens_left = micro_tokens
        packs[-1].append(index)
        tokens_left -= tokens
    return packs


def _batch(sentences: Sentences, indices: list[int]) -> Batch:
    """Return sentences as one batch, end to end."""
    ids, lengths, positions = [], [], []
    start = 0
    for index in indices:
        sentence = sentences.sentence(index)
        ids.append(sentence.ids)
        lengths.append(len(sentence.ids))
        positions.append(start + sentence.loss_at - 1)  # a token is predicted at the position before it
        start += len(sentence.ids)
    # One row without padding; `lengths` tells attention where a sentence ends.
    all_ids = torch.from_numpy(np.concatenate(ids).astype(np.int64))
    return Batch(all_ids, tuple(lengths), torch.from_numpy(np.concatenate(positions)))
