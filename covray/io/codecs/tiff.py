"""TIFF by its specification (TIFF 6.0, BigTIFF): every layout is read as its tags say, or refused by name.

libtiff, in Pillow, unpacks strips and tiles; the tags are read here. Pillow's TIFF plugin is not used: it returns 12
bits as 16, ignores "white is zero" at 16 bits, undoes the multiplication by alpha with rounding, reads planes of 16
bits as 8, and reads on where a strip is shorter than its rows.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from covray.errors import PairError
from covray.io.codecs import jpeg
from covray.io.codecs.opening import check_size, several_frames
from covray.io.codecs.raster import Raster, cmyk_to_rgb, lab_to_rgb
from covray.io.codecs.tiff_directory import Directory, Tag, read_directory

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCC, LAB = 0, 1, 2, 3, 5, 6, 8
_COLOUR_CHANNELS = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCC: 3, LAB: 3}
_NOT_READ = {
    4: "a transparency mask", 9: "ICC L*a*b*", 10: "ITU L*a*b*", 32803: "a colour filter array (raw)",
    32844: "LogL", 32845: "LogLuv", 34892: "linear raw",
}  # fmt: skip
_RAW, _OLD_JPEG, _JPEG = 1, 6, 7
_UNSPECIFIED, _ASSOCIATED, _UNASSOCIATED = 0, 1, 2
MAX_CHANNELS = 8
"""Samples a pixel of the largest picture that is read; a smaller one may have more."""
_MAX_BITS = 32


@dataclass(frozen=True)
class _Layout:
    """What the tags say of the samples."""

    width_px: int
    height_px: int
    photometric: int
    bits: int
    channels: int
    """Samples a pixel, extra samples included."""
    extra: tuple[int, ...]
    """ExtraSamples of what follows the colours; -1 where the file does not say."""
    planar: bool
    compression: int


def read_tiff(data: bytes, max_pixels: int) -> Raster:
    """Return the samples of a TIFF; the size in its tags is checked before any pixel is decoded.

    Raises:
        PairError: for damaged, truncated, multi-page and too large or small pictures, and ``unsupported`` for layouts
            that have no agreed meaning. Errors of libtiff pass through for the caller to name.
    """
    directory = read_directory(data)
    width_px, height_px = directory.value(Tag.WIDTH, 0), directory.value(Tag.LENGTH, 0)
    check_size(width_px, height_px, max_pixels)
    if directory.has_successor:
        raise several_frames("TIFF")
    # Before anything is as long as the file says: planes that share a strip cost a few bytes each.
    channels = directory.value(Tag.SAMPLES_PER_PIXEL, 1)
    if width_px * height_px * channels > MAX_CHANNELS * max_pixels:
        raise PairError("too_large", f"{width_px} x {height_px} px of {channels} samples; save RGB or RGBA")
    layout = _layout(directory, width_px, height_px)
    _require_strips(directory, layout)
    raster = _raster(directory, layout)
    return replace(raster, orientation=directory.value(Tag.ORIENTATION, 1))


def _layout(directory: Directory, width_px: int, height_px: int) -> _Layout:
    """Raise PairError ``unsupported`` for what is not read, by name."""
    photometric = directory.value(Tag.PHOTOMETRIC, -1)
    if photometric not in _COLOUR_CHANNELS:
        name = _NOT_READ.get(photometric, f"photometric interpretation {photometric}")
        raise PairError("unsupported", f"TIFF of {name}; save grey or RGB")
    channels = directory.value(Tag.SAMPLES_PER_PIXEL, 1)
    bits = directory.values(Tag.BITS, (1,))
    formats = set(directory.values(Tag.SAMPLE_FORMAT, (1,)))
    if formats != {1}:
        name = {2: "signed integers", 3: "floating point"}.get(max(formats), "samples of no stated kind")
        raise PairError("unsupported", f"TIFF of {name} has no agreed range; save 8 or 16 bits")
    if len(set(bits)) > 1:
        raise PairError("unsupported", f"TIFF of {', '.join(map(str, bits))} bits; save 8 or 16 bits")
    if bits[0] > _MAX_BITS:  # the field may say four billion, and 2 to that power takes minutes to compute
        raise PairError("unsupported", f"TIFF of {bits[0]} bits; save 8 or 16 bits")
    compression = directory.value(Tag.COMPRESSION, _RAW)
    if compression == _OLD_JPEG:
        raise PairError("unsupported", "TIFF with JPEG data of the old style (compression 6); save it anew")
    if photometric == CMYK and directory.value(Tag.INK_SET, 1) != 1:
        raise PairError("unsupported", "TIFF of other inks than CMYK; save RGB")
    extra_count = channels - _COLOUR_CHANNELS[photometric]
    if extra_count < 0:
        raise PairError("damaged", f"{channels} samples a pixel for photometric interpretation {photometric}")
    extra = directory.values(Tag.EXTRA_SAMPLES)
    if len(extra) != extra_count or any(kind > _UNASSOCIATED for kind in extra):
        extra = (-1,) * extra_count
    planar = directory.value(Tag.PLANAR, 1) == 2 and channels > 1
    return _Layout(width_px, height_px, photometric, bits[0], channels, extra, planar, compression)


def _require_strips(directory: Directory, layout: _Layout) -> None:
    """Raise PairError where a strip or tile lacks bytes, or holds a JPEG that is not whole."""
    tiled = Tag.TILE_OFFSETS in directory.entries
    offsets = directory.values(Tag.TILE_OFFSETS if tiled else Tag.STRIP_OFFSETS)
    counts = directory.values(Tag.TILE_COUNTS if tiled else Tag.STRIP_COUNTS)
    if not offsets or len(counts) != len(offsets):
        raise PairError("damaged", f"{len(offsets)} strips or tiles and {len(counts)} byte counts")
    for number, (offset, count) in enumerate(zip(offsets, counts, strict=True)):
        if offset + count > len(directory.data) or count < _plain_bytes(directory, layout, number, tiled):
            raise PairError("truncated", f"strip {number} is shorter than its rows, or lies beyond the file")
    if layout.compression == _JPEG:
        # Each is looked through as a whole: strips that share bytes would multiply the work.
        if sum(counts) > len(directory.data):
            raise PairError("damaged", "strips overlap")
        for offset, count in zip(offsets, counts, strict=True):
            jpeg.require_whole(directory.data[offset : offset + count], bytes(directory.values(Tag.JPEG_TABLES)))


def _plain_bytes(directory: Directory, layout: _Layout, number: int, tiled: bool) -> int:
    """The bytes that strip ``number`` must have; 0 where that depends on a compression, or on YCbCr's subsampling."""
    if layout.compression != _RAW or layout.photometric == YCC:
        return 0
    bits = layout.bits * (1 if layout.planar else layout.channels)
    if tiled:
        return -(-directory.value(Tag.TILE_WIDTH, 0) * bits // 8) * directory.value(Tag.TILE_LENGTH, 0)
    rows = max(1, directory.value(Tag.ROWS_PER_STRIP, layout.height_px))
    above = number % -(-layout.height_px // rows) * rows
    return -(-layout.width_px * bits // 8) * min(rows, layout.height_px - above)


def _raster(directory: Directory, layout: _Layout) -> Raster:
    photometric, maximum = layout.photometric, 2**layout.bits - 1
    if photometric == YCC:
        return Raster(_ycc_samples(directory, layout), 255)
    if layout.bits == 32 and layout.channels == 1 and photometric != PALETTE:
        return Raster(_plane(directory, layout, 0).astype(np.int64), None)
    samples = _channels(directory, layout)
    base = _COLOUR_CHANNELS[photometric]
    alpha, premultiplied = _alpha(layout, samples[base:], maximum)
    if photometric == PALETTE:
        return Raster(samples[0], maximum, palette=_palette(directory, layout, alpha))
    if base == 1:
        return Raster(samples[0], maximum, alpha, premultiplied, white_is_zero=photometric == WHITE_IS_ZERO)
    pixels = np.stack(samples[:base], axis=-1)
    if photometric == CMYK:
        pixels = _cmyk_as_rgb(pixels, maximum)
    if photometric == LAB:
        if layout.bits != 8:
            raise PairError("unsupported", f"TIFF of L*a*b* in {layout.bits} bits; save RGB")
        pixels = lab_to_rgb(pixels)
    return Raster(pixels, maximum, alpha, premultiplied)


def _alpha(layout: _Layout, extra: list[NDArray], maximum: int) -> tuple[NDArray | None, bool]:
    """Alpha and whether the colours are multiplied by it. Further samples that are declared unspecified count nothing.

    A sample of no declared meaning is alpha to one program and nothing to another: it is accepted where it is opaque
    throughout, which both read alike.
    """
    alpha, premultiplied = None, False
    for kind, plane in zip(layout.extra, extra, strict=True):
        if kind == _UNSPECIFIED or (kind == -1 and plane.min() == maximum):
            continue
        if kind == -1:
            raise PairError("unsupported", "TIFF with an extra sample that it does not explain; declare ExtraSamples")
        if alpha is not None or layout.photometric in (CMYK, LAB):
            raise PairError("unsupported", "TIFF of several alphas, or of alpha with CMYK or L*a*b*; save RGBA")
        alpha, premultiplied = plane, kind == _ASSOCIATED
    if alpha is not None and premultiplied and layout.photometric == WHITE_IS_ZERO:
        raise PairError("unsupported", "TIFF whose white is zero and multiplied by alpha; save grey or RGBA")
    return alpha, premultiplied


def _palette(directory: Directory, layout: _Layout, alpha: NDArray | None) -> NDArray[np.uint8]:
    """Colours by index; a map of 16-bit numbers counts by its high bytes, as it is written."""
    if alpha is not None:
        raise PairError("unsupported", "TIFF of a palette with alpha; save RGBA")
    colours = np.array(directory.values(Tag.COLOUR_MAP), np.int64)
    if layout.bits > 8 or len(colours) != 3 * 2**layout.bits:
        raise PairError("damaged", f"a colour map of {len(colours)} numbers for {layout.bits} bits")
    if 0 < colours.max() < 256:
        raise PairError("unsupported", "TIFF with a colour map of 8-bit numbers, where 16 bits are due; save RGB")
    rgb = (colours >> 8).reshape(3, -1).T
    return np.column_stack([rgb, np.full(len(rgb), 255)]).astype(np.uint8)


def _cmyk_as_rgb(inks: NDArray, maximum: int) -> NDArray:
    if maximum == 255:
        return np.array(Image.fromarray(inks, "CMYK").convert("RGB"))
    return cmyk_to_rgb(inks, maximum)


def _channels(directory: Directory, layout: _Layout) -> list[NDArray]:
    """The stored samples as a list of channels [h, w]."""
    if layout.planar or layout.channels == 1:
        return [_plane(directory, layout, number) for number in range(layout.channels)]
    modes = {2: ("LA", "LA"), 3: ("RGB", "RGB"), 4: ("RGBA", "RGBA"), 5: ("RGBA", "RGBAX"), 6: ("RGBA", "RGBAXX")}
    if layout.bits == 8 and layout.channels in modes:
        interleaved = _unpacked(directory, layout, *modes[layout.channels])
    elif layout.bits == 16 and layout.channels == 2:
        # Four bytes a pixel in the machine's order: Pillow has no mode of two wide channels.
        interleaved = _unpacked(directory, layout, "RGBA", "RGBA").view(np.uint16)
    elif layout.bits == 16 and layout.channels in (3, 4):
        mode = modes[layout.channels][0]
        # Pillow keeps one byte of 16 bits: the high one of the order that it is told.
        little, big = (_unpacked(directory, layout, mode, f"{mode};16{order}") for order in "LB")
        high, low = (little, big) if sys.byteorder == "little" else (big, little)
        interleaved = high.astype(np.uint16) << 8 | low
    else:
        raise PairError("unsupported", f"TIFF of {layout.channels} samples of {layout.bits} bits; save 8 or 16 bits")
    channels = [interleaved[..., number] for number in range(interleaved.shape[-1])]
    if len(channels) < layout.channels and layout.extra[-1] != _UNSPECIFIED:
        raise PairError("unsupported", f"TIFF of {layout.channels} samples a pixel; save RGB or RGBA")
    # Pillow drops samples that the file calls unspecified; the last one stands for them, and counts nothing either.
    return channels + channels[-1:] * (layout.channels - len(channels))


def _plane(directory: Directory, layout: _Layout, number: int) -> NDArray:
    """One channel [h, w], stored by itself."""
    modes = {
        1: ("P", "P;1"), 2: ("P", "P;2"), 4: ("P", "P;4"), 8: ("L", "L"), 12: ("I;16", "I;12"), 16: ("I;16", "I;16N"),
        32: ("I", "I;32N"),
    }  # fmt: skip
    if layout.bits not in modes:
        raise PairError("unsupported", f"TIFF of {layout.bits} bits; save 8 or 16 bits")
    return _unpacked(_of_plane(directory, layout, number), layout, *modes[layout.bits])


def _of_plane(directory: Directory, layout: _Layout, number: int) -> Directory:
    """The file with a directory that knows the strips of one plane only, as a grey picture."""
    if not layout.planar:
        return directory
    replaced: dict[int, tuple[int, ...]] = {
        Tag.PHOTOMETRIC: (BLACK_IS_ZERO,),
        Tag.SAMPLES_PER_PIXEL: (1,),
        Tag.PLANAR: (1,),
        Tag.BITS: (layout.bits,),
        Tag.EXTRA_SAMPLES: (),
        Tag.SAMPLE_FORMAT: (1,),
    }
    for tag in (Tag.STRIP_OFFSETS, Tag.STRIP_COUNTS, Tag.TILE_OFFSETS, Tag.TILE_COUNTS):
        if tag in directory.entries:
            values = directory.values(tag)
            of_plane = len(values) // layout.channels
            replaced[tag] = values[number * of_plane : (number + 1) * of_plane]
    return directory.rewritten(replaced)


def _ycc_samples(directory: Directory, layout: _Layout) -> NDArray[np.uint8]:
    """Y Cb Cr as RGB: by Pillow where it lies plainly, else by libtiff, which knows subsampling and levels."""
    if layout.bits != 8 or layout.channels != 3:
        raise PairError("unsupported", f"TIFF of YCbCr in {layout.channels} samples of {layout.bits} bits; save RGB")
    whole = directory.values(Tag.YCC_SUBSAMPLING, (2, 2)) == (1, 1)
    if layout.compression == _RAW and whole and not layout.planar and _full_range(directory):
        # libtiff would convert it, one level off Pillow here and there; called RGB, it is left as it is.
        stored = _unpacked(directory.rewritten({Tag.PHOTOMETRIC: (RGB,)}), layout, "RGB", "RGB")
        return np.array(Image.fromarray(stored, "YCbCr").convert("RGB"))
    of_jpeg = layout.compression == _JPEG and not layout.planar
    return _unpacked(directory, layout, "RGB", "RGB" if of_jpeg else "RGBX")


def _full_range(directory: Directory) -> bool:
    """Whether black is 0 and white 255, and no colour lies at 128."""
    stated = directory.values(Tag.REFERENCE_BLACK_WHITE, (0, 1, 255, 1, 128, 1, 255, 1, 128, 1, 255, 1))
    levels = (0, 255, 128, 255, 128, 255)
    numbers = zip(stated[::2], stated[1::2], levels, strict=False)
    return len(stated) == 12 and all(above == level * below for above, below, level in numbers)


def _unpacked(directory: Directory, layout: _Layout, mode: str, raw_mode: str) -> NDArray:
    size = (layout.width_px, layout.height_px)
    image = Image.frombytes(mode, size, directory.data, "libtiff", raw_mode, False, directory.at)
    return np.array(image)
