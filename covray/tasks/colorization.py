"""Colorization: from grey to colour; the label is the photograph itself."""

import numpy as np
from numpy.typing import NDArray

RESAMPLE = "bicubic"


def grey(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture [h, w, 3] in three equal channels, by ITU-R BT.601 luma (.2989, .5870, .1140), as LVM does."""
    luma = np.rint(picture @ np.array([0.2989, 0.5870, 0.1140])).clip(0, 255).astype(np.uint8)
    return np.repeat(luma[..., None], 3, axis=2)


def draw(colour: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Colour [h, w, 3] in [0, 1] as a picture [h, w, 3]."""
    return np.rint(np.clip(colour, 0, 1) * 255).astype(np.uint8)


def read(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Colour float32 [h, w, 3] in [0, 1]."""
    return picture.astype(np.float32) / np.float32(255)
