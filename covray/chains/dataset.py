"""A dataset of chains: its folder, its versions, and how its shards are read (a row: ``shard_rows.py``).

A dataset folder holds ``_dataset.json`` (written first), ``shards/task=<task>/*.parquet`` and ``_audit.json`` (written
last).

``covray build --append`` adds versions: the rows that version n has beyond the one before it are below
``shards/version=<n>/``. So a version is all shards up to its own, and an older one stays as it was.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from covray.chains.records import Audit, DatasetRecord, TaskCounts
from covray.chains.shard_rows import ShardRow, alphas_of, python_rows, shard_schema, union_alphas
from covray.config.section import JsonObject
from covray.errors import DatasetError, one_line
from covray.io.storage import Folder

_UNREADABLE = (OSError, pa.ArrowInvalid)  # an incomplete file has no footer, a damaged one a wrong footer
_ROWS_AT_ONCE = 1024  # rows of 256 tokens and a dozen frames: some 7 MB


class ChainDataset:
    """A dataset of chains, to read."""

    def __init__(self, path: str, *, unfinished: bool = False, version: int | None = None):
        """Open a dataset.

        Args:
            path: The dataset folder, local or on any filesystem pyarrow knows. ``FOLDER@2`` is its version 2.
            unfinished: Also open a dataset that is still being built, or whose build was stopped: shards that cannot be
                read are then left out, and listed in ``unreadable``.
            version: Which version, counted from 1; None: the one that ``path`` names, else the newest finished one.

        Raises:
            DatasetError: The dataset is absent, unfinished or without this version, or its description cannot be
                used.
        """
        path, named = split_version(path)
        self.path = path
        self.folder = Folder(path)
        record = DatasetRecord.read_if_present(self.folder)
        if record is None:
            raise DatasetError(f"{path}: no _dataset.json there, so not a dataset; give the --out of a covray build")
        audit = Audit.read_if_present(self.folder)
        # An audit exists as soon as the first version is finished, so that version 0 is "none yet".
        finished = 0
        if audit is not None:
            finished = audit.version
        # Compared with None: the 0 of ``FOLDER@0`` is a version that there is not, and must be refused as one.
        if version is None:
            version = named
        self.version = max(finished, 1) if version is None else version
        """The version that is read."""
        if not 1 <= self.version <= len(record.pair_sets):
            raise DatasetError(f"{path}: has {len(record.pair_sets)} versions, no version {self.version}")
        if self.version > finished and not unfinished:
            raise DatasetError(f"{path}: is unfinished; run the same covray build again")
        self.record = record.of_version(self.version)
        """The description of the version."""
        self._versions_audit = audit
        self.audit: Audit | None = None
        """What the finished build wrote; None while it is unfinished."""
        if audit is not None and self.version <= finished:
            self.audit = audit.of_version(self.version)
        self.versions = max(finished, 1)
        """How many versions are finished; 1 also while the first is not."""
        self.unreadable: list[str] = []
        """Shards, relative to ``path``, that reading an unfinished dataset left out."""

    @property
    def config(self) -> dict[str, Any]:
        """Return the resolved BuildConfig, as JSON values."""
        return self.record.config

    @property
    def identity(self) -> JsonObject:
        """Return the part of the configuration that decides the tokens."""
        return self.record.identity

    @property
    def fingerprints(self) -> dict[str, str]:
        """Return the SHA-256 (hex) of ``prior``, ``tokenizer`` and ``codebook``."""
        return self.record.fingerprints

    @property
    def tokens_per_image(self) -> int:
        """Return the tokens of one picture."""
        return self.record.tokens_per_image

    @property
    def methods(self) -> tuple[str, ...]:
        """Return the methods that frames were built by."""
        return tuple(sorted(self.config["methods"]))

    @property
    def alphas(self) -> tuple[float, ...]:
        """Return the alphas (float32) that frames were built at."""
        return union_alphas(self.config["lengths"], self.config["alphas"])

    @property
    def shards(self) -> list[str]:
        """Return the Parquet files of the version, relative to ``path``."""
        return shard_files(self.folder, self.version)

    @property
    def reference(self) -> str:
        """Return the path that opens this version whatever is appended later."""
        return f"{self.path}@{self.version}"

    def count(self, *, errors: bool = False) -> int:
        """Return how many rows are good, or with ``errors`` how many there are; a finished dataset's audit knows."""
        if self.audit is not None and errors:
            return self.audit.written + self.audit.rejected
        if self.audit is not None:
            return self.audit.written
        # Without an audit the ids of all rows are read.
        rows = 0
        for batch in self._batches(["pair_id"], None, None, errors):
            rows += len(batch)
        return rows

    def rows(
        self,
        columns: Sequence[str] | None = None,
        tasks: Iterable[str] | None = None,
        split: str | None = None,
        *,
        errors: bool = False,
    ) -> Iterator[ShardRow]:
        """Yield the rows in the order of the files, with tokens as uint16 arrays; memory is that of a thousand rows.

        Args:
            columns: Only these columns; None: all.
            tasks: Only rows of these tasks.
            split: Only rows of this split.
            errors: Also rejected rows.

        Raises:
            DatasetError: A shard cannot be read.
        """
        for batch in self._batches(columns, tasks, split, errors):
            yield from python_rows(batch)

    def table(
        self,
        columns: Sequence[str] | None = None,
        tasks: Iterable[str] | None = None,
        split: str | None = None,
        *,
        errors: bool = False,
    ) -> pa.Table:
        """Return what ``rows`` yields as one Arrow table in memory, with the columns of ``shard_schema``."""
        batches = list(self._batches(columns, tasks, split, errors))
        schema = self._schema()
        columns = list(columns or schema.names)
        return pa.Table.from_batches(batches, pa.schema(map(schema.field, columns)))

    def added(self, version: int, columns: Sequence[str], split: str | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the good rows that one version of a finished dataset added, file by file.

        Args:
            version: The version, up to that of this reader.
            columns: Columns of ``shard_schema``.
            split: Only rows of this split.

        Raises:
            DatasetError: A shard cannot be read, is lost or was copied.
        """
        yield from self._batches(columns, None, split, False, version)

    def shard_batches(self, shard: str, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the rows of one shard, rejected ones too.

        Args:
            shard: One of ``shards``.
            columns: Only these columns; None: all.

        Raises:
            DatasetError: A shard of a finished dataset cannot be read. Of an unfinished one nothing is yielded then,
                and ``unreadable`` lists it.
        """
        schema = self._schema()
        narrow = pa.schema(map(schema.field, columns or schema.names))
        yield from self._file_batches(shard, task_of(shard), narrow)

    def chain(self, row: ShardRow, length: int, method: str) -> np.ndarray:
        """Return the chain of a row of ``rows``, from the source to the label.

        Args:
            row: A row with all its columns.
            length: Pictures of the chain, both ends counted.
            method: How its frames were made; ``none``, like the length 2, gives source and label alone.

        Returns:
            uint16 [length, tokens_per_image].

        Raises:
            DatasetError: The dataset lacks the method or an alpha, or the row is a rejected pair.
        """
        if row.get("error") is not None:
            raise DatasetError(f"{self.path}: pair {row.get('pair_id')} was rejected ({row['error']}); it has no chain")
        # Checked here, as shorter lengths need no alpha either and would pass for a chain of two.
        if length < 2:
            raise DatasetError(
                f"{self.path}: a chain of {length} cannot be; ask for 2 pictures or more, both ends counted"
            )
        # Both ends are in every row; such a chain needs no frames.
        if method == "none" or length == 2:
            return np.stack([row["source"], row["label"]])
        if method not in self.methods:
            raise DatasetError(
                f"{self.path}: has no frames by {method}, only by {', '.join(self.methods) or 'none'}; "
                f"build with --method {','.join((*self.methods, method))}"
            )
        by_alpha = {}
        for frame in row["frames"]:
            if frame["method"] == method:
                by_alpha[frame["alpha"]] = frame["tokens"]
        pictures, missing = [row["source"]], []
        # Compared exactly: both sides are the float32 values of the same fractions.
        for alpha in alphas_of(length):
            if alpha in by_alpha:
                pictures.append(by_alpha[alpha])
            else:
                missing.append(alpha)
        if missing:
            lengths = ",".join(map(str, sorted({*self.config["lengths"], length})))
            raise DatasetError(
                f"{self.path}: a chain of {length} needs alpha {_rounded(missing)}, "
                f"the dataset has {_rounded(by_alpha)}; build with --length {lengths}"
            )
        return np.stack([*pictures, row["label"]])

    def _batches(
        self,
        columns: Sequence[str] | None,
        tasks: Iterable[str] | None,
        split: str | None,
        errors: bool,
        version: int | None = None,
    ) -> Iterator[pa.RecordBatch]:
        schema = self._schema()
        wanted = list(columns or schema.names)
        for name in wanted:
            if name not in schema.names:
                raise DatasetError(f"{self.path}: has no column {name}, only {', '.join(schema.names)}")
        # The filters' columns are read beside the wanted ones, and dropped again.
        to_read = [*wanted]
        if not errors and "error" not in to_read:
            to_read.append("error")
        if split is not None and "split" not in to_read:
            to_read.append("split")
        narrow = pa.schema(map(schema.field, to_read))
        chosen = None if tasks is None else set(tasks)

        stored: Counter[str] = Counter()
        for batch in _joined(self._read_shards(narrow, chosen, version, stored)):
            selected = batch
            # A filter copies the batch, so that it is skipped where it would select all rows.
            if not errors and batch.column("error").null_count < len(batch):
                selected = selected.filter(pc.is_null(selected.column("error")))
            if split is not None:
                in_split = pc.fill_null(pc.equal(selected.column("split"), split), False)
                if in_split.true_count < len(selected):
                    selected = selected.filter(in_split)
            if len(selected):
                yield selected.select(wanted)
        # Checked behind the last row: only then are all shards counted.
        if self.audit is not None:
            self._require_audited(stored, chosen, self._built(version))

    def _read_shards(
        self, schema: pa.Schema, tasks: set[str] | None, version: int | None, stored: Counter[str]
    ) -> Iterator[pa.RecordBatch]:
        """Yield the rows of shards, rejected ones too, file by file.

        Args:
            schema: Their columns.
            tasks: Only shards of these; None: all.
            version: Only shards that this version added; None: all.
            stored: Is given how many rows of each task were read.
        """
        for name in self.shards:
            task = task_of(name)
            if (tasks is not None and task not in tasks) or version not in (None, version_of(name)):
                continue
            for batch in self._file_batches(name, task, schema):
                stored[task] += len(batch)
                yield batch

    def _built(self, version: int | None) -> dict[str, int]:
        """Return the rows of each task that were written, or that ``version`` added to those before it."""
        assert self.audit is not None
        if version is None:
            return _asked_by_task(self.audit.per_task)
        assert self._versions_audit is not None
        built = _asked_by_task(self._versions_audit.of_version(version).per_task)
        # An audit counts all rows up to its version: what this one added is the difference.
        if version > 1:
            before = _asked_by_task(self._versions_audit.of_version(version - 1).per_task)
            for task, rows in before.items():
                built[task] -= rows
        return built

    def _require_audited(self, stored: Mapping[str, int], tasks: set[str] | None, expected: Mapping[str, int]) -> None:
        """Refuse a finished dataset whose shards hold other numbers of rows, by task, than its build wrote."""
        for task, built in expected.items():
            if (tasks is None or task in tasks) and stored.get(task, 0) != built:
                raise DatasetError(
                    f"{self.path}: holds {stored.get(task, 0)} rows of {task}, its build wrote {built}; restore the "
                    "shards (one was lost, or copied), or delete _audit.json and run the same covray build again"
                )

    def _file_batches(self, name: str, task: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """Yield the rows of one shard with the columns of ``schema``."""
        # A partitioned writer leaves the task out of the files: the folder says it.
        stored = list(schema.names)
        if "task" in stored:
            stored.remove("task")
        path, filesystem = self.folder.inner_path(name), self.folder.filesystem
        # Requests are joined where each takes a round trip; on a disk that costs more than a small shard's tokens.
        is_remote = not isinstance(filesystem, fs.LocalFileSystem)
        try:
            with pq.ParquetFile(path, filesystem=filesystem, pre_buffer=is_remote) as file:
                # To hand the columns of a small shard to threads costs more than to decode them.
                is_large = file.metadata.num_rows > _ROWS_AT_ONCE
                for batch in file.iter_batches(_ROWS_AT_ONCE, columns=stored, use_threads=is_large or is_remote):
                    absent = set(stored) - set(batch.schema.names)
                    if absent:
                        raise DatasetError(f"{self.path}/{name}: lacks column {min(absent)}; build the dataset again")
                    columns = []
                    # Built in the order of the schema; a file may have its columns in another order and with wider
                    # types.
                    for field in schema:
                        if field.name == "task":
                            columns.append(pa.array([task] * len(batch), pa.string()))
                            continue
                        column = batch.column(field.name)
                        if column.type != field.type:
                            column = column.cast(field.type)
                        columns.append(column)
                    yield pa.RecordBatch.from_arrays(columns, schema=schema)
        except _UNREADABLE as error:
            # A finished dataset has no shard that may be incomplete. In an unfinished one a writer may still be at
            # it.
            if self.audit is not None:
                raise DatasetError(
                    f"{self.path}/{name}: cannot be read ({one_line(error)}); try again, and where it is damaged "
                    "delete it and _audit.json, and run the same covray build again: it makes what is missing"
                ) from error
            if name not in self.unreadable:
                self.unreadable.append(name)

    def _schema(self) -> pa.Schema:
        return shard_schema(keep_noise=bool(self.config.get("keep_noise", False)))


def _asked_by_task(per_task: Mapping[str, TaskCounts]) -> dict[str, int]:
    """Return the rows of each task, good and rejected ones, by an audit."""
    return {task: counts.asked for task, counts in per_task.items()}


def _joined(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield the same rows with the batches of small shards joined: each batch has a fixed cost."""
    group: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        if rows + len(batch) > _ROWS_AT_ONCE and group:
            yield pa.concat_batches(group)
            group, rows = [], 0
        group.append(batch)
        rows += len(batch)
    if group:
        yield pa.concat_batches(group)


def shard_files(folder: Folder, version: int) -> list[str]:
    """Return the Parquet files of a version, relative to the dataset folder, sorted; not those a writer left aside."""
    names = []
    for name in (folder / "shards").list_files(".parquet"):
        shard = f"shards/{name}"
        # Writers of Parquet leave names with "." or "_" for what is not part of the data.
        if not name.rsplit("/", 1)[-1].startswith((".", "_")) and version_of(shard) <= version:
            names.append(shard)
    return names


def shard_folder(version: int) -> str:
    """Return the folder, relative to the dataset's, of the rows that a version adds."""
    return "shards" if version == 1 else f"shards/version={version}"


def version_of(shard: str) -> int:
    """Return the version that added a shard, by its path."""
    match = re.match(r"shards/version=(\d+)/", shard)
    if match is None:
        return 1  # the first version has no folder of its own
    return int(match[1])


def split_version(path: str) -> tuple[str, int | None]:
    """Return the dataset folder and the version that ``FOLDER@2`` names; a folder of that very name is itself."""
    match = re.fullmatch(r"(.+)@(\d+)/?", path)
    if match is None or Folder(path).exists(DatasetRecord.FILE):
        return path, None
    return match[1], int(match[2])


def task_of(shard: str) -> str:
    """Return the task that a shard's path names (``shards/task=<task>/...``). Raises DatasetError for none."""
    # A path has at most one such part; version=<n> may stand before it.
    for part in shard.split("/"):
        if part.startswith("task="):
            return part.removeprefix("task=")
    raise DatasetError(f"{shard}: is not below a folder task=...; it is no shard of this dataset, move it away")


def _rounded(alphas: Iterable[float]) -> str:
    return ", ".join(f"{alpha:.4g}" for alpha in sorted(alphas)) or "none"
