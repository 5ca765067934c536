"""Archives: every member is checked before the first is written, and nothing is written outside the folder."""

from __future__ import annotations

import contextlib
import fnmatch
import gzip
import hashlib
import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, Self

from covray.errors import one_line
from covray.fetching.catalogue import Archive, FetchError, File, inner_path

UNPACKED_RATIO = 20
"""An archive may unpack to at most this many times its own bytes. Pictures and JSON, all that covray reads, stay below
5."""
UNPACKED_LEAST = 64 * 2**20
"""But always to this many bytes."""
_CHUNK = 2**20
_TEXT_BYTES = 2**20
"""A text about a tar's member, such as a long name, has at most so many bytes. Python reads the whole of it at once."""
_TEXTS = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
"""Types of a tar's headers that a text about the next member follows."""
# What Python's readers of zip and tar raise on hostile files.
_DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    ArithmeticError,
)


class Unpacking:
    """The unpacking of one archive into a folder, in which every member is checked before the first is written."""

    def __init__(self, folder: Path, archive: Archive, limit_bytes: int):
        """Prepare to unpack the members that ``archive`` names into ``folder``, at most ``limit_bytes`` in all."""
        self.folder = folder
        self.archive = archive
        self.limit_bytes = limit_bytes
        self.total_bytes = 0

    def unpack(self, file: Path) -> dict[str, File]:
        """Unpack the archive ``file``, and return the files written, by their paths below the folder.

        Raises:
            FetchError: The archive is damaged, leads out of the folder, holds links or devices where files should be,
                unpacks to too much, or has no member that is needed.
        """
        below = f"{self.archive.into}/" if self.archive.into else ""
        try:
            files = self._unpack(file, below, (*self.archive.members, *self.archive.inner))
            for path in self.archive.inner:
                if files.pop(path, None) is None:
                    raise FetchError(f"{file}: has no {path} in it; give another archive")
                files |= self._unpack(self.folder / path, path.rpartition("/")[0] + "/", self.archive.members)
                (self.folder / path).unlink()
        except _DAMAGED as error:
            raise FetchError(f"{file}: cannot be unpacked ({one_line(error)}); remove it, and try again") from error
        if not files:
            raise FetchError(f"{file}: has no {' or '.join(self.archive.members)} in it; remove it")
        return files

    def _unpack(self, file: Path, below: str, patterns: Sequence[str]) -> dict[str, File]:
        """Unpack the members of ``file`` whose paths, put ``below`` a folder, match any of ``patterns``."""
        chosen: dict[str, _Member] = {}
        with _opened(file, self.folder / below) as members:
            for member in members:  # one after another, so that a bomb is not decompressed to its end
                self._check(file, member)
                path = below + PurePosixPath(member.name).as_posix()
                if not member.is_folder and any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns):
                    chosen[path] = member
            for member in chosen.values():
                if member.read is None:
                    raise FetchError(f"{file}: {member.name} is a link, not a file; nothing was unpacked of it")
            return {path: self._write(path, member) for path, member in chosen.items()}

    def _check(self, file: Path, member: _Member) -> None:
        """Refuse a member that leads out of the folder, and one that makes the archive unpack to too much."""
        try:
            inner_path(member.name)
        except ValueError as error:
            raise FetchError(f"{file}: {one_line(error)}; nothing was unpacked of it, do not use it") from error
        if member.bytes < 0:  # the next header would be looked for before this one, again and again
            raise FetchError(f"{file}: {member.name} has a size below 0; nothing was unpacked of it, do not use it")
        self.total_bytes += member.bytes
        if self.total_bytes > self.limit_bytes:
            raise FetchError(f"{file}: unpacks to more than {self.limit_bytes} bytes; nothing was unpacked of it")

    def _write(self, path: str, member: _Member) -> File:
        """Write ``member`` to ``path`` below the folder, whole or not at all."""
        target = self.folder / path
        if not target.parent.resolve().is_relative_to(self.folder.resolve()):
            raise FetchError(f"{target}: leads out of {self.folder} by a link; remove the link, and try again")
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f"{target.name}.part")
        draft.unlink(missing_ok=True)  # if it is a link, writing would follow it
        sha256, size = hashlib.sha256(), 0
        assert member.read is not None
        with member.read() as stream, draft.open("xb") as out:
            while chunk := stream.read(_CHUNK):
                out.write(chunk)
                sha256.update(chunk)
                size += len(chunk)
        os.replace(draft, target)
        return File(bytes=size, sha256=sha256.hexdigest())


@dataclass(frozen=True)
class _Member:
    """A member, as its archive describes it."""

    name: str
    bytes: int
    is_folder: bool
    read: Callable[[], IO[Any]] | None
    """Opens it, if it is a regular file. What is read is at most ``bytes`` long."""


@contextlib.contextmanager
def _opened(file: Path, folder: Path) -> Iterator[Iterator[_Member]]:
    """Yield the members of a zip or tar. Raises FetchError for one that is a device, or a link out of ``folder``."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as packed:
            yield _zip_members(file, packed)
    else:
        with tarfile.open(file, tarinfo=_Header) as tar:
            yield _tar_members(file, tar, folder)


def _zip_members(file: Path, packed: zipfile.ZipFile) -> Iterator[_Member]:
    for info in packed.infolist():
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise FetchError(
                f"{file}: {info.filename} is a link or a device; nothing was unpacked of it, do not use it"
            )
        yield _Member(info.filename, info.file_size, info.is_dir(), partial(packed.open, info))


class _Header(tarfile.TarInfo):
    """A header of a tar, refused where it would fill the memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Read a header. Raises ValueError for a text about a member that is too long."""
        header = super().frombuf(buf, encoding, errors)
        if header.type in _TEXTS and header.size > _TEXT_BYTES:
            raise ValueError(f"the name of a member, or another text about it, has {header.size} bytes")
        return header


def _tar_members(file: Path, tar: tarfile.TarFile, folder: Path) -> Iterator[_Member]:
    for member in tar:
        try:
            tarfile.data_filter(member, str(folder))
        except tarfile.FilterError as error:
            raise FetchError(f"{file}: {one_line(error)}; nothing was unpacked of it, do not use it") from error
        # A link is not read even if it leads to a member: its bytes were not counted.
        read = partial(_extract, tar, member) if member.isreg() else None
        yield _Member(member.name, member.size, member.isdir(), read)


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    stream = tar.extractfile(member)
    assert stream is not None  # it is a regular file
    return stream
