"""JPEG, WebP, BMP, GIF, PPM and AVIF: Pillow's plugins, with what they leave out."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from covray.errors import PairError
from covray.io.codecs import jpeg
from covray.io.codecs.opening import opened, orientation_of, require_no_hdr
from covray.io.codecs.raster import Raster

_PNM_HEADER = re.compile(rb"P[25](?:\s|#[^\n]*\n)+\d+(?:\s|#[^\n]*\n)+\d+(?:\s|#[^\n]*\n)+(\d+)\s")
_JPEG_MAGIC = b"\xff\xd8\xff"
_NCLX = re.compile(rb"colrnclx..(..)", re.DOTALL)
_HEAD_BYTES = 2**16
"""Where AVIF's description of its colours lies."""


def read_plain(data: bytes, max_pixels: int) -> Raster:
    """Return the samples of a picture in one of the formats above.

    Raises:
        PairError: whatever is wrong with it.
    """
    if data.startswith(_JPEG_MAGIC):
        jpeg.require_known(data)
    with opened(data, max_pixels) as image:
        if image.format == "AVIF":
            _require_no_hdr(data)
        covered = _covered(image) if image.format == "GIF" else None
        image.load()
        if image.format in ("JPEG", "MPO"):
            jpeg.require_whole(data)
        return replace(_raster(image, data, covered), orientation=orientation_of(image))


def _raster(image: Image.Image, data: bytes, covered: tuple[int, ...] | None) -> Raster:
    """The samples of a loaded picture; ``covered`` is the part of a GIF's canvas that its frame fills."""
    if image.mode == "F":
        raise PairError("unsupported", "floating point pixels have no agreed range; save 8 or 16 bits")
    if image.mode == "P" or image.format == "GIF":
        return _indexed(image, covered)
    pixels = np.array(image)
    if image.mode == "1":
        inverted = image.format == "PPM"  # whose ones are black
        return Raster((pixels ^ inverted).astype(np.uint8), 1, white_is_zero=inverted)
    if image.format == "PPM" and image.mode in ("L", "I"):
        return _grey_of_pnm(data, pixels)
    if image.mode in ("L", "RGB"):
        return Raster(pixels, 255)
    if image.mode in ("LA", "RGBA"):
        return Raster(np.array(image.convert("RGB")), 255, pixels[..., -1])
    return Raster(np.array(image.convert("RGB")), 255)


def _grey_of_pnm(data: bytes, scaled: NDArray) -> Raster:
    """Grey levels as stored: Pillow has scaled them from the file's maximum to 255 or 65535, which can be undone."""
    header = _PNM_HEADER.match(data)
    full = 65535 if scaled.dtype != np.uint8 else 255
    maximum = int(header[1]) if header else full
    stored = scaled
    if maximum != full:
        stored = (2 * scaled.astype(np.int64) * maximum + full) // (2 * full)
    return Raster(stored.astype(np.uint8 if maximum < 256 else np.uint16), maximum)


def _covered(image: Image.Image) -> tuple[int, ...] | None:
    """The part of a GIF's canvas (left, top, right, bottom) that its frame fills; known before it is loaded."""
    tiles = getattr(image, "tile", ())
    return tuple(tiles[0].extents) if tiles else None


def _indexed(image: Image.Image, covered: tuple[int, ...] | None) -> Raster:
    """Indices and colours; the part of a GIF's canvas that its frame does not cover shows nothing, as in browsers."""
    ramp = list(range(256))
    flat = image.getpalette("RGB") if image.mode == "P" else np.repeat(ramp, 3).tolist()
    colours = np.array(flat or [], np.uint8).reshape(-1, 3)
    alpha = np.full(len(colours), 255, np.uint8)
    hidden = image.info.get("transparency")
    if isinstance(hidden, int) and hidden < len(alpha):
        alpha[hidden] = 0
    palette = np.column_stack([colours, alpha])
    indices = np.array(image)
    if covered is not None and covered != (0, 0, *image.size):
        left, top, right, bottom = covered
        outside = np.ones(indices.shape, bool)
        outside[top:bottom, left:right] = False
        palette = np.vstack([palette, np.zeros((1, 4), np.uint8)])
        indices = np.where(outside, len(palette) - 1, indices).astype(np.uint16)
    return Raster(indices, 255, palette=palette)


def _require_no_hdr(data: bytes) -> None:
    """Refuse an AVIF of HDR, by its colour box: ``colr``, kind ``nclx``, primaries, then the transfer (two bytes)."""
    stated = _NCLX.search(data, 0, _HEAD_BYTES)
    if stated is not None:
        require_no_hdr("AVIF", int.from_bytes(stated[1], "big"))
