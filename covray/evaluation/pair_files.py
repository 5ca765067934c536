"""The pairs of an evaluation: which ones are chosen, and files of them that any worker reads a few rows at a time."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from covray.chains.dataset import ChainDataset
from covray.errors import DatasetError, PairError
from covray.io import storage
from covray.io.images import decode, load_picture, picture_of, square
from covray.io.pixels import Picture
from covray.pairs.manifest_reading import check_manifest, read_manifest, row_dicts
from covray.pairs.rows import PairRow
from covray.seeds import seed_of

PAIR_SCHEMA = pa.schema(
    [
        ("pair_id", pa.int64()),
        ("task", pa.string()),
        ("image", pa.struct([("uri", pa.string()), ("bytes", pa.binary())])),
        ("label", pa.struct([("uri", pa.string()), ("bytes", pa.binary())])),
        ("meta", pa.string()),
    ]
)
_ROWS_AT_ONCE = 64
_ROOT_KEY = b"covray.root"


class PairFile:
    """Pairs of a manifest, chosen for an evaluation: written once, read by any worker, a few rows at a time."""

    def __init__(self, path: str):
        """Open the file that ``write_pairs`` wrote to ``path``."""
        self.path = path
        filesystem, inner = storage.resolve(path)
        # The narrow columns only; pictures are read when they are asked for.
        with pq.ParquetFile(inner, filesystem=filesystem) as file:
            table = file.read(columns=["pair_id", "task"])
            metadata = file.schema_arrow.metadata or {}
        self.root: str | None = json.loads(metadata[_ROOT_KEY])
        self._ids, self._tasks = table["pair_id"].to_numpy(), table["task"].to_pylist()
        # A file is small beside its pictures: the place of every pair is held in memory.
        self._row = {pair_id: row for row, pair_id in enumerate(self._ids.tolist())}
        self._group = functools.lru_cache(maxsize=4)(self._read_group)

    def ids_of(self, task: str) -> list[int]:
        """Return the pairs of ``task``, in the order of the file."""
        of_task = np.array([name == task for name in self._tasks], bool)
        ids: list[int] = self._ids[of_task].tolist()
        return ids

    def read(self, pair_ids: Iterable[int]) -> list[PairRow]:
        """Return the rows (``PAIR_SCHEMA``) of ``pair_ids``. Raises KeyError for one that is not in the file."""
        rows = []
        for pair_id in pair_ids:
            # Row groups have a fixed size, so that a row's number says where it is.
            group, row = divmod(self._row[pair_id], _ROWS_AT_ONCE)
            rows.append(self._group(group)[row])
        return rows

    def picture(self, pair: PairRow, name: Literal["image", "label"], fit: Literal["stretch", "crop"]) -> Picture:
        """Return a picture of the pair, of which with ``fit`` ``crop`` the centre square. Raises PairError."""
        try:
            picture = decode(load_picture(picture_of(pair[name]), self.root))
        except PairError as error:
            # The reason stays; the detail also says which of the two pictures it was.
            reason, _, detail = str(error).partition(": ")
            raise PairError(reason, f"{name}: {detail}") from error
        # A chain shows the centre only: what lies outside cannot be answered.
        if fit == "crop":
            picture = square(picture, min(picture.shape[:2]), "crop")
        return picture

    def _read_group(self, number: int) -> list[PairRow]:
        filesystem, inner = storage.resolve(self.path)
        with pq.ParquetFile(inner, filesystem=filesystem) as file:
            return row_dicts(file.read_row_group(number))


def require_pairs(manifest: str, wanted: pa.Table) -> str | None:
    """Check that a manifest has the pairs of ``wanted`` (pair_id, task), and return its root.

    Raises:
        ManifestError: The manifest cannot be used.
        DatasetError: It lacks some of the pairs.
    """
    info = check_manifest(manifest)
    missing = np.setdiff1d(wanted["pair_id"].to_numpy(), info.pair_ids)
    if len(missing):
        raise DatasetError(
            f"{manifest}: lacks {len(missing)} of the {len(wanted)} pairs to evaluate, pair {missing[0]} for one; "
            "give --manifest the one the dataset was built from"
        )
    return info.root


def write_pairs(path: str, manifest: str, root: str | None, wanted: pa.Table) -> None:
    """Write rows of a manifest for ``PairFile``.

    Args:
        path: The file to write.
        manifest: Where the rows are.
        root: The manifest's root.
        wanted: Table of (pair_id, task): which rows, in which order.
    """
    ids = wanted["pair_id"].combine_chunks()
    batches = []
    for batch in read_manifest(manifest, PAIR_SCHEMA.names):
        batches.append(batch.filter(pc.is_in(batch.column("pair_id"), value_set=ids)))
    table = pa.Table.from_batches(batches)
    # Rows come in the manifest's order; the file has that of ``wanted``.
    order = pc.index_in(wanted["pair_id"], value_set=table["pair_id"].combine_chunks())
    metadata = {_ROOT_KEY: json.dumps(root)}
    buffer = pa.BufferOutputStream()
    pq.write_table(table.take(order).replace_schema_metadata(metadata), buffer, row_group_size=_ROWS_AT_ONCE)
    storage.write_bytes(path, buffer.getvalue().to_pybytes())


def choose_pairs(
    dataset: ChainDataset, tasks: Sequence[str] | None, split: str, count: int | None, seed: int, option: str
) -> pa.Table:
    """Choose good pairs of a split, by the seed and the pair alone, so that fewer are some of the more.

    Args:
        dataset: Whose pairs.
        tasks: Only of these; None: all.
        split: Only of this.
        count: At most so many of a task; None: all.
        seed: By which they are chosen.
        option: What the error tells the user to set.

    Returns:
        Table of (pair_id, task), sorted by task and pair.

    Raises:
        DatasetError: The split, or one of ``tasks``, has no good pair.
    """
    table = dataset.table(["pair_id", "task"], tasks, split)
    present = set(table["task"].to_pylist())
    absent = [task for task in tasks or () if task not in present]
    if not len(table) or absent:
        # The splits that there are tell the user what to set.
        splits = sorted(set(dataset.table(["split"], tasks)["split"].drop_null().to_pylist()))
        missing = "no good pairs"
        if absent:
            missing = f"no good pairs of {', '.join(absent)}"
        raise DatasetError(
            f"{dataset.path}: {missing} in split {split}, only in {', '.join(splits) or 'none'}; set {option}"
        )
    # The order within a task depends on the seed and the pair alone: asking for fewer takes some of the more.
    rows = table.to_pylist()
    shuffled = sorted(rows, key=lambda row: (row["task"], seed_of(seed, row["pair_id"])))
    taken: dict[str, int] = {}
    chosen = []
    for row in shuffled:
        taken[row["task"]] = taken.get(row["task"], 0) + 1
        if count is None or taken[row["task"]] <= count:
            chosen.append(row)
    chosen.sort(key=lambda row: (row["task"], row["pair_id"]))
    return pa.Table.from_pylist(chosen, table.schema)
