"""Surface normals in camera coordinates, drawn as rgb = (n + 1) / 2; black is "no normal"."""

import numpy as np
from numpy.typing import NDArray

RESAMPLE = "nearest"


def draw(normals: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Unit normals [h, w, 3] (the zero vector where there is none) as a picture [h, w, 3]."""
    valid = np.linalg.norm(normals, axis=2) > 0.5
    return np.where(valid[..., None], np.rint((normals + 1) / 2 * 255).clip(0, 255), 0).astype(np.uint8)


def read(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Unit normals float32 [h, w, 3]; zero where the picture is black or its colour is no direction."""
    vectors = picture.astype(np.float32) / 255 * 2 - 1
    length = np.linalg.norm(vectors, axis=2, keepdims=True)
    valid = picture.any(axis=2, keepdims=True) & (length > 1e-3)
    return np.where(valid, vectors / np.maximum(length, 1e-3), 0).astype(np.float32)
