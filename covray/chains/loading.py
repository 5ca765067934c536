"""The chains of a split that sentences are made of: which rows and pictures they are, and how they are read.

``Chains`` are those of one dataset in memory; ``covray.chains.mapped`` has those of several, mapped from files.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from covray.chains.dataset import ChainDataset, task_of
from covray.chains.quality import best_rows, chain_quality, kept_count
from covray.chains.shard_rows import FrameColumn, ShardRow, frame_order
from covray.config import SentencesConfig
from covray.errors import DatasetError


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
        # Pictures of all lengths, each once: chains of several lengths share alphas.
        needed = np.unique(np.concatenate(list(stored.values())))
        # The first and the last picture are source and label; a row's list of frames begins behind the source.
        inner = needed[1:-1] - 1
        reader = _TaskReader(dataset, split, inner, dropped=dropped_share(dataset, config, split))

        # For the rows of all splits: counting first would open each file twice, and memory is taken when it is written.
        tokens = np.empty((dataset.count(), len(needed), dataset.tokens_per_image), np.uint16)
        pair_ids = np.empty(len(tokens), np.int64)
        counts: dict[str, int] = {}
        first = 0
        tasks = config.tasks or set(map(task_of, dataset.shards))
        for task in sorted(tasks):
            rows = reader.read(task, tokens[first:], pair_ids[first:])
            if rows:
                counts[task] = rows
                first += rows

        require_pairs(dataset, config, split, counts)
        starts = np.cumsum([0, *counts.values()])
        pictures = {length: np.searchsorted(needed, indices) for length, indices in stored.items()}
        # The arrays are longer by the rows of other splits; a view leaves them out.
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
        # Every row gets its place first, so that tokens are written where they belong, batch by batch, without a copy
        # of all.
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
            # Arrow's list of frames is flat: [rows x frames] lists of tokens, in the fixed order of `frame_order`.
            if len(self._inner):
                frames = batch.column("frames").flatten().field("tokens")
                tokens[rows, 1:-1] = flat_tokens(dataset, frames, (len(batch), self._frames))[:, self._inner]
        if not self._share:
            return len(table)
        # Chains of the lowest quality are dropped: the best move up, and stay sorted by pair.
        figures = table["quality"].to_pylist()
        qualities = [chain_quality(figures[row]) for row in order]
        best = best_rows(qualities, self._share)
        tokens[: len(best)], pair_ids[: len(best)] = tokens[best], pair_ids[best]
        return len(best)


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
    # Only to refuse a method or a length that was not built.
    pictures_of(dataset, config)
    dropped = dropped_share(dataset, config, split)
    counts: Counter[str] = Counter()
    tasks = dataset.table(["task"], config.tasks, split)["task"].combine_chunks()
    for entry in pc.value_counts(tasks).to_pylist():
        counts[entry["values"]] = kept_count(entry["counts"], dropped)
    return counts


def dropped_share(dataset: ChainDataset, config: SentencesConfig, split: str) -> float:
    """Return the share of chains of ``split`` that is left out. Raises DatasetError where no quality is known."""
    # The worst are left out of training only: validation asks for chains as they come.
    if not config.drop_worst or split != config.split:
        return 0.0
    if "diffusion" not in dataset.methods:
        raise DatasetError(
            f"{dataset.path}: has no diffused frames, whose quality sentences.drop_worst goes by; build with "
            f"--method {','.join((*dataset.methods, 'diffusion'))}, or set it to 0"
        )
    return config.drop_worst


def lengths_of(config: SentencesConfig) -> tuple[int, ...]:
    """Return the lengths of the chains that sentences are made of."""
    if config.method == "none":
        return (2,)
    return config.lengths


def pictures_of(dataset: ChainDataset, config: SentencesConfig) -> dict[int, np.ndarray]:
    """Return which pictures of a stored row (source, frames, label) make a chain of each length.

    It asks the dataset for the chain of a row whose pictures are their own numbers; the dataset refuses frames that
    were not built.
    """
    order = frame_order(dataset.methods, dataset.alphas)
    frames: list[FrameColumn] = []
    for number, (method, alpha) in enumerate(order, 1):
        frames.append({"method": method, "alpha": alpha, "tokens": [number]})
    row: ShardRow = {"source": [0], "frames": frames, "label": [len(order) + 1]}
    return {length: dataset.chain(row, length, config.method)[:, 0] for length in lengths_of(config)}


def require_pairs(dataset: ChainDataset, config: SentencesConfig, split: str, counts: dict[str, int]) -> None:
    """Refuse a split without pairs, and tasks with too few for a sentence. Raises DatasetError."""
    if not counts:
        splits = sorted(set(dataset.table(["split"], config.tasks)["split"].drop_null().to_pylist()))
        raise DatasetError(
            f"{dataset.path}: no good pairs in split {split}, only in {', '.join(splits) or 'none'}; "
            "set sentences.split or sentences.validation_split"
        )
    # The query is a pair, too.
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
