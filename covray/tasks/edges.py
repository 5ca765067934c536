"""Edges: strength a pixel, white on black."""

import numpy as np
from numpy.typing import NDArray

RESAMPLE = "bicubic"


def draw(edges: NDArray[np.bool_] | NDArray[np.floating]) -> NDArray[np.uint8]:
    """Edge strength [h, w] in [0, 1] as a picture [h, w, 3]."""
    level = np.rint(np.clip(edges.astype(np.float64), 0, 1) * 255).astype(np.uint8)
    return np.repeat(level[..., None], 3, axis=2)


def read(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Edge strength float32 [h, w] in [0, 1]: the mean of the channels."""
    return (picture.mean(axis=2) / 255).astype(np.float32)
