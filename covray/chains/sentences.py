"""Visual sentences: example chains and a query chain of one task, end to end, and how a step shares them out.

A sentence is ``[pair_1 chain] ... [pair_n chain] [query chain]``, a chain is image, frames in ascending alpha, label,
and nothing stands between them (the paper's <I0, R, I1>). Which pairs meet is a pure function of (seed, epoch, index):
not of workers, shards or the order of rows. Sentences are counted through all epochs, so that one number, the cursor,
says how far a run is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from covray.chains.dataset import ChainDataset, frame_order, task_of
from covray.config import SentencesConfig
from covray.errors import ConfigError, DatasetError
from covray.models.lvm.model import Batch

# The chains of a sentence, and the pictures of those, that carry loss.
_LOSS: dict[str, tuple[slice | int, slice | int]] = {
    "all": (slice(None), slice(None)),
    "chains": (slice(None), slice(1, None)),
    "chain": (-1, slice(1, None)),
    "answer": (-1, -1),
}


def require_context(config: SentencesConfig, tokens_per_image: int, context_tokens: int) -> int:
    """Tokens of the longest sentence of ``config``; ConfigError, with the arithmetic, when they exceed the context."""
    pictures, pairs = max(_lengths(config)), max(config.pairs)
    tokens = pictures * (pairs + 1) * tokens_per_image
    if tokens > context_tokens:
        raise ConfigError(
            f"sentences: {pictures} pictures x ({pairs} + 1) chains x {tokens_per_image} tokens = {tokens} tokens "
            f"exceed the context of {context_tokens} ({context_tokens // tokens_per_image} pictures); "
            "lower --length or --example-pairs"
        )
    return tokens


def count_pairs(dataset: ChainDataset, config: SentencesConfig, split: str) -> dict[str, int]:
    """Pairs of each task in ``split``, by task; reads no tokens, so it is cheap enough to ask before workers start.

    Raises DatasetError: the frames that a length needs were not built, the split is empty, or a task has too few pairs
    for a sentence.
    """
    _pictures(dataset, config)
    found = pc.value_counts(dataset.table(["task"], config.tasks, split)["task"].combine_chunks()).to_pylist()
    counts = {entry["values"]: entry["counts"] for entry in sorted(found, key=lambda entry: entry["values"])}
    _require_pairs(dataset, config, split, counts)
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
    """Rows of ``tasks[k]`` are ``starts[k]`` to ``starts[k + 1]``, int64 [tasks + 1]."""
    pictures: dict[int, np.ndarray]
    """The pictures of a chain of each length, as places in the second axis of ``tokens``."""

    @classmethod
    def load(cls, dataset: ChainDataset, config: SentencesConfig, split: str) -> Chains:
        """Read what ``config`` needs of ``split``: only its tasks, its method and its lengths' alphas.

        Memory is the tokens kept and, while reading, all columns of one task. Raises DatasetError as ``count_pairs``.
        """
        stored = _pictures(dataset, config)
        kept = np.unique(np.concatenate(list(stored.values())))
        label = len(frame_order(dataset.methods, dataset.alphas)) + 1
        inner = kept[1:-1] - 1  # as places in a row's list of frames
        # Room for every split: counting first would open each file twice, and memory is taken where it is written.
        tokens = np.empty((dataset.count(), len(kept), dataset.tokens_per_image), np.uint16)
        pair_ids = np.empty(len(tokens), np.int64)
        counts: dict[str, int] = {}
        columns = ["pair_id", "source", "label", *(["frames"] if len(inner) else [])]
        first = 0
        for task in sorted(config.tasks or {task_of(shard) for shard in dataset.shards}):
            table = dataset.table(columns, [task], split)
            if not len(table):
                continue
            counts[task] = len(table)
            ids = table["pair_id"].to_numpy()
            order = np.argsort(ids)
            pair_ids[first : first + len(table)] = ids[order]
            place = np.empty(len(table), np.int64)
            place[order] = np.arange(first, first + len(table))
            first += len(table)
            for batch in table.to_batches():
                here, place = np.split(place, [len(batch)])
                tokens[here, 0] = _flat(dataset, batch.column("source"), (len(batch),))
                tokens[here, -1] = _flat(dataset, batch.column("label"), (len(batch),))
                if len(inner):
                    frames = batch.column("frames").flatten().field("tokens")
                    tokens[here, 1:-1] = _flat(dataset, frames, (len(batch), label - 1))[:, inner]
        _require_pairs(dataset, config, split, counts)
        starts = np.cumsum([0, *counts.values()])
        pictures = {length: np.searchsorted(kept, places) for length, places in stored.items()}
        return cls(tokens[:first], pair_ids[:first], tuple(counts), starts, pictures)

    @property
    def tokens_per_image(self) -> int:
        """Tokens of one picture."""
        return int(self.tokens.shape[2])


@dataclass(frozen=True)
class Sentence:
    """One visual sentence."""

    ids: np.ndarray
    """uint16 [T]."""
    loss_at: np.ndarray
    """The positions whose tokens carry loss, ascending, int64 [loss tokens]."""


class Sentences:
    """The endless stream of visual sentences over ``chains``; every pair is the query once in ``len()`` of them.

    ``context_tokens`` is the backbone's. An ``index`` counts sentences from the start of the first epoch. Raises
    ConfigError when the longest sentence exceeds the context.
    """

    def __init__(self, chains: Chains, config: SentencesConfig, context_tokens: int, seed: int):
        require_context(config, chains.tokens_per_image, context_tokens)
        self.chains, self.config, self.seed = chains, config, seed
        # Two: a step may lie across the end of an epoch.
        self._epoch = lru_cache(maxsize=2)(self._draw)
        self._loss_at = cache(self._find_loss)  # of every shape of sentence

    def __len__(self) -> int:
        """Queries of an epoch."""
        return len(self.chains.tokens)

    def shape(self, index: int) -> tuple[int, int]:
        """Pictures of a chain and example pairs of the sentence."""
        epoch, place = divmod(index, len(self))
        drawn = self._epoch(epoch)
        return int(drawn.lengths[place]), int(drawn.pairs[place])

    def tokens(self, index: int) -> int:
        """Tokens of the sentence."""
        length, pairs = self.shape(index)
        return length * (pairs + 1) * self.chains.tokens_per_image

    def loss_at(self, index: int) -> np.ndarray:
        """The positions of the sentence whose tokens carry loss, ascending, int64 [loss tokens]."""
        return self._loss_at(*self.shape(index))

    def rows(self, index: int) -> np.ndarray:
        """Rows of ``chains`` in the order of the sentence, int64 [pairs + 1]; the query is the last."""
        epoch, place = divmod(index, len(self))
        drawn = self._epoch(epoch)
        return drawn.rows[place, drawn.pairs[place] :: -1]

    def sentence(self, index: int) -> Sentence:
        """Sentence ``index``."""
        length, _ = self.shape(index)
        ids = self.chains.tokens[self.rows(index)[:, None], self.chains.pictures[length]]  # [pairs + 1, length, tokens]
        return Sentence(ids.reshape(-1), self.loss_at(index))

    def _find_loss(self, length: int, pairs: int) -> np.ndarray:
        carries = np.zeros((pairs + 1, length, self.chains.tokens_per_image), bool)
        carries[_LOSS[self.config.loss]] = True
        carries[0, 0, 0] = False  # nothing stands before the first token to predict it from
        return np.flatnonzero(carries)

    def _draw(self, epoch: int) -> _Epoch:
        """All that is left to chance in an epoch.

        Only uniform doubles are drawn, and always as many: so configurations that differ in lengths, method or loss
        show the same pairs in the same order, and one with fewer examples lacks the first of them.
        """
        generator = np.random.default_rng([self.seed, epoch])
        queries = np.argsort(generator.random(len(self)), kind="stable")
        lengths, pairs = (
            np.array(choices)[_below(generator, np.full(len(self), len(choices)))]
            for choices in (_lengths(self.config), self.config.pairs)
        )
        starts = self.chains.starts
        task = np.searchsorted(starts, queries, side="right") - 1
        first, size = starts[task], np.diff(starts)[task]
        rows = queries[:, None]
        for taken in range(1, max(self.config.pairs) + 1):
            # The k-th of the pairs that are not in the sentence yet: count on past those that are, in ascending order.
            example = first + _below(generator, size - taken)
            for present in np.sort(rows, axis=1).T:
                example += example >= present
            rows = np.column_stack((rows, example))
        return _Epoch(rows, lengths, pairs)


def step_bounds(sentences: Sentences, first: int, batch_tokens: int) -> int:
    """The step that begins at cursor ``first`` has the sentences up to the returned one.

    As many as fit in ``batch_tokens``, at least one; the next step begins where it ends.
    """
    last, room = first + 1, batch_tokens - sentences.tokens(first)
    while (room := room - sentences.tokens(last)) >= 0:
        last += 1
    return last


def micro_batches(
    sentences: Sentences, first: int, last: int, rank: int, world: int, micro_tokens: int
) -> list[Batch | None]:
    """What worker ``rank`` of ``world`` computes of the step ``[first, last)``: every ``world``-th sentence.

    Longest first and equal lengths adjacent, which is what attention runs fastest on, packed up to ``micro_tokens``, at
    least one sentence a batch. Every worker gets as many batches as the busiest, the missing ones None: the collectives
    of ZeRO-3 must pair up.
    """
    shares = [_packed(sentences, range(first + start, last, world), micro_tokens) for start in range(world)]
    batches: list[Batch | None] = [_batch(sentences, share) for share in shares[rank]]
    return batches + [None] * (max(len(share) for share in shares) - len(batches))


def loss_tokens(sentences: Sentences, first: int, last: int) -> int:
    """Tokens that carry loss in the sentences ``[first, last)``, over all workers."""
    return sum(len(sentences.loss_at(index)) for index in range(first, last))


@dataclass(frozen=True)
class _Epoch:
    rows: np.ndarray  # int64 [queries, most pairs + 1]: the query, then its examples, the nearest to it first
    lengths: np.ndarray  # int64 [queries]
    pairs: np.ndarray  # int64 [queries]


def _lengths(config: SentencesConfig) -> tuple[int, ...]:
    return (2,) if config.method == "none" else config.lengths


def _below(generator: np.random.Generator, bounds: np.ndarray) -> np.ndarray:
    """A number from 0 to below each of ``bounds``, int64."""
    return (generator.random(len(bounds)) * bounds).astype(np.int64)


def _pictures(dataset: ChainDataset, config: SentencesConfig) -> dict[int, np.ndarray]:
    """Which pictures of a stored row (source, frames, label) make a chain of each length.

    Asks the dataset for the chain of a row whose pictures are their own numbers; it refuses what was not built.
    """
    order = frame_order(dataset.methods, dataset.alphas)
    frames = [{"method": method, "alpha": alpha, "tokens": [at]} for at, (method, alpha) in enumerate(order, 1)]
    row = {"source": [0], "frames": frames, "label": [len(order) + 1]}
    return {length: dataset.chain(row, length, config.method)[:, 0] for length in _lengths(config)}


def _require_pairs(dataset: ChainDataset, config: SentencesConfig, split: str, counts: dict[str, int]) -> None:
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


def _flat(dataset: ChainDataset, column: pa.Array, pictures: tuple[int, ...]) -> np.ndarray:
    """The tokens of ``column``, which has a list a picture, as uint16 [*pictures, tokens per picture]."""
    tokens = column.flatten().to_numpy()
    shape = (*pictures, dataset.tokens_per_image)
    if len(tokens) != np.prod(shape):
        raise DatasetError(
            f"{dataset.path}: a shard has {len(tokens)} tokens where {' x '.join(map(str, shape))} are due; "
            "build the dataset again"
        )
    return tokens.reshape(shape)


def _packed(sentences: Sentences, share: range, micro_tokens: int) -> list[list[int]]:
    """The sentences of ``share``, longest first, cut into batches."""
    packs: list[list[int]] = []
    room = 0
    for index in sorted(share, key=sentences.tokens, reverse=True):  # a stable sort: equal lengths stay in order
        tokens = sentences.tokens(index)
        if not packs or tokens > room:
            packs.append([])
            room = micro_tokens
        packs[-1].append(index)
        room -= tokens
    return packs


def _batch(sentences: Sentences, indices: list[int]) -> Batch:
    parts = [sentences.sentence(index) for index in indices]
    lengths = tuple(len(part.ids) for part in parts)
    ends = np.cumsum(lengths)
    positions = [end - len(part.ids) + part.loss_at - 1 for end, part in zip(ends, parts, strict=True)]
    ids = np.concatenate([part.ids for part in parts]).astype(np.int64)
    return Batch(torch.from_numpy(ids), lengths, torch.from_numpy(np.concatenate(positions)))
