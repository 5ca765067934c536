"""PNG by its specification: samples of every depth, tRNS, checksums; metadata is never unpacked (W3C PNG, 3rd edition).

Pillow's zip decoder inflates and unfilters. Its PNG plugin is not used: it compares the tRNS of 16-, 4- and 2-bit
pictures with scaled samples, cuts 16-bit colours to their high byte, leaves rows black that the data lacks, and
refuses a sound picture for a large colour profile or text.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from covray.errors import PairError
from covray.io.codecs.opening import HOSTILE, check_size, require_no_hdr, several_frames
from covray.io.codecs.raster import Raster

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_METADATA_BYTES = 2**20
"""Text that may name the orientation is read up to this size, inflated; longer text is passed over."""

GREY, RGB, INDEXED, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
_DEPTHS = {GREY: (1, 2, 4, 8, 16), RGB: (8, 16), INDEXED: (1, 2, 4, 8), GREY_ALPHA: (8, 16), RGB_ALPHA: (8, 16)}
_CHANNELS = {GREY: 1, RGB: 3, INDEXED: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column, first row, column step and row step of each pass of an interlaced picture."""


@dataclass
class _Png:
    """The chunks that pixels depend on."""

    width_px: int = 0
    height_px: int = 0
    depth: int = 0
    colour: int = 0
    interlaced: int = 0
    palette: bytes = b""
    transparency: bytes | None = None
    data: list[bytes] = field(default_factory=list)
    exif: bytes | None = None
    profile_exif: bytes | None = None
    xmp: bytes | None = None


def read_png(data: bytes, max_pixels: int) -> Raster:
    """Return the samples of a PNG; the size in its header is checked before any pixel is decoded.

    Raises:
        PairError: for damaged, truncated, animated and too large or small pictures. Errors of Pillow's decoder pass
            through for the caller to name.
    """
    png = _parsed(data, max_pixels)
    samples = _samples(png)
    maximum = 2**png.depth - 1
    raster = Raster(samples, maximum)
    if png.colour == GREY_ALPHA:
        raster = Raster(samples[..., 0], maximum, samples[..., 1])
    elif png.colour == RGB_ALPHA:
        raster = Raster(samples[..., :3], maximum, samples[..., 3])
    elif png.colour == INDEXED:
        raster = Raster(samples, maximum, palette=_palette(png))
    elif png.transparency is not None:
        raster = Raster(samples, maximum, _keyed_alpha(png, samples, maximum))
    return replace(raster, orientation=_orientation(png))


def _parsed(data: bytes, max_pixels: int) -> _Png:
    png = _Png()
    for name, body in _chunks(data):
        if name == b"IHDR":
            _read_header(png, body)
            check_size(png.width_px, png.height_px, max_pixels)
        elif not png.depth:
            raise PairError("damaged", f"begins with chunk {name!r}, not with IHDR")
        elif name == b"PLTE":
            png.palette = body
        elif name == b"tRNS":
            png.transparency = body
        elif name == b"IDAT":
            png.data.append(body)
        elif name == b"acTL" and int.from_bytes(body[:4], "big") > 1:
            raise several_frames("PNG")
        elif name == b"cICP" and len(body) == 4:
            require_no_hdr("PNG", body[1])
        elif name == b"eXIf":
            png.exif = body
        elif name in (b"tEXt", b"zTXt", b"iTXt"):
            _read_text(png, name, body)
        # All other chunks (colour profiles, gamma, times, applications' own) are passed over unread.
    if not png.data:
        raise PairError("truncated" if png.depth else "damaged", "holds no image data")
    return png


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield name and body of each chunk up to IEND; checksums count for the chunks that pixels depend on."""
    if not data.startswith(SIGNATURE):
        raise PairError("damaged", "the signature of PNG is broken, as by a transfer as text")
    at = len(SIGNATURE)
    while at < len(data):
        length, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        body, check = data[at + 8 : at + 8 + length], data[at + 8 + length : at + 12 + length]
        if name == b"IEND":
            return
        if len(check) < 4:
            raise PairError("truncated", f"ends within chunk {name!r}")
        if not name.isalpha():
            raise PairError("damaged", f"a chunk named {name!r}")
        # Chunks that begin with a capital are critical to the picture, by definition; tRNS is in fact.
        counts = name[0:1].isupper() or name == b"tRNS"
        if counts and zlib.crc32(body, zlib.crc32(name)) != int.from_bytes(check, "big"):
            raise PairError("damaged", f"the checksum of chunk {name!r} is wrong")
        yield name, body
        at += 12 + length


def _read_header(png: _Png, body: bytes) -> None:
    if len(body) != 13 or png.depth:
        raise PairError("damaged", "the header (IHDR) is not one")
    width_px, height_px, depth, colour, packing, filtering, interlaced = struct.unpack(">2I5B", body)
    if depth not in _DEPTHS.get(colour, ()) or packing or filtering or interlaced > 1:
        raise PairError("damaged", f"the header has depth {depth}, colour type {colour}, interlacing {interlaced}")
    png.width_px, png.height_px, png.depth, png.colour, png.interlaced = width_px, height_px, depth, colour, interlaced


def _samples(png: _Png) -> NDArray:
    """The stored samples [h, w] or [h, w, channels], uint8 below 16 bits."""
    if png.depth < 8:
        samples = _decoded(png, "P", f"P;{png.depth}")  # as indices, which Pillow does not scale
    elif png.depth == 8:
        mode = {GREY: "L", INDEXED: "P", GREY_ALPHA: "LA", RGB: "RGB", RGB_ALPHA: "RGBA"}[png.colour]
        samples = _decoded(png, mode, mode)
    elif png.colour == GREY:
        samples = _decoded(png, "I;16", "I;16B")
    elif png.colour == GREY_ALPHA:
        # Four bytes a pixel, as in RGBA: Pillow has no mode of two wide channels.
        samples = _decoded(png, "RGBA", "RGBA").view(">u2").astype(np.uint16)
    else:
        mode = "RGB" if png.colour == RGB else "RGBA"
        # Pillow keeps the high byte of 16 bits; told that the order is little-endian, it keeps the low one.
        high, low = _decoded(png, mode, f"{mode};16B"), _decoded(png, mode, f"{mode};16L")
        samples = high.astype(np.uint16) << 8 | low
    _require_all_rows(png, samples)
    return samples


def _decoded(png: _Png, mode: str, raw_mode: str) -> NDArray:
    size = (png.width_px, png.height_px)
    image = Image.frombytes(mode, size, b"".join(png.data), "zip", raw_mode, png.interlaced)
    return np.array(image)


def _require_all_rows(png: _Png, samples: NDArray) -> None:
    """Raise PairError where the data ends early: Pillow leaves the rest zero, and says nothing."""
    last = len(samples) - 1
    if png.interlaced:
        last -= last % 2 == 0  # the last pass has the odd rows
    # Rows are decoded in their order: where the last has a value, all before it were there.
    if samples[last].any():
        return
    inflater, counted, rest = zlib.decompressobj(), 0, b"".join(png.data)
    while rest and not inflater.eof:
        counted += len(inflater.decompress(rest, 2**20))
        rest = inflater.unconsumed_tail
    if counted < _raw_bytes(png):
        raise PairError("truncated", f"the data ends after {counted} of {_raw_bytes(png)} bytes")


def _raw_bytes(png: _Png) -> int:
    """How many bytes the rows have with their filter types."""
    bits = png.depth * _CHANNELS[png.colour]
    if not png.interlaced:
        return png.height_px * (1 + (png.width_px * bits + 7) // 8)
    total = 0
    for left, top, column_step, row_step in _ADAM7:
        columns = -(-(png.width_px - left) // column_step)
        rows = -(-(png.height_px - top) // row_step)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total


def _palette(png: _Png) -> NDArray[np.uint8]:
    """Return the colours of the palette with their alpha, uint8 [colours, 4]. Raises PairError."""
    if not png.palette or len(png.palette) % 3 or len(png.palette) > 3 * 256:
        raise PairError("damaged", f"a palette (PLTE) of {len(png.palette)} bytes")
    colours = np.frombuffer(png.palette, np.uint8).reshape(-1, 3)
    # Alpha is given for the first colours only; the others are opaque.
    alpha = np.full(len(colours), 255, np.uint8)
    listed = np.frombuffer(png.transparency or b"", np.uint8)[: len(colours)]
    alpha[: len(listed)] = listed
    return np.column_stack([colours, alpha])


def _keyed_alpha(png: _Png, samples: NDArray, maximum: int) -> NDArray:
    """Alpha of the one colour that tRNS makes transparent; its samples have the depth of the picture's."""
    channels = _CHANNELS[png.colour]
    if png.transparency is None or len(png.transparency) < 2 * channels:
        raise PairError("damaged", "the transparent colour (tRNS) is cut")
    # 16 bits a channel whatever the depth; of the smaller depths the low bits count.
    key = np.array(struct.unpack(f">{channels}H", png.transparency[: 2 * channels])) & maximum
    hidden = samples == key[0] if channels == 1 else (samples == key).all(axis=-1)
    return np.where(hidden, 0, maximum).astype(samples.dtype)


def _read_text(png: _Png, name: bytes, body: bytes) -> None:
    """Keep the two texts that may name the orientation: EXIF as ImageMagick wrote it, and XMP."""
    keyword, _, rest = body.partition(b"\0")
    if keyword == b"Raw profile type exif" and name != b"iTXt":
        png.profile_exif = rest if name == b"tEXt" else _inflated(rest[1:])
    elif keyword == b"XML:com.adobe.xmp" and name == b"iTXt" and len(rest) > 2:
        packed, text = rest[0], rest[2:].split(b"\0", 2)[-1]
        png.xmp = _inflated(text) if packed else text


def _inflated(packed: bytes) -> bytes | None:
    try:
        inflater = zlib.decompressobj()
        text = inflater.decompress(packed, MAX_METADATA_BYTES)
    except zlib.error:
        return None
    return None if inflater.unconsumed_tail else text


def _orientation(png: _Png) -> int:
    """EXIF's orientation: of the chunk eXIf, else of ImageMagick's text, else of XMP; broken metadata turns nothing."""
    blob = png.exif
    try:
        if blob is None and png.profile_exif:
            blob = bytes.fromhex("".join(png.profile_exif.decode("latin-1").split("\n")[3:]))
        if blob is not None:
            exif = Image.Exif()
            exif.load(blob)
            orientation = exif.get(ExifTags.Base.Orientation)
            if isinstance(orientation, int):
                return orientation
    except HOSTILE:
        pass
    named = re.search(rb'tiff:Orientation(?:="|>)([1-8])', png.xmp or b"")
    return int(named[1]) if named else 1
