"""Reading a manifest: what is wrong with it is said in one line, before a build is started."""

from __future__ import annotations

import json
import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from covray.config.section import JsonObject
from covray.errors import ManifestError
from covray.io import storage
from covray.pairs.manifest import ENDING, MANIFEST_SCHEMA, METADATA_KEY, VERSION, known_tasks
from covray.pairs.rows import PairRow
from covray.pairs.values import absolute, fits_type, parsed_json, plain_type, reading, unknown_task
from covray.pairs.words import CAPTION_TASK, WORD_FIELDS
from covray.tasks import segmentation
from covray.tasks.base import Meta


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
    has_captions: bool = False
    """Whether every file has the optional columns of words."""


def check_manifest(path: str | os.PathLike[str], captions: bool = False) -> ManifestInfo:
    """Check a manifest, a Parquet file or a folder of them, before work is put into it.

    Reads ids, tasks and splits only; the pictures are checked by the build, each as its own row. A manifest that
    another program wrote has no root; its URIs are then below the folder that holds it.

    Args:
        path: The manifest, or a folder of manifests.
        captions: Accept rows of the task ``caption``, which have words for a label and cannot be built.

    Raises:
        ManifestError: In one line that names the file: it is missing, not Parquet, empty, lacks a column or has one of
            another type, is of a later version or of several roots, or has unknown tasks, nulls, or an id twice.
    """
    path = os.fspath(path)
    files, filesystem = _manifest_files(path)
    per_task: Counter[str] = Counter()
    splits: Counter[str] = Counter()
    ids: list[NDArray[np.int64]] = []
    roots: dict[str | None, str] = {}
    without_root: list[tuple[str, str]] = []
    has_captions = True
    # Everything is counted in one pass over the narrow columns of all files.
    for file in files:
        name = file if len(files) > 1 else path  # as the user knows it
        with reading(name), pq.ParquetFile(file, filesystem=filesystem) as parquet:
            _check_schema(name, parquet.schema_arrow)
            has_captions &= _has_captions(name, parquet.schema_arrow)
            metadata = parquet.schema_arrow.metadata or {}
            if METADATA_KEY in metadata:
                # Files written by covray name their root; others are looked at below, all at once.
                roots.setdefault(_root_of(name, metadata[METADATA_KEY]), name)
            else:
                without_root.append((name, file))
            for batch in parquet.iter_batches(2**16, columns=["pair_id", "task", "split"]):
                for column in ("pair_id", "task", "split"):
                    if batch.column(column).null_count:
                        raise ManifestError(f"{name}: column {column} has nulls; every pair needs one")
                ids.append(batch.column("pair_id").to_numpy())
                for column, counts in (("task", per_task), ("split", splits)):
                    for entry in batch.column(column).value_counts().to_pylist():
                        counts[entry["values"]] += entry["counts"]
    # What is wrong with the manifest as a whole.
    unknown = sorted(set(per_task) - known_tasks(captions))
    if unknown == [CAPTION_TASK]:
        raise ManifestError(f"{path}: has rows of captions, which have no label picture to build; leave them out")
    if unknown:
        raise ManifestError(f"{path}: {unknown_task(*unknown)}")
    pair_ids = np.concatenate(ids) if ids else np.empty(0, np.int64)
    if not len(pair_ids):
        raise ManifestError(f"{path}: holds no pairs; write some with covray pairs")
    _check_unique(path, pair_ids)
    for name, file in without_root:
        roots.setdefault(_folder_as_root(path, name, file, filesystem), name)
    root = _common_root(path, roots)
    tasks, named_splits = dict(sorted(per_task.items())), dict(sorted(splits.items()))
    return ManifestInfo(len(pair_ids), tasks, named_splits, root, pair_ids, tuple(files), has_captions)


def _common_root(path: str, roots: dict[str | None, str]) -> str | None:
    """Return the one root of a manifest's files; ``roots`` has the name of a file with each. Raises ManifestError."""
    if len(roots) > 1:  # a file that needs no root, its pictures being bytes, goes with any
        roots.pop(None, None)
    if len(roots) > 1:
        shown = ", ".join(f"{root} ({name})" for root, name in list(roots.items())[:3])
        raise ManifestError(
            f"{path}: its files have different roots: {shown}; write them with one --root, a folder above all pictures"
        )
    (root,) = roots
    return root


def read_manifest(path: str | os.PathLike[str], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a checked manifest, ``columns`` of ``MANIFEST_SCHEMA`` or words in its types; files by name."""
    files, filesystem = _manifest_files(os.fspath(path))
    known = pa.schema([*MANIFEST_SCHEMA, *WORD_FIELDS])
    schema = pa.schema(map(known.field, columns))
    for file in files:
        with reading(file), pq.ParquetFile(file, filesystem=filesystem) as parquet:
            for batch in parquet.iter_batches(256, columns=list(columns)):
                # Other writers have their own order of columns, large strings and dictionaries.
                yield batch.select(list(columns)).cast(schema)


def read_classes(path: str | os.PathLike[str]) -> JsonObject | None:
    """Return the class table of a manifest's segmentation: the keys ``meta_keys`` of its ``meta``.

    None where it has no segmentation. Rows that cannot be used do not count.

    Raises:
        ManifestError: Two rows have different classes, so that one colour would stand for two things; or a row's
            ``meta`` is damaged, so that its classes are not known.
    """
    tables: dict[str, str] = {}
    for batch in read_manifest(path, ["pair_id", "task", "split", "label", "meta"]):
        for row in row_dicts(pa.Table.from_batches([batch])):
            if row["task"] != segmentation.name or not any((row["label"] or {}).values()):
                continue
            meta = read_meta(row["meta"])
            if not meta and is_damaged(row["meta"]):
                raise ManifestError(
                    f"{os.fspath(path)}: meta of pair {row['pair_id']} is no JSON object, so that its classes are not "
                    "known; write the manifest again with covray pairs"
                )
            # Only the keys by which a mask is read: others differ from pair to pair.
            table = {}
            for key in segmentation.meta_keys:
                if key in meta:
                    table[key] = meta[key]
            # As JSON with sorted keys: equal tables have one text.
            tables.setdefault(json.dumps(table, sort_keys=True), _described(meta))
            if len(tables) > 1:
                first, second = tables.values()
                raise ManifestError(
                    f"{os.fspath(path)}: its segmentation has two sets of classes, {first} and {second}, so that one "
                    "colour would stand for two things; build them apart, or declare one --classes for both"
                )
    if not tables:
        return None
    (only,) = tables
    return json.loads(only)


def _described(meta: Meta) -> str:
    """Return how a message calls the classes of a row."""
    names = meta.get("classes")
    source = str(meta.get("source", "a list"))[:40]
    if not isinstance(names, list) or not names:
        return f"unnamed ones ({source})"
    return f"{len(names)} from {str(names[0])[:40]!r} to {str(names[-1])[:40]!r} ({source})"


def row_dicts(table: pa.Table) -> list[PairRow]:
    """Return the rows of a manifest's ``table``. Parquet may call text what is not UTF-8: that becomes U+FFFD."""
    try:
        return cast(list[PairRow], table.to_pylist())
    except UnicodeDecodeError:
        # Read as bytes, and decode here what was text.
        kinds = {field.name: field.type for field in table.schema}
        undecoded_fields = [(field.name, _undecoded(field.type)) for field in table.schema]
        undecoded = pa.schema(undecoded_fields)
        rows = []
        for row in table.cast(undecoded).to_pylist():
            rows.append({name: _replaced(value, kinds[name]) for name, value in row.items()})
        return cast(list[PairRow], rows)


def _undecoded(kind: pa.DataType) -> pa.DataType:
    """Return a type with bytes in place of text."""
    if pa.types.is_struct(kind):
        return pa.struct([(part.name, _undecoded(part.type)) for part in kind])
    if pa.types.is_list(kind):
        return pa.list_(_undecoded(kind.value_type))
    if _is_text(kind):
        return pa.large_binary()
    return kind


def _replaced(value: Any, kind: pa.DataType) -> Any:
    """Return a value that was read as ``_undecoded`` says, with text of the type ``kind`` decoded."""
    if pa.types.is_struct(kind) and value is not None:
        return {part.name: _replaced(value[part.name], part.type) for part in kind}
    if pa.types.is_list(kind) and value is not None:
        return [_replaced(item, kind.value_type) for item in value]
    if isinstance(value, bytes) and _is_text(kind):
        return value.decode("utf-8", "replace")
    return value


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def read_meta(text: str | None) -> Meta:
    """Return a row's ``meta``; empty where another program's is no JSON object."""
    try:
        values = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    if not isinstance(values, dict):
        return {}
    return values


def is_damaged(meta: str | None) -> bool:
    """Return whether the text ``meta``, of which ``read_meta`` read nothing, had something to say."""
    return (meta or "").strip() not in ("", "{}", "null")


def _manifest_files(path: str) -> tuple[list[str], fs.FileSystem]:
    """Return the Parquet files of a manifest as paths of their storage, by name. Raises ManifestError for none."""
    with reading(path):
        filesystem, inner = storage.resolve(path)
        kind = filesystem.get_file_info(inner).type
        if kind == fs.FileType.NotFound:
            raise ManifestError(f"{path}: no such file or folder; write it with covray pairs")
        if kind == fs.FileType.File:
            _require_ending(path, inner, filesystem)
            return [inner], filesystem
        parts = []
        for name in storage.list_files(path):
            if not _is_public(name):
                continue
            file = posixpath.join(inner, name)
            if name.lower().endswith(ENDING):
                # A Parquet file under another ending would be left out without a word; it is refused.
                parts.append(file)
            elif name.lower().endswith(".pq") or not posixpath.splitext(name)[1]:
                _require_ending(file, file, filesystem)
    if not parts:
        raise ManifestError(f"{path}: holds no Parquet files; give a manifest written by covray pairs")
    return parts, filesystem


def _is_public(name: str) -> bool:
    """Whether a file of a manifest's folder belongs to it; all who read Parquet ignore names with ``.`` or ``_``."""
    return not any(part[0] in "._" for part in name.split("/"))


def _require_ending(path: str, inner: str, filesystem: fs.FileSystem) -> None:
    """Refuse a Parquet file that Ray would not read as one, for its name."""
    if inner.lower().endswith(ENDING):
        return
    with filesystem.open_input_stream(inner) as stream:
        is_parquet = stream.read(4) == b"PAR1"
    if is_parquet:
        raise ManifestError(f"{path}: a manifest's name ends in {ENDING}; rename it")


def _check_schema(name: str, schema: pa.Schema) -> None:
    """Refuse a file that lacks a column, or has it of another type. Raises ManifestError."""
    for expected in MANIFEST_SCHEMA:
        if expected.name not in schema.names:
            raise ManifestError(
                f"{name}: has no column {expected.name}; a manifest has {', '.join(MANIFEST_SCHEMA.names)}"
                " (turn your own list into one with covray pairs manifest)"
            )
        kind = schema.field(expected.name).type
        if not fits_type(plain_type(kind), expected.type):
            raise ManifestError(f"{name}: column {expected.name} is {kind}, not {expected.type}")


def _has_captions(name: str, schema: pa.Schema) -> bool:
    """Return whether a file has the columns of words; they come together, and a wrong type is refused."""
    if not {column.name for column in WORD_FIELDS} <= set(schema.names):
        return False
    for expected in WORD_FIELDS:
        kind = schema.field(expected.name).type
        if not pa.types.is_list(expected.type) and not fits_type(plain_type(kind), expected.type):
            raise ManifestError(f"{name}: column {expected.name} is {kind}, not {expected.type}")
    return True


def _root_of(name: str, metadata: bytes) -> str | None:
    """Return the root that a file's metadata names; None where it needs none. Raises ManifestError."""
    header = parsed_json(f"{name}, metadata covray.manifest", metadata)
    if not isinstance(header, dict) or not isinstance(header.get("root"), str | None):
        raise ManifestError(f"{name}: its metadata covray.manifest is damaged; write it again with covray pairs")
    if header.get("version") != VERSION:
        raise ManifestError(
            f"{name}: is of version {header.get('version')}, this covray reads {VERSION}; upgrade covray"
        )
    return header.get("root")


def _folder_as_root(path: str, name: str, file: str, filesystem: fs.FileSystem) -> str | None:
    """Return the root of a manifest that names none, written by hand or through a program that drops metadata.

    That is the folder that holds it, if the first picture that has only a URI is below; None if all are bytes.

    Raises:
        ManifestError: The picture is not there.
    """
    folder = absolute(path).rstrip("/")
    if folder.lower().endswith(ENDING):
        folder = posixpath.dirname(folder)
    uri = _first_uri(name, file, filesystem)
    if uri is None:
        return None
    with reading(name):
        # The pictures of a manifest without a root are looked for beside it.
        if storage.exists(storage.join(folder, uri)):
            return folder
    raise ManifestError(
        f"{name}: names no root (another program may have dropped it), and {uri[:80]!r} is not in {folder}; move the "
        "manifest into the folder that its pictures are below"
    )


def _first_uri(name: str, file: str, filesystem: fs.FileSystem) -> str | None:
    """Return the URI of the first picture that has no bytes; None where all have."""
    with reading(name), pq.ParquetFile(file, filesystem=filesystem) as parquet:
        for batch in parquet.iter_batches(256, columns=["image", "label"]):
            for row in row_dicts(pa.Table.from_batches([batch])):
                for picture in (row["image"], row["label"]):
                    if picture and picture["uri"] and picture["bytes"] is None:
                        return str(picture["uri"])
    return None


def _check_unique(path: str, pair_ids: NDArray[np.int64]) -> None:
    """Refuse an id that is there twice. Raises ManifestError."""
    # Sorted in place of a set, which for a hundred million ids would take some 10 GB.
    ordered = np.sort(pair_ids)
    repeats = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeats):
        first = ", ".join(map(str, np.unique(repeats)[:3]))
        raise ManifestError(f"{path}: {len(repeats)} rows repeat a pair_id ({first}); ids must be unique")
