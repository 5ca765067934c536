"""Pairs of a user's own list, opened and checked: files that are there, labels that say what the build will read.

A label that is already drawn as its task draws it stays where it is. Another one that is understood (a mask of own
classes, depth in 16 bits, a label that EXIF turns with its image) is drawn anew and kept as bytes. What is not
understood, or in two ways, gets no label, and the reason as ``meta["error"]``.
"""

from __future__ import annotations

import functools
import os
import posixpath
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covray.errors import ManifestError, PairError
from covray.io.images import decode, encode_png, load_picture
from covray.io.web import WebRules, fetch, is_web
from covray.pairs.classes import MaskCoding, painter_coding, read_mask, voc_coding
from covray.pairs.label_files import (
    ImageLayout,
    LabelFile,
    Orientation,
    align,
    read_label_file,
    read_layout,
    same_aspect,
)
from covray.pairs.manifest import Pair, Picture
from covray.pairs.nyuv2 import draw_depth, only_directions
from covray.tasks import depth, segmentation
from covray.tasks.base import Meta

PAINTER_MASKS = {"ade20k_image2semantic": (150, 6), "coco_image2panoptic_sem_seg": (133, 7)}
"""Classes, and levels a channel, of the colours of Painter's lists."""
PAINTER_DEPTH = "nyuv2_image2depth"

GREY_SPREAD = 12
"""How far the channels of a grey label may lie apart, in levels of 255: those of a JPEG differ a little."""
MOST_EDGES = 0.5
"""Share of a label's pixels that can be edges; a label with more is black on white, or no edge map."""
LEAST_DIRECTIONS = 0.5
"""Share of the coloured pixels of a normal map that must be directions."""

_THREADS = 8
_AHEAD = 64
"""Pairs that are opened before the first of them is taken."""


@dataclass(frozen=True)
class LabelRules:
    """What the user declares of all labels of a list."""

    masks: MaskCoding | None = None
    """The classes of segmentation masks; None: PASCAL VOC's, or those that a row names."""
    metres_per_level: float | None = None
    """Depth of one level; None: 8 bits are drawn as ``covray.tasks.depth`` does, 16 bits are refused."""
    orientation: Orientation | None = None
    """How labels lie to images that EXIF turns; None: as their size tells."""
    web: WebRules | None = None
    """Where pictures of the web may come from; None: from nowhere."""

    def settings(self) -> dict[str, Any]:
        """Return what decides the labels, as JSON."""
        classes = None if self.masks is None else self.masks.meta
        return {"classes": classes, "metres_per_level": self.metres_per_level, "orientation": self.orientation}


def checked_pairs(pairs: Iterable[Pair], root: str, rules: LabelRules) -> Iterator[Pair]:
    """Yield ``pairs`` in their order, each opened and checked.

    A name that is missing as it is written is looked for without blanks around it, with slashes for backslashes, and in
    the other Unicode forms. A pair with a file that cannot be opened keeps its pictures and gets the reason as
    ``meta["error"]``: the build will find the file if it is there by then.

    Args:
        pairs: Pairs of a list.
        root: Folder that their URIs are below.
        rules: What the user declares of the labels.

    Raises:
        ManifestError: Not one image can be opened, and each is missing.
    """
    count, missing, first = 0, 0, ""
    for pair in in_order(functools.partial(check_pair, root=root, rules=rules), pairs):
        count += 1
        if str(pair.meta.get("error")).startswith("missing: image"):
            missing += 1
            first = first or (pair.image.uri or "")
        yield pair
    if count and missing == count and first:
        raise ManifestError(f"{root}: none of the {count} images is there, such as {first[:80]!r}; give --root")


def in_order(change: Callable[[Pair], Pair], pairs: Iterable[Pair]) -> Iterator[Pair]:
    """Yield ``change`` of each pair, in their order, on several threads: files and servers let one wait."""
    waiting: deque[Future[Pair]] = deque()
    readers = ThreadPoolExecutor(_THREADS)
    try:
        for pair in pairs:
            waiting.append(readers.submit(change, pair))
            if len(waiting) >= _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # After an error or Ctrl-C the pairs ahead are of no use, and each may be minutes of waiting for a server.
        readers.shutdown(cancel_futures=True)


def check_pair(pair: Pair, root: str | None, rules: LabelRules) -> Pair:
    """Return ``pair``, opened and checked: see ``checked_pairs``."""
    meta = dict(pair.meta)
    if "error" in meta:  # a column of the list; in a manifest it is why a pair cannot be used
        meta["list_error"] = meta.pop("error")
    if rules.web is not None:
        try:
            pair, urls = _downloaded(pair, rules.web)
        except PairError as error:
            return replace(pair, meta=meta | {"error": str(error)})
        meta |= urls
    # Both files are there and can be read; a rejected pair keeps the pictures that were found.
    try:
        image, image_data = _found("image", pair.image, root)
        pair = replace(pair, image=image)
        layout = _named("image", read_layout, image_data)
        label, label_data = _found("label", pair.label, root)
        pair = replace(pair, label=label)
        shown = _named("label", decode, label_data)
    except PairError as error:
        return replace(pair, meta=meta | {"error": str(error)})
    # The label is one of its task, of the picture's shape; ``known`` is what reading it told for ``meta``.
    try:
        drawn, known = _drawn(pair, label_data, layout, rules)
        height_px, width_px = drawn.shape[:2]
        if not same_aspect((height_px, width_px), (layout.height_px, layout.width_px)):
            sizes = f"label is {width_px}x{height_px} px, image is {layout.width_px}x{layout.height_px} px"
            raise PairError("label_shape", f"{sizes}; their aspects differ")
    except PairError as error:
        reason, _, detail = str(error).partition(": ")
        return replace(pair, label=Picture(), meta=meta | {"error": f"{reason}: {label.uri or 'label'}: {detail}"})
    # Columns of the list that are called so would be read as the classes of what is drawn here.
    if pair.task == segmentation.name:
        for key in segmentation.meta_keys:
            meta.pop(key, None)
    meta |= known
    # A label in the user's own coding is replaced by the picture that it is drawn as.
    if not np.array_equal(drawn, shown):
        pair = replace(pair, label=Picture(bytes=encode_png(drawn)))
        if label.uri:
            meta["label_file"] = label.uri
    return replace(pair, meta=meta)


def _downloaded(pair: Pair, rules: WebRules) -> tuple[Pair, dict[str, str]]:
    """Return ``pair`` with the bytes of its pictures of the web, and where they are from."""
    urls, pictures = {}, []
    for name, picture in (("image", pair.image), ("label", pair.label)):
        if picture.bytes is None and picture.uri is not None and is_web(picture.uri):
            urls[f"{name}_url"] = picture.uri
            pictures.append(Picture(bytes=_named(name, functools.partial(fetch, rules=rules), picture.uri)))
        else:
            pictures.append(picture)
    image, label = pictures
    return replace(pair, image=image, label=label), urls


def _drawn(pair: Pair, data: bytes, layout: ImageLayout, rules: LabelRules) -> tuple[NDArray[np.uint8], Meta]:
    """Return the label as its task draws it, upright [h, w, 3], and what is known of it."""
    if pair.task == segmentation.name:
        file = read_label_file(data)
        coding = _coding_of(pair, rules)
        return _aligned(segmentation.render(read_mask(file, coding)), file, layout, rules), coding.meta
    if pair.task == depth.name:
        file = read_label_file(data)
        return _aligned(_draw_depth(pair, file, rules), file, layout, rules), {}
    if pair.task == "normals":
        file = read_label_file(data)
        return align(_draw_normals(file), layout, file.orientation, "fixed"), {}
    shown = decode(data)
    own_orientation = read_layout(data).orientation
    if pair.task == "edges":
        _check_edges(shown)
    if own_orientation != 1:  # it is upright by itself
        return shown, {}
    return align(shown, layout, declared=rules.orientation), {}


def _aligned(drawn: NDArray[np.uint8], file: LabelFile, layout: ImageLayout, rules: LabelRules) -> NDArray[np.uint8]:
    return align(drawn, layout, file.orientation, rules.orientation)


def _coding_of(pair: Pair, rules: LabelRules) -> MaskCoding:
    if rules.masks is not None:
        return rules.masks
    kind, names = pair.meta.get("type"), pair.meta.get("classes")
    if isinstance(kind, str) and kind in PAINTER_MASKS:
        return painter_coding(*PAINTER_MASKS[kind])
    if isinstance(names, list) and 1 <= len(names) <= 256:
        return voc_coding(map(str, names), declared=True)
    return voc_coding()


def _draw_depth(pair: Pair, file: LabelFile, rules: LabelRules) -> NDArray[np.uint8]:
    if pair.meta.get("type") == PAINTER_DEPTH:
        if file.samples.ndim != 2:
            raise PairError("unsupported", "several channels, where 16 bits of millimetres are expected")
        return draw_depth(file.samples)
    levels = _grey_levels(file)
    if rules.metres_per_level is not None:
        return _draw_metres(levels, rules.metres_per_level)
    if levels.dtype != np.uint8:
        raise PairError(
            "undeclared", "16 bits of depth without a unit; give --metres-per-level, such as 0.001 for millimetres"
        )
    # A PNG of few bits is one of 8 bits that a program has shrunk: what was 255 is now 1, 3 or 15.
    if file.maximum < 255:
        levels = np.rint(levels * (255 / file.maximum)).astype(np.uint8)
    if file.palette is None and file.samples.ndim == 3:  # as it is: of a JPEG the channels may differ by a little
        return file.samples.astype(np.uint8)
    return np.repeat(levels.astype(np.uint8)[..., None], 3, axis=2)


def _draw_metres(levels: NDArray[np.uint8] | NDArray[np.uint16], metres_per_level: float) -> NDArray[np.uint8]:
    """Draw depth of a declared unit; without one pixel in the range that can be drawn the unit is a wrong one."""
    metres = levels * metres_per_level
    known = (metres >= depth.MIN_M) & (metres < depth.MAX_M)
    if not known.any():
        raise PairError(
            "no_depth",
            f"levels {levels.min()} to {levels.max()} of {metres_per_level:g} m, none of them {depth.MIN_M:g} to "
            f"{depth.MAX_M:g} m deep; correct --metres-per-level",
        )
    return depth.render(metres)


def _grey_levels(file: LabelFile) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Return the grey levels [h, w] of a label, which may be saved with three channels or a palette."""
    levels = file.samples
    if file.palette is not None:
        levels = file.colours()
    if levels.ndim == 2:
        return levels
    # Three channels are grey where they are equal; in a lossy file, where they are nearly so.
    spread = int((levels.max(axis=2).astype(int) - levels.min(axis=2)).max())
    allowed = GREY_SPREAD if file.lossy else 0
    if spread > allowed:
        raise PairError("unsupported", "depth in colour, where grey is expected; the colours of a map have no unit")
    return np.rint(levels.mean(axis=2)).astype(levels.dtype)


def _draw_normals(file: LabelFile) -> NDArray[np.uint8]:
    if file.samples.ndim != 3 or file.samples.dtype != np.uint8:
        raise PairError("unsupported", "one channel, where red, green and blue of a direction are expected")
    coloured = file.samples.any(axis=2)
    drawn = only_directions(file.samples)
    if coloured.any() and drawn.any(axis=2).sum() < LEAST_DIRECTIONS * coloured.sum():
        raise PairError("unsupported", "most pixels are no directions (rgb = (n + 1) / 2)")
    return drawn


def _check_edges(shown: NDArray[np.uint8]) -> None:
    if shown.max() == 1:
        raise PairError("unsupported", "has levels 0 and 1, where white is 255; multiply them by 255")
    edges = float((shown.mean(axis=2) >= 127.5).mean())
    if edges > MOST_EDGES:
        raise PairError("inverted", f"{edges:.0%} of the pixels are edges; edges are white on black")


# --- files that are not where the list says --------------------------------------------------------------------------


def _named(name: str, read: Any, data: bytes | str) -> Any:
    """Return ``read(data)``; its PairError says which of the two pictures it is about."""
    try:
        return read(data)
    except PairError as error:
        raise PairError(error.reason, f"{name}: {str(error).partition(': ')[2]}") from error


def _found(name: str, picture: Picture, root: str | None) -> tuple[Picture, bytes]:
    """Return ``picture`` as its file is called, and the file's bytes."""
    try:
        return picture, load_picture(picture, root)
    except PairError as error:
        detail = str(error).partition(": ")[2]
        if error.reason == "missing" and picture.uri and root is not None:
            for uri in _spellings(picture.uri):
                try:
                    return replace(picture, uri=uri), load_picture(Picture(uri=uri), root)
                except PairError:
                    continue
            detail += _hint(picture.uri, root)
        raise PairError(error.reason, f"{name}: {detail}") from error


def _spellings(uri: str) -> list[str]:
    """Return the other ways to write a path that name the same file on some machine."""
    spellings: list[str] = []
    for text in (uri, uri.strip(), uri.replace("\\", "/"), uri.strip().replace("\\", "/")):
        for form in (text, unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)):
            if form not in spellings:
                spellings.append(form)
    return spellings[1:]


def _hint(uri: str, root: str) -> str:
    """Return what to say of a file that is there in other capitals; empty otherwise."""
    folder, name = posixpath.split(uri.strip().replace("\\", "/"))
    place = os.path.join(os.path.expanduser(root), folder)
    if "://" in root or ".." in folder.split("/") or not os.path.isdir(place):
        return ""
    try:
        entries = os.listdir(place)
    except OSError:  # a folder whose files can be opened by name may not be listed
        return ""
    for entry in entries:
        if unicodedata.normalize("NFC", entry).casefold() == unicodedata.normalize("NFC", name).casefold():
            return f"; {entry!r} is there: capitals matter"
    return ""
