"""Lists of pairs as people write them: CSV, JSON lines, JSON (also Painter's) and Parquet.

A list is read where it can be understood in one way: with any line ends, separators and byte order marks. Otherwise
one line names the file, the place and the cause. No picture is opened here.
"""

from __future__ import annotations

import codecs
import csv
import functools
import io
import itertools
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pyarrow.parquet as pq

from covray.errors import ManifestError
from covray.io import storage
from covray.pairs.manifest import Pair, Picture
from covray.pairs.values import absolute, parsed_json, plain, reading, storable, unknown_task
from covray.tasks import TASKS

RowReader = Callable[[str], Iterator[tuple[str, Any]]]
"""Yields the rows of a list, each after its place in the file."""

PAINTER_TASKS = {
    "ade20k_image2semantic": "segmentation",
    "coco_image2panoptic_sem_seg": "segmentation",
    "nyuv2_image2depth": "depth",
    "lol_image2enhance": "low_light",
}
"""Types of Painter's lists that are one of our tasks (github.com/baaivision/Painter). The others (deraining,
denoising, class-agnostic instances) are refused by name."""

PAINTER_POSE = "coco_image2pose"
"""Painter's keypoints: heat maps and areas, from which no skeleton can be read."""

MAX_FIELD_CHARACTERS = 2**24
"""Of one CSV cell; lists carry run-length codes and captions."""

_SEPARATORS = (",", ";", "\t", "|")
_KEYS = ("image", "label", "task", "split", "image_path", "target_path", "type")
_WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def list_root(file: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> str:
    """Return the root of a user's list, for ``ManifestWriter``: ``root``, else the folder that holds the list."""
    if root is not None:
        return absolute(os.fspath(root))
    return posixpath.dirname(absolute(os.fspath(file)).rstrip("/"))


def read_user_list(
    file: str | os.PathLike[str],
    task: str | None = None,
    split: str = "train",
    root: str | os.PathLike[str] | None = None,
    columns: Mapping[str, str] | None = None,
) -> Iterator[Pair]:
    """Return the pairs of a user's own list: ``.csv``, ``.tsv``, ``.jsonl``, ``.json`` or ``.parquet``.

    Columns or keys: ``image``, ``label``, and where not the same for all ``task`` and ``split`` (a row's own wins over
    the argument); further ones go to ``meta``. Capitals and blanks around these names do not matter. Pictures are URIs
    below ``list_root(file, root)``; an absolute one there is made relative, so that a pair keeps its identity when the
    folder moves. Parquet may hold the bytes themselves, as binary or as a struct of ``bytes`` and ``uri`` or ``path``
    (Hugging Face's way). Nothing is opened here: a null, missing or hostile picture is a pair all the same
    (``covray.pairs.user_labels`` opens them).

    Args:
        file: The list, on any storage.
        task: Task of the rows that name none.
        split: Split of the rows that name none.
        root: Folder that the list's paths are below; None for the one that holds the list.
        columns: The columns of ``image`` and ``label``, where they have other names.

    Raises:
        ManifestError: The list is malformed, or names a task that is none of ours: file and line, or item.
    """
    file = os.fspath(file)
    columns = columns or {}
    rows = rows_of(file, "pairs", functools.partial(_csv_rows, columns=columns), _json_rows)
    if task is not None and task not in TASKS:
        raise ManifestError(f"--task {task}: {unknown_task(task)}")
    # Relative paths of the list are below it.
    base = list_root(file, root).rstrip("/") + "/"
    return _user_pairs(file, _named_rows(file, rows, columns), task, split, base)


def _named_rows(file: str, rows: Iterable[tuple[str, Any]], columns: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Yield ``rows`` with the names that ``columns`` gives; a column that had such a name is called ``list_NAME``."""
    for where, row in rows:
        if not columns or not isinstance(row, dict):
            yield where, row
            continue
        named = {_name_of(key, columns): value for key, value in row.items()}
        for key, column in columns.items():
            if key not in named:
                known = ", ".join(str(name)[:80] for name in row)
                raise ManifestError(f"{file}, {where}: has no column {column}; it has {known}: give --{key}-column")
        yield where, named


def _name_of(column: Any, columns: Mapping[str, str]) -> Any:
    """Return the name that a column of the list gets here."""
    for key, chosen in columns.items():
        if column == chosen:
            return key
    if column in columns:  # another column stands for this name
        return f"list_{column}"
    return column


def rows_of(file: str, what: str, csv: RowReader, json: RowReader) -> Iterator[tuple[str, Any]]:
    """Return the rows of a list, each after its place in the file, by the reader that the file's ending asks for.

    Args:
        file: The list, on any storage.
        what: What it lists, for the message.
        csv: Reads CSV and TSV.
        json: Reads JSON.

    Raises:
        ManifestError: The file has another ending.
    """
    readers: dict[str, RowReader] = {
        ".csv": csv, ".tsv": csv, ".jsonl": jsonl_rows, ".ndjson": jsonl_rows, ".json": json,
        ".parquet": parquet_rows, ".pq": parquet_rows,
    }  # fmt: skip
    ending = posixpath.splitext(file)[1].lower()
    if ending not in readers:
        raise ManifestError(f"{file}: a list of {what} ends in {', '.join(readers)}")
    return readers[ending](file)


def _user_pairs(file: str, rows: Iterable[tuple[str, Any]], task: str | None, split: str, base: str) -> Iterator[Pair]:
    for where, row in rows:
        if not isinstance(row, dict):
            raise ManifestError(f"{file}, {where}: is no object with image and label")
        # Keys of any case are taken; what has no meaning here is kept as meta.
        values = _with_plain_keys(row)
        if "image_path" in values:
            _from_painter(file, where, values)
        for key in ("image", "label"):
            if key not in values:
                raise ManifestError(f"{file}, {where}: has no {key}; a pair needs image and label")
        image = list_picture(file, where, "image", values.pop("image"), base)
        label = list_picture(file, where, "label", values.pop("label"), base)
        own_task = stripped(values.pop("task", None)) or task
        own_split = stripped(values.pop("split", None)) or split
        # A row's own task and split count before those of the options.
        if own_task is None:
            raise ManifestError(f"{file}, {where}: has no task; add a column task, or give --task")
        if not isinstance(own_task, str) or own_task not in TASKS:
            raise ManifestError(f"{file}, {where}: {unknown_task(own_task)}")
        if not isinstance(own_split, str):
            raise ManifestError(f"{file}, {where}: split is {own_split!r}, not a name")
        yield Pair(own_task, own_split, image, label, plain(values))


def _with_plain_keys(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Return ``row`` with the keys that mean something here in small letters, unless it has both forms."""
    values = dict(row)
    for key in row:
        if not isinstance(key, str):
            continue
        name = key.strip().lower()
        if name in _KEYS and name not in values:
            values[name] = values.pop(key)
    return values


def stripped(value: Any) -> Any:
    """Return a text without the blanks around it, anything else as it is."""
    if isinstance(value, str):
        return value.strip()
    return value


def _from_painter(file: str, where: str, values: dict[str, Any]) -> None:
    values["image"] = values.pop("image_path")
    values["label"] = values.pop("target_path", None)
    kind = values.get("type")
    if kind is None:
        return
    if kind == PAINTER_POSE:
        raise ManifestError(
            f"{file}, {where}: Painter's type {kind!r} draws keypoints as heat maps, not as skeletons; make pairs of "
            "pose with covray pairs coco --task pose"
        )
    if not isinstance(kind, str) or kind not in PAINTER_TASKS:
        known = ", ".join(PAINTER_TASKS)
        raise ManifestError(f"{file}, {where}: Painter's type {kind!r} is none of the seven tasks; usable: {known}")
    values["task"] = PAINTER_TASKS[kind]


def list_picture(file: str, where: str, key: str, value: Any, base: str) -> Picture:
    """Return the picture that a cell of a list names, or holds.

    Args:
        file: The list.
        where: The place in it.
        key: The column.
        value: The cell.
        base: Folder of the pictures, with a slash at its end.

    Raises:
        ManifestError: It is neither a URI nor the bytes of a picture.
    """
    if value is None or value == "":
        # An empty cell is a pair without a picture, which is rejected later, with its reason.
        return Picture()
    if isinstance(value, bytes):
        return Picture(bytes=value)
    if isinstance(value, str):
        return Picture(uri=_uri(file, where, key, value, base))
    if isinstance(value, Mapping) and value.keys() <= {"uri", "path", "bytes"}:
        uri, data = value.get("uri") or value.get("path"), value.get("bytes")
        if isinstance(uri, str | None) and isinstance(data, bytes | None):
            if uri:
                uri = _uri(file, where, key, uri, base)
            return Picture(uri=uri or None, bytes=data)
    raise ManifestError(f"{file}, {where}: {key} is {type(value).__name__}, neither a URI nor a picture's bytes")


def _uri(file: str, where: str, key: str, value: str, base: str) -> str:
    """Return a path of the list as a URI; one below ``base`` becomes relative to it."""
    if _WINDOWS_PATH.match(value.strip()):
        raise ManifestError(
            f"{file}, {where}: {key} is {value.strip()[:80]!r}, a path of Windows; give paths relative to the list or "
            "to --root"
        )
    return str(storable(value.removeprefix(base)))


# --- the formats -----------------------------------------------------------------------------------------------------


def _csv_rows(file: str, columns: Mapping[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    lines = (text for _, text in numbered_lines(file))
    first = next(lines, "")
    declared = re.fullmatch(r"\"?sep=(.)\"?\s*", first, re.IGNORECASE)  # a line that only Excel writes
    rest: Iterable[str] = lines
    if declared:
        separator, offset = declared[1], 1
    else:
        separator, offset = _separator_of(first, columns), 0
        rest = itertools.chain([first], lines)
    # A cell may hold a picture in base64.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD_CHARACTERS))
    reader = csv.reader(rest, strict=True, delimiter=separator, skipinitialspace=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            where = f"line {reader.line_num + offset}"
            if not any(cell.strip() for cell in cells):
                # Empty lines are no rows; spreadsheets write them at the end.
                continue
            if header is None:
                header = _header(file, where, cells, columns)
                continue
            if len(cells) < len(header) or any(cell.strip() for cell in cells[len(header) :]):
                raise ManifestError(f"{file}, {where}: {len(cells)} cells for {len(header)} columns{_hint(separator)}")
            yield where, _named(file, where, header, cells)
    except csv.Error as error:
        raise ManifestError(f"{file}, line {reader.line_num + offset}: {error}") from error


def _separator_of(header: str, columns: Mapping[str, str]) -> str:
    """Return what separates the columns of ``header``; the comma, unless only another makes image and label of it."""
    # The keys of a pair, or those of Painter's lists.
    for separator in _SEPARATORS:
        names = {name.strip(" \t\r\n\"'").lower() for name in header.split(separator)}
        needed = {columns.get("image", "image").lower(), columns.get("label", "label").lower()}
        if needed <= names or {"image_path", "target_path"} <= names:
            return separator
    return ","


def _header(file: str, where: str, cells: list[str], columns: Mapping[str, str]) -> list[str]:
    """Return the names of the columns; those that ``columns`` gives keep theirs, which ``_named_rows`` changes."""
    header = [cell.strip() for cell in cells]
    # Columns that the user names are taken as they are written, in their own case.
    if columns:
        for column in columns.values():
            if column not in header:
                known = ", ".join(name[:80] for name in header)
                raise ManifestError(f"{file}, {where}: has no column {column}; its columns are {known}")
    names = []
    for cell in header:
        if cell.lower() in _KEYS and cell not in columns.values():
            cell = cell.lower()
        names.append(cell)
    # Columns without a name are allowed where they are empty; two of one name are not.
    named = list(filter(None, names))
    missing = []
    for key in ("image", "label"):
        if columns.get(key, key) not in names:
            missing.append(key)
    if missing and not {"image_path", "target_path"} <= set(names):
        message = f"no column {' or '.join(missing)}"
    elif len(set(named)) < len(named):
        message = "a column name twice"
    else:
        return names
    raise ManifestError(f"{file}, {where}: {message}; the first line names the columns: image,label,...")


def _hint(separator: str) -> str:
    """Return advice for a line of too many or too few cells: texts often hold a comma or a semicolon."""
    if separator not in ",;":
        return ""
    return f"; put cells that contain {separator} between quotes"


def _named(file: str, where: str, header: list[str], cells: list[str]) -> dict[str, str]:
    """Return a row's cells by column; a column without a name may only be empty."""
    row = {}
    for name, cell in zip(header, cells, strict=False):
        if name:
            row[name] = cell
        elif cell.strip():
            raise ManifestError(f"{file}, {where}: {cell.strip()[:80]!r} stands in a column without a name; name it")
    return row


def jsonl_rows(file: str) -> Iterator[tuple[str, Any]]:
    """Yield the values of a file of JSON lines, each with its place."""
    for number, text in numbered_lines(file):
        if text.strip():
            where = f"line {number}"
            yield where, parsed_json(f"{file}, {where}", text, unique_keys=True)


def _json_rows(file: str) -> Iterator[tuple[str, Any]]:
    with reading(file):
        data = storage.read_bytes(file)
    items = parsed_json(file, data, unique_keys=True)
    if not isinstance(items, list):
        raise ManifestError(f"{file}: holds {type(items).__name__}, not a list of pairs")
    for number, item in enumerate(items, 1):
        yield f"item {number}", item


def parquet_rows(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a Parquet file, each with its place."""
    number = 0
    with reading(file):
        filesystem, inner = storage.resolve(file)
        with pq.ParquetFile(inner, filesystem=filesystem) as parquet:
            for batch in parquet.iter_batches(256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row


def numbered_lines(file: str) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a text, whatever ends them; UTF-8, or UTF-16 with its mark.

    Raises:
        ManifestError: A line is of another encoding.
    """
    with reading(file):
        filesystem, inner = storage.resolve(file)
        with io.BufferedReader(filesystem.open_input_stream(inner)) as stream:
            encoding = "utf-16" if stream.peek(2)[:2] in _UTF16 else "utf-8-sig"
            # What is no UTF-8 becomes surrogates, so that its line can be named.
            errors = "strict" if encoding == "utf-16" else "surrogateescape"
            text = io.TextIOWrapper(stream, encoding, errors, newline="")
            for number, line in enumerate(text, 1):
                try:
                    line.encode()
                except UnicodeEncodeError as error:
                    raise ManifestError(f"{file}, line {number}: is not UTF-8; save the list as UTF-8") from error
                yield number, line
