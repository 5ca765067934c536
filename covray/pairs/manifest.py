"""The manifest: one Parquet row a pair of an image and its label drawn as an image.

A manifest comes from one of our sources, from the user's own list (``read_user_list``), or from anywhere else, since
it is plain Parquet; ``check_manifest`` says in one line what is wrong with it before a build is started.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import io
import json
import math
import os
import posixpath
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from covray.errors import ConfigError, ManifestError, one_line
from covray.io import storage
from covray.io.images import Picture, picture_identity
from covray.tasks import TASKS

__all__ = [
    "MANIFEST_SCHEMA",
    "ManifestInfo",
    "ManifestWriter",
    "Pair",
    "Picture",
    "check_manifest",
    "list_root",
    "read_manifest",
    "read_meta",
    "read_user_list",
    "row_dicts",
]

VERSION = 1
METADATA_KEY = b"covray.manifest"

_PICTURE = pa.struct([("uri", pa.string()), ("bytes", pa.binary())])
MANIFEST_SCHEMA = pa.schema(
    [
        ("pair_id", pa.int64()),
        ("task", pa.string()),
        ("split", pa.string()),
        ("image", _PICTURE),
        ("label", _PICTURE),
        ("meta", pa.string()),
    ]
)
"""Columns of a manifest; the file's metadata carries ``covray.manifest`` = {"version": 1, "root": folder or null}."""

ROW_GROUP_BYTES = 32 * 2**20
ROW_GROUP_ROWS = 10_000

PAINTER_TASKS = {
    "ade20k_image2semantic": "segmentation",
    "coco_image2panoptic_sem_seg": "segmentation",
    "nyuv2_image2depth": "depth",
    "coco_image2pose": "pose",
    "lol_image2enhance": "low_light",
}
"""Types of Painter's lists that are one of our tasks (github.com/baaivision/Painter). The others (deraining,
denoising, class-agnostic instances) are refused by name."""


@dataclass(frozen=True)
class Pair:
    """An image and its label drawn as an image."""

    task: str
    split: str
    image: Picture
    label: Picture
    meta: dict[str, Any] = field(default_factory=dict)
    """Whatever else is known; written as JSON."""

    @functools.cached_property
    def pair_id(self) -> int:
        """Signed int64: the first 8 bytes (big endian) of a SHA-256 over task, image and label identity.

        Each part is preceded by its length, so that no two triples spell the same string.
        """
        digest = hashlib.sha256()
        for part in (self.task, picture_identity(self.image), picture_identity(self.label)):
            encoded = part.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
        return int.from_bytes(digest.digest()[:8], "big", signed=True)


class ManifestWriter:
    """Writes a manifest, row by row; the file appears whole when the ``with`` block ends well, else not at all.

    ``path`` is the Parquet file to write, on any storage; ``root`` the folder that relative URIs are below (a local
    one is made absolute), None where every picture is given by its bytes. Raises ManifestError where ``path`` cannot
    be written.
    """

    def __init__(self, path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None):
        self.path = os.fspath(path)
        self.root = None if root is None else _absolute(os.fspath(root))
        self.rows = 0
        """Pairs written."""
        self.duplicates = 0
        """Pairs left out, because that ``pair_id`` had been added before."""
        self._seen: set[int] = set()
        self._buffer: list[dict[str, Any]] = []
        self._buffer_bytes = 0
        self._aside = ""

    def __enter__(self) -> ManifestWriter:
        with _writing(self.path):
            filesystem, inner = storage.resolve(self.path)
            if filesystem.get_file_info(inner).type == fs.FileType.Directory:
                raise ManifestError(f"{self.path}: is a folder; give the file to write, such as pairs.parquet")
            if isinstance(filesystem, fs.LocalFileSystem):
                folder = os.path.dirname(inner)
                os.makedirs(folder, exist_ok=True)
                self._aside = os.path.join(folder, f".{os.path.basename(inner)}.{os.getpid()}.part")
            else:  # object stores cannot rename: the file is spooled here and sent in one piece
                handle, self._aside = tempfile.mkstemp(suffix=".parquet")
                os.close(handle)
            metadata = {METADATA_KEY: json.dumps({"version": VERSION, "root": self.root})}
            # No dictionary for the pictures: each is different, and a dictionary would hold them all.
            self._writer = pq.ParquetWriter(
                self._aside, MANIFEST_SCHEMA.with_metadata(metadata), use_dictionary=["task", "split"]
            )
        return self

    def add(self, pair: Pair) -> bool:
        """Write ``pair``; False, and counted in ``duplicates``, where its ``pair_id`` had been added before."""
        if pair.task not in TASKS:
            raise ManifestError(f"{self.path}: {_unknown_task(pair.task)}")
        if pair.pair_id in self._seen:
            self.duplicates += 1
            return False
        self._seen.add(pair.pair_id)
        row = {
            "pair_id": pair.pair_id,
            "task": pair.task,
            "split": _text(pair.split),
            "image": {"uri": _text(pair.image.uri), "bytes": pair.image.bytes},
            "label": {"uri": _text(pair.label.uri), "bytes": pair.label.bytes},
            "meta": json.dumps(_plain(pair.meta), sort_keys=True),
        }
        self._buffer.append(row)
        self._buffer_bytes += len(pair.image.bytes or b"") + len(pair.label.bytes or b"") + len(row["meta"])
        self.rows += 1
        if self._buffer_bytes >= ROW_GROUP_BYTES or len(self._buffer) >= ROW_GROUP_ROWS:
            self._flush()
        return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            with _writing(self.path):
                try:
                    if kind is None:
                        self._flush()
                finally:
                    self._writer.close()
                if kind is None and not self.rows:  # what stood there may be good
                    raise ManifestError(f"{self.path}: is not written: there are no pairs to write")
                if kind is None:
                    self._publish()
        except ManifestError:
            if kind is None:  # the first failure is the one to tell
                raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(self._aside)

    def _flush(self) -> None:
        if not self._buffer:
            return
        with _writing(self.path):
            self._writer.write_table(pa.Table.from_pylist(self._buffer, MANIFEST_SCHEMA))
        self._buffer = []
        self._buffer_bytes = 0

    def _publish(self) -> None:
        filesystem, inner = storage.resolve(self.path)
        if isinstance(filesystem, fs.LocalFileSystem):
            with open(self._aside, "rb") as file:
                os.fsync(file.fileno())
            os.replace(self._aside, inner)
        else:
            filesystem.create_dir(posixpath.dirname(inner), recursive=True)
            with open(self._aside, "rb") as file, filesystem.open_output_stream(inner) as stream:
                shutil.copyfileobj(file, stream, 2**20)


@dataclass(frozen=True)
class ManifestInfo:
    """What a manifest holds, as far as its narrow columns tell."""

    rows: int
    per_task: dict[str, int]
    splits: dict[str, int]
    root: str | None
    pair_ids: NDArray[np.int64]
    """In the order of the rows, files by name."""
    files: tuple[str, ...]
    """The Parquet files, as paths of their storage, by name."""


def check_manifest(path: str | os.PathLike[str]) -> ManifestInfo:
    """Check a manifest, a Parquet file or a folder of them, before work is put into it.

    Reads ids, tasks and splits only; the pictures are checked by the build, each as its own row. Raises ManifestError
    (one line, the file named) where it is missing, not Parquet, empty, without a column or with one of another type,
    written by a later version, of several roots, or where it has unknown tasks, nulls, or an id twice.
    """
    path = os.fspath(path)
    files, filesystem = _manifest_files(path)
    per_task: Counter[str] = Counter()
    splits: Counter[str] = Counter()
    ids: list[NDArray[np.int64]] = []
    roots: dict[str | None, str] = {}
    for file in files:
        name = file if len(files) > 1 else path
        with _reading(name), pq.ParquetFile(file, filesystem=filesystem) as parquet:
            _check_schema(name, parquet.schema_arrow)
            roots.setdefault(_root_of(name, parquet.schema_arrow.metadata), name)
            for batch in parquet.iter_batches(2**16, columns=["pair_id", "task", "split"]):
                for column in ("pair_id", "task", "split"):
                    if batch.column(column).null_count:
                        raise ManifestError(f"{name}: column {column} has nulls; every pair needs one")
                ids.append(batch.column("pair_id").to_numpy())
                for column, counts in (("task", per_task), ("split", splits)):
                    for entry in batch.column(column).value_counts().to_pylist():
                        counts[entry["values"]] += entry["counts"]
    if len(roots) > 1:  # a file that needs no root, its pictures being bytes, goes with any
        roots.pop(None, None)
    if len(roots) > 1:
        found = ", ".join(f"{root} ({name})" for root, name in list(roots.items())[:3])
        raise ManifestError(
            f"{path}: its files have different roots: {found}; write them with one --root, a folder above all pictures"
        )
    unknown = sorted(set(per_task) - set(TASKS))
    if unknown:
        raise ManifestError(f"{path}: {_unknown_task(*unknown)}")
    pair_ids = np.concatenate(ids) if ids else np.empty(0, np.int64)
    if not len(pair_ids):
        raise ManifestError(f"{path}: holds no pairs; write some with covray pairs")
    _check_unique(path, pair_ids)
    (root,) = roots
    return ManifestInfo(
        len(pair_ids), dict(sorted(per_task.items())), dict(sorted(splits.items())), root, pair_ids, tuple(files)
    )


def read_manifest(path: str | os.PathLike[str], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a checked manifest, ``columns`` of ``MANIFEST_SCHEMA`` in its types; files by name."""
    files, filesystem = _manifest_files(os.fspath(path))
    schema = pa.schema([MANIFEST_SCHEMA.field(name) for name in columns])
    for file in files:
        with _reading(file), pq.ParquetFile(file, filesystem=filesystem) as parquet:
            for batch in parquet.iter_batches(256, columns=list(columns)):
                yield batch.select(list(columns)).cast(schema)


def row_dicts(table: pa.Table) -> list[dict[str, Any]]:
    """The rows of a manifest's ``table``. Parquet may call text what is not UTF-8: such parts come as U+FFFD."""
    try:
        return cast(list[dict[str, Any]], table.to_pylist())
    except UnicodeDecodeError:
        kinds = {field.name: field.type for field in table.schema}
        raw = table.cast(pa.schema([(name, _undecoded(kind)) for name, kind in kinds.items()])).to_pylist()
        return [{name: _replaced(value, kinds[name]) for name, value in row.items()} for row in raw]


def _undecoded(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_struct(kind):
        return pa.struct([(part.name, _undecoded(part.type)) for part in kind])
    return pa.large_binary() if pa.types.is_string(kind) or pa.types.is_large_string(kind) else kind


def _replaced(value: Any, kind: pa.DataType) -> Any:
    if pa.types.is_struct(kind) and value is not None:
        return {part.name: _replaced(value[part.name], part.type) for part in kind}
    if isinstance(value, bytes) and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return value.decode("utf-8", "replace")
    return value


def read_meta(text: str | None) -> dict[str, Any]:
    """A row's ``meta``; empty where a stranger's is no JSON object."""
    try:
        values = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def list_root(file: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> str:
    """The root of a user's list, to be given to ``ManifestWriter``: ``root``, else the folder the list lies in."""
    if root is not None:
        return _absolute(os.fspath(root))
    return posixpath.dirname(_absolute(os.fspath(file)).rstrip("/"))


def read_user_list(
    file: str | os.PathLike[str],
    task: str | None = None,
    split: str = "train",
    root: str | os.PathLike[str] | None = None,
) -> Iterator[Pair]:
    """The pairs of a user's own list: ``.csv``, ``.jsonl``, ``.json`` (Painter's, or objects) or ``.parquet``.

    Columns or keys: ``image``, ``label``, and where not the same for all ``task`` and ``split`` (a row's own wins over
    the argument); further ones go to ``meta``. Pictures are URIs below ``list_root(file, root)``; an absolute one
    there is made relative, so that a pair keeps its identity when the folder moves. Parquet may hold the bytes
    themselves, as binary or as a struct of ``bytes`` and ``uri`` or ``path`` (Hugging Face's way). Nothing is opened
    here: a null, missing or hostile picture is a pair all the same, and becomes a rejected row in the build.
    Raises ManifestError (file and line, or item) where the list is malformed or names a task that is none of ours.
    """
    file = os.fspath(file)
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".json": _json_rows}
    readers |= {".parquet": _parquet_rows, ".pq": _parquet_rows}
    ending = posixpath.splitext(file)[1].lower()
    if ending not in readers:
        raise ManifestError(f"{file}: a list of pairs ends in {', '.join(readers)}")
    if task is not None and task not in TASKS:
        raise ManifestError(f"--task {task}: {_unknown_task(task)}")
    base = list_root(file, root).rstrip("/") + "/"
    return _user_pairs(file, readers[ending](file), task, split, base)


def _user_pairs(file: str, rows: Iterable[tuple[str, Any]], task: str | None, split: str, base: str) -> Iterator[Pair]:
    for where, row in rows:
        if not isinstance(row, dict):
            raise ManifestError(f"{file}, {where}: is no object with image and label")
        values = dict(row)
        if "image_path" in values:
            _from_painter(file, where, values)
        for key in ("image", "label"):
            if key not in values:
                raise ManifestError(f"{file}, {where}: has no {key}; a pair needs image and label")
        image = _picture(file, where, "image", values.pop("image"), base)
        label = _picture(file, where, "label", values.pop("label"), base)
        own_task, own_split = values.pop("task", None) or task, values.pop("split", None) or split
        if own_task is None:
            raise ManifestError(f"{file}, {where}: has no task; add a column task, or give --task")
        if own_task not in tuple(TASKS):
            raise ManifestError(f"{file}, {where}: {_unknown_task(own_task)}")
        if not isinstance(own_split, str):
            raise ManifestError(f"{file}, {where}: split is {own_split!r}, not a name")
        yield Pair(own_task, own_split, image, label, _plain(values))


def _from_painter(file: str, where: str, values: dict[str, Any]) -> None:
    values["image"] = values.pop("image_path")
    values["label"] = values.pop("target_path", None)
    kind = values.get("type")
    if kind is None:
        return
    if not isinstance(kind, str) or kind not in PAINTER_TASKS:
        known = ", ".join(PAINTER_TASKS)
        raise ManifestError(f"{file}, {where}: Painter's type {kind!r} is none of the seven tasks; usable: {known}")
    values["task"] = PAINTER_TASKS[kind]


def _picture(file: str, where: str, key: str, value: Any, base: str) -> Picture:
    if value is None or value == "":
        return Picture()
    if isinstance(value, bytes):
        return Picture(bytes=value)
    if isinstance(value, str):
        return Picture(uri=_text(value.removeprefix(base)))
    if isinstance(value, Mapping) and value.keys() <= {"uri", "path", "bytes"}:
        uri, data = value.get("uri") or value.get("path"), value.get("bytes")
        if (uri is None or isinstance(uri, str)) and (data is None or isinstance(data, bytes)):
            return Picture(uri=_text(uri.removeprefix(base)) if uri else None, bytes=data)
    raise ManifestError(f"{file}, {where}: {key} is {type(value).__name__}, neither a URI nor a picture's bytes")


def _csv_rows(file: str) -> Iterator[tuple[str, dict[str, str]]]:
    reader = csv.reader((text for _, text in _lines(file)), strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            where = f"line {reader.line_num}"
            if not cells:
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                missing = [key for key in ("image", "label") if key not in header]
                if missing or len(set(header)) < len(header):
                    told = f"no column {' or '.join(missing)}" if missing else "a column name twice"
                    raise ManifestError(f"{file}, {where}: {told}; the first line names the columns: image,label,...")
                continue
            if len(cells) != len(header):
                raise ManifestError(f"{file}, {where}: {len(cells)} cells for {len(header)} columns")
            yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ManifestError(f"{file}, line {reader.line_num}: {error}") from error


def _jsonl_rows(file: str) -> Iterator[tuple[str, Any]]:
    for number, text in _lines(file):
        if text.strip():
            where = f"line {number}"
            yield where, _parsed(f"{file}, {where}", text)


def _json_rows(file: str) -> Iterator[tuple[str, Any]]:
    with _reading(file):
        data = storage.read_bytes(file)
    items = _parsed(file, data)
    if not isinstance(items, list):
        raise ManifestError(f"{file}: holds {type(items).__name__}, not a list of pairs")
    for number, item in enumerate(items, 1):
        yield f"item {number}", item


def _parquet_rows(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    with _reading(file):
        filesystem, inner = storage.resolve(file)
        with pq.ParquetFile(inner, filesystem=filesystem) as parquet:
            for batch in parquet.iter_batches(256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row


def _lines(file: str) -> Iterator[tuple[int, str]]:
    with _reading(file):
        filesystem, inner = storage.resolve(file)
        with io.BufferedReader(filesystem.open_input_stream(inner)) as stream:
            for number, line in enumerate(stream, 1):
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise ManifestError(f"{file}, line {number}: is not UTF-8") from error


def _parsed(where: str, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: not valid JSON: {one_line(error)}") from error


def _manifest_files(path: str) -> tuple[list[str], fs.FileSystem]:
    with _reading(path):
        filesystem, inner = storage.resolve(path)
        kind = filesystem.get_file_info(inner).type
        if kind == fs.FileType.NotFound:
            raise ManifestError(f"{path}: no such file or folder; write it with covray pairs")
        if kind == fs.FileType.File:
            return [inner], filesystem
        names = [name for name in storage.list_files(path) if _is_part(name)]
    if not names:
        raise ManifestError(f"{path}: holds no Parquet files; give a manifest written by covray pairs")
    return [posixpath.join(inner, name) for name in names], filesystem


def _is_part(name: str) -> bool:
    """Whether a file of a manifest's folder belongs to it; names that begin with ``.`` or ``_`` are private to all who
    read Parquet."""
    return name.lower().endswith((".parquet", ".pq")) and not any(part[0] in "._" for part in name.split("/"))


def _check_schema(name: str, schema: pa.Schema) -> None:
    for wanted in MANIFEST_SCHEMA:
        if wanted.name not in schema.names:
            raise ManifestError(
                f"{name}: has no column {wanted.name}; a manifest has {', '.join(MANIFEST_SCHEMA.names)}"
                " (turn your own list into one with covray pairs manifest)"
            )
        found = schema.field(wanted.name).type
        if _small(found) != wanted.type:
            raise ManifestError(f"{name}: column {wanted.name} is {found}, not {wanted.type}")


def _small(kind: pa.DataType) -> pa.DataType:
    """``kind`` with Arrow's large variants, which other writers choose, as the plain ones."""
    if pa.types.is_large_string(kind):
        return pa.string()
    if pa.types.is_large_binary(kind):
        return pa.binary()
    if pa.types.is_struct(kind):
        return pa.struct(sorted(((part.name, _small(part.type)) for part in kind), reverse=True))
    return kind


def _root_of(name: str, metadata: dict[bytes, bytes] | None) -> str | None:
    if metadata is None or METADATA_KEY not in metadata:  # written by hand
        return None
    header = _parsed(f"{name}, metadata covray.manifest", metadata[METADATA_KEY])
    if not isinstance(header, dict) or not isinstance(header.get("root"), str | None):
        raise ManifestError(f"{name}: its metadata covray.manifest is damaged; write it again with covray pairs")
    if header.get("version") != VERSION:
        raise ManifestError(
            f"{name}: is of version {header.get('version')}, this covray reads {VERSION}; upgrade covray"
        )
    return header.get("root")


def _check_unique(path: str, pair_ids: NDArray[np.int64]) -> None:
    ordered = np.sort(pair_ids)
    repeats = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeats):
        first = ", ".join(str(pair_id) for pair_id in np.unique(repeats)[:3])
        raise ManifestError(f"{path}: {len(repeats)} rows repeat a pair_id ({first}); ids must be unique")


def _unknown_task(*names: Any) -> str:
    shown = ", ".join(repr(name)[:80] for name in names[:3])
    return f"unknown task {shown}; the tasks are {', '.join(TASKS)}"


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def _text(value: Any) -> Any:
    """Text that Parquet can hold: a file name of broken UTF-8 loses the broken part (and is rejected in its row)."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _plain(value: Any) -> Any:
    """``value`` as strict JSON can hold it: no NaN, no bytes, other things by their text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return value if value is None or isinstance(value, bool | int | str) else str(value)


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    """What goes wrong with the output's storage is the user's to mend: one line."""
    try:
        yield
    except (OSError, UnicodeEncodeError, pa.ArrowException, ConfigError) as error:
        raise ManifestError(
            f"{path}: cannot be written: {one_line(error)}; give a path with room that you own"
        ) from error


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ManifestError(f"{path}: no such file") from error
    except pa.ArrowInvalid as error:
        raise ManifestError(f"{path}: is not a Parquet file, or a damaged one: {one_line(error)}") from error
    except (OSError, UnicodeError, OverflowError, pa.ArrowException, ConfigError) as error:
        # Unicode: of a path or a text that is no UTF-8; overflow: of a date that Python does not have.
        raise ManifestError(f"{path}: cannot be read: {one_line(error)}") from error
