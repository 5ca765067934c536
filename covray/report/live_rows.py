"""The rows of a dataset that may still be built: which are new since a page last asked."""

from __future__ import annotations

import pyarrow as pa

from covray.chains.dataset import ChainDataset
from covray.chains.shard_rows import ShardRow, python_rows
from covray.errors import DatasetError
from covray.io.records import RecordPart
from covray.report.pair_rows import COLUMNS, PackedRows, packed_rows


class NewRows(RecordPart):
    """The rows that a page lacks, as a server gives them to it."""

    generation: int
    """What to ask with the next time, as ``shards``."""
    shards: int
    again: bool
    """Whether the page must drop its rows first."""
    finished: bool
    rows: PackedRows


class LiveRows:
    """The list of a dataset's pairs, read again shard by shard as a build writes them.

    Shards are only added, but a build that continues deletes those that it had not committed: then ``generation``
    grows, and a page starts its list again.
    """

    def __init__(self, path: str):
        """Open the dataset ``path``. Raises DatasetError for none."""
        self.path = path
        self.dataset = ChainDataset(path, unfinished=True)
        self.generation = 0
        self._shards: dict[str, pa.Table] = {}
        """By shard, in the order in which they were read."""

    def refresh(self) -> None:
        """Read what was written since the last time.

        Raises:
            DatasetError: The dataset is gone, or a shard of a finished one cannot be read.
        """
        self.dataset = ChainDataset(self.path, unfinished=True)
        present = self.dataset.shards
        # A shard that was shown is gone: the build was resumed, and what it had not committed is written again.
        if not set(self._shards) <= set(present):
            self.generation += 1
            self._shards.clear()
        for shard in present:
            if shard not in self._shards:
                batches = list(self.dataset.shard_batches(shard, COLUMNS))
                # A shard that is being written has no footer yet, and is read the next time.
                if shard not in self.dataset.unreadable and batches:
                    self._shards[shard] = pa.Table.from_batches(batches)

    def since(self, generation: int, shards: int) -> NewRows:
        """Return the rows that a page lacks.

        Args:
            generation: The ``generation`` of what the page has.
            shards: The ``shards`` of what the page has.
        """
        again = generation != self.generation or shards > len(self._shards)
        tables = list(self._shards.values())
        if not again:
            tables = tables[shards:]  # the page has the rows of the others
        rows = PackedRows(count=0)
        if tables:
            rows = packed_rows(pa.concat_tables(tables))
        return NewRows(
            generation=self.generation,
            shards=len(self._shards),
            again=again,
            finished=self.dataset.audit is not None,
            rows=rows,
        )

    def row(self, pair_id: int) -> ShardRow:
        """Return a row with all its columns. Raises DatasetError where there is none of this id."""
        for shard, table in self._shards.items():
            # The ids are in memory; only the shard that has the pair is read.
            if (table["pair_id"].to_numpy() == pair_id).any():
                return find_row(self.dataset, pair_id, [shard])
        raise no_such_pair(self.dataset, pair_id)


def find_row(dataset: ChainDataset, pair_id: int, shards: list[str] | None = None) -> ShardRow:
    """Return the row of a pair with all its columns.

    Args:
        dataset: The dataset, finished or not.
        pair_id: The id.
        shards: Where to look; None: in all shards.

    Raises:
        DatasetError: There is none.
    """
    if shards is None:
        shards = dataset.shards
    for shard in shards:
        # The ids alone are read first: tokens are most of a shard's bytes.
        is_present = False
        for batch in dataset.shard_batches(shard, ["pair_id"]):
            is_present |= bool((batch.column("pair_id").to_numpy() == pair_id).any())
        if not is_present:
            continue
        for batch in dataset.shard_batches(shard):
            matches = pa.array(batch.column("pair_id").to_numpy() == pair_id)
            for row in python_rows(batch.filter(matches)):
                return row
    raise no_such_pair(dataset, pair_id)


def no_such_pair(dataset: ChainDataset, pair_id: int) -> DatasetError:
    """Return the refusal of an id that no row has."""
    return DatasetError(
        f"{dataset.path}: has no pair {pair_id}; covray view {dataset.path} lists the ids of all its pairs"
    )
