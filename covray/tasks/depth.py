"""Depth in metres, drawn as NYUv2 is in the generalist literature: metres / 10 to 8 bits, three equal channels."""

import numpy as np
from numpy.typing import NDArray

RESAMPLE = "nearest"
MAX_M = 10.0
"""Depth of full white; what lies further is drawn at it."""
MIN_M = 1e-3
"""Less than this is no depth: the pixel is invalid and drawn black."""


def draw(depth_m: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Depth [h, w] in metres (0, NaN or infinite where there is none) as a picture [h, w, 3]."""
    valid = np.isfinite(depth_m) & (depth_m >= MIN_M)
    level = np.clip(np.rint(np.where(valid, depth_m, 0.0) / MAX_M * 255), 1, 255)  # 0 is kept for "none"
    return np.repeat(np.where(valid, level, 0).astype(np.uint8)[..., None], 3, axis=2)


def read(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Depth [h, w] in metres by the mean of the channels; 0 where the picture has none."""
    return (picture.mean(axis=2) / 255 * MAX_M).astype(np.float32)
