"""Files and folders on any filesystem that pyarrow knows (local, s3://, gs://, hf://): whole small files and JSON.

``Folder`` is for several files of one folder: it finds its filesystem once, where every function here that takes a path
finds it again, which on an object store can be a request.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import re
import secrets
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyarrow import fs

from covray.errors import ConfigError, one_line

_ASIDE_ENDING = ".part"
"""Of the hidden file that is renamed once it is whole."""


def resolve(path: str) -> tuple[fs.FileSystem, str]:
    """Return the filesystem of ``path`` and the path on it.

    A path without a scheme is local and made absolute. In an address, characters that no URI may hold (spaces, letters
    beyond ASCII, ``#``) stand for themselves, and ``%`` before two hexadecimal digits is an escape. The network errors
    of an ``hf://`` address are OSErrors, like those of other filesystems.

    Raises:
        ConfigError: The scheme is unknown, or the address cannot be parsed.
    """
    if "://" not in path:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))
    try:
        if path.startswith("hf://"):
            return _hub_filesystem(), path.removeprefix("hf://").rstrip("/")
        filesystem, inner = fs.FileSystem.from_uri(_quoted(path))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise ConfigError(
            f"{path}: no such storage: {one_line(error)}; give a folder, or an address as s3://"
        ) from error
    return filesystem, inner


def absolute(path: str) -> str:
    """Return ``path`` as it means the same in another folder, such as a worker's."""
    if "://" in path:
        return path
    return resolve(path)[1]


def join(path: str, *parts: str) -> str:
    """Join ``path`` and ``parts``, whatever the scheme. Raises ConfigError where ``path`` carries options."""
    _require_no_options(path)
    return posixpath.join(path, *parts)


def exists(path: str) -> bool:
    """Return whether a file or folder is at ``path``."""
    return _exists(*resolve(path))


def require_writable(out: str) -> None:
    """Refuse a folder that cannot be written, before work is put in; an absent one stays absent. Raises ConfigError."""
    try:
        folder = Folder(out)
        existed = folder.exists()
        # A name of its own that counts as partial: commands in one folder neither trip over nor delete each other's.
        probe = f".writable.{secrets.token_hex(4)}{_ASIDE_ENDING}"
        folder.write_bytes(probe, b"")
        folder.delete_file(probe)
        # Meanwhile another command may have begun here: its files must not go with the folder.
        if not existed:
            folder.delete_if_empty()
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({one_line(error)}); give another folder") from error


def list_files(path: str, suffix: str = "") -> list[str]:
    """Return the files below ``path``, relative to it, sorted; none where the folder is absent."""
    return _list_files(*resolve(path), suffix)


def read_bytes(path: str) -> bytes:
    """Return the whole file. Raises OSError (FileNotFoundError when absent)."""
    return _read_bytes(*resolve(path))


def write_bytes(path: str, data: bytes) -> None:
    """Write a whole file, and create its folder; a reader sees the old file or the new one, never a part.

    On a local disk by writing aside and renaming; object stores replace an object in one piece by themselves.
    """
    _write_bytes(*resolve(path), data)


def is_partial(name: str) -> bool:
    """Return whether ``name`` is what ``write_bytes`` writes aside: of a file being written, or left by a kill."""
    return name.startswith(".") and name.endswith(_ASIDE_ENDING)


def read_json(path: str) -> Any:
    """Return the parsed JSON file at ``path``. Raises OSError or ValueError."""
    return json.loads(read_bytes(path))


def write_json(path: str, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_bytes(path, _json_bytes(value))


class Folder:
    """A folder on any filesystem, which is found once; file names are relative to the folder.

    Names are taken as they are, so that a ``%`` or a ``?`` in one is a character of the name. A ``Folder`` can be
    pickled.
    """

    def __init__(self, path: str):
        """Resolve ``path``. Raises ConfigError for unknown storage, and for an address that carries options."""
        _require_no_options(path)
        self.path = path
        """The folder as the user gave it, for messages and configurations."""
        self.filesystem, self.inner = resolve(path)

    def __truediv__(self, name: str) -> Folder:
        """Return the folder ``name`` below this one, on the same filesystem."""
        below = Folder.__new__(Folder)
        below.path, below.filesystem, below.inner = self.join(name), self.filesystem, self.inner_path(name)
        return below

    def __repr__(self) -> str:
        """Return the path in a form for debugging."""
        return f"Folder({self.path!r})"

    def join(self, *names: str) -> str:
        """Return the path of a file or folder below, as a user would give it."""
        return posixpath.join(self.path, *names)

    def inner_path(self, *names: str) -> str:
        """Return the path of a file or folder below on ``filesystem``, for readers that take both (as pyarrow's)."""
        return posixpath.join(self.inner, *names)

    def exists(self, name: str = "") -> bool:
        """Return whether the folder itself, or the file or folder ``name`` below it, exists."""
        return _exists(self.filesystem, self.inner_path(name) if name else self.inner)

    def list_files(self, suffix: str = "") -> list[str]:
        """Return the files below, relative to the folder, sorted; none where the folder is absent."""
        return _list_files(self.filesystem, self.inner, suffix)

    def read_bytes(self, name: str) -> bytes:
        """Return the whole file ``name``. Raises OSError (FileNotFoundError when absent)."""
        return _read_bytes(self.filesystem, self.inner_path(name))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write the file ``name`` whole or not at all, and create its folder (see the function ``write_bytes``)."""
        _write_bytes(self.filesystem, self.inner_path(name), data)

    def read_json(self, name: str) -> Any:
        """Return the parsed JSON file ``name``. Raises OSError or ValueError."""
        return json.loads(self.read_bytes(name))

    def write_json(self, name: str, value: Any) -> None:
        """Write ``value`` as indented JSON to the file ``name``, whole or not at all."""
        self.write_bytes(name, _json_bytes(value))

    def create(self) -> None:
        """Create the folder and those above it, where they are absent."""
        self.filesystem.create_dir(self.inner, recursive=True)

    def delete(self) -> None:
        """Delete the folder and all that is in it. Raises FileNotFoundError when it is absent."""
        self.filesystem.delete_dir(self.inner)

    def delete_if_empty(self) -> None:
        """Delete the folder, unless a file is in it, as far as its storage can tell; an absent one stays absent."""
        with contextlib.suppress(OSError):
            # Unlike pyarrow's delete_dir, rmdir refuses a folder that a file has just come into.
            if isinstance(self.filesystem, fs.LocalFileSystem):
                os.rmdir(self.inner)
            elif not self.list_files():
                self.delete()

    def delete_file(self, name: str) -> None:
        """Delete the file ``name``. Raises FileNotFoundError when it is absent."""
        self.filesystem.delete_file(self.inner_path(name))


class _HubHandler(fs.FSSpecHandler):
    """Files of the Hugging Face hub; what its client raises without a connection becomes an OSError of one line."""

    def get_file_info(self, paths: list[str]) -> Any:
        with _hub_errors():
            return super().get_file_info(paths)

    def get_file_info_selector(self, selector: fs.FileSelector) -> Any:
        with _hub_errors():
            return super().get_file_info_selector(selector)

    def open_input_stream(self, path: str) -> Any:
        with _hub_errors():
            return super().open_input_stream(path)

    def open_input_file(self, path: str) -> Any:
        with _hub_errors():
            return super().open_input_file(path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        with _hub_errors():
            return super().open_output_stream(path, metadata)

    def create_dir(self, path: str, recursive: bool) -> None:
        with _hub_errors():
            super().create_dir(path, recursive)


@contextlib.contextmanager
def _hub_errors() -> Iterator[None]:
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except HTTPError as error:
        raise OSError(f"the hub cannot be reached: {one_line(error)}") from error


def _hub_filesystem() -> fs.FileSystem:
    # Imported here: most commands need no hub client.
    from huggingface_hub import HfFileSystem

    return fs.PyFileSystem(_HubHandler(HfFileSystem()))


def _quoted(address: str) -> str:
    """Return ``address`` with what no URI may hold escaped: pyarrow drops all from a ``#`` on, and refuses the rest."""
    scheme, _, rest = address.partition("://")
    # In the address of a file a ? is a character of its name; elsewhere options follow it.
    path, mark, options = (rest, "", "") if scheme == "file" else rest.partition("?")
    host, slash, path = path.partition("/")
    path = re.sub("%(?![0-9A-Fa-f]{2})", "%25", path)
    return f"{scheme}://{host}{slash}{urllib.parse.quote(path, safe='/%:@+,;=&$!~*()')}{mark}{options}"


def _require_no_options(path: str) -> None:
    if "://" in path and "?" in path and not path.startswith("file://"):  # behind them nothing can be appended
        raise ConfigError(
            f"{path}: a folder's address ends before the ?; set what follows it in the environment "
            "(AWS_REGION, AWS_ENDPOINT_URL)"
        )


def _exists(filesystem: fs.FileSystem, inner: str) -> bool:
    return bool(filesystem.get_file_info(inner).type != fs.FileType.NotFound)


def _list_files(filesystem: fs.FileSystem, inner: str, suffix: str) -> list[str]:
    selector = fs.FileSelector(inner, recursive=True, allow_not_found=True)
    prefix = inner.rstrip("/") + "/"
    names = []
    for info in filesystem.get_file_info(selector):
        if info.type == fs.FileType.File and info.path.endswith(suffix):
            names.append(info.path.removeprefix(prefix))
    return sorted(names)


def _read_bytes(filesystem: fs.FileSystem, inner: str) -> bytes:
    with filesystem.open_input_stream(inner) as stream:
        return bytes(stream.read())


def _write_bytes(filesystem: fs.FileSystem, inner: str, data: bytes) -> None:
    """Write a file whole or not at all; its folder is made."""
    folder = posixpath.dirname(inner)
    filesystem.create_dir(folder, recursive=True)
    # An object store shows an object only once all of it is there.
    if not isinstance(filesystem, fs.LocalFileSystem):
        with filesystem.open_output_stream(inner) as stream:
            stream.write(data)
        return
    # On a disk: written under another name, flushed, and renamed; a kill leaves the file that was there before.
    aside = posixpath.join(folder, f".{posixpath.basename(inner)}.{os.getpid()}{_ASIDE_ENDING}")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, inner)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(aside)


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=False) + "\n").encode()
