"""An eighth task, as another package would bring it: how bright a picture is, drawn as one grey."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from covray.tasks.base import Lpips, Meta, Metric, Picture, Resample, Score, require_labels

name = "brightness"
short = "bright"
resample: Resample = "nearest"
continuous = True
meta_keys: tuple[str, ...] = ()
metrics: tuple[Metric, ...] = (
    Metric("level_error", "Level error", "Difference of the two brightnesses, from 0 to 1.", "lower", short="level"),
)


def render(level: float, size_px: int) -> Picture:
    """Draw a brightness in [0, 1] as a picture of one grey."""
    return np.full((size_px, size_px, 3), round(255 * float(level)), np.uint8)


def read(picture: Picture, meta: Meta | None = None) -> NDArray[np.float64]:
    """Read the brightness in [0, 1]."""
    return np.asarray(picture.mean() / 255)


def score(answer: Picture, label: Picture, meta: Meta | None = None, *, lpips: Lpips | None = None) -> Score:
    """Score the brightness of ``answer`` against that of ``label``."""
    return Score({"level_error": abs(float(read(answer)) - float(read(label)))})


def mean(labels: Iterable[Picture], meta: Meta | None = None, *, robust: bool = False) -> Picture:
    """Return the mean brightness; with ``robust`` the median."""
    pictures = require_labels(name, labels)
    levels = [float(read(picture)) for picture in pictures]
    middle = np.median(levels) if robust else np.mean(levels)
    return render(float(middle), len(pictures[0]))


def export(answer: Picture, meta: Meta | None = None) -> dict[str, bytes]:
    """Return the brightness as JSON."""
    return {"brightness.json": json.dumps({"level": float(read(answer))}).encode()}
