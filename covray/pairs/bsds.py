"""BSDS500 and HED-BSDS: edges that several people drew, joined into one picture.

Arbelaez et al., "Contour Detection and Hierarchical Image Segmentation", PAMI 2011; Xie & Tu, "Holistically-Nested
Edge Detection", ICCV 2015, whose list of augmented copies is HED-BSDS.
"""

from __future__ import annotations

import functools
import io
import os
import posixpath
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat

from covray.errors import ConfigError, ManifestError, PairError
from covray.io.images import decode, load_picture
from covray.pairs.manifest import Pair, Picture
from covray.pairs.sources import Entry, labelled, list_below, read_file
from covray.tasks import edges

SPLITS = ("train", "val", "test")
DATA = "BSR/BSDS500/data"

SHARE = 0.5
"""Share of the annotators who must have drawn a pixel: the threshold of RCF (Liu et al., CVPR 2017)."""

MAX_MAT_BYTES = 16 * 2**20
"""Of a .mat file when unpacked; those of BSDS500 stay below 5 MB."""
MAX_MAT_ARRAYS = 1000
"""In a .mat file; those of BSDS500 hold three an annotator. scipy follows arrays within arrays by recursion in C, where
some thousands, one in another, end the process."""

# What scipy raises on damaged files, and what another structure than BSDS500's leads to.
_HOSTILE = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError, zlib.error)


def bsds_pairs(
    root: str | os.PathLike[str],
    split: str = "train",
    share: float = SHARE,
    listing: str | None = None,
    count: int | None = None,
    seed: int = 0,
) -> Iterator[Pair]:
    """Edge pairs below ``root``, ``count`` of them drawn by ``seed`` and the image's name (all by default).

    Without ``listing`` those of BSDS500, 200 of train, 100 of val, 200 of test: ``images/{split}/*.jpg`` and
    ``groundTruth/{split}/*.mat`` in ``BSR/BSDS500/data``. With it those of a file below ``root`` of lines ``image
    label``, as HED-BSDS's ``train_pair.lst``: URIs below ``root``, the label as white as the share of annotators who
    drew a pixel. Either way a pixel is an edge, drawn white, where at least ``share`` of the annotators drew it: the
    smallest share is their union, 1 what all agree on.

    See ``covray.pairs.sources.labelled`` for pairs that cannot be used. Raises ConfigError for an unknown split or an
    impossible share, ManifestError where a folder or the list is missing, or a line of it is malformed.
    """
    root = os.fspath(root)
    if split not in SPLITS:
        raise ConfigError(f"split: BSDS gives {', '.join(SPLITS)} (got {split})")
    if not 0 < share <= 1:
        raise ConfigError(f"share: must be above 0 and at most 1 (got {share})")
    entries = _bsds500(root, split, share) if listing is None else _listed(root, listing, share)
    return labelled("edges", split, root, entries, count, seed)


def agreement(data: bytes) -> NDArray[np.float64]:
    """The share of annotators [h, w] who drew a boundary at a pixel, from the bytes of a ``groundTruth`` .mat file.

    The file holds a cell of structs, one an annotator, each with ``Boundaries`` [h, w]. Raises PairError:
    ``unsupported`` (not MATLAB 5), ``too_large`` (unpacked), ``damaged``.
    """
    _check_mat(data)
    try:
        cells = loadmat(io.BytesIO(data), variable_names=["groundTruth"])["groundTruth"].ravel()
        drawn = [np.asarray(cell["Boundaries"][0, 0]) for cell in cells]
    except MemoryError as error:
        raise PairError("too_large", "the .mat file does not fit into memory") from error
    except _HOSTILE as error:
        raise PairError("damaged", f"holds no groundTruth with Boundaries: {type(error).__name__}") from error
    if not drawn or any(one.ndim != 2 or one.dtype.kind not in "bu" or one.shape != drawn[0].shape for one in drawn):
        raise PairError("damaged", "Boundaries of a groundTruth are whole numbers [h, w], of all annotators alike")
    return np.mean([one > 0 for one in drawn], axis=0)


def _bsds500(root: str, split: str, share: float) -> dict[str, Entry]:
    folder = f"{DATA}/images/{split}"
    hint = "give the folder BSR_bsds500.tgz was unpacked in, or name a list of pairs (HED-BSDS)"
    entries = {}
    for uri in list_below(root, folder, hint):
        name = posixpath.splitext(uri.removeprefix(f"{folder}/"))[0]
        label = functools.partial(_draw_mat, root, f"{DATA}/groundTruth/{split}/{name}.mat", share)
        entries[uri] = Entry(label, {"source": "bsds500", "share": share})
    return entries


def _listed(root: str, listing: str, share: float) -> dict[str, Entry]:
    hint = "give a list of lines 'image label' below it, such as train_pair.lst of HED-BSDS"
    entries = {}
    for number, line in enumerate(read_file(root, listing, hint).splitlines(), 1):
        try:
            names = line.decode().split()
        except UnicodeDecodeError as error:
            raise ManifestError(f"{root}: {listing}, line {number}: is not UTF-8") from error
        if names and len(names) != 2:
            raise ManifestError(f"{root}: {listing}, line {number}: is {len(names)} names, not 'image label'")
        if names:
            label = functools.partial(_draw_grey, root, names[1], share)
            entries[names[0]] = Entry(label, {"source": listing, "share": share})
    if not entries:
        raise ManifestError(f"{root}: {listing} is empty; {hint}")
    return entries


def _draw_mat(root: str, uri: str, share: float) -> NDArray[np.uint8]:
    data = load_picture(Picture(uri=uri), root)
    try:
        return edges.render(agreement(data) >= share)
    except PairError as error:
        raise PairError(error.reason, f"{uri}: {str(error).partition(': ')[2]}") from error


def _draw_grey(root: str, uri: str, share: float) -> NDArray[np.uint8]:
    return edges.render(edges.read(decode(load_picture(Picture(uri=uri), root))) >= share)


def _check_mat(data: bytes) -> None:
    """Refuse what is not MATLAB 5, unpacks to too much, or holds too many arrays.

    After a header of 128 bytes come elements: kind, size in bytes, content; of kind 15 the content is compressed. Those
    of kind 14 are arrays, and may hold arrays (MAT-File Format, MathWorks).
    """
    order = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}.get(data[124:128])
    if order is None:
        raise PairError("unsupported", "no MATLAB 5 file")
    array = struct.pack(f"{order}I", 14)
    # Counted wherever it stands, for scipy does not go by the sizes; as a label of BSDS500 it hardly occurs.
    arrays, at, room = data.count(array), 128, MAX_MAT_BYTES
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        content = data[at + 8 : at + 8 + size]
        at += 8 + len(content)
        if kind == 15:
            try:
                content = zlib.decompressobj().decompress(content, room + 1)
            except zlib.error as error:
                raise PairError("damaged", f"a compressed part is broken: {error}") from error
            arrays += content.count(array)
        room -= len(content)
        if room < 0:
            raise PairError("too_large", f"unpacks to more than {MAX_MAT_BYTES} bytes")
    if arrays > MAX_MAT_ARRAYS:
        raise PairError("unsupported", f"holds more than {MAX_MAT_ARRAYS} arrays")
