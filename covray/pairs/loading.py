"""One pair of a manifest, decoded and checked: the same for the build, for ``covray pairs check`` and for sheets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from covray.errors import PairError
from covray.io.images import PictureColumn, decode, load_picture, picture_of
from covray.pairs.label_files import ASPECT_TOLERANCE
from covray.pairs.manifest_reading import is_damaged, read_meta
from covray.pairs.rows import PairRow
from covray.tasks import TASKS, segmentation
from covray.tasks.base import Meta


@dataclass(frozen=True, eq=False)
class LoadedPair:
    """Image and label of a pair, uint8 RGB [h, w, 3] each; their sizes may differ, their aspects hardly."""

    image: NDArray[np.uint8]
    label: NDArray[np.uint8]


def load_pair(row: PairRow, root: str | None) -> LoadedPair:
    """Return the pictures of a manifest's ``row``.

    Raises:
        PairError: why the pair cannot be used. Its detail says whether the image or the label is the cause; a label
            that ``covray pairs`` could not draw has the reason that the manifest has noted.
    """
    if row["task"] not in TASKS:
        raise PairError("unknown_task", f"{row['task']!r} is none of {', '.join(TASKS)}")
    meta = _meta(row)
    image = _decoded(row["image"], "image", root)
    # The manifest recorded why the label is missing; that reason tells the user more.
    if not any((row["label"] or {}).values()):
        _raise_noted_error(meta)
    label = _decoded(row["label"], "label", root)
    image_aspect, label_aspect = (picture.shape[1] / picture.shape[0] for picture in (image, label))
    if abs(image_aspect / label_aspect - 1) > ASPECT_TOLERANCE:
        image_px, label_px = (f"{picture.shape[1]}x{picture.shape[0]}" for picture in (image, label))
        raise PairError("label_shape", f"label is {label_px} px, image is {image_px} px; their aspects differ")
    return LoadedPair(image, label)


def _meta(row: PairRow) -> Meta:
    """Return the row's ``meta``, of a segmentation with classes that can be read. Raises PairError.

    A mask whose classes are read by another list than the one it was drawn with is wrong, without a word.
    """
    meta = read_meta(row.get("meta"))
    if row["task"] == segmentation.name:
        problem = segmentation.malformed_classes(meta)
        if not meta and is_damaged(row.get("meta")):
            problem = "is no JSON object"
        if problem is not None:
            raise PairError("malformed_meta", f"meta: {problem}")
    return meta


def _raise_noted_error(meta: Meta) -> None:
    """Raise the PairError for which ``covray pairs`` could not draw a label, if the manifest has noted one."""
    error = meta.get("error")
    if isinstance(error, str):
        reason, _, detail = error.partition(": ")
        raise PairError(reason, f"label: {detail}")


def _decoded(picture: PictureColumn | None, name: str, root: str | None) -> NDArray[np.uint8]:
    try:
        return decode(load_picture(picture_of(picture), root))
    except PairError as error:
        reason, _, detail = str(error).partition(": ")
        raise PairError(reason, f"{name}: {detail}") from error
