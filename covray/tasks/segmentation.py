"""Segmentation: a class index a pixel, drawn in the PASCAL VOC colours."""

import numpy as np
from numpy.typing import NDArray

RESAMPLE = "nearest"


def palette(classes: int) -> NDArray[np.uint8]:
    """The first ``classes`` (at most 256) colours of the PASCAL VOC colour map, uint8 [classes, 3].

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


def draw(classes: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Class indices [h, w], 0..255, as a picture [h, w, 3]."""
    return palette(256)[classes]


def read(picture: NDArray[np.uint8], classes: int = 21) -> NDArray[np.uint8]:
    """The nearest of the first ``classes`` palette colours at every pixel, as class indices uint8 [h, w].

    Exact on drawn labels; on generated ones this is the decoding the literature scores (facts: Metrics).
    """
    colours = palette(classes).astype(np.int32)
    pixels = picture.reshape(-1, 3).astype(np.int32)
    # |p - c|^2 = |p|^2 - 2 p.c + |c|^2, and |p|^2 does not change which colour is nearest.
    distance = (colours**2).sum(1)[None, :] - 2 * pixels @ colours.T
    return distance.argmin(1).astype(np.uint8).reshape(picture.shape[:2])
