"""Paths on any filesystem pyarrow knows (local, s3://, gs://, ...): resolve, read, write whole small files."""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
from typing import Any

import pyarrow as pa
from pyarrow import fs

from covray.errors import ConfigError, one_line


def resolve(path: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of ``path`` and the path on it; a path without a scheme is local and made absolute."""
    if "://" not in path:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))
    try:
        filesystem, inner = fs.FileSystem.from_uri(path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise ConfigError(f"{path}: no such storage: {one_line(error)}") from error
    return filesystem, inner


def join(path: str, *parts: str) -> str:
    """``path`` and ``parts`` joined, whatever the scheme. Raises ConfigError where ``path`` carries options."""
    if "://" in path and "?" in path:  # behind them nothing can be appended
        raise ConfigError(
            f"{path}: a folder's address ends before the ?; set what follows it in the environment "
            "(AWS_REGION, AWS_ENDPOINT_URL)"
        )
    return posixpath.join(path, *parts)


def exists(path: str) -> bool:
    """Whether a file or folder stands at ``path``."""
    filesystem, inner = resolve(path)
    return bool(filesystem.get_file_info(inner).type != fs.FileType.NotFound)


def require_writable(out: str) -> None:
    """Refuse a folder that cannot be written, before work is put in; an absent one stays absent. Raises ConfigError."""
    try:
        existed = exists(out)
        write_bytes(join(out, ".writable"), b"")
        filesystem, inner = resolve(out)
        filesystem.delete_file(f"{inner}/.writable")
        if not existed:
            filesystem.delete_dir(inner)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({one_line(error)}); give another folder") from error


def list_files(path: str, suffix: str = "") -> list[str]:
    """Files below ``path``, relative to it, sorted; an absent folder holds none."""
    filesystem, inner = resolve(path)
    selector = fs.FileSelector(inner, recursive=True, allow_not_found=True)
    prefix = inner.rstrip("/") + "/"
    return sorted(
        info.path.removeprefix(prefix)
        for info in filesystem.get_file_info(selector)
        if info.type == fs.FileType.File and info.path.endswith(suffix)
    )


def read_bytes(path: str) -> bytes:
    """The whole file. Raises OSError (FileNotFoundError when absent)."""
    filesystem, inner = resolve(path)
    with filesystem.open_input_stream(inner) as stream:
        return bytes(stream.read())


def write_bytes(path: str, data: bytes) -> None:
    """Write a whole file, creating its folder; a reader sees the old file or the new one, never a part.

    On a local disk by writing aside and renaming; object stores replace an object in one piece by themselves.
    """
    filesystem, inner = resolve(path)
    folder = posixpath.dirname(inner)
    filesystem.create_dir(folder, recursive=True)
    if isinstance(filesystem, fs.LocalFileSystem):
        aside = posixpath.join(folder, f".{posixpath.basename(inner)}.{os.getpid()}.part")
        try:
            with open(aside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, inner)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(aside)
    else:
        with filesystem.open_output_stream(inner) as stream:
            stream.write(data)


def read_json(path: str) -> Any:
    """The file at ``path``, parsed. Raises OSError or ValueError."""
    return json.loads(read_bytes(path))


def write_json(path: str, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=False) + "\n").encode())
