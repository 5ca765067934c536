"""Colorization: from grey to colour; the label is the photograph itself."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from covray.io.pixels import mse, psnr
from covray.tasks.base import Lpips, Meta, Metric, Picture, Resample, Score
from covray.tasks.pictures import LPIPS, MSE, PSNR, mean_colour, read_colour, render_colour

name = "colorization"
short = "colour"
resample: Resample = "bicubic"
continuous = True
meta_keys: tuple[str, ...] = ()
metrics: tuple[Metric, ...] = (MSE, LPIPS, PSNR)


def grey(picture: Picture) -> Picture:
    """Return the picture [h, w, 3] in three equal channels, by ITU-R BT.601 luma (.2989, .5870, .1140), as LVM does."""
    # The weights sum to 0.9999; rounding keeps white at 255.
    luma = np.rint(picture @ np.array([0.2989, 0.5870, 0.1140])).clip(0, 255).astype(np.uint8)
    return np.repeat(luma[..., None], 3, axis=2)


def render(colour: NDArray[np.floating]) -> Picture:
    """Draw colour [h, w, 3] in [0, 1] as a picture [h, w, 3]."""
    return render_colour(colour)


def read(picture: Picture, meta: Meta | None = None) -> NDArray[np.float32]:
    """Read colour float32 [h, w, 3] in [0, 1]."""
    return read_colour(picture)


def score(answer: Picture, label: Picture, meta: Meta | None = None, *, lpips: Lpips | None = None) -> Score:
    """Score the pixels of ``answer`` against those of ``label``."""
    perceptual = {} if lpips is None else {"lpips": float(lpips(answer, label))}
    return Score({"mse": mse(answer, label), **perceptual, "psnr": psnr(answer, label)})


def mean(labels: Iterable[Picture], meta: Meta | None = None, *, robust: bool = False) -> Picture:
    """Return the mean of the pixels."""
    return mean_colour(name, labels)


def export(answer: Picture, meta: Meta | None = None) -> dict[str, bytes]:
    """Return no files: the picture is the answer."""
    return {}
