"""What a picture file stores, and its meaning as RGB: depth, alpha, palette and orientation, by definition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from covray.errors import PairError
from covray.io.pixels import to_srgb

BAND_ROWS = 256
"""Rows that are converted at once, so that wide integers of a whole picture never lie in memory."""

_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, eq=False)
class Raster:
    """The samples of a picture as its file stores them, and what they mean."""

    samples: NDArray
    """uint8, uint16 or int64 [h, w] grey levels or indices of a palette, or [h, w, 3] red, green, blue."""
    maximum: int | None
    """The sample of full intensity; None where the format leaves the range open."""
    alpha: NDArray | None = None
    """uint8 or uint16 [h, w], 0 is transparent and ``maximum`` opaque; for a palette, which has its own, None."""
    premultiplied: bool = False
    """Whether the samples are already multiplied by ``alpha``."""
    palette: NDArray[np.uint8] | None = None
    """[n, 4] red, green, blue and alpha of each index; None where the samples are intensities."""
    white_is_zero: bool = False
    orientation: int = 1
    """EXIF's 1 to 8: how to turn the samples for display."""


def to_rgb(raster: Raster) -> NDArray[np.uint8]:
    """Return ``raster`` as upright RGB [h, w, 3], 8 bits, composited on black.

    Intensities are scaled by 255 / maximum and rounded half up, after they are multiplied by alpha.

    Raises:
        PairError: ``unsupported`` where the samples have no agreed range, ``damaged`` for an index without a colour.
    """
    if raster.palette is not None:
        rgb = _looked_up(raster.samples, raster.palette)
    elif raster.maximum is None:
        raise PairError("unsupported", "pixels without an agreed range (wide integers); save 8 or 16 bits")
    else:
        rgb = _scaled(raster, raster.maximum)
    return turned(rgb, raster.orientation)


def turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Return ``pixels`` [h, w] or [h, w, 3] as EXIF's ``orientation`` displays them; unknown numbers turn nothing."""
    turn = _TURN.get(orientation)
    return pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))


def cmyk_to_rgb(cmyk: NDArray[np.uint16], maximum: int) -> NDArray[np.uint16]:
    """Return amounts of ink [h, w, 4] as RGB [h, w, 3] of the same ``maximum``: (1 - ink) (1 - black)."""
    rgb = np.empty((*cmyk.shape[:2], 3), np.uint16)
    for top in range(0, len(cmyk), BAND_ROWS):
        paper = maximum - cmyk[top : top + BAND_ROWS].astype(np.int64)
        rgb[top : top + BAND_ROWS] = (2 * paper[..., :3] * paper[..., 3:] + maximum) // (2 * maximum)
    return rgb


def lab_to_rgb(lab: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return TIFF's CIE L*a*b* [h, w, 3] as sRGB [h, w, 3].

    L* is 0 to 255 for 0 to 100; a* and b* are signed bytes. The white point is D50, adapted to sRGB's D65 by
    Bradford's matrix (TIFF 6.0, section 23; CIE 15:2004; IEC 61966-2-1).
    """
    xyz_d50_to_linear = np.array(
        [
            [3.1338561, -1.6168667, -0.4906146],
            [-0.9787684, 1.9161415, 0.0334540],
            [0.0719453, -0.2289914, 1.4052427],
        ]
    )
    white_d50 = np.array([0.96422, 1.0, 0.82521])
    rgb = np.empty(lab.shape, np.uint8)
    for top in range(0, len(lab), BAND_ROWS):
        band = lab[top : top + BAND_ROWS]
        lightness = band[..., 0] * (100 / 255)
        a, b = (band[..., channel].astype(np.int8).astype(np.float64) for channel in (1, 2))
        y = (lightness + 16) / 116
        f = np.stack([y + a / 500, y, y - b / 200], axis=-1)
        xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * white_d50
        rgb[top : top + BAND_ROWS] = np.floor(255 * to_srgb(xyz @ xyz_d50_to_linear.T) + 0.5)
    return rgb


def _looked_up(indices: NDArray, palette: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if indices.max() >= len(palette):
        raise PairError("damaged", f"a pixel of colour {indices.max()}, where the palette has {len(palette)} colours")
    # Composited before the lookup: a palette has at most 256 colours.
    opaque = (2 * palette[:, :3].astype(np.int64) * palette[:, 3:] + 255) // 510
    return opaque.astype(np.uint8)[indices]


def _scaled(raster: Raster, maximum: int) -> NDArray[np.uint8]:
    samples = raster.samples
    if raster.white_is_zero:
        samples = maximum - samples
    if samples.ndim == 2:
        samples = samples[..., None]
    if raster.alpha is None or raster.premultiplied:
        levels = samples if maximum == 255 else _scaled_levels(samples, maximum)
    elif maximum == 255 and samples.shape[2] == 3:
        levels = _composited(samples, raster.alpha)
    else:
        levels = _scaled_levels(samples, maximum, raster.alpha)
    levels = levels.astype(np.uint8, copy=False)
    return levels if levels.shape[2] == 3 else np.repeat(levels, 3, axis=2)


def _scaled_levels(samples: NDArray, maximum: int, alpha: NDArray | None = None) -> NDArray[np.uint8]:
    """round(255 * samples / maximum * alpha / maximum), exactly, half up, of [h, w, channels] and [h, w]."""
    levels = np.empty(samples.shape, np.uint8)
    for top in range(0, len(samples), BAND_ROWS):
        rows = slice(top, top + BAND_ROWS)
        numerator, denominator = 255 * samples[rows].astype(np.int64), maximum
        if alpha is not None:
            numerator *= alpha[rows][..., None]
            denominator *= maximum
        levels[rows] = (2 * numerator + denominator) // (2 * denominator)
    return levels


def _composited(rgb: NDArray, alpha: NDArray) -> NDArray[np.uint8]:
    """The same as ``_scaled_levels`` for 8 bits, in Pillow's faster code."""
    cut_out = Image.fromarray(np.dstack([rgb, alpha]).astype(np.uint8, copy=False))
    ground = Image.new("RGBA", cut_out.size, (0, 0, 0, 255))
    return np.array(Image.alpha_composite(ground, cut_out).convert("RGB"))
