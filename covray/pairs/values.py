"""Values of lists and manifests: checked, and made such that JSON and Parquet hold them; errors as one line."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from covray.errors import ConfigError, ManifestError, one_line
from covray.tasks import TASKS


def unknown_task(*names: Any) -> str:
    """Return what a message says of tasks that are none of ours."""
    shown = ", ".join(repr(name)[:80] for name in names[:3])
    return f"unknown task {shown}; the tasks are {', '.join(TASKS)}"


def absolute(path: str) -> str:
    """Return ``path``, a local one made absolute."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def storable(value: Any) -> Any:
    """Return text as Parquet can hold it: a file name of broken UTF-8 loses the broken part, and is then rejected."""
    if not isinstance(value, str):
        return value
    return value.encode("utf-8", "replace").decode()


def plain(value: Any) -> Any:
    """Return ``value`` as strict JSON can hold it: no NaN, no bytes, other things by their text."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    # Python's JSON would write NaN, which no other reader accepts.
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return ``kind`` with the variants that other writers choose as the plain ones."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_struct(kind):
        fields = [(part.name, plain_type(part.type)) for part in kind]
        # In one order, uri before bytes: writers order the fields of a struct as they like.
        return pa.struct(sorted(fields, reverse=True))
    return kind


def fits_type(kind: pa.DataType, expected: pa.DataType) -> bool:
    """Whether a column can be read as ``expected``: pandas writes fields without a value as of type null."""
    if pa.types.is_struct(kind) and pa.types.is_struct(expected):
        if kind.num_fields != expected.num_fields:
            return False
        for part, other in zip(kind, expected, strict=True):
            if part.name != other.name or not fits_type(part.type, other.type):
                return False
        return True
    return bool(kind == expected or pa.types.is_null(kind))


def parsed_json(where: str, text: str | bytes, *, unique_keys: bool = False) -> Any:
    """Return the value that ``text`` is in JSON; ManifestError names ``where`` it is.

    With ``unique_keys`` an object that has a key twice is an error: without, its last value counts.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: not valid JSON: {one_line(error)}") from error


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's values by key. Raises ValueError for a key that it has twice."""
    values: dict[str, Any] = {}
    for name, value in items:
        if name in values:
            raise ValueError(f"{name[:80]!r} has two values")
        values[name] = value
    return values


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Turn what goes wrong with the output's storage into one line."""
    try:
        yield
    except (OSError, UnicodeEncodeError, pa.ArrowException, ConfigError) as error:
        raise ManifestError(
            f"{path}: cannot be written: {one_line(error)}; give a path with room that you own"
        ) from error


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what goes wrong with reading a list or a manifest into one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise ManifestError(f"{path}: no such file") from error
    except pa.ArrowInvalid as error:
        raise ManifestError(f"{path}: is not a Parquet file, or a damaged one: {one_line(error)}") from error
    except (OSError, UnicodeError, OverflowError, pa.ArrowException, ConfigError) as error:
        # Unicode: of a path or a text that is no UTF-8; overflow: of a date that Python does not have.
        raise ManifestError(f"{path}: cannot be read: {one_line(error)}") from error
