"""The chains that a training reads: of one dataset or several, mapped into memory, each with a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from covray.chains.dataset import ChainDataset
from covray.chains.loading import count_pairs, dropped_share, kept_by_task, pictures_of, require_pairs
from covray.chains.quality import best_rows, chain_quality
from covray.chains.token_files import picture_count, token_batches, tokens_of
from covray.config import SentencesConfig


@dataclass(frozen=True)
class Source:
    """A dataset of a training."""

    dataset: ChainDataset
    weight: float = 1.0
    """How often each of its pairs is the query in an epoch."""


def count_queries(sources: Sequence[Source], config: SentencesConfig, split: str) -> int:
    """Return the queries of an epoch; no tokens are read.

    Raises:
        DatasetError: As ``count_pairs``.
    """
    first, *others = [source.dataset for source in sources]
    pairs = count_pairs(first, config, split, *others)  # also where weights decide: it refuses what is too small
    if _is_natural(sources):
        return sum(pairs.values())
    queries = 0
    for source in sources:
        queries += _queries(source, kept_by_task(source.dataset, config, split).total())
    return queries


_Views = dict[int, list[NDArray[np.uint16]]]
"""Of a batch of rows, the pictures of a chain of each length: views that follow each other, uint16 [rows, pictures,
tokens of a picture], each of pictures that stand together. To copy these is faster than to index every picture."""


@dataclass(frozen=True)
class _Share:
    """The rows of one dataset, and how many of them are queries in an epoch."""

    rows: NDArray[np.int32]
    queries: int

    def dealt(self, seed: int, number: int, epoch: int) -> NDArray[np.int32]:
        """Return the queries of an epoch: the rows are dealt, in a new order each time they have all been dealt."""
        # Dealing goes on across epochs: the k-th deal is one permutation of all rows, and an epoch takes the next
        # `queries`.
        first, count = epoch * self.queries, len(self.rows)
        end = first + self.queries
        taken = []
        for deal in range(first // count, -(-end // count)):
            # Seeded by the deal, so that an epoch can be had without those before it.
            order = np.argsort(np.random.default_rng([seed, number, deal]).random(count), kind="stable")
            taken.append(order[max(first - deal * count, 0) : end - deal * count])
        return self.rows[np.concatenate(taken)]


@dataclass(frozen=True)
class _Rows:
    """The rows that are needed of some batches; arrays of one length."""

    pair_ids: NDArray[np.int64]
    tasks: NDArray[np.int16]
    """Indices of a list of names."""
    batches: NDArray[np.uint16]
    """Which batch of rows, mapped or in memory."""
    rows: NDArray[np.int32]
    """Rows of the batch."""

    @classmethod
    def joined(cls, pieces: Sequence[_Rows]) -> _Rows:
        """Return the rows of all ``pieces``, at least one."""
        columns: dict[str, NDArray[Any]] = {}
        for column in fields(cls):
            columns[column.name] = np.concatenate([getattr(piece, column.name) for piece in pieces])
        return cls(**columns)

    def best(self, qualities: Sequence[float | None], dropped: float) -> _Rows:
        """Return the rows without the share ``dropped`` of each task that has the lowest of ``qualities``."""
        best = [np.empty(0, np.int64)]  # for the dtype, where there are no rows
        for task in np.unique(self.tasks):
            of_task = np.flatnonzero(self.tasks == task)
            of_task = of_task[np.argsort(self.pair_ids[of_task])]  # of equal ones the same stay, whatever the shards
            qualities_of_task = [qualities[row] for row in of_task.tolist()]
            best.append(of_task[best_rows(qualities_of_task, dropped)])
        chosen = np.concatenate(best)
        return _Rows(self.pair_ids[chosen], self.tasks[chosen], self.batches[chosen], self.rows[chosen])


class MappedChains:
    """The chains of one split of one or more datasets, sorted as the chains of one dataset with all their pairs.

    A row takes 6 bytes of memory; its tokens are read from the token files when they are asked for.
    """

    def __init__(self, sources: Sequence[Source], config: SentencesConfig, split: str):
        """Find the rows that ``config`` needs.

        Args:
            sources: The datasets, with pictures of equally many tokens.
            config: Which sentences will be made.
            split: The split.

        Raises:
            DatasetError: The frames that a length needs were not built, the split is empty, a task has too few pairs
                for a sentence, or a shard cannot be used.
        """
        self.tokens_per_image = sources[0].dataset.tokens_per_image
        self._batches: list[_Views] = []
        self._names: list[str] = []
        pieces = [self._read(source.dataset, config, split) for source in sources]
        rows = _Rows.joined(pieces)

        # Names were numbered as they appeared; the sentences go by their alphabet, whatever the datasets' order.
        alphabetical = np.argsort(self._names).astype(np.int16)
        tasks = np.argsort(alphabetical).astype(np.int16)[rows.tasks]
        order = np.lexsort((rows.pair_ids, tasks))  # by task, then by pair
        self._batch_of, self._row_of = rows.batches[order], rows.rows[order]
        # A task that only another split has is left out.
        counts = np.bincount(tasks, minlength=len(self._names))
        present = np.flatnonzero(counts)
        self.tasks = tuple(self._names[alphabetical[task]] for task in present)
        """The tasks, sorted."""
        self.starts: NDArray[np.int64] = np.cumsum([0, *counts[present]])
        """The rows of ``tasks[k]`` are ``starts[k]`` to ``starts[k + 1]``, int64 [tasks + 1]."""
        require_pairs(sources[0].dataset, config, split, dict(zip(self.tasks, counts[present].tolist(), strict=True)))
        self._shares = _shares(sources, [len(piece.rows) for piece in pieces], order)

    def __len__(self) -> int:
        """Return the rows."""
        return len(self._row_of)

    @property
    def epoch_queries(self) -> int:
        """The queries of an epoch."""
        if not self._shares:
            return len(self)
        queries = 0
        for share in self._shares:
            queries += share.queries
        return queries

    def queries(self, seed: int, epoch: int) -> NDArray[np.int32] | None:
        """Return the rows that are queries of an epoch, [epoch_queries], in any order; None: each row once."""
        if not self._shares:
            return None
        dealt = [share.dealt(seed, number, epoch) for number, share in enumerate(self._shares)]
        return np.concatenate(dealt)

    def take(self, rows: NDArray[np.int64], length: int) -> NDArray[np.uint16]:
        """Return the chains of ``rows``, uint16 [rows, length, tokens per picture]."""
        views = []
        for batch, row in zip(self._batch_of[rows].tolist(), self._row_of[rows].tolist(), strict=True):
            for view in self._batches[batch][length]:
                views.append(view[row])
        return np.concatenate(views).reshape(len(rows), length, self.tokens_per_image)

    def _read(self, dataset: ChainDataset, config: SentencesConfig, split: str) -> _Rows:
        """Return the rows that are needed of one dataset, and remember its batches and tasks."""
        # `stored` counts the pictures of a stored row, `in_memory` those that were read from it.
        stored = pictures_of(dataset, config)
        needed = np.unique(np.concatenate(list(stored.values())))
        in_memory = {length: np.searchsorted(needed, pictures) for length, pictures in stored.items()}
        pieces = [_Rows(np.empty(0, np.int64), np.empty(0, np.int16), np.empty(0, np.uint16), np.empty(0, np.int32))]
        dropped = dropped_share(dataset, config, split)
        qualities: list[float | None] = []
        for batch in token_batches(dataset, needed, split):
            # Views of the file; nothing is copied.
            tokens = tokens_of(batch, self.tokens_per_image)
            # A mapped file has the rows of all splits and tasks.
            wanted = pc.equal(batch.column("split"), split)
            if config.tasks is not None:
                wanted = pc.and_(wanted, pc.is_in(batch.column("task"), pa.array(config.tasks, pa.string())))
            is_wanted = pc.fill_null(wanted, False).to_numpy(zero_copy_only=False)
            rows = np.flatnonzero(is_wanted).astype(np.int32)
            if not len(rows):
                continue
            ids = batch.column("pair_id").to_numpy()[rows]
            if dropped:
                figures = batch.column("quality").take(pa.array(rows)).to_pylist()
                qualities += map(chain_quality, figures)
            number = np.full(len(rows), len(self._batches), np.uint16)
            pieces.append(_Rows(ids, self._task_numbers(batch.column("task"))[rows], number, rows))
            pictures = in_memory
            if tokens.shape[1] == picture_count(dataset):
                # A mapped file has all pictures at their places in a stored row; in memory only those needed are kept.
                pictures = stored
            views = {}
            for length, places in pictures.items():
                views[length] = _views(tokens, places)
            self._batches.append(views)

        rows_of_dataset = _Rows.joined(pieces)
        if not dropped:
            return rows_of_dataset
        return rows_of_dataset.best(qualities, dropped)

    def _task_numbers(self, tasks: pa.StringArray) -> NDArray[np.int16]:
        """Return the place of each row's task in the list of names, int16 [rows]; new names are added to the list."""
        # The few distinct names are looked up, not every row.
        encoded = tasks.dictionary_encode()
        places = []
        for name in encoded.dictionary.to_pylist():
            if name not in self._names:
                self._names.append(name)
            places.append(self._names.index(name))
        return np.array(places, np.int16)[encoded.indices.to_numpy()]


def _views(tokens: NDArray[np.uint16], pictures: NDArray[np.int64]) -> list[NDArray[np.uint16]]:
    """Return the views of ``tokens`` [rows, pictures, tokens of a picture] that make up the ``pictures``, ascending."""
    # A run of pictures that stand together ends where the next number is not the next picture.
    runs = np.split(pictures, np.flatnonzero(np.diff(pictures) != 1) + 1)
    return [tokens[:, run[0] : run[-1] + 1] for run in runs]


def _shares(sources: Sequence[Source], counts: Sequence[int], order: NDArray[np.int64]) -> tuple[_Share, ...]:
    """Return the share of every dataset; none where each pair is the query once in an epoch.

    Args:
        sources: The datasets.
        counts: The rows of each, which follow each other before they are sorted.
        order: Which row stands where after that, int64 [rows].
    """
    if _is_natural(sources):
        return ()
    # Which dataset each sorted row is of.
    source_of = np.repeat(np.arange(len(sources), dtype=np.uint8), counts)[order]
    shares = []
    for number, source in enumerate(sources):
        rows = np.flatnonzero(source_of == number).astype(np.int32)
        if len(rows):
            shares.append(_Share(rows, _queries(source, len(rows))))
    return tuple(shares)


def _is_natural(sources: Sequence[Source]) -> bool:
    return all(source.weight == 1.0 for source in sources)


def _queries(source: Source, rows: int) -> int:
    """Return how many of a dataset's rows are queries in an epoch."""
    if not rows:
        return 0
    return max(1, round(source.weight * rows))
