"""BSDS500 and HED-BSDS: edges that several people drew, combined into one picture.

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
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat
from scipy.sparse import issparse

from covray.errors import ConfigError, ManifestError, PairError
from covray.io.codecs.raster import turned
from covray.io.images import MAX_PIXELS, load_picture
from covray.pairs.label_files import read_label_file
from covray.pairs.manifest import Picture
from covray.pairs.sources import Entry, as_utf8, labelled, list_below, read_file
from covray.pairs.work import PairWork
from covray.tasks import edges

SPLITS = ("train", "val", "test")
DATA = "BSR/BSDS500/data"

SHARE = 0.5
"""Share of the annotators who must have drawn a pixel: the threshold of RCF (Liu et al., CVPR 2017)."""

MAX_MAT_BYTES = 16 * 2**20
"""Size of a .mat file when unpacked; those of BSDS500 stay below 5 MB."""
MAX_MAT_ARRAYS = 1000
"""Arrays in a .mat file; those of BSDS500 hold three for each annotator. scipy follows nested arrays by recursion in C,
and some thousands of them, one in another, end the process."""

JPEG_SPREAD = 12
"""How far the channels of a grey JPEG may lie apart, in levels of 255."""

MOST_EDGES = 0.5
"""Share of a label's pixels that can be edges; a label with more is black on white, or no edge map."""

# What scipy raises on damaged files, and what another structure than BSDS500's leads to.
_HOSTILE = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError, zlib.error)


def bsds_pairs(
    root: str | os.PathLike[str],
    split: str = "train",
    share: float = SHARE,
    listing: str | None = None,
    count: int | None = None,
    seed: int = 0,
) -> PairWork:
    """Return edge pairs of BSDS500, or of a list such as HED-BSDS's. A pixel is white where enough annotators drew it.

    BSDS500 has 200 pairs of train, 100 of val and 200 of test: ``images/{split}/*.jpg`` and
    ``groundTruth/{split}/*.mat`` in ``BSR/BSDS500/data``. A list has lines ``image label``, as HED-BSDS's
    ``train_pair.lst``: URIs below ``root``, the label as white as the share of annotators who drew a pixel. Labels lie
    over the pixels of their images as stored. See ``covray.pairs.sources.labelled`` for pairs that cannot be used.

    Args:
        root: Folder of the dataset, on any storage.
        split: ``train``, ``val`` or ``test``.
        share: Share of the annotators who must have drawn a pixel: the smallest share is their union, 1 what all agree
            on.
        listing: File below ``root`` with the list; None for BSDS500.
        count: How many pairs to sample, by ``seed`` and the image's name; None for all.
        seed: Seed of the sample.

    Raises:
        ConfigError: An unknown split or an impossible share.
        ManifestError: A folder or the list is missing, or a line of the list is malformed.
    """
    root = os.fspath(root)
    if split not in SPLITS:
        raise ConfigError(f"split: BSDS gives {', '.join(SPLITS)} (got {split})")
    if not 0 < share <= 1:
        raise ConfigError(f"share: must be above 0 and at most 1 (got {share})")
    entries = _bsds500(root, split, share) if listing is None else _listed(root, listing, share)
    return labelled("edges", split, root, entries, count, seed)


def agreement(data: bytes) -> NDArray[np.float64]:
    """Return the share of annotators [h, w] who drew a boundary at a pixel.

    Args:
        data: A ``groundTruth`` file: a cell of structs, one for each annotator, each with ``Boundaries`` [h, w],
            logical, whole numbers or doubles, full or sparse; what is above 0 is a boundary.

    Raises:
        PairError: ``unsupported`` (not MATLAB 5), ``too_large`` (unpacked), ``damaged``.
    """
    _check_mat(data)
    try:
        cells = loadmat(io.BytesIO(data), variable_names=["groundTruth"])["groundTruth"].ravel()
        drawings = [_boundaries(cell["Boundaries"][0, 0]) for cell in cells]
    except MemoryError as error:
        raise PairError("too_large", "the .mat file does not fit into memory") from error
    except _HOSTILE as error:
        raise PairError("damaged", f"holds no groundTruth with Boundaries: {type(error).__name__}") from error
    if not drawings or any(drawing.shape != drawings[0].shape for drawing in drawings):
        raise PairError("damaged", "Boundaries of a groundTruth have one size [h, w] for all annotators")
    return np.mean([drawing > 0 for drawing in drawings], axis=0)


def _boundaries(values: Any) -> NDArray[Any]:
    """Return one annotator's boundaries [h, w] as a full array of whole numbers."""
    if issparse(values):
        if values.shape[0] * values.shape[1] > MAX_PIXELS:
            raise PairError("too_large", f"sparse Boundaries of {values.shape[1]} x {values.shape[0]} px")
        values.check_format(full_check=True)  # indices beyond the array would be written to all the same
        values = values.toarray()
    drawing = np.asarray(values)
    whole = drawing.dtype.kind in "bu" or (drawing.dtype.kind in "if" and bool((drawing == np.rint(drawing)).all()))
    if drawing.ndim != 2 or not whole:
        raise PairError("damaged", "Boundaries of a groundTruth are whole numbers [h, w]")
    return drawing


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
    entries: dict[str, Entry] = {}
    for number, line in enumerate(as_utf8(read_file(root, listing, hint)).splitlines(), 1):
        where = f"{root}: {listing}, line {number}"
        try:
            names = line.decode().split()
        except UnicodeDecodeError as error:
            raise ManifestError(f"{where}: is not UTF-8") from error
        if not names:
            continue
        if len(names) != 2:
            raise ManifestError(f"{where}: is {len(names)} names, not 'image label'")
        image, label = names
        entry = Entry(functools.partial(_draw_grey, root, label, share), {"source": listing, "share": share})
        if image in entries:
            raise ManifestError(f"{where}: names {image} a second time; give each image one label")
        entries[image] = entry
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
    file = read_label_file(load_picture(Picture(uri=uri), root))
    levels = file.samples if file.palette is None else file.colours()
    if levels.ndim == 2:
        levels = levels[..., None]
    # Grey in three channels is taken; colours have no reading as a share of annotators.
    spread = levels.max(axis=2) - levels.min(axis=2)
    if spread.max() > (JPEG_SPREAD if file.lossy else 0):
        raise PairError("unsupported", f"{uri}: is in colour, where grey is expected, as white as an edge is sure")
    # Programs that shrink PNGs keep black and white in one bit, and sixteen greys in four: white is then 1 or 15.
    white = file.maximum
    if levels.max() == 1 < white:
        raise PairError("unsupported", f"{uri}: has levels 0 and 1, where white is {white}; multiply them by {white}")
    drawn = levels.mean(axis=2) / white >= share
    if drawn.mean() > MOST_EDGES:
        raise PairError("inverted", f"{uri}: {drawn.mean():.0%} of the pixels are edges; edges are white on black")
    return turned(edges.render(drawn), file.orientation)


def _check_mat(data: bytes) -> None:
    """Refuse what is not MATLAB 5, unpacks to too much, or holds too many arrays.

    A header of 128 bytes is followed by elements: kind, size in bytes, content. Kind 15 is a compressed element, kind
    14 an array, which may hold arrays (MAT-File Format, MathWorks).
    """
    # The header's last four bytes: version 1.0 and the letters MI, both in the writer's order of bytes.
    order = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}.get(data[124:128])
    if order is None:
        raise PairError("unsupported", "no MATLAB 5 file")
    array = struct.pack(f"{order}I", 14)
    # Counted wherever it stands: scipy does not go by the sizes. In the labels of BSDS500 it hardly occurs otherwise.
    arrays, at, room = data.count(array), 128, MAX_MAT_BYTES
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        content = data[at + 8 : at + 8 + size]
        at += 8 + len(content)
        if kind == 15:
            try:
                # One byte more than is allowed tells enough: a bomb is never unpacked.
                content = zlib.decompressobj().decompress(content, room + 1)
            except zlib.error as error:
                raise PairError("damaged", f"a compressed part is broken: {error}") from error
            arrays += content.count(array)
        room -= len(content)
        if room < 0:
            raise PairError("too_large", f"unpacks to more than {MAX_MAT_BYTES} bytes")
    if arrays > MAX_MAT_ARRAYS:
        raise PairError("unsupported", f"holds more than {MAX_MAT_ARRAYS} arrays")
