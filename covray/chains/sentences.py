"""Visual sentences: example chains and a query chain of one task, end to end, and how workers share a step's.

A sentence is ``[pair_1 chain] ... [pair_n chain] [query chain]``. A chain is image, frames in ascending alpha, label,
without separators (the paper's <I0, R, I1>). Which pairs meet is a pure function of (seed, epoch, index), and does not
depend on workers, shards or the order of rows. Sentences are counted through all epochs, so that one number, the
cursor, says how far a training is.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from covray.chains.dataset import ChainDataset, frame_order, task_of
from covray.chains.quality import best_rows, chain_quality, kept_count
from covray.config import SentencesConfig
from covray.errors import ConfigError, DatasetError
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
    pictures, pairs = max(_lengths(config)), max(config.pairs)
    tokens = pictures * (pairs + 1) * tokens_per_image
    if tokens > context_tokens:
        raise ConfigError(
            f"sentences: {pictures} pictures x ({pairs} + 1) chains x {tokens_per_image} tokens = {tokens} tokens "
            f"exceed the context of {context_tokens} ({context_tokens // tokens_per_image} pictures); "
            "lower --length or --example-pairs"
        )
    return tokens


def count_pairs(dataset: ChainDataset, config: SentencesConfig, split: str, *more: ChainDataset) -> dict[str, int]:
    """Return the pairs of each task in ``split``, by task; no tokens are read, so that it is a cheap check.

    Args:
        dataset: The dataset.
        config: Which sentences will be made.
        split: The split.
        more: Further datasets, whose pairs are counted together with its own.

    Raises:
        DatasetError: The frames that a length needs were not built, the split is empty, or a task has too few pairs for
            a sentence.
    """
    counts: Counter[str] = Counter()
    for each in (dataset, *more):
        counts += kept_by_task(each, config, split)
    require_pairs(dataset, config, split, counts)
    return dict(sorted(counts.items()))


def kept_by_task(dataset: ChainDataset, config: SentencesConfig, split: str) -> Counter[str]:
    """Return the pairs of one dataset that sentences are made of, by task.

    Raises:
        DatasetError: The frames that a length needs were not built, or no quality is known to drop the worst chains by.
    """
    pictures_of(dataset, config)
    dropped = dropped_share(dataset, config, split)
    counts: Counter[str] = Counter()
    for entry in pc.value_counts(dataset.table(["task"], config.tasks, split)["task"].combine_chunks()).to_pylist():
        counts[entry["values"]] = kept_count(entry["counts"], dropped)
    return counts


@dataclass(frozen=True)
class Chains:
    """The chains of one split, in memory, sorted by task and pair id."""

    tokens: np.ndarray
    """Pictures that the configured lengths need, uint16 [rows, pictures, tokens per picture], in order of alpha."""
    pair_ids: np.ndarray
    """int64 [rows]."""
    tasks: tuple[str, ...]
    starts: np.ndarray
    """The rows of ``tasks[k]`` are ``starts[k]`` to ``starts[k + 1]``, int64 [tasks + 1]."""
    pictures: dict[int, np.ndarray]
    """The pictures of a chain of each length, as indices into the second axis of ``tokens``."""

    @classmethod
    def load(cls, dataset: ChainDataset, config: SentencesConfig, split: str) -> Chains:
        """Read what ``config`` needs of ``split``: only its tasks, its method and the alphas of its lengths.

        Memory is that of the tokens kept and, while reading, of all columns of one task.

        Raises:
            DatasetError: As ``count_pairs``, or a shard has another number of tokens than the dataset.
        """
        stored = pictures_of(dataset, config)
        kept = np.unique(np.concatenate(list(stored.values())))
        reader = _TaskReader(dataset, split, inner=kept[1:-1] - 1, dropped=dropped_share(dataset, config, split))
        # For the rows of all splits: counting first would open each file twice, and memory is taken when it is written.
        tokens = np.empty((dataset.count(), len(kept), dataset.tokens_per_image), np.uint16)
        pair_ids = np.empty(len(tokens), np.int64)
        counts: dict[str, int] = {}
        first = 0
        for task in sorted(config.tasks or {task_of(shard) for shard in dataset.shards}):
            rows = reader.read(task, tokens[first:], pair_ids[first:])
            if rows:
                counts[task] = rows
                first += rows
        require_pairs(dataset, config, split, counts)
        starts = np.cumsum([0, *counts.values()])
        pictures = {length: np.searchsorted(kept, indices) for length, indices in stored.items()}
        return cls(tokens[:first], pair_ids[:first], tuple(counts), starts, pictures)

    def __len__(self) -> int:
        """Return the rows."""
        return len(self.tokens)

    @property
    def epoch_queries(self) -> int:
        """The queries of an epoch."""
        return len(self)

    def queries(self, seed: int, epoch: int) -> np.ndarray | None:
        """Return the rows that are queries of an epoch; None: each row once."""
        return None

    def take(self, rows: np.ndarray, length: int) -> np.ndarray:
        """Return the chains of ``rows``, uint16 [rows, length, tokens per picture]."""
        return self.tokens[rows[:, None], self.pictures[length]]

    @property
    def tokens_per_image(self) -> int:
        """Tokens of one picture."""
        return int(self.tokens.shape[2])


class _TaskReader:
    """Reads the rows of one split, task by task."""

    def __init__(self, dataset: ChainDataset, split: str, inner: np.ndarray, dropped: float):
        """Prepare to read.

        Args:
            dataset: The dataset.
            split: The split.
            inner: The frames to read, as indices of a row's list of frames, int64 [frames].
            dropped: Share of each task's rows that is left out, those of the lowest quality.
        """
        self._dataset, self._split, self._inner, self._share = dataset, split, inner, dropped
        self._frames = len(frame_order(dataset.methods, dataset.alphas))
        self._columns = ["pair_id", "source", "label"]
        if len(inner):
            self._columns.append("frames")
        if dropped:
            self._columns.append("quality")

    def read(self, task: str, tokens: np.ndarray, pair_ids: np.ndarray) -> int:
        """Write the rows of ``task``, sorted by pair id, to the beginning of two arrays; return how many there are.

        Args:
            task: The task.
            tokens: uint16 [rows or more, pictures, tokens per picture].
            pair_ids: int64 [rows or more].

        Raises:
            DatasetError: A shard has another number of tokens than the dataset.
        """
        dataset = self._dataset
        table = dataset.table(self._columns, [task], self._split)
        if not len(table):
            return 0
        ids = table["pair_id"].to_numpy()
        order = np.argsort(ids)
        pair_ids[: len(table)] = ids[order]
        target = np.empty(len(table), np.int64)  # the sorted position of every row
        target[order] = np.arange(len(table))
        start = 0
        for batch in table.to_batches():
            rows = target[start : start + len(batch)]
            start += len(batch)
            tokens[rows, 0] = flat_tokens(dataset, batch.column("source"), (len(batch),))
            tokens[rows, -1] = flat_tokens(dataset, batch.column("label"), (len(batch),))
            if len(self._inner):
                frames = batch.column("frames").flatten().field("tokens")
                tokens[rows, 1:-1] = flat_tokens(dataset, frames, (len(batch), self._frames))[:, self._inner]
        if not self._share:
            return len(table)
        figures = table["quality"].to_pylist()
        best = best_rows([chain_quality(figures[row]) for row in order], self._share)
        tokens[: len(best)], pair_ids[: len(best)] = tokens[best], pair_ids[best]
        return len(best)


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
        require_context(config, chains.tokens_per_image, context_tokens)
        self.chains, self.config, self.seed = chains, config, seed
        # Two epochs: a step may lie across the end of one.
        self._epoch = lru_cache(maxsize=2)(self._sample)
        self._loss_at = cache(self._find_loss)  # of every shape of sentence
        shapes = list(itertools.product(_lengths(config), config.pairs))
        self._only_shape = shapes[0] if len(shapes) == 1 else None  # asked for several times a sentence

    def __len__(self) -> int:
        """Return the queries of an epoch."""
        return self.chains.epoch_queries

    def shape(self, index: int) -> tuple[int, int]:
        """Return the pictures of a chain and the example pairs of the sentence."""
        if self._only_shape is not None:
            return self._only_shape
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
        return np.arange(end - (length - 1) * size, end - size)

    def rows(self, index: int) -> np.ndarray:
        """Return the rows of ``chains`` in the order of the sentence, int [pairs + 1]; the query is the last."""
        number, position = divmod(index, len(self))
        epoch = self._epoch(number)
        return epoch.rows[position, epoch.pairs[position] :: -1]

    def sentence(self, index: int) -> Sentence:
        """Return the sentence."""
        length, _ = self.shape(index)
        ids = self.chains.take(self.rows(index), length)
        return Sentence(ids.reshape(-1), self.loss_at(index))

    def _find_loss(self, length: int, pairs: int) -> np.ndarray:
        carries = np.zeros((pairs + 1, length, self.chains.tokens_per_image), bool)
        carries[_LOSS[self.config.loss]] = True
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
        lengths = self._choose(_lengths(self.config), generator)
        pairs = self._choose(self.config.pairs, generator)
        most = max(self.config.pairs)
        rows = np.empty((len(self), most + 1), np.int32 if len(self.chains) < 2**31 else np.int64)
        rows[:, 0] = queries
        for taken in range(1, most + 1):
            luck = generator.random(len(self))
            for start in range(0, len(self), _QUERIES_AT_ONCE):
                some = slice(start, start + _QUERIES_AT_ONCE)
                rows[some, taken] = self._examples(rows[some, :taken], luck[some])
        return _Epoch(rows, lengths, pairs)

    def _examples(self, present: np.ndarray, luck: np.ndarray) -> np.ndarray:
        """Return one more row of the same task for each sentence, int64 [sentences].

        Args:
            present: The rows that each sentence has, [sentences, rows].
            luck: A uniform number for each sentence.
        """
        starts = self.chains.starts
        task = np.searchsorted(starts, present[:, 0], side="right") - 1
        # The k-th of the pairs that are not in the sentence yet: count past those that are, in ascending order.
        free = np.diff(starts)[task] - present.shape[1]
        example = starts[task] + (luck * free).astype(np.int64)
        for row in np.sort(present, axis=1).T:
            example += example >= row
        return example

    def _choose(self, choices: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
        """Return one of ``choices`` for each query of an epoch, uint16 [queries]."""
        return np.array(choices, np.uint16)[(generator.random(len(self)) * len(choices)).astype(np.int64)]


def step_bounds(sentences: Sentences, first: int, batch_tokens: int) -> int:
    """Return the end of the step that begins at cursor ``first``, which is where the next step begins.

    A step has as many sentences as fit in ``batch_tokens``, and at least one.
    """
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
    shares = [_packed(sentences, range(first + start, last, world), micro_tokens) for start in range(world)]
    batches: list[Batch | None] = []
    for share in shares[rank]:
        batch = _batch(sentences, share)
        batches.append(batch if finish is None else finish(batch, share))
    return batches + [None] * (max(len(share) for share in shares) - len(batches))


def loss_tokens(sentences: Sentences, first: int, last: int) -> int:
    """Return the tokens that carry loss in the sentences ``[first, last)``, over all workers."""
    return sum(len(sentences.loss_at(index)) for index in range(first, last))


@dataclass(frozen=True)
class _Epoch:
    rows: np.ndarray  # int32 or int64 [queries, most pairs + 1]: the query, then its examples, the nearest to it first
    lengths: np.ndarray  # uint16 [queries]
    pairs: np.ndarray  # uint16 [queries]


def dropped_share(dataset: ChainDataset, config: SentencesConfig, split: str) -> float:
    """Return the share of chains of ``split`` that is left out. Raises DatasetError where no quality is known."""
    if not config.drop_worst or split != config.split:
        return 0.0
    if "diffusion" not in dataset.methods:
        raise DatasetError(
            f"{dataset.path}: has no diffused frames, whose quality sentences.drop_worst goes by; build with "
            f"--method {','.join((*dataset.methods, 'diffusion'))}, or set it to 0"
        )
    return config.drop_worst


def _lengths(config: SentencesConfig) -> tuple[int, ...]:
    return (2,) if config.method == "none" else config.lengths


def pictures_of(dataset: ChainDataset, config: SentencesConfig) -> dict[int, np.ndarray]:
    """Return which pictures of a stored row (source, frames, label) make a chain of each length.

    It asks the dataset for the chain of a row whose pictures are their own numbers; the dataset refuses frames that
    were not built.
    """
    order = frame_order(dataset.methods, dataset.alphas)
    frames = []
    for number, (method, alpha) in enumerate(order, 1):
        frames.append({"method": method, "alpha": alpha, "tokens": [number]})
    row = {"source": [0], "frames": frames, "label": [len(order) + 1]}
    return {length: dataset.chain(row, length, config.method)[:, 0] for length in _lengths(config)}


def require_pairs(dataset: ChainDataset, config: SentencesConfig, split: str, counts: dict[str, int]) -> None:
    """Refuse a split without pairs, and tasks with too few for a sentence. Raises DatasetError."""
    if not counts:
        splits = sorted(set(dataset.table(["split"], config.tasks)["split"].drop_null().to_pylist()))
        raise DatasetError(
            f"{dataset.path}: no good pairs in split {split}, only in {', '.join(splits) or 'none'}; "
            "set sentences.split or sentences.validation_split"
        )
    needed = max(config.pairs) + 1
    for task in config.tasks or counts:
        if counts.get(task, 0) < needed:
            raise DatasetError(
                f"{dataset.path}: {task} has {counts.get(task, 0)} good pairs in split {split}, a sentence of "
                f"{needed - 1} + 1 chains needs {needed}; lower --example-pairs, or name the other "
                "tasks in sentences.tasks"
            )


def flat_tokens(dataset: ChainDataset, column: pa.Array, pictures: tuple[int, ...]) -> np.ndarray:
    """Return the tokens of ``column``, which has a list for each picture, as uint16 [*pictures, tokens per picture].

    Raises:
        DatasetError: It has another number of tokens.
    """
    tokens = column.flatten().to_numpy()
    shape = (*pictures, dataset.tokens_per_image)
    if len(tokens) != np.prod(shape):
        raise DatasetError(
            f"{dataset.path}: a shard has {len(tokens)} tokens, {' x '.join(map(str, shape))} are expected; "
            "build the dataset again"
        )
    return tokens.reshape(shape)


def _packed(sentences: Sentences, share: range, micro_tokens: int) -> list[list[int]]:
    """Return the sentences of ``share``, longest first, cut into batches."""
    packs: list[list[int]] = []
    tokens_left = 0
    for index in sorted(share, key=sentences.tokens, reverse=True):  # a stable sort: equal lengths stay in order
        tokens = sentences.tokens(index)
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
    all_ids = torch.from_numpy(np.concatenate(ids).astype(np.int64))
    return Batch(all_ids, tuple(lengths), torch.from_numpy(np.concatenate(positions)))
