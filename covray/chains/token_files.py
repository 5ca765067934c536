"""Token files: the tokens of a dataset beside its shards, in a form that trainings map into memory.

Shards are compressed and hold what people ask for; a training needs the tokens alone, at random. So the first training
on a dataset writes them once as Arrow IPC files, one for the rows of each version, and every worker maps them: what is
not looked at takes no memory. ::

    _tokens/1-<key>.arrow   pair_id, task, split, quality, tokens: fixed_size_list<uint16>[pictures x tokens]

The pictures of a row are source, frames (by method, then by alpha) and label. The key follows from the names and sizes
of the shards, so that a file of other shards is never read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs

from covray.chains.dataset import ChainDataset, version_of
from covray.chains.loading import flat_tokens
from covray.chains.shard_rows import frame_order, shard_schema

FOLDER = "_tokens"
_TOKENS_OF_A_BATCH = 2**25
"""Tokens of a record batch: 64 MiB, which is what writing takes."""


def token_batches(dataset: ChainDataset, pictures: NDArray[np.int64], split: str) -> list[pa.RecordBatch]:
    """Return the good rows of a dataset: mapped, where its token files are or can be written, else read into memory.

    Args:
        dataset: The dataset.
        pictures: Which pictures of a row are needed, ascending.
        split: The split that is needed.

    Returns:
        Batches with the columns of a token file. Mapped ones have all pictures and all splits, those in memory only
        what is needed.

    Raises:
        DatasetError: A shard cannot be used.
    """
    batches: list[pa.RecordBatch] = []
    # A file a version: what is appended later leaves the files before it as they are.
    for version in range(1, dataset.version + 1):
        path = token_file(dataset, version)
        if path is None:
            batches += _grouped(dataset, _rows(dataset, version, pictures, split), len(pictures))
        else:
            # Mapped: what is not looked at takes no memory.
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            batches += map(reader.get_batch, range(reader.num_record_batches))
    return batches


def tokens_of(batch: pa.RecordBatch, tokens_per_image: int) -> NDArray[np.uint16]:
    """Return the tokens of a batch without a copy, uint16 [rows, pictures, tokens of a picture]."""
    tokens: NDArray[np.uint16] = batch.column("tokens").flatten().to_numpy()
    return tokens.reshape(len(batch), -1, tokens_per_image)


def picture_count(dataset: ChainDataset) -> int:
    """Return the pictures of a row: source, frames and label."""
    return len(frame_order(dataset.methods, dataset.alphas)) + 2


def token_file(dataset: ChainDataset, version: int) -> Path | None:
    """Return the token file of a version's own rows, which is written now where it is absent.

    Returns:
        The file; None where the dataset is not on a local disk, or the disk is full or read-only.

    Raises:
        DatasetError: A shard cannot be used.
    """
    if not isinstance(dataset.folder.filesystem, fs.LocalFileSystem):
        return None
    folder = Path(dataset.folder.inner_path(FOLDER))
    path = folder / f"{version}-{_key(dataset, version)}.arrow"
    if path.exists():
        return path
    # Written aside and renamed: a reader never sees half a file, and two writers write the same rows.
    aside = folder / f".{path.name}.{os.getpid()}.part"
    try:
        folder.mkdir(exist_ok=True)
        with open(aside, "wb") as file:
            _write(dataset, version, file)
        os.replace(aside, path)
    # A training works without the file, from memory.
    except OSError:
        return None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()
    for stale in folder.glob(f"{version}-*.arrow"):
        if stale != path:  # of shards that were lost and built again
            stale.unlink(missing_ok=True)
    return path


def _key(dataset: ChainDataset, version: int) -> str:
    # Sizes beside names: a shard that was lost and built again has its old name.
    shards = _shards(dataset, version)
    shard_paths = list(map(dataset.folder.inner_path, shards))
    infos = dataset.folder.filesystem.get_file_info(shard_paths)
    sizes = [[shard, info.size] for shard, info in zip(shards, infos, strict=True)]
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]


def _shards(dataset: ChainDataset, version: int) -> list[str]:
    """Return the shards that a version added."""
    return [shard for shard in dataset.shards if version_of(shard) == version]


def _write(dataset: ChainDataset, version: int, file: IO[bytes]) -> None:
    """Write the rows of a version to an open file, one batch at a time."""
    pictures = np.arange(picture_count(dataset))
    with pa.ipc.new_file(file, _schema(dataset, len(pictures))) as writer:
        for batch in _grouped(dataset, _rows(dataset, version, pictures, None), len(pictures)):
            writer.write_batch(batch)


def _schema(dataset: ChainDataset, pictures: int) -> pa.Schema:
    tokens = pa.list_(pa.uint16(), pictures * dataset.tokens_per_image)
    quality = shard_schema(keep_noise=False).field("quality")
    return pa.schema(
        [("pair_id", pa.int64()), ("task", pa.string()), ("split", pa.string()), quality, ("tokens", tokens)]
    )


def _grouped(dataset: ChainDataset, batches: Iterable[pa.RecordBatch], pictures: int) -> Iterator[pa.RecordBatch]:
    """Join the small batches of small shards, since every batch costs a training memory and time."""
    rows = max(1, _TOKENS_OF_A_BATCH // (pictures * dataset.tokens_per_image))
    group: list[pa.RecordBatch] = []
    rows_in_group = 0
    for batch in batches:
        group.append(batch)
        rows_in_group += len(batch)
        if rows_in_group >= rows:
            yield pa.concat_batches(group)
            group, rows_in_group = [], 0
    if group:
        yield pa.concat_batches(group)


def _rows(
    dataset: ChainDataset, version: int, pictures: NDArray[np.int64], split: str | None
) -> Iterator[pa.RecordBatch]:
    """Yield the good rows that a version added, with ``pictures`` of each; of one split, or of all."""
    frames = picture_count(dataset) - 2
    # A row's list of frames begins behind its source.
    inner = pictures[1:-1] - 1
    columns = ["pair_id", "task", "split", "quality", "source", "label"]
    if len(inner):
        columns.append("frames")
    schema = _schema(dataset, len(pictures))
    for batch in dataset.added(version, columns, split):
        # [rows, pictures, tokens of a picture], in the order of a stored row.
        tokens = np.empty((len(batch), len(pictures), dataset.tokens_per_image), np.uint16)
        tokens[:, 0] = flat_tokens(dataset, batch.column("source"), (len(batch),))
        tokens[:, -1] = flat_tokens(dataset, batch.column("label"), (len(batch),))
        if len(inner):
            of_frames = batch.column("frames").flatten().field("tokens")
            tokens[:, 1:-1] = flat_tokens(dataset, of_frames, (len(batch), frames))[:, inner]
        flat = pa.array(tokens.reshape(-1))
        values = list(map(batch.column, schema.names[:-1]))
        values.append(pa.FixedSizeListArray.from_arrays(flat, type=schema.field("tokens").type))
        yield pa.RecordBatch.from_arrays(values, schema=schema)
