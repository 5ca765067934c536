"""Picture files written by their definitions, without an image library: the judge of what covray reads."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def packed_rows(samples: NDArray, bits: int, order: str = ">") -> list[bytes]:
    """Rows of ``samples`` [h, w, channels], ``bits`` each, most significant bit first; every row ends on a byte."""
    rows = []
    for row in samples:
        if bits in (8, 16, 32):
            rows.append(row.astype(f"{order}u{bits // 8}").tobytes())
        else:
            shifts = np.arange(bits - 1, -1, -1)
            rows.append(np.packbits((row.reshape(-1, 1) >> shifts) & 1).tobytes())
    return rows


def png_chunk(name: bytes, body: bytes) -> bytes:
    """A chunk with its length and checksum."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_file(
    samples: NDArray,
    colour: int,
    depth: int,
    before: Sequence[tuple[bytes, bytes]] = (),
    *,
    interlaced: bool = False,
    data: bytes | None = None,
) -> bytes:
    """A PNG of ``samples`` [h, w, channels] with the chunks ``before`` its data, which is ``data`` if given."""
    height_px, width_px = samples.shape[:2]
    header = struct.pack(">2I5B", width_px, height_px, depth, colour, 0, 0, int(interlaced))
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    raw = b""
    for left, top, column_step, row_step in passes:
        part = samples[top::row_step, left::column_step]
        if part.size:
            raw += b"".join(b"\0" + row for row in packed_rows(part, depth))
    chunks = [(b"IHDR", header), *before, (b"IDAT", zlib.compress(raw) if data is None else data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def exif_orientation(orientation: int) -> bytes:
    """An EXIF block (of TIFF's form) that holds an orientation only."""
    return struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)


@dataclass
class Tiff:
    """A TIFF to be written; ``bytes`` writes it."""

    samples: NDArray
    """[h, w, channels]"""
    bits: int
    photometric: int
    order: str = "<"
    big: bool = False
    planar: bool = False
    deflated: bool = False
    predicted: bool = False
    rows_per_strip: int | None = None
    tile_px: int | None = None
    extra: tuple[int, ...] = ()
    colour_map: NDArray | None = None
    orientation: int | None = None
    sample_format: int = 1
    tags: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    """Further tags, or others: number, field type, values; without values the tag is left out."""

    def __bytes__(self) -> bytes:
        """The file: header, directory, values, strips."""
        height_px, width_px, channels = self.samples.shape
        parts = [self._pack(strip) for strip in self._parts()]
        tags: dict[int, tuple[int, tuple[int, ...]]] = {
            256: (4, (width_px,)), 257: (4, (height_px,)), 258: (3, (self.bits,) * channels),
            259: (3, (8 if self.deflated else 1,)), 262: (3, (self.photometric,)), 277: (3, (channels,)),
            284: (3, (2 if self.planar else 1,)),
        }  # fmt: skip
        offsets, counts = (324, 325) if self.tile_px else (273, 279)
        tags[offsets], tags[counts] = (4, (0,) * len(parts)), (4, tuple(map(len, parts)))
        if self.tile_px:
            tags |= {322: (4, (self.tile_px,)), 323: (4, (self.tile_px,))}
        else:
            tags[278] = (4, (self.rows_per_strip or height_px,))
        if self.predicted:
            tags[317] = (3, (2,))
        if self.colour_map is not None:
            tags[320] = (3, tuple(self.colour_map.T.reshape(-1).tolist()))
        if self.extra:
            tags[338] = (3, self.extra)
        if self.sample_format != 1:
            tags[339] = (3, (self.sample_format,) * channels)
        if self.orientation is not None:
            tags[274] = (3, (self.orientation,))
        for number, kind, values in self.tags:
            tags[number] = (kind, values)
        return self._file({number: entry for number, entry in tags.items() if entry[1]}, offsets, parts)

    def _parts(self) -> list[NDArray]:
        """The samples of each strip or tile, plane by plane where the file is planar."""
        height_px, width_px, channels = self.samples.shape
        planes = [self.samples[..., k : k + 1] for k in range(channels)] if self.planar else [self.samples]
        parts = []
        for plane in planes:
            if self.tile_px:
                side = self.tile_px
                padded = np.zeros((-(-height_px // side) * side, -(-width_px // side) * side, plane.shape[2]), np.int64)
                padded[:height_px, :width_px] = plane
                for top in range(0, len(padded), side):
                    for left in range(0, padded.shape[1], side):
                        parts.append(padded[top : top + side, left : left + side])
            else:
                step = self.rows_per_strip or height_px
                parts += [plane[top : top + step] for top in range(0, height_px, step)]
        return parts

    def _pack(self, samples: NDArray) -> bytes:
        if self.predicted:
            samples = np.diff(samples.astype(np.int64), axis=1, prepend=0) % 2**self.bits
        plain = b"".join(packed_rows(samples, self.bits, self.order))
        return zlib.compress(plain) if self.deflated else plain

    def _file(self, tags: dict[int, tuple[int, tuple[int, ...]]], offsets: int, parts: list[bytes]) -> bytes:
        number_code, inline, start = ("Q", 8, 16) if self.big else ("I", 4, 8)
        codes = {1: "B", 3: "H", 4: "I", 5: "I"}
        after = start + (8 + 20 * len(tags) + 8 if self.big else 2 + 12 * len(tags) + 4)
        values_at = {}
        for number, (kind, values) in sorted(tags.items()):
            size = struct.calcsize(codes[kind]) * len(values)
            if size > inline:
                values_at[number] = after
                after += size + size % 2
        part_offsets = []
        for part in parts:
            part_offsets.append(after)
            after += len(part) + len(part) % 2
        entries = blobs = b""
        for number, (kind, values) in sorted(tags.items()):
            values = tuple(part_offsets) if number == offsets else values
            blob = struct.pack(f"{self.order}{len(values)}{codes[kind]}", *values)
            count = len(values) // 2 if kind == 5 else len(values)
            entries += struct.pack(f"{self.order}HH{number_code}", number, kind, count)
            if number in values_at:
                entries += struct.pack(self.order + number_code, values_at[number])
                blobs += blob + b"\0" * (len(blob) % 2)
            else:
                entries += blob.ljust(inline, b"\0")
        head = b"II" if self.order == "<" else b"MM"
        if self.big:
            head += struct.pack(f"{self.order}HHHQQ", 43, 8, 0, start, len(tags))
        else:
            head += struct.pack(f"{self.order}HIH", 42, start, len(tags))
        return head + entries + bytes(inline) + blobs + b"".join(part + b"\0" * (len(part) % 2) for part in parts)


def bmp_file(rows: list[bytes], width_px: int, bits: int, palette: bytes = b"", masks: bytes = b"") -> bytes:
    """A BMP of packed ``rows``, the top one first; ``masks`` of colours make it a bit-field picture."""
    pixels = b"".join(row + b"\0" * (-len(row) % 4) for row in reversed(rows))
    offset = 14 + 40 + len(masks) + len(palette)
    sizes = (40, width_px, len(rows), 1, bits, 3 if masks else 0, len(pixels), 0, 0, len(palette) // 4, 0)
    return struct.pack("<2sIHHI", b"BM", offset + len(pixels), 0, 0, offset) + struct.pack(
        "<IiiHHIIiiII", *sizes
    ) + masks + palette + pixels  # fmt: skip


def gif_file(
    indices: NDArray, palette: bytes, canvas: tuple[int, int], corner: tuple[int, int], hidden: int | None = None
) -> bytes:
    """A GIF of one frame of ``indices`` [h, w] under 4 at ``corner`` (left, top) of a ``canvas`` (width, height)."""
    control = b"" if hidden is None else b"\x21\xf9\x04\x01\0\0" + bytes([hidden]) + b"\0"
    bits: list[int] = []
    codes = [4]  # clear; then again after every two codes, so that codes stay 3 bits wide
    for number, index in enumerate(indices.reshape(-1).tolist()):
        codes += [index, 4] if number % 2 else [index]
    for code in [*codes, 5]:
        bits += [code >> bit & 1 for bit in range(3)]
    packed = np.packbits(np.array(bits, np.uint8), bitorder="little").tobytes()
    blocks = b"".join(bytes([len(packed[at : at + 255])]) + packed[at : at + 255] for at in range(0, len(packed), 255))
    frame = b"\x2c" + struct.pack("<HHHHB", *corner, indices.shape[1], indices.shape[0], 0) + b"\x02" + blocks + b"\0"
    return b"GIF89a" + struct.pack("<HHBBB", *canvas, 0x91, 0, 0) + palette + control + frame + b";"
