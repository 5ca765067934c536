"""The directory of a TIFF or BigTIFF: its fields, with bounds on all that they point to, and how to rewrite them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum

from covray.errors import PairError

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_TYPES = {1: ("B", 1), 3: ("H", 1), 4: ("I", 1), 5: ("I", 2), 7: ("B", 1), 16: ("Q", 1)}
"""Struct code and numbers a value of the field types that are read: byte, short, long, rational, undefined, long of
BigTIFF."""
_MAX_VALUES = 2**22
"""Values of one field. The largest that is read lists strips, which are thousands."""


class Tag(IntEnum):
    """Numbers of the fields that are read (TIFF 6.0)."""

    NEW_SUBFILE_TYPE = 254
    WIDTH = 256
    LENGTH = 257
    BITS = 258
    COMPRESSION = 259
    PHOTOMETRIC = 262
    STRIP_OFFSETS = 273
    ORIENTATION = 274
    SAMPLES_PER_PIXEL = 277
    ROWS_PER_STRIP = 278
    STRIP_COUNTS = 279
    PLANAR = 284
    COLOUR_MAP = 320
    TILE_WIDTH = 322
    TILE_LENGTH = 323
    TILE_OFFSETS = 324
    TILE_COUNTS = 325
    INK_SET = 332
    EXTRA_SAMPLES = 338
    SAMPLE_FORMAT = 339
    JPEG_TABLES = 347
    YCC_SUBSAMPLING = 530
    REFERENCE_BLACK_WHITE = 532


@dataclass(frozen=True)
class _Variant:
    """Sizes in which TIFF and BigTIFF differ."""

    header_at: int
    """Where the header names the directory."""
    count_code: str
    """Struct code of the number of fields."""
    offset_code: str
    """Struct code of offsets and of a field's count."""
    entry_bytes: int
    inline_bytes: int
    """Values up to this size stand in the field itself."""

    @property
    def values_at(self) -> int:
        """Where, in a field, its values or their offset stand."""
        return self.entry_bytes - self.inline_bytes


_CLASSIC = _Variant(4, "H", "I", 12, 4)
_BIG = _Variant(8, "Q", "Q", 20, 8)


@dataclass(frozen=True)
class _Entry:
    """A field: where it stands, and where its values do."""

    at: int
    code: str
    """Struct code of its numbers."""
    count: int
    """Of numbers; a rational has two."""
    values_at: int


@dataclass(frozen=True)
class Directory:
    """The first directory of a file."""

    data: bytes
    at: int
    order: str
    """``<`` or ``>``, as in struct."""
    variant: _Variant
    entries: dict[int, _Entry]
    has_successor: bool
    """Whether the file has another directory: a further page."""

    def values(self, tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Return the numbers of ``tag`` (a rational's two), or ``default`` where the file has none."""
        entry = self.entries.get(tag)
        if entry is None:
            return default
        return struct.unpack_from(f"{self.order}{entry.count}{entry.code}", self.data, entry.values_at)

    def value(self, tag: int, default: int) -> int:
        """Return the first number of ``tag``."""
        return (self.values(tag) or (default,))[0]

    def rewritten(self, values_by_tag: Mapping[int, tuple[int, ...]]) -> Directory:
        """Return the file with other values for those tags that it has.

        There are never more values than there were, and no rationals; no values hide the tag.
        """
        data = bytearray(self.data)
        for tag, values in values_by_tag.items():
            if tag in self.entries:
                self._overwrite(data, self.entries[tag], values)
        return replace(self, data=bytes(data))

    def _overwrite(self, data: bytearray, entry: _Entry, values: tuple[int, ...]) -> None:
        offset_code = self.variant.offset_code
        if not values:
            # As a second NewSubfileType of 0, which libtiff passes over without a word.
            struct.pack_into(f"{self.order}HH{offset_code * 2}", data, entry.at, Tag.NEW_SUBFILE_TYPE, 4, 1, 0)
            return
        struct.pack_into(self.order + offset_code, data, entry.at + 4, len(values))
        packed = struct.pack(f"{self.order}{len(values)}{entry.code}", *values)
        inline_at = entry.at + self.variant.values_at
        if len(packed) <= self.variant.inline_bytes:
            data[inline_at : inline_at + self.variant.inline_bytes] = packed.ljust(self.variant.inline_bytes, b"\0")
        else:
            data[entry.values_at : entry.values_at + len(packed)] = packed


def read_directory(data: bytes) -> Directory:
    """Return the first directory of a file that begins with one of ``MAGIC``.

    Raises:
        PairError: ``truncated`` where the directory or what it points to lies beyond the file.
        struct.error: for a header that is cut.
    """
    order = "<" if data.startswith(b"II") else ">"
    variant = _BIG if b"+" in data[2:4] else _CLASSIC
    (at,) = struct.unpack_from(order + variant.offset_code, data, variant.header_at)
    if at + 8 > len(data):
        raise PairError("truncated", "ends before its directory")
    (count,) = struct.unpack_from(order + variant.count_code, data, at)
    first = at + struct.calcsize(order + variant.count_code)
    end = first + count * variant.entry_bytes
    if end > len(data):
        raise PairError("truncated", "ends within its directory")
    entries: dict[int, _Entry] = {}
    for entry_at in range(first, end, variant.entry_bytes):
        tag, kind, number = struct.unpack_from(f"{order}HH{variant.offset_code}", data, entry_at)
        if kind not in _TYPES or not 0 < number <= _MAX_VALUES:
            continue
        code, numbers_a_value = _TYPES[kind]
        numbers = number * numbers_a_value
        length = numbers * struct.calcsize(order + code)
        values_at = entry_at + variant.values_at
        if length > variant.inline_bytes:
            (values_at,) = struct.unpack_from(order + variant.offset_code, data, values_at)
        if values_at + length > len(data):
            raise PairError("truncated", f"ends before the values of tag {tag}")
        # Of a tag that is there twice the first counts, as for libtiff, which decodes by the same directory.
        entries.setdefault(tag, _Entry(entry_at, code, numbers, values_at))
    successor = data[end : end + struct.calcsize(order + variant.offset_code)]
    return Directory(data, at, order, variant, entries, has_successor=any(successor))
