"""What the sources share: pictures below a folder, a draw that can be repeated, labels drawn pair by pair."""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covray.errors import ConfigError, ManifestError, PairError, one_line
from covray.io import storage
from covray.io.images import decode, encode_png, load_picture
from covray.pairs.manifest import Pair, Picture
from covray.seeds import hash_number

ENDINGS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".heic", ".heif", ".avif", ".jp2"),
)
"""What counts as a photograph. The last row cannot be decoded: better a rejected row than a silent gap."""


@dataclass(frozen=True)
class Entry:
    """An image of a dataset, before anything of it has been opened."""

    label: Callable[[], NDArray[np.uint8]]
    """Reads the label and draws it [h, w, 3]; raises PairError where it cannot."""
    meta: Mapping[str, Any]
    label_uri: str | None = None
    """Where the label already lies as it is drawn: the pair names it, instead of holding its bytes."""


def labelled(
    task: str, split: str, root: str, entries: Mapping[str, Entry], count: int | None, seed: int
) -> Iterator[Pair]:
    """Pairs of ``count`` entries, drawn by ``seed``, in the order of their images' URIs below ``root``.

    The image stays where it is: the pair names its URI. The label is PNG bytes, unless it has a URI itself. What
    cannot be used (missing, broken, outside the root, a label of another size) gives its pair too, with the image's
    URI, no label, and the reason as ``meta["error"]``, so that the build records it as rejected. Raises ManifestError
    where there are no entries, ConfigError for a count below 1.
    """
    if not entries:
        raise ManifestError(f"{root}: holds no pairs of {task} for {split}")
    return (_pair(task, split, root, uri, entries[uri]) for uri in draw(entries, count, seed))


def _pair(task: str, split: str, root: str, uri: str, entry: Entry) -> Pair:
    image = Picture(uri=uri)
    try:
        shape = decode(load_picture(image, root)).shape
        drawn = entry.label()
        if drawn.shape != shape:
            sizes = [f"{width_px}x{height_px}" for height_px, width_px, _ in (drawn.shape, shape)]
            raise PairError("label_shape", f"label is {sizes[0]} px, image is {sizes[1]} px")
    except PairError as error:
        return Pair(task, split, image, Picture(), {**entry.meta, "error": str(error)})
    label = Picture(uri=entry.label_uri) if entry.label_uri else Picture(bytes=encode_png(drawn))
    return Pair(task, split, image, label, dict(entry.meta))


def draw(names: Iterable[str], count: int | None, seed: int) -> list[str]:
    """``count`` of ``names``, sorted; all where ``count`` is None, or more than there are.

    A name's chance is a hash of ``seed`` and the name alone: the order of the names does not matter, a smaller draw is
    a part of a larger one, and names that come or go change the draw only by themselves. Raises ConfigError for a
    count below 1.
    """
    if count is None:
        return sorted(names)
    if count < 1:
        raise ConfigError(f"count: must be at least 1 (got {count})")

    def rank(name: str) -> int:
        return hash_number(f"draw {seed} {name}")

    return sorted(heapq.nsmallest(count, names, key=rank))


def rebased(pairs: Iterable[Pair], root: str | os.PathLike[str], base: str | os.PathLike[str]) -> Iterator[Pair]:
    """``pairs`` whose URIs are below ``root`` as pairs whose URIs are below ``base``, a folder that holds ``root``.

    So manifests of several datasets can name one root. Raises ConfigError where ``root`` is not below ``base``.
    """
    places = [storage.resolve(os.fspath(path)) for path in (base, root)]
    (base_storage, outer), (root_storage, inner) = ((system, f"{path.rstrip('/')}/") for system, path in places)
    if base_storage != root_storage or not inner.startswith(outer):
        raise ConfigError(f"root: {os.fspath(base)} does not hold {os.fspath(root)}")
    prefix = inner.removeprefix(outer)

    def moved(picture: Picture) -> Picture:
        return replace(picture, uri=prefix + picture.uri) if picture.uri else picture

    return (replace(pair, image=moved(pair.image), label=moved(pair.label)) for pair in pairs)


def list_pictures(folder: str) -> list[str]:
    """Photographs below ``folder`` (on any storage), relative to it, sorted.

    Hidden files and folders are left out, links to folders not followed. Raises ManifestError where it cannot be read.
    """
    if "://" in folder:
        names = storage.list_files(folder)
    else:
        # Not by pyarrow: it follows links to folders, in circles where they lead back.
        base = Path(folder).expanduser()
        if not base.is_dir():
            raise ManifestError(f"{folder}: no such folder; give a folder of photographs")
        names = [
            Path(place, name).relative_to(base).as_posix()
            for place, _, files in os.walk(base, onerror=_unreadable)
            for name in files
        ]
    return sorted(
        name
        for name in names
        if name.lower().endswith(ENDINGS) and not any(part.startswith(".") for part in name.split("/"))
    )


def list_below(root: str, folder: str, hint: str) -> list[str]:
    """URIs below ``root`` of the pictures in its ``folder``; ``hint`` tells in a ManifestError where to get them."""
    require(root, folder, hint)
    names = list_pictures(storage.join(root, folder))
    if not names:
        raise ManifestError(f"{root}: {folder} holds no pictures; {hint}")
    return [f"{folder}/{name}" for name in names]


def require(root: str, path: str, hint: str) -> None:
    """Raise ManifestError, with ``hint``, where ``root`` has no ``path``."""
    try:
        found = storage.exists(storage.join(root, path))
    except OSError as error:
        raise ManifestError(f"{root}: {path} cannot be looked for: {one_line(error)}") from error
    if not found:
        raise ManifestError(f"{root}: {path} is missing; {hint}")


def read_file(root: str, path: str, hint: str) -> bytes:
    """The file at ``path`` below ``root``, by the rules of pictures: no links out of it, no endless files."""
    require(root, path, hint)
    try:
        return load_picture(Picture(uri=path), root)
    except PairError as error:
        raise ManifestError(f"{root}: {path} cannot be used: {error}") from error


def _unreadable(error: OSError) -> None:
    raise ManifestError(f"{error.filename}: cannot be read: {one_line(error)}; give it read rights, or move it away")
