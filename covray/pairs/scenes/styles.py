"""Ten styles of a picture; half of them are the label pictures of covray's own tasks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from covray.pairs.scenes.render import View
from covray.tasks import depth, normals

_SEPIA = np.array([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]])
_PAPER, _INK = np.array([246, 240, 226], np.uint8), np.array([40, 38, 44], np.uint8)
_BLOCKS = 16


def styled(view: View, style: str) -> NDArray[np.uint8]:
    """Return the picture [h, w, 3] of ``view`` in ``style``, one of ``portrait_values.STYLES``."""
    colour = view.colour
    if style == "photo":
        return colour
    if style == "pixels":
        return _pixels(colour)
    if style == "poster":
        tones = np.rint(colour / 255 * 3) / 3
        return np.rint(tones * 255).astype(np.uint8)
    if style == "dark":
        return np.rint(colour * 0.4).astype(np.uint8)
    if style == "negative":
        return np.asarray(255 - colour)
    if style == "grey":
        return np.repeat(_luma(colour)[..., None], 3, axis=2)
    if style == "sepia":
        # Of a grey the rows of the matrix are factors: their sums. The last ones make it browner.
        toned = _luma(colour)[..., None] * _SEPIA.sum(axis=1) * np.array([0.85, 0.74, 0.58])
        return np.rint(np.clip(toned, 0, 255)).astype(np.uint8)
    if style == "sketch":
        return np.asarray(np.where(view.edges[..., None], _INK, _PAPER))
    if style == "normals":
        return normals.render(view.normals)
    if style == "depth":
        return depth.render(view.depth_m)
    raise ValueError(f"no such style: {style}")


def _luma(colour: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.rint(colour @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)


def _pixels(colour: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Average the picture in 16 by 16 blocks, or as many as it has pixels."""
    size = colour.shape[0]
    block = max(size // _BLOCKS, 1)
    kept = np.empty_like(colour)
    for top in range(0, size, block):
        for left in range(0, size, block):
            patch = colour[top : top + block, left : left + block]
            kept[top : top + block, left : left + block] = np.rint(patch.mean(axis=(0, 1)))
    return kept
