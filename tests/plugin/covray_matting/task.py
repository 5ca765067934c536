"""The task: how much of each pixel is foreground, drawn as a grey."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from covray.tasks.base import Lpips, Meta, Metric, Picture, Resample, Score, grey_png, require_labels

name = "matting"
short = "matting"
resample: Resample = "bicubic"
continuous = True
meta_keys: tuple[str, ...] = ()
metrics: tuple[Metric, ...] = (
    Metric("matte_mad", "MAD", "Mean absolute difference of the mattes, in thousandths.", "lower"),
)


def render(matte: NDArray[np.floating]) -> Picture:
    """Draw a matte [h, w] in [0, 1]."""
    grey = np.rint(255 * np.clip(matte, 0, 1)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def read(picture: Picture, meta: Meta | None = None) -> NDArray[np.float64]:
    """Read the matte [h, w] in [0, 1]."""
    return picture.mean(axis=2) / 255


def score(answer: Picture, label: Picture, meta: Meta | None = None, *, lpips: Lpips | None = None) -> Score:
    """Score the matte of ``answer``."""
    return Score({"matte_mad": 1000 * float(np.abs(read(answer) - read(label)).mean())})


def mean(labels: Iterable[Picture], meta: Meta | None = None, *, robust: bool = False) -> Picture:
    """Return the mean matte; with ``robust`` the median."""
    mattes = np.stack([read(picture) for picture in require_labels(name, labels)])
    return render(np.median(mattes, axis=0) if robust else mattes.mean(axis=0))


def export(answer: Picture, meta: Meta | None = None) -> dict[str, bytes]:
    """Return the matte as a grey PNG."""
    return {"matte.png": grey_png(np.rint(255 * read(answer)).astype(np.uint8))}
