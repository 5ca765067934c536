"""The manifest: one Parquet row for each pair of an image and its label drawn as an image.

A manifest comes from one of our sources, from the user's own list (``covray.pairs.user_lists``), or from anywhere else,
since it is plain Parquet; ``covray.pairs.manifest_reading`` checks and reads it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import posixpath
import shutil
import tempfile
from dataclasses import dataclass, field
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from covray.errors import ManifestError
from covray.io import storage
from covray.io.images import Picture, picture_identity, picture_of
from covray.pairs.rows import PairRow
from covray.pairs.values import (
    absolute,
    plain,
    storable,
    unknown_task,
    writing,
)
from covray.pairs.words import CAPTION_TASK, NO_WORDS, WORD_FIELDS, Words, words_of
from covray.tasks import TASKS
from covray.tasks.base import Meta

__all__ = ["MANIFEST_SCHEMA", "ManifestWriter", "Pair", "Picture"]

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

ENDING = ".parquet"
"""What a manifest's name ends in: Ray reads no other files as Parquet."""

ROW_GROUP_BYTES = 32 * 2**20
ROW_GROUP_ROWS = 10_000


@dataclass(frozen=True)
class Pair:
    """An image and its label drawn as an image."""

    task: str
    split: str
    image: Picture
    label: Picture
    meta: Meta = field(default_factory=dict)
    """What else is known; written as JSON. Of segmentation the class table (``covray.tasks.segmentation``)."""
    words: Words | None = None
    """Caption, attributes and questions; the only label of a row of the task ``caption``."""

    @functools.cached_property
    def pair_id(self) -> int:
        """Signed int64: the first 8 bytes (big endian) of a SHA-256 over task, image and label identity.

        Each part is preceded by its length, so that no two triples spell the same string. A row of the task
        ``caption`` has its caption in the place of the label, so that an image may have several.
        """
        digest = hashlib.sha256()
        label = picture_identity(self.label)
        if self.task == CAPTION_TASK and self.words is not None:
            label = self.words.caption
        for part in (self.task, picture_identity(self.image), label):
            # Names of files need not be UTF-8: their other bytes are lone surrogates.
            encoded = part.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
        return int.from_bytes(digest.digest()[:8], "big", signed=True)


def known_tasks(captions: bool) -> set[str]:
    """Return the tasks that rows may have; ``caption`` is one only for those who read words."""
    return {*TASKS, CAPTION_TASK} if captions else set(TASKS)


def manifest_row(pair: Pair, captions: bool) -> PairRow:
    """Return the row of a pair, by column; with ``captions`` the columns of words, too."""
    row: PairRow = {
        "pair_id": pair.pair_id,
        "task": pair.task,
        "split": storable(pair.split),
        "image": {"uri": storable(pair.image.uri), "bytes": pair.image.bytes},
        "label": {"uri": storable(pair.label.uri), "bytes": pair.label.bytes},
        "meta": json.dumps(plain(pair.meta), sort_keys=True),
    }
    if captions:
        row.update(NO_WORDS if pair.words is None else pair.words.columns())
    return row


def pair_of_row(row: PairRow) -> Pair:
    """Return the pair of a row that ``manifest_row`` has made with the columns of words."""
    image, label = picture_of(row["image"]), picture_of(row["label"])
    return Pair(row["task"], row["split"], image, label, json.loads(row["meta"] or "{}"), words_of(row))


def manifest_place(path: str) -> tuple[fs.FileSystem, str]:
    """Return the filesystem of a manifest to be written, and its path there.

    Raises:
        ManifestError: It is a folder, has another ending, or its storage cannot be used.
    """
    with writing(path):
        filesystem, inner = storage.resolve(path)
        if filesystem.get_file_info(inner).type == fs.FileType.Directory:
            raise ManifestError(f"{path}: is a folder; give the file to write, such as pairs.parquet")
    if not inner.lower().endswith(ENDING):
        raise ManifestError(f"{path}: a manifest's name ends in {ENDING}; give --out such a name")
    return filesystem, inner


class ManifestWriter:
    """Writes a manifest row by row; the file appears whole when the ``with`` block ends well, else not at all."""

    def __init__(
        self, path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None, captions: bool = False
    ):
        """Prepare to write; nothing is opened before the ``with`` block.

        Args:
            path: The Parquet file to write, on any storage; its name ends in ``.parquet``.
            root: Folder that relative URIs are below (a local one is made absolute); None where every picture is given
                by its bytes.
            captions: Write the optional columns of words, and accept rows of the task ``caption``.

        Raises:
            ManifestError: In the ``with`` block, where ``path`` has another ending or cannot be written.
        """
        self.path = os.fspath(path)
        self.root = None if root is None else absolute(os.fspath(root))
        self._captions = captions
        self._schema = pa.schema([*MANIFEST_SCHEMA, *WORD_FIELDS]) if captions else MANIFEST_SCHEMA
        self.rows = 0
        """Pairs written."""
        self.duplicates = 0
        """Pairs that were left out because their ``pair_id`` had been added before."""
        self._seen: set[int] = set()
        self._buffer: list[PairRow] = []
        self._buffer_bytes = 0
        self._aside = ""

    def __enter__(self) -> ManifestWriter:
        """Open the file beside its place."""
        with writing(self.path):
            filesystem, inner = manifest_place(self.path)
            if isinstance(filesystem, fs.LocalFileSystem):
                folder = os.path.dirname(inner)
                os.makedirs(folder, exist_ok=True)
                self._aside = os.path.join(folder, f".{os.path.basename(inner)}.{os.getpid()}.part")
            else:  # object stores cannot rename: the file is spooled here and sent in one piece
                handle, self._aside = tempfile.mkstemp(suffix=".parquet")
                os.close(handle)
            metadata = {METADATA_KEY: json.dumps({"version": VERSION, "root": self.root})}
            try:
                # No dictionary for the pictures: each is different, and a dictionary would hold them all.
                self._writer = pq.ParquetWriter(
                    self._aside, self._schema.with_metadata(metadata), use_dictionary=["task", "split"]
                )
            except BaseException:  # a signal, too: nobody calls __exit__
                self._remove_aside()
                raise
        return self

    def add(self, pair: Pair) -> bool:
        """Write ``pair``; return False, and count it, where its ``pair_id`` had been added before."""
        if pair.task not in known_tasks(self._captions):
            raise ManifestError(f"{self.path}: {unknown_task(pair.task)}")
        if pair.pair_id in self._seen:
            self.duplicates += 1
            return False
        self._seen.add(pair.pair_id)
        row = manifest_row(pair, self._captions)
        self._buffer.append(row)
        self._buffer_bytes += len(pair.image.bytes or b"") + len(pair.label.bytes or b"") + len(row["meta"] or "")
        self.rows += 1
        if self._buffer_bytes >= ROW_GROUP_BYTES or len(self._buffer) >= ROW_GROUP_ROWS:
            self._flush()
        return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Put the file in its place, or remove it after an error."""
        try:
            with writing(self.path):
                try:
                    if kind is None:
                        self._flush()
                finally:
                    self._writer.close()
                if kind is None and not self.rows:  # the file at that path may be good
                    raise ManifestError(f"{self.path}: is not written: there are no pairs to write")
                if kind is None:
                    self._publish()
        except ManifestError:
            if kind is None:  # otherwise the first failure is the one to report
                raise
        finally:
            self._remove_aside()

    def _remove_aside(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.remove(self._aside)

    def _flush(self) -> None:
        if not self._buffer:
            return
        with writing(self.path):
            self._writer.write_table(pa.Table.from_pylist(self._buffer, self._schema))
        self._buffer = []
        self._buffer_bytes = 0

    def _publish(self) -> None:
        filesystem, inner = storage.resolve(self.path)
        if isinstance(filesystem, fs.LocalFileSystem):
            # On the disk before it gets its name, so that a crash leaves the old file or a whole new one.
            with open(self._aside, "rb") as file:
                os.fsync(file.fileno())
            os.replace(self._aside, inner)
        else:
            filesystem.create_dir(posixpath.dirname(inner), recursive=True)
            with open(self._aside, "rb") as file, filesystem.open_output_stream(inner) as stream:
                shutil.copyfileobj(file, stream, 2**20)
