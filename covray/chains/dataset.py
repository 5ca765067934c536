"""Shards: the Parquet rows that hold chains as tokens, and how to read them.

A dataset folder holds ``_dataset.json`` (written first), ``shards/task=<task>/*.parquet`` and ``_audit.json`` (written
last). One row is one pair; its frames serve every method and every length that was built.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from covray.chains.records import Audit, DatasetRecord
from covray.errors import ConfigError, DatasetError, one_line
from covray.io import storage

QUALITY = ("source_noise_rms", "label_noise_rms", "source_psnr", "label_psnr", "diffusion_path", "linear_path")
"""Figures of a row: ``*_noise_rms`` is |z_T|/sqrt(d), expected 1; ``*_psnr`` the round trip of an end in dB, null where
it was not checked; ``*_path`` the way through the frames over the direct way, as RMS pixel distances (linear: 1)."""

_TOKENS = pa.list_(pa.uint16())
_UNREADABLE = (OSError, pa.ArrowInvalid)  # a torn file has no footer, a damaged one a footer that lies
_ROWS_AT_ONCE = 1024  # rows of 256 tokens and a dozen frames: some 7 MB


def shard_schema(keep_noise: bool) -> pa.Schema:
    """The schema of a shard; ``keep_noise`` adds the inverted noise of both ends (float32 little-endian bytes), and
    the BLAKE2b digests (16 bytes) of the pixels that were inverted."""
    frame = pa.struct([("method", pa.string()), ("alpha", pa.float32()), ("tokens", _TOKENS)])
    fields = [
        ("pair_id", pa.int64()),
        ("task", pa.string()),
        ("split", pa.string()),
        ("source", _TOKENS),
        ("label", _TOKENS),
        ("frames", pa.list_(frame)),
        ("quality", pa.struct([(name, pa.float32()) for name in QUALITY])),
        ("error", pa.string()),
    ]
    kept = [(f"{end}_{what}", pa.binary()) for what in ("noise", "pixels") for end in ("source", "label")]
    return pa.schema(fields + (kept if keep_noise else []))


def alphas_of(length: int) -> tuple[float, ...]:
    """The alphas k/(length-1), k = 1..length-2, of a chain of ``length`` pictures, rounded to float32 as stored."""
    return tuple(float(np.float32(k / (length - 1))) for k in range(1, length - 1))


def union_alphas(lengths: Iterable[int], alphas: Iterable[float] = ()) -> tuple[float, ...]:
    """All alphas that chains of ``lengths`` need, and ``alphas``: distinct as float32, ascending.

    Raises ConfigError for an alpha that float32 cannot tell from an end of the chain.
    """
    extra = {float(np.float32(alpha)) for alpha in alphas}
    if any(not 0.0 < alpha < 1.0 for alpha in extra):
        raise ConfigError("alphas: an alpha is not between 0 and 1 as float32; leave it out, the ends are always there")
    return tuple(sorted(extra.union(*(alphas_of(length) for length in lengths))))


def frame_order(methods: Iterable[str], alphas: Iterable[float]) -> list[tuple[str, float]]:
    """The (method, alpha) of a row's frames in their fixed order: by method, then by alpha."""
    ascending = sorted(alphas)
    return [(method, alpha) for method in sorted(methods) for alpha in ascending]


class ChainDataset:
    """A dataset of chains, to read.

    ``path`` is a dataset folder, local or on any filesystem pyarrow knows. ``unfinished=True`` also opens a dataset
    that is still being built, or whose build was stopped: shards that cannot be read are then left out and listed in
    ``unreadable``. Raises DatasetError when there is no dataset, it is unfinished, or it is of an unknown version.
    """

    def __init__(self, path: str, *, unfinished: bool = False):
        self.path = path
        record = DatasetRecord.read_if_present(path)
        if record is None:
            raise DatasetError(f"{path}: no _dataset.json there, so not a dataset; give the --out of a covray build")
        self.record = record
        """The description of the dataset."""
        self.audit = Audit.read_if_present(path)
        """What the finished build wrote; None while it is unfinished."""
        if self.audit is None and not unfinished:
            raise DatasetError(f"{path}: is unfinished; run the same covray build again")
        self.unreadable: list[str] = []
        """Shards, relative to ``path``, that reading an unfinished dataset left out."""

    @property
    def config(self) -> dict[str, Any]:
        """The resolved BuildConfig, as JSON values."""
        return self.record.config

    @property
    def identity(self) -> dict[str, Any]:
        """The part of the configuration that decides the tokens."""
        return self.record.identity

    @property
    def fingerprints(self) -> dict[str, str]:
        """SHA-256 (hex) of ``prior``, ``tokenizer`` and ``codebook``."""
        return self.record.fingerprints

    @property
    def tokens_per_image(self) -> int:
        """Tokens of one picture."""
        return self.record.tokens_per_image

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that frames were built by."""
        return tuple(sorted(self.config["methods"]))

    @property
    def alphas(self) -> tuple[float, ...]:
        """The alphas (float32) that frames were built at."""
        return union_alphas(self.config["lengths"], self.config["alphas"])

    @property
    def shards(self) -> list[str]:
        """The Parquet files, relative to ``path``."""
        return shard_files(self.path)

    def count(self, *, errors: bool = False) -> int:
        """Rows: the good ones, and with ``errors`` also the rejected ones. A finished dataset's audit knows."""
        if self.audit is not None:
            return self.audit.written + (self.audit.rejected if errors else 0)
        return sum(len(batch) for batch in self._batches(["pair_id"], None, None, errors))

    def rows(
        self,
        columns: Sequence[str] | None = None,
        tasks: Iterable[str] | None = None,
        split: str | None = None,
        *,
        errors: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """The rows one after another, in the order of the files; tokens as uint16 arrays.

        ``columns``: only these (all by default); ``tasks``, ``split``: only of these; ``errors``: also rejected rows.
        Streams: memory is that of a thousand rows. Raises DatasetError for a shard that cannot be read.
        """
        for batch in self._batches(columns, tasks, split, errors):
            values = {name: _python_values(batch.column(name)) for name in batch.schema.names}
            for index in range(len(batch)):
                yield {name: column[index] for name, column in values.items()}

    def table(
        self,
        columns: Sequence[str] | None = None,
        tasks: Iterable[str] | None = None,
        split: str | None = None,
        *,
        errors: bool = False,
    ) -> pa.Table:
        """Like ``rows``, as one Arrow table with the columns of ``shard_schema``; it is held in memory."""
        batches = list(self._batches(columns, tasks, split, errors))
        schema = self._schema()
        return pa.Table.from_batches(batches, pa.schema([schema.field(name) for name in columns or schema.names]))

    def chain(self, row: Mapping[str, Any], length: int, method: str) -> np.ndarray:
        """The chain of a row of ``rows``: uint16 ``[length, tokens_per_image]``, from the source to the label.

        The method ``none`` and the length 2 have no frames: they give source and label. Raises DatasetError when the
        dataset lacks the method or an alpha, or the row is a rejected pair.
        """
        if row.get("error") is not None:
            raise DatasetError(f"{self.path}: pair {row.get('pair_id')} was rejected ({row['error']}); it has no chain")
        if method == "none" or length == 2:
            return np.stack([row["source"], row["label"]])
        if method not in self.methods:
            raise DatasetError(
                f"{self.path}: has no frames by {method}, only by {', '.join(self.methods) or 'none'}; "
                f"build with --methods {','.join((*self.methods, method))}"
            )
        frames = {frame["alpha"]: frame["tokens"] for frame in row["frames"] if frame["method"] == method}
        wanted = alphas_of(length)
        missing = [alpha for alpha in wanted if alpha not in frames]
        if missing:
            lengths = ",".join(str(known) for known in sorted({*self.config["lengths"], length}))
            raise DatasetError(
                f"{self.path}: a chain of {length} needs alpha {_rounded(missing)}, "
                f"the dataset has {_rounded(frames)}; build with --lengths {lengths}"
            )
        return np.stack([row["source"], *(frames[alpha] for alpha in wanted), row["label"]])

    def _batches(
        self, columns: Sequence[str] | None, tasks: Iterable[str] | None, split: str | None, errors: bool
    ) -> Iterator[pa.RecordBatch]:
        schema = self._schema()
        unknown = [name for name in columns or () if name not in schema.names]
        if unknown:
            raise DatasetError(f"{self.path}: has no column {unknown[0]}, only {', '.join(schema.names)}")
        wanted = pa.schema([schema.field(name) for name in columns or schema.names])
        # The filters' columns are read beside the wanted ones, and dropped again.
        needed = [*dict.fromkeys([*wanted.names, *([] if errors else ["error"]), *(["split"] if split else [])])]
        chosen = None if tasks is None else set(tasks)
        for name in self.shards:
            task = task_of(name)
            if chosen is not None and task not in chosen:
                continue
            for batch in self._file_batches(name, task, pa.schema([schema.field(column) for column in needed])):
                kept = batch
                if not errors:
                    kept = kept.filter(pc.is_null(kept.column("error")))
                if split is not None:
                    kept = kept.filter(pc.fill_null(pc.equal(kept.column("split"), split), False))
                if len(kept):
                    yield kept.select(wanted.names)

    def _file_batches(self, name: str, task: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        filesystem, inner = storage.resolve(storage.join(self.path, name))
        try:
            with pq.ParquetFile(inner, filesystem=filesystem) as file:
                absent = set(schema.names) - set(file.schema_arrow.names) - {"task"}
                if absent:
                    raise DatasetError(f"{self.path}/{name}: lacks column {min(absent)}; build the dataset again")
                # A partitioned writer leaves the task out of the files: the folder says it.
                for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[c for c in schema.names if c != "task"]):
                    columns = [
                        pa.array([task] * len(batch), pa.string())
                        if field.name == "task"
                        else batch.column(field.name).cast(field.type)
                        for field in schema
                    ]
                    yield pa.RecordBatch.from_arrays(columns, schema=schema)
        except _UNREADABLE as error:
            if self.audit is not None:
                raise DatasetError(
                    f"{self.path}/{name}: cannot be read ({one_line(error)}); try again, and where it is damaged "
                    "delete it and _audit.json, and run the same covray build again: it makes what is missing"
                ) from error
            if name not in self.unreadable:
                self.unreadable.append(name)

    def _schema(self) -> pa.Schema:
        return shard_schema(keep_noise=bool(self.config.get("keep_noise", False)))


def shard_files(out: str) -> list[str]:
    """The Parquet files of the dataset folder ``out``, relative to it, sorted; not those a writer left aside."""
    names = [f"shards/{name}" for name in storage.list_files(storage.join(out, "shards"), ".parquet")]
    return [name for name in names if not name.rsplit("/", 1)[-1].startswith((".", "_"))]


def task_of(shard: str) -> str:
    """The task a shard's path names (``shards/task=<task>/...``). Raises DatasetError when it names none."""
    for part in shard.split("/"):
        if part.startswith("task="):
            return part.removeprefix("task=")
    raise DatasetError(f"{shard}: is not below a folder task=...; it is no shard of this dataset, move it away")


def _python_values(column: pa.Array) -> list[Any]:
    """The values of a column; lists of tokens as uint16 arrays, as nobody wants them as Python integers."""
    if column.type == _TOKENS:
        return _token_arrays(column)
    if pa.types.is_list(column.type):
        flat = column.flatten()
        tokens = _token_arrays(flat.field("tokens"))
        frames = [
            {"method": method, "alpha": alpha, "tokens": ids}
            for method, alpha, ids in zip(
                flat.field("method").to_pylist(), flat.field("alpha").to_pylist(), tokens, strict=True
            )
        ]
        return [None if part is None else frames[part] for part in _list_slices(column)]
    return list(column.to_pylist())


def _token_arrays(column: pa.Array) -> list[np.ndarray | None]:
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return [None if part is None else flat[part] for part in _list_slices(column)]


def _list_slices(column: pa.Array) -> list[slice | None]:
    """Where each list of ``column`` lies in ``column.flatten()``, which leaves out what lies below null lists."""
    slices: list[slice | None] = []
    start = 0
    for length in column.value_lengths().to_pylist():
        slices.append(None if length is None else slice(start, start + length))
        start += length or 0
    return slices


def _rounded(alphas: Iterable[float]) -> str:
    return ", ".join(f"{alpha:.4g}" for alpha in sorted(alphas)) or "none"
