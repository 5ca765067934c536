"""What a task is: how its label becomes a picture, and how a picture is read, scored, joined with others and exported.

A task is a module of this package, or any object with these attributes. ``covray.tasks.TASKS`` lists the modules; a
package of your own adds one by an entry point in the group ``covray.tasks``.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from covray.io.pixels import Picture

Counts = NDArray[np.int64]
Meta = Mapping[str, Any]
"""The ``meta`` of a pair's manifest row; segmentation reads its class table."""
Lpips = Callable[[Picture, Picture], float]
"""Perceptual distance of two pictures (Zhang et al. 2018)."""
Resample = Literal["nearest", "bicubic"]
"""How a label is resized: ``nearest`` where in-between colours would mean something else, ``bicubic`` otherwise."""


@dataclass(frozen=True)
class Metric:
    """A figure of an answer, or of a set of answers: its name in files and how pages show it."""

    name: str
    label: str
    about: str
    better: Literal["higher", "lower"] | None
    """None: neither more nor less of it is better."""
    unit: str = ""
    short: str = ""
    """The label where there is little space; empty: ``label``."""
    of_set: Callable[[Sequence[Counts]], float | None] | None = None
    """Computes the figure of a set of episodes from their ``Score.counts``; None: it is a mean over episodes."""
    absent: str = ""
    """Why an evaluation may lack the metric; empty: it never does."""

    @property
    def with_unit(self) -> str:
        """The label and its unit, if any."""
        return f"{self.label}, {self.unit}" if self.unit else self.label


@dataclass(frozen=True)
class Score:
    """How good one answer is."""

    values: dict[str, float | None]
    """By metric; None where it is undefined. ``lpips`` is missing where its network is not at hand."""
    counts: Counts | None = None
    """What metrics of a set are computed from; None for tasks that have none."""


class Task(Protocol):
    """A kind of label. Pictures are uint8 RGB; ``meta`` is that of the pair's manifest row, or None."""

    name: str
    short: str
    """The name where there is little space, as in a table of seven columns in a terminal."""
    resample: Resample
    continuous: bool
    """Whether what lies between two values of a label is one, too: of metres and colours, not of classes or lines."""
    metrics: tuple[Metric, ...]
    """The first one is primary: pages rank and compare answers by it."""
    meta_keys: tuple[str, ...]
    """The keys of ``meta`` that decide how a label is read; mostly none."""

    @property
    def render(self) -> Callable[..., Picture]:
        """Draw a label as a picture; the arguments are what a label of this task consists of."""

    def read(self, picture: Picture, meta: Meta | None = None) -> NDArray[Any]:
        """Read the label that ``picture`` [h, w, 3] shows. Every picture can be read, whatever a model painted."""

    def score(self, answer: Picture, label: Picture, meta: Meta | None = None, *, lpips: Lpips | None = None) -> Score:
        """Score ``answer`` against ``label``, both [h, w, 3].

        Every value is finite, or None where the label has nothing to score. What an answer leaves out counts against
        it.
        """

    def mean(self, labels: Iterable[Picture], meta: Meta | None = None, *, robust: bool = False) -> Picture:
        """Join several labels [h, w, 3] of one size into one: the mean of what they say, not of their colours.

        Args:
            labels: At least one; their order does not matter.
            meta: As in ``read``.
            robust: Take medians where a label is made of numbers (keypoints, metres), so that one stray label does not
                move the result. Votes are joined so; the baseline "mean label" is not.

        Raises:
            ValueError: There are no labels.
        """

    def export(self, answer: Picture, meta: Meta | None = None) -> dict[str, bytes]:
        """Return the answer as data, file name to content; empty where the picture itself is the answer."""


def require_labels(task: str, labels: Iterable[Picture]) -> list[Picture]:
    """Return ``labels`` as a list; ValueError where there are none."""
    pictures = list(labels)
    if not pictures:
        raise ValueError(f"no labels of {task} to take the mean of")
    return pictures


def mean_where_valid(
    values: Iterable[NDArray[np.floating]], valid: Callable[[NDArray[np.floating]], NDArray[np.bool_]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean of ``values`` over those that are valid, and how many are.

    Args:
        values: Arrays of one shape, 0 where they are not valid.
        valid: Returns which elements of an array are valid; it broadcasts to the array's shape.
    """
    # Numbers at first, which take the shape of the first array; so only one array is in memory at a time.
    total, count = np.zeros(()), np.zeros(())
    for value in values:
        total = total + value
        count = count + valid(value)
    return total / np.maximum(count, 1), count


def grey_png(values: NDArray[np.uint8] | NDArray[np.uint16]) -> bytes:
    """Return ``values`` [h, w] as a grey PNG of their depth."""
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def npy_file(values: NDArray[Any]) -> bytes:
    """Return ``values`` as NumPy's own file."""
    buffer = io.BytesIO()
    # Pickles run code where they are read: an array that needs one is a mistake here.
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()
