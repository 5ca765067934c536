"""Segmentation: a class index a pixel, drawn in the PASCAL VOC colours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from covray.tasks.base import Counts, Lpips, Meta, Metric, Picture, Resample, Score, grey_png, require_labels

_PIXELS_AT_ONCE = 2**14
"""Pixels that are compared with all colours at a time."""
VOC_CLASSES = 21
"""Classes of a segmentation whose ``meta`` names none: PASCAL VOC's twenty and the background."""


@dataclass(frozen=True)
class ClassTable:
    """The classes of a segmentation. An index is the place of a class in ``meta`` and of its colour in ``palette``."""

    names: tuple[str, ...]
    """The name of each class."""
    numbers: tuple[int, ...]
    """The number that each class has in the user's own masks, 0 to 65535."""
    void: int | None = None
    """The index of pixels that are not labelled and not scored; None where all are labelled."""
    void_number: int | None = None
    """The number of void in the user's own masks; None without void."""

    @property
    def colours(self) -> tuple[int, ...]:
        """The indices whose colours a label can have."""
        indices = tuple(range(len(self.names)))
        return indices if self.void is None or self.void in indices else (*indices, self.void)

    def to_numbers(self, indices: NDArray[np.integer]) -> NDArray[np.uint8] | NDArray[np.uint16]:
        """Return ``indices`` [h, w] as the user's own numbers, in 8 bits where all fit."""
        table = np.zeros(256, np.uint16)
        table[: len(self.numbers)] = self.numbers
        if self.void is not None and self.void_number is not None:
            table[self.void] = self.void_number
        return table.astype(np.uint8)[indices] if table.max() < 256 else table[indices]


def class_table(meta: Meta | None) -> ClassTable:
    """Return the classes that ``meta`` describes; the first classes of PASCAL VOC where it names none.

    What is malformed counts as absent; ``malformed_classes`` says what is, and pairs that have it are rejected.
    """
    meta = meta or {}
    names, numbers, void = (meta.get(key) for key in ("classes", "class_numbers", "void"))
    if not isinstance(names, list) or not 1 <= len(names) <= 256:
        return ClassTable(tuple(map(str, range(VOC_CLASSES))), tuple(range(VOC_CLASSES)))
    if not isinstance(numbers, list) or len(numbers) != len(names) or not all(map(_is_number, numbers)):
        numbers = list(range(len(names)))
    if not _is_number(void) or void > 255:
        return ClassTable(tuple(map(str, names)), tuple(numbers))
    void_number = meta.get("void_number")
    if not _is_number(void_number):
        void_number = numbers[void] if void < len(numbers) else void
    return ClassTable(tuple(map(str, names)), tuple(numbers), void, void_number)


def malformed_classes(meta: Meta) -> str | None:
    """Return what is wrong with the classes that ``meta`` describes; None where nothing is, or where it has none.

    ``class_table`` reads such a ``meta`` all the same, but then numbers are not those that the masks had.
    """
    names, numbers, void, void_number = (meta.get(key) for key in ("classes", "class_numbers", "void", "void_number"))
    if names is None:
        return None
    if not isinstance(names, list) or not 1 <= len(names) <= 256:
        return "classes is not a list of 1 to 256 names"
    if numbers is not None and (
        not isinstance(numbers, list) or len(numbers) != len(names) or not all(map(_is_number, numbers))
    ):
        return f"class_numbers is not a list of {len(names)} numbers from 0 to 65535, one for each of classes"
    if void is not None and not (_is_number(void) and void < 256):
        return "void is not a number from 0 to 255"
    if void_number is not None and not _is_number(void_number):
        return "void_number is not a number from 0 to 65535"
    return None


def _is_number(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 65536


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


def render(classes: NDArray[np.integer]) -> Picture:
    """Draw class indices [h, w], 0..255, as a picture [h, w, 3]."""
    return palette(256)[classes]


def read(picture: Picture, meta: Meta | None = None) -> NDArray[np.uint8]:
    """Read class indices uint8 [h, w] by the colours that the classes of ``meta`` and void have."""
    return _nearest(picture, class_table(meta).colours)


def read_classes(picture: Picture, classes: int) -> NDArray[np.uint8]:
    """Return the nearest of the first ``classes`` palette colours at every pixel, as class indices uint8 [h, w].

    Exact on drawn labels; on generated ones this is the decoding the literature scores.
    """
    return _nearest(picture, range(len(palette(classes))))


def _nearest(picture: Picture, indices: Sequence[int]) -> NDArray[np.uint8]:
    chosen = np.array(indices, np.uint8)
    colours = palette(256)[chosen].astype(np.int32)
    pixels = picture.reshape(-1, 3)
    nearest = np.empty(len(pixels), np.uint8)
    # Some at a time: a photograph of 12 megapixels and 256 classes would need 25 GB for its distances.
    for start in range(0, len(pixels), _PIXELS_AT_ONCE):
        part = slice(start, start + _PIXELS_AT_ONCE)
        # |p - c|^2 = |p|^2 - 2 p.c + |c|^2, and |p|^2 does not change which colour is nearest.
        distance = (colours**2).sum(1)[None, :] - 2 * pixels[part].astype(np.int32) @ colours.T
        nearest[part] = chosen[distance.argmin(1)]
    return nearest.reshape(picture.shape[:2])


def score(answer: Picture, label: Picture, meta: Meta | None = None, *, lpips: Lpips | None = None) -> Score:
    """Score the classes of ``answer`` against those of ``label``; pixels whose label is void do not count."""
    table = class_table(meta)
    answered, truth = read(answer, meta), read(label, meta)
    if table.void is not None:
        labelled = truth != table.void
        answered, truth = answered[labelled], truth[labelled]
    # One class more, for void in the answer: it is wrong wherever the label has a class.
    classes = len(table.names)
    counts = class_counts(np.minimum(answered, classes), truth, classes + 1)[:, :classes]
    if table.void is not None and table.void < classes:
        counts[:, table.void] = 0
    accuracy = float((answered == truth).mean()) if truth.size else None
    return Score({"iou": mean_iou(counts), "p_acc": accuracy}, counts)


def class_counts(answer: NDArray[np.integer], label: NDArray[np.integer], classes: int) -> Counts:
    """Count the pixels of every class.

    Args:
        answer: Class indices of any shape.
        label: Class indices of the same pixels.
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
    # Counts are int64 [2, classes], as `score` returns them for an episode.
    classes = max((each.shape[1] for each in counts), default=0)
    total = np.zeros((2, classes), np.int64)
    for each in counts:  # sources of fewer classes count in the first of them
        total[:, : each.shape[1]] += each
    return mean_iou(total)


def mean(labels: Iterable[Picture], meta: Meta | None = None, *, robust: bool = False) -> Picture:
    """Return the most frequent class of every pixel, of equally frequent ones the first; void does not vote."""
    pictures = require_labels(name, labels)
    table = class_table(meta)
    classes = len(table.names)
    height, width = pictures[0].shape[:2]
    votes = np.zeros((height, width, classes), np.int32)
    rows, columns = np.ogrid[:height, :width]
    for picture in pictures:
        indices = read(picture, meta)
        votes[rows, columns, np.minimum(indices, classes - 1)] += indices != (-1 if table.void is None else table.void)
    winners = votes.argmax(axis=2)
    if table.void is not None:
        winners[~votes.any(axis=2)] = table.void
    return render(winners)


def export(answer: Picture, meta: Meta | None = None) -> dict[str, bytes]:
    """Return a grey PNG of the numbers that the classes have in the user's own masks."""
    return {"classes.png": grey_png(class_table(meta).to_numbers(read(answer, meta)))}


name = "segmentation"
short = "segm."
resample: Resample = "nearest"
continuous = False
meta_keys: tuple[str, ...] = ("classes", "class_numbers", "class_colours", "void", "void_number", "void_colour")
"""Which classes a label\'s colours stand for; ``class_table`` reads them."""
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
