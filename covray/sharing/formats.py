"""Chains in the formats of other loaders: Hugging Face ``datasets``, WebDataset and MosaicML's MDS.

Only good rows are written. A row has the same values in every format: ``pair_id``, ``task``, ``split``, the tokens of
all its pictures, uint16 [pictures, tokens of a picture], and which frame each picture between source and label is.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from covray.chains.dataset import ChainDataset
from covray.chains.shard_rows import ShardRow, frame_order, shard_schema
from covray.config.section import JsonObject
from covray.errors import ConfigError
from covray.io.model_folders import local_path
from covray.io.tensor_files import new_folder, require_new
from covray.progress import stage
from covray.sharing.cards import dataset_card
from covray.sharing.strips import chain_strips

Format = Literal["datasets", "webdataset", "mds"]
_ROWS_OF_A_FILE = 4096
"""Rows of one file: 2 KB a row and picture, so some tens of MB."""


class _Writer(Protocol):
    """Writes the rows of one split below a folder, some at a time."""

    def write(self, rows: list[ShardRow]) -> None:
        """Write a file of ``rows``."""

    def close(self) -> None:
        """Write what belongs to all files."""


def export_chains(path: str, out: str, form: str, licence: str | None = None) -> dict[str, int]:
    """Write the good rows of a dataset to the new folder ``out``, with a card.

    Args:
        path: The dataset folder of a finished build.
        out: The folder; it is complete in the end, or absent.
        form: The format.
        licence: For the card; None: the card says that none was stated.

    Returns:
        Rows by split.

    Raises:
        DatasetError: The dataset is unfinished or damaged.
        ConfigError: ``form`` is no format, or ``out`` cannot be used.
    """
    if form not in get_args(Format):
        raise ConfigError(f"--as {form}: is none of {', '.join(get_args(Format))}")
    if "://" in out:
        raise ConfigError(f"--out {out}: is not on this machine; export to a folder here, and copy it from there")
    target = local_path(out)
    # Refused before anything is written.
    require_new(target)
    dataset = ChainDataset(path)
    counts: dict[str, int] = {}
    with stage(f"writing {form} to {out}"), new_folder(target) as folder:
        writers: dict[str, _Writer] = {}
        # A writer a split, opened when its first rows come.
        for split, rows in _files(dataset):
            if split not in writers:
                writers[split] = _WRITERS[form](folder, split, dataset)
            writers[split].write(rows)
            counts[split] = counts.get(split, 0) + len(rows)
        for writer in writers.values():
            writer.close()
        strips = chain_strips(dataset)
        for name, picture in strips.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(picture)
        card = dataset_card(dataset, form, sorted(counts), licence, strips)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return counts


def _files(dataset: ChainDataset) -> Iterator[tuple[str, list[ShardRow]]]:
    """Yield the rows of every file with their split, in the order of the shards."""
    waiting: dict[str, list[ShardRow]] = {}
    for row in dataset.rows():
        # Rows without a split go into one that is named for all.
        split = file_name(row["split"] or "all")
        rows = waiting.setdefault(split, [])
        rows.append(row)
        if len(rows) == _ROWS_OF_A_FILE:
            yield split, rows
            waiting[split] = []
    for split, rows in waiting.items():
        if rows:
            yield split, rows


def file_name(split: str) -> str:
    """Return the name of a split as loaders take it: of letters, digits and ``_``."""
    return re.sub(r"\W", "_", split, flags=re.ASCII)


def sample_of(row: ShardRow, dataset: ChainDataset) -> tuple[JsonObject, np.ndarray]:
    """Return what a row says beside its tokens, and the tokens, uint16 [pictures, tokens of a picture]."""
    frames = row["frames"] or []
    about: JsonObject = {
        "pair_id": row["pair_id"],
        "task": row["task"],
        "split": row["split"],
        "frames": [[frame["method"], frame["alpha"]] for frame in frames],
    }
    about["quality"] = None if row["quality"] is None else dict(row["quality"])
    frame_tokens = [frame["tokens"] for frame in frames]
    tokens = np.stack([row["source"], *frame_tokens, row["label"]])
    return about, tokens.astype("<u2", copy=False)


class _DatasetsWriter:
    """Parquet files that ``datasets.load_dataset(FOLDER)`` reads; the card says which belong to which split."""

    def __init__(self, folder: Path, split: str, dataset: ChainDataset):
        self._folder, self._split, self._files = folder / "data", split, 0
        schema = shard_schema(keep_noise=False)
        self._schema = schema.remove(schema.get_field_index("error"))
        self._folder.mkdir(exist_ok=True)

    def write(self, rows: list[ShardRow]) -> None:
        table = pa.Table.from_pylist(rows, self._schema)
        pq.write_table(table, self._folder / f"{self._split}-{self._files:05}.parquet")
        self._files += 1

    def close(self) -> None:
        """Write nothing: every file is complete by itself."""


class _WebDatasetWriter:
    """Tars with two files a sample: ``<key>.json`` and ``<key>.tokens.npy``. The same rows make the same bytes."""

    def __init__(self, folder: Path, split: str, dataset: ChainDataset):
        self._folder, self._split, self._dataset, self._files = folder, split, dataset, 0

    def write(self, rows: list[ShardRow]) -> None:
        with tarfile.open(
            self._folder / f"{self._split}-{self._files:06}.tar", "w", format=tarfile.USTAR_FORMAT
        ) as tar:
            for row in rows:
                about, tokens = sample_of(row, self._dataset)
                key = f"{row['pair_id'] & (2**64 - 1):016x}"  # a dot or a minus would split or hide the name
                array = io.BytesIO()
                np.save(array, tokens)
                for ending, data in (("json", json.dumps(about).encode()), ("tokens.npy", array.getvalue())):
                    # A TarInfo has no user and no time by default: equal rows make equal bytes.
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        self._files += 1

    def close(self) -> None:
        """Write nothing: every file is complete by itself."""


class _MdsWriter:
    """MDS, version 2, of mosaicml-streaming: a folder a split with shards and ``index.json``.

    A shard is the number of samples and their offsets (uint32), the description of the columns as JSON, and the
    samples: the sizes (uint32) of the columns of no fixed size, then the columns, by name.
    """

    def __init__(self, folder: Path, split: str, dataset: ChainDataset):
        self._folder, self._dataset = folder / split, dataset
        self._folder.mkdir()
        pictures = len(frame_order(dataset.methods, dataset.alphas)) + 2
        shape = f"{pictures},{dataset.tokens_per_image}"
        encodings = {"about": ("json", None), "pair_id": ("int", 8), "task": ("str", None)}
        encodings["tokens"] = (f"ndarray:uint16:{shape}", 2 * pictures * dataset.tokens_per_image)
        self._columns: JsonObject = {
            "column_encodings": [encoding for encoding, _ in encodings.values()],
            "column_names": list(encodings),
            "column_sizes": [size for _, size in encodings.values()],
            "compression": None,
            "format": "mds",
            "hashes": [],
            "size_limit": None,
            "version": 2,
        }
        self._shards: list[JsonObject] = []

    def write(self, rows: list[ShardRow]) -> None:
        samples = list(map(self._sample, rows))
        description = json.dumps(self._columns, sort_keys=True).encode()
        # Offsets count from the start of the shard: behind the count (4 bytes), the offsets and the description.
        start = 4 + 4 * (len(samples) + 1) + len(description)
        offsets = start + np.cumsum([0, *map(len, samples)])
        data = np.uint32(len(samples)).tobytes() + offsets.astype("<u4").tobytes() + description + b"".join(samples)
        name = f"shard.{len(self._shards):05}.mds"
        (self._folder / name).write_bytes(data)
        raw: JsonObject = {"basename": name, "bytes": len(data), "hashes": {}}
        about: JsonObject = {"raw_data": raw, "samples": len(samples), "zip_data": None}
        self._shards.append(self._columns | about)

    def _sample(self, row: ShardRow) -> bytes:
        about, tokens = sample_of(row, self._dataset)
        text, task = json.dumps(about).encode(), row["task"].encode()
        sizes = np.array([len(text), len(task)], "<u4").tobytes()
        return sizes + text + np.int64(row["pair_id"]).tobytes() + task + tokens.tobytes()

    def close(self) -> None:
        index = {"version": 2, "shards": self._shards}
        (self._folder / "index.json").write_text(json.dumps(index, sort_keys=True), encoding="utf-8")


_WRITERS: dict[str, type[_DatasetsWriter] | type[_WebDatasetWriter] | type[_MdsWriter]] = {
    "datasets": _DatasetsWriter,
    "webdataset": _WebDatasetWriter,
    "mds": _MdsWriter,
}
