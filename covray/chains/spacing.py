"""Where frames stand: adaptive alphas, at which a chain goes on in even steps; and frames that no prior makes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from covray.io.pixels import Picture, step_sizes
from covray.tasks.base import Resample

PROBES = 8
"""Frames at even alphas, by which the path of a chain is measured."""
PROBE_ALPHAS = tuple(float(np.float32(number / (PROBES + 1))) for number in range(1, PROBES + 1))
COARSE_CELLS = 16
"""Cells along a side of a coarse label at alpha 1; at alpha 1/2 a picture of 64 px has cells of 8 px."""


def even_path_alphas(pictures: Sequence[Picture], alphas: Sequence[float], shares: Sequence[float]) -> list[float]:
    """Return the alphas at which a chain has gone ``shares`` of its path.

    The path is that through ``pictures``, as RMS distances of pixels; between two of them it is taken to go on evenly.
    A chain whose pictures are all equal keeps ``shares`` as alphas.

    Args:
        pictures: From the source to the label, uint8 [h, w, 3] each.
        alphas: Where they stand, ascending from 0 to 1.
        shares: Of the path, between 0 and 1, ascending.
    """
    # gone[i] is the way to picture i, in RMS pixels; gone[0] is 0.
    gone = np.cumsum([0.0, *step_sizes(pictures)])
    if not gone[-1]:
        return list(shares)
    # The path is a rising function of alpha, piecewise linear: interp reads it the other way round.
    even = np.interp(np.asarray(shares) * gone[-1], gone, alphas)
    return list(map(float, even))


def coarse_label(label: Picture, alpha: float, resample: Resample) -> Picture:
    """Return a label in square cells, of which there are more the nearer ``alpha`` is to 1: a control for frames.

    Args:
        label: uint8 [h, w, 3].
        alpha: Between 0 and 1; there are ``COARSE_CELLS`` x alpha cells along a side.
        resample: How the task's labels are resized; with ``nearest`` a cell has its most frequent colour, else its
            mean.
    """
    height, width = label.shape[:2]
    # At least one cell, and no cell smaller than a pixel.
    cells = max(1, min(round(COARSE_CELLS * alpha), height, width))
    row_cells, column_cells = np.arange(height) * cells // height, np.arange(width) * cells // width
    coarse = np.empty_like(label)
    # Cells differ by a pixel where the side is not divisible, so that they are not reshaped into a grid.
    for row in range(cells):
        for column in range(cells):
            area = np.ix_(row_cells == row, column_cells == column)
            coarse[area] = _colour(label[area].reshape(-1, 3), resample)
    return coarse


def _colour(pixels: NDArray[np.uint8], resample: Resample) -> NDArray[np.uint8]:
    """Return the colour of a cell of ``pixels`` [n, 3]: the mean, or of labels of classes the most frequent one."""
    if resample != "nearest":
        return np.rint(pixels.mean(axis=0)).astype(np.uint8)
    # A mean of two classes' colours would be a third class.
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    colour: NDArray[np.uint8] = colours[counts.argmax()]
    return colour
