"""What the sources of pairs share: pictures below a folder, a sample that can be repeated, one pair after another."""

from __future__ import annotations

import codecs
import functools
import hashlib
import heapq
import json
import logging
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from covray.errors import ConfigError, ManifestError, PairError
from covray.io import storage
from covray.io.images import encode_png, load_picture
from covray.io.model_folders import local_path
from covray.pairs.label_files import Orientation, align, read_layout
from covray.pairs.manifest import Pair, Picture
from covray.pairs.values import plain, reading
from covray.pairs.work import PairWork, one_by_one
from covray.tasks.base import Meta

_LOG = logging.getLogger("covray")

ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".mpo", ".png", ".apng", ".webp", ".tif", ".tiff", ".bmp", ".dib"),
    *(".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".avif"),
    *(".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpx", ".psd", ".exr", ".hdr", ".pam", ".pfm", ".ico"),
)
"""Endings of photographs. Those of the last row may not be decoded: a rejected row is better than a silent gap."""


@dataclass(frozen=True)
class Entry:
    """An image of a dataset, before any of its files has been opened."""

    label: Callable[[], NDArray[np.uint8]]
    """Reads the label and draws it [h, w, 3]; raises PairError where it cannot."""
    meta: Meta
    label_uri: str | None = None
    """Where the label's file already is as the label is drawn: the pair names it instead of holding its bytes."""
    orientation: Orientation = "stored"
    """How ``label`` lies to an image that EXIF turns; most datasets were annotated over the pixels as stored."""


def labelled(task: str, split: str, root: str, entries: Mapping[str, Entry], count: int | None, seed: int) -> PairWork:
    """Return the pairs of ``count`` entries, in the order of their images' URIs.

    The image stays where it is: the pair names its URI. The label is PNG bytes, unless its entry has a URI; it is
    turned with its image where EXIF turns that. A pair that cannot be used (its file is missing, broken or outside the
    root, its label is of another size) is returned with the image's URI, no label, and the reason as
    ``meta["error"]``, so that the build records it as rejected.

    Args:
        task: Task of the pairs.
        split: Split of the pairs.
        root: Folder that the URIs are below.
        entries: The dataset's entries by the URI of their image.
        count: How many entries to sample; None for all.
        seed: Seed of the sample.

    Raises:
        ManifestError: There are no entries.
        ConfigError: ``count`` is below 1.
    """
    if not entries:
        raise ManifestError(f"{root}: holds no pairs of {task} for {split}")
    # Sampled by name, before a file is opened: the same sample wherever the files lie.
    items = [(uri, entries[uri]) for uri in draw(entries, count, seed)]
    make = functools.partial(_make_pair, task, split, root)
    settings = {"task": task, "split": split, "root": root, "meta_sha256": _meta_sha256(items)}
    return PairWork(items, functools.partial(one_by_one, make), settings)


def _meta_sha256(items: Iterable[tuple[str, Entry]]) -> str:
    """Return a SHA-256 (hex) over the ``meta`` of the entries, which name the source and its settings."""
    # Other options can give the same images other labels: names alone do not tell the work.
    whole = hashlib.sha256()
    for _, entry in items:
        whole.update(json.dumps(plain(entry.meta), sort_keys=True).encode())
    return whole.hexdigest()


def _make_pair(task: str, split: str, root: str, uri: str, entry: Entry) -> list[Pair]:
    return [_pair(task, split, root, uri, entry)]


def _pair(task: str, split: str, root: str, uri: str, entry: Entry) -> Pair:
    image = Picture(uri=uri)
    try:
        layout = read_layout(load_picture(image, root))
        label = align(entry.label(), layout, declared=entry.orientation)
        height_px, width_px, _ = label.shape
        if (height_px, width_px) != (layout.height_px, layout.width_px):
            sizes = f"label is {width_px}x{height_px} px, image is {layout.width_px}x{layout.height_px} px"
            raise PairError("label_shape", sizes)
    except PairError as error:
        return Pair(task, split, image, Picture(), {**entry.meta, "error": str(error)})
    # A label that lies on the disk as it is drawn is named, not copied.
    stored = Picture(uri=entry.label_uri) if entry.label_uri else Picture(bytes=encode_png(label))
    return Pair(task, split, image, stored, dict(entry.meta))


def draw(names: Iterable[str], count: int | None, seed: int) -> list[str]:
    """Return a sample of ``count`` of ``names``, sorted; all where ``count`` is None or more than there are.

    Whether a name is taken depends on a hash of ``seed`` and the name: the order of the names does not matter, a
    smaller sample is part of a larger one, and names that come or go change the sample only by themselves. Raises
    ConfigError for a count below 1.
    """
    if count is None:
        return sorted(names)
    if count < 1:
        raise ConfigError(f"count: must be at least 1 (got {count})")

    def rank(name: str) -> bytes:
        return hashlib.sha256(f"draw {seed} {name}".encode("utf-8", "surrogateescape")).digest()

    return sorted(heapq.nsmallest(count, names, key=rank))


def rebased(pairs: Iterable[Pair], root: str | os.PathLike[str], base: str | os.PathLike[str]) -> Iterable[Pair]:
    """Return ``pairs`` with URIs below ``root`` as pairs with URIs below ``base``, a folder that holds ``root``.

    Manifests of several datasets can then name one root. Raises ConfigError where ``root`` is not below ``base``.
    """
    move = functools.partial(_moved, path_below(os.fspath(root), os.fspath(base)))
    return pairs.changed(move, base=os.fspath(base)) if isinstance(pairs, PairWork) else map(move, pairs)


def path_below(folder: str, base: str) -> str:
    """Return the path of ``folder`` relative to ``base``, with a slash at its end; empty where they are the same.

    Raises:
        ConfigError: ``base`` does not hold ``folder``.
    """
    base_storage, base_path = storage.resolve(base)
    folder_storage, folder_path = storage.resolve(folder)
    # With a slash at both ends, since /data/a does not hold /data/ab.
    outer, inner = f"{base_path.rstrip('/')}/", f"{folder_path.rstrip('/')}/"
    if base_storage != folder_storage or not inner.startswith(outer):
        raise ConfigError(f"root: {base} does not hold {folder}")
    return inner.removeprefix(outer)


def _moved(prefix: str, pair: Pair) -> Pair:
    return replace(pair, image=_below(prefix, pair.image), label=_below(prefix, pair.label))


def _below(prefix: str, picture: Picture) -> Picture:
    """Return ``picture`` with ``prefix`` before its URI, if it has one."""
    if not picture.uri:
        return picture
    return replace(picture, uri=prefix + picture.uri)


def list_pictures(folder: str) -> list[str]:
    """Return the photographs below ``folder`` (on any storage), relative to it, sorted.

    Hidden files and folders are left out, and links to folders are not followed; a line of the log counts the files of
    other endings. Raises ManifestError where the folder cannot be read.
    """
    if "://" in folder:
        with reading(folder):
            names = storage.list_files(folder)
    else:
        names = _local_files(folder)
    pictures = []
    others = Counter[str]()
    for name in names:
        # Thumbnails, and what programs keep for themselves.
        if any(part.startswith(".") for part in name.split("/")):
            continue
        if name.lower().endswith(ENDINGS):
            pictures.append(name)
        else:
            others[posixpath.splitext(name)[1].lower() or "no ending"] += 1
    if others:
        counts = ", ".join(f"{ending} {count}" for ending, count in sorted(others.items()))
        _LOG.warning("%s: files that are no pictures by their names are passed over: %s", folder, counts)
    return sorted(pictures)


def _local_files(folder: str) -> list[str]:
    # pyarrow is not used here: it follows links to folders, in circles where they lead back.
    base = local_path(folder)
    if not base.is_dir():
        raise ManifestError(f"{folder}: no such folder; give a folder of photographs")
    names: list[str] = []
    for place, _, files in os.walk(base, onerror=_unreadable):
        names.extend(Path(place, name).relative_to(base).as_posix() for name in files)
    return names


def list_below(root: str, folder: str, hint: str) -> list[str]:
    """Return the URIs below ``root`` of the pictures in its ``folder``.

    ``hint`` says in a ManifestError where to get them.
    """
    require(root, folder, hint)
    names = list_pictures(storage.join(root, folder))
    if not names:
        raise ManifestError(f"{root}: {folder} holds no pictures; {hint}")
    return [f"{folder}/{name}" for name in names]


def require(root: str, path: str, hint: str) -> None:
    """Raise ManifestError, with ``hint``, where ``root`` has no ``path``."""
    try:
        present = storage.exists(storage.join(root, path))
    except OSError as error:
        raise ManifestError(f"{root}: {path} cannot be looked for: {error.strerror or error}") from error
    if not present:
        raise ManifestError(f"{root}: {path} is missing; {hint}")


def read_file(root: str, path: str, hint: str) -> bytes:
    """Return the file at ``path`` below ``root``, by the rules of pictures: no links out of it, no endless files."""
    require(root, path, hint)
    try:
        return load_picture(Picture(uri=path), root)
    except PairError as error:
        raise ManifestError(f"{root}: {path} cannot be used: {error}") from error


def as_utf8(data: bytes) -> bytes:
    """Return the text ``data`` as UTF-8 without a byte order mark, which editors of Windows put before it.

    Text without a mark is returned as it is; so is text whose mark lies.
    """
    if data.startswith(codecs.BOM_UTF8):
        return data.removeprefix(codecs.BOM_UTF8)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return data.decode("utf-16").encode()
        except UnicodeError:
            return data
    return data


def _unreadable(error: OSError) -> None:
    raise ManifestError(f"{error.filename}: cannot be read: {error.strerror}; give it read rights, or move it away")
