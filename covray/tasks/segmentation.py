"""Segmentation: a class index a pixel, drawn in the PASCAL VOC colours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from covray.tasks.base import Counts, Lpips, Meta, Metric, Picture, Resample, Score, grey_png, require_labels

VOC_CLASSES = 21
"""Classes of a segmentation whose ``meta`` names none: PASCAL VOC's twenty and the background."""


def palette(classes: int) -> NDArray[np.uint8]:
    """Return the first ``classes`` (at most 256) colours of the PASCAL VOC colour map, uint8 [classes, 3].

    Class c's bits are dealt in turn to red, green and blue, the lowest to the highest bit of the channel, so that
    neighbouring classes get far colours and no two classes share one (VOC development kit, ``VOClabelcolormap``).
    """
    if not 1 <= classes <= 256:
        raise ValueError(f"a palette holds 1 to 256 classes, not {classes}")
    index = np.arange(classes, dtype=np.uint32)
    colours = np.zeros((classes, 3), np.uint32)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
    return colours.astype(np.uint8)


def class_count(meta: Meta | None) -> int:
    """Return how many classes ``meta`` names in ``classes``, else PASCAL VOC's number."""
    names = (meta or {}).get("classes")
    return len(names) if isinstance(names, list) and 1 <= len(names) <= 256 else VOC_CLASSES


def render(classes: NDArray[np.integer]) -> Picture:
    """Draw class indices [h, w], 0..255, as a picture [h, w, 3]."""
    return palette(256)[classes]


def read(picture: Picture, meta: Meta | None = None) -> NDArray[np.uint8]:
    """Read class indices uint8 [h, w] by the colours of as many classes as ``meta`` names."""
    return read_classes(picture, class_count(meta))


def read_classes(picture: Picture, classes: int) -> NDArray[np.uint8]:
    """Return the nearest of the first ``classes`` palette colours at every pixel, as class indices uint8 [h, w].

    Exact on drawn labels; on generated ones this is the decoding the literature scores.
    """
    colours = palette(classes).astype(np.int32)
    pixels = picture.reshape(-1, 3).astype(np.int32)
    # |p - c|^2 = |p|^2 - 2 p.c + |c|^2, and |p|^2 does not change which colour is nearest.
    distance = (colours**2).sum(1)[None, :] - 2 * pixels @ colours.T
    return distance.argmin(1).astype(np.uint8).reshape(picture.shape[:2])


def score(answer: Picture, label: Picture, meta: Meta | None = None, *, lpips: Lpips | None = None) -> Score:
    """Score the classes of ``answer`` against those of ``label``."""
    classes = class_count(meta)
    answered, truth = read_classes(answer, classes), read_classes(label, classes)
    counts = class_counts(answered, truth, classes)
    return Score({"iou": mean_iou(counts), "p_acc": float((answered == truth).mean())}, counts)


def class_counts(answer: NDArray[np.integer], label: NDArray[np.integer], classes: int) -> Counts:
    """Count the pixels of every class.

    Args:
        answer: Class indices [h, w].
        label: Class indices [h, w].
        classes: How many classes there are.

    Returns:
        int64 [2, classes]: pixels that have the class in answer and label both, and in either.
    """
    pairs = label.astype(np.int64).ravel() * classes + answer.ravel()
    confusion = np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    both = confusion.diagonal()
    return np.stack([both, confusion.sum(axis=0) + confusion.sum(axis=1) - both])


def mean_iou(counts: Counts) -> float | None:
    """Return the mean intersection over union of ``class_counts`` over the classes that occur.

    The background is a class. Everingham et al. 2010 (PASCAL VOC), for the classes present in answer or label: others
    have no union to divide by. None where no class occurs.
    """
    both, either = counts[:, counts[1] > 0]
    return float((both / either).mean()) if either.size else None


def mean_iou_of_set(counts: Sequence[Counts]) -> float | None:
    """Return the IoU of every class over all pixels of the set, then the mean over classes."""
    classes = max((each.shape[1] for each in counts), default=0)
    total = np.zeros((2, classes), np.int64)
    for each in counts:  # sources of fewer classes count in the first of them
        total[:, : each.shape[1]] += each
    return mean_iou(total)


def mean(labels: Iterable[Picture], meta: Meta | None = None, *, robust: bool = False) -> Picture:
    """Return the most frequent class of every pixel; of equally frequent ones the first."""
    pictures = require_labels(name, labels)
    classes = class_count(meta)
    height, width = pictures[0].shape[:2]
    votes = np.zeros((height, width, classes), np.int32)
    rows, columns = np.ogrid[:height, :width]
    for picture in pictures:
        votes[rows, columns, read_classes(picture, classes)] += 1
    return render(votes.argmax(axis=2))


def export(answer: Picture, meta: Meta | None = None) -> dict[str, bytes]:
    """Return the class indices as a grey PNG."""
    return {"classes.png": grey_png(read(answer, meta))}


name = "segmentation"
short = "segm."
resample: Resample = "nearest"
metrics: tuple[Metric, ...] = (
    Metric(
        "iou",
        "IoU",
        "Intersection over union of the classes that occur, mean over them; of every episode, then the mean.",
        "higher",
    ),
    Metric("p_acc", "P-ACC", "Share of pixels with the right class.", "higher"),
    Metric(
        "miou",
        "mIoU",
        "IoU of every class over all pixels of the set, then the mean over classes: no mean over episodes, so it has "
        "no interval.",
        "higher",
        of_set=mean_iou_of_set,
    ),
)
