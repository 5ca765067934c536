"""``covray pairs --actors``: pairs made by a pool of actors, exactly once, in the order and bytes of one process.

    items -> repartition -> PairActor (actor pool) -> Parquet parts -> the manifest, in the items' order

The parts lie in a hidden folder beside the manifest until the manifest is whole. Killed anywhere, the same command
continues there.
"""

from __future__ import annotations

import contextlib
import json
import posixpath
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from covray.config import ActorsConfig, EngineConfig
from covray.distributed.pool import (
    CHECKPOINT,
    Pool,
    PoolActor,
    RowsIn,
    RowsOut,
    choose_rows_per_block,
    gpus_of,
    like_an_actor,
    most_actors,
    one_line_errors,
    parquet_bytes,
    pool_of,
    run_pool,
)
from covray.distributed.progress import start_progress_actor
from covray.distributed.resumable import Output
from covray.distributed.session import ray_session
from covray.errors import ManifestError, one_line
from covray.io.storage import Folder, absolute
from covray.pairs.manifest import MANIFEST_SCHEMA, Pair, manifest_row, pair_of_row
from covray.pairs.records import PairsRecord
from covray.pairs.rows import PairRow
from covray.pairs.words import WORD_FIELDS
from covray.pairs.work import Item, PairWork
from covray.progress import stage

ITEMS = "_items.parquet"
PARTS = "parts"
_ITEM = "item"
"""The column with an item's place in the work."""
_PARTITION = "of"
_ROW = pa.struct([*MANIFEST_SCHEMA, *WORD_FIELDS])
PART_SCHEMA = pa.schema([(_ITEM, pa.int64()), (_PARTITION, pa.string()), ("pairs", pa.list_(_ROW))])
_ITEMS_PER_CHUNK = 1024
"""Items that travel to an actor together, as one object of Ray's store."""


@contextmanager
def pairs_on_ray(work: PairWork, out: str, actors: int | None) -> Iterator[Iterator[Pair]]:
    """Make the pairs of ``work`` on a pool of actors, then give them in order for the length of the block.

    Args:
        work: The pairs to be made.
        out: The manifest that the block writes them to. What the actors have made lies beside it, and is deleted when
            the block ends well.
        actors: The most actors; None for as many as fit.

    Raises:
        ManifestError: Other work was begun for this manifest.
        DatasetError: Another command makes it, or a worker failed.
    """
    folder = Folder(parts_folder(absolute(out)))
    with Output(folder.path, PairsRecord, "covray pairs") as output:
        settings = json.loads(json.dumps(dict(work.settings)))  # as the file gives them back: lists for tuples
        record = PairsRecord(settings=settings, items=len(work.items), names_sha256=work.names_sha256())
        if output.begun is None:
            record.write(folder)
        else:
            _require_same_work(output, record)
        # Parts without items or checkpoint are of a command that was killed while it deleted them.
        if not folder.exists(ITEMS) or not (folder / CHECKPOINT).list_files():
            _delete(folder / CHECKPOINT)
            _delete(folder / PARTS)
        with ray_session() as cores:
            _make(work, folder, ActorsConfig(max=actors), cores)
        yield ordered_pairs(folder, len(work.items))
        # The list of items goes first: without it nobody continues from half a checkpoint. The description goes last:
        # until then the folder is known as ours, wherever this is killed. All of it goes while the folder is locked:
        # the next command may begin here at once.
        folder.delete_file(ITEMS)
        _delete(folder / CHECKPOINT)
        _delete(folder / PARTS)
        folder.delete_file(PairsRecord.FILE)
    folder.delete_if_empty()


def parts_folder(out: str) -> str:
    """Return the hidden folder beside the manifest ``out``; readers of a folder of manifests pass over it."""
    place, name = posixpath.split(out)
    return posixpath.join(place, f".{name}.parts")


def _delete(folder: Folder) -> None:
    with contextlib.suppress(FileNotFoundError):
        folder.delete()


def _require_same_work(output: Output[PairsRecord], record: PairsRecord) -> None:
    begun = output.begun
    assert begun is not None
    output.require_same(begun.settings, record.settings)
    if (begun.items, begun.names_sha256) != (record.items, record.names_sha256):
        raise ManifestError(
            f"{output.folder.path}: was begun with {begun.items} other items, there are {record.items} now; bring back "
            "those, or delete this folder to begin anew"
        )


def _make(work: PairWork, folder: Folder, actors: ActorsConfig, cores: int) -> None:
    """Make all pairs that earlier commands have not made."""
    engine = EngineConfig(device="cpu")
    if work.uses_gpu:
        engine = EngineConfig(device="auto")
    gpus = gpus_of(actors, engine)
    most = most_actors(actors, engine, cores, gpus)
    rows = min(choose_rows_per_block(None, len(work.items), most, 1), work.items_per_block)
    with one_line_errors(folder.path, "making of pairs"):
        if work.loads_model:
            _load_once(work.load, gpus)
    _write_items(folder, len(work.items))
    chunks = []
    for start in range(0, len(work.items), _ITEMS_PER_CHUNK):
        chunks.append(ray.put(list(work.items[start : start + _ITEMS_PER_CHUNK])))

    rows_in = RowsIn(folder.filesystem, [folder.inner_path(ITEMS)], [_ITEM], _ITEM, len(work.items), work.unit)
    rows_out = RowsOut(folder, PARTS, PART_SCHEMA, partition=_PARTITION)
    pool = Pool(PairActor, {"load": work.load, "chunks": chunks}, pool_of(actors, engine, cores, gpus), rows)
    with one_line_errors(folder.path, "making of pairs"):
        run_pool(pool, rows_in, rows_out, start_progress_actor())


def _load_once(load: Callable[[], Any], gpus: float) -> None:
    """Load what makes pairs where an actor will, so that what is wrong with it is one line before the pool starts."""

    def loads() -> None:
        load()

    check = ray.remote(**like_an_actor(gpus, None))(loads)
    with stage("loading the model, to check it"):
        ray.get(check.remote())


def _write_items(folder: Folder, items: int) -> None:
    folder.write_bytes(ITEMS, parquet_bytes(pa.table({_ITEM: np.arange(items, dtype=np.int64)})))


class PairActor(PoolActor):
    """One worker of the pool: makes the pairs of blocks of items."""

    def __init__(self, load: Callable[[], Any], chunks: list[Any], progress: Any):
        """Load what makes the pairs; ``chunks`` are references to the items."""
        self.make = load()
        self.chunks = chunks
        self._held: tuple[int, list[Item]] = (-1, [])  # the chunk that was used last
        super().__init__(progress)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Return the parts' rows of a block of items."""
        started = time.time()
        numbers = block[_ITEM].to_pylist()
        rows, rejected = [], 0
        items = [self._item(number) for number in numbers]
        for number, pairs in zip(numbers, self.make(items), strict=True):
            manifest_rows = []
            for pair in pairs:
                rejected += "error" in pair.meta
                manifest_rows.append(manifest_row(pair, True))
            rows.append({_ITEM: number, _PARTITION: "pairs", "pairs": manifest_rows})
        self.report(started, len(rows), rejected)
        return pa.Table.from_pylist(rows, PART_SCHEMA)

    def _item(self, number: int) -> Item:
        chunk = number // _ITEMS_PER_CHUNK
        if self._held[0] != chunk:
            self._held = (chunk, ray.get(self.chunks[chunk]))
        return self._held[1][number % _ITEMS_PER_CHUNK]


# --- from the parts to the manifest ---------------------------------------------------------------------------------


def ordered_pairs(folder: Folder, items: int) -> Iterator[Pair]:
    """Yield the pairs of all parts in the items' order.

    A part mostly holds neighbours, so that few parts are in memory at a time.

    Raises:
        ManifestError: A part cannot be read, or an item is missing or made twice.
    """
    places = _places(folder, items)
    reader = _PartReader(folder)
    for number, part in enumerate(places):
        for row in reader.take(part, number):
            yield pair_of_row(row)


def _places(folder: Folder, items: int) -> list[str]:
    """Return the part that holds each item."""
    places: list[str] = [""] * items
    for name in (folder / PARTS).list_files(".parquet"):
        for number in _read_part(folder, name, [_ITEM])[_ITEM].to_pylist():
            if not 0 <= number < items or places[number]:
                raise ManifestError(f"{folder.path}: item {number} was made twice; {PairsRecord.FIX}")
            places[number] = name
    missing = places.count("")
    if missing:
        raise ManifestError(f"{folder.path}: {missing} items were not made; {PairsRecord.FIX}")
    return places


class _PartReader:
    """Reads parts, and forgets each when its last item was taken."""

    def __init__(self, folder: Folder):
        self._folder = folder
        self._open: dict[str, dict[int, list[PairRow]]] = {}

    def take(self, part: str, number: int) -> list[PairRow]:
        """Return the rows of item ``number``, which ``part`` holds."""
        if part not in self._open:
            rows = _read_part(self._folder, part, [_ITEM, "pairs"]).to_pylist()
            self._open[part] = {row[_ITEM]: row["pairs"] for row in rows}
        held = self._open[part]
        taken = held.pop(number)
        if not held:
            del self._open[part]
        return taken


def _read_part(folder: Folder, name: str, columns: list[str]) -> pa.Table:
    try:
        path = (folder / PARTS).inner_path(name)
        return pq.ParquetFile(path, filesystem=folder.filesystem).read(columns)
    except (OSError, pa.ArrowException) as error:
        part = folder.join(PARTS, name)
        raise ManifestError(f"{part}: cannot be read ({one_line(error)}); {PairsRecord.FIX}") from error
