"""Label files: numbers come as they are stored, and labels turn with their images or are refused."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from covray.errors import PairError
from covray.io.codecs.raster import turned
from covray.io.images import decode
from covray.pairs.label_files import (
    ImageLayout,
    Orientation,
    align,
    read_label_file,
    read_layout,
    read_levels,
)
from tests.support.photographs import photo


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[274] = orientation
    return data


def grey_png(levels: NDArray[np.integer], bits: int) -> bytes:
    """A grey PNG of 1 to 8 bits, written by the definition: rows of packed samples, the first in the high bits."""
    height_px, width_px = levels.shape
    unpacked = (levels[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    rows = np.packbits(unpacked.reshape(height_px, -1).astype(np.uint8), axis=1)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width_px, height_px, bits, 0, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_levels_of_few_bits_keep_their_numbers(bits: int) -> None:
    levels = np.arange(24 * 10).reshape(10, 24) % 2**bits
    assert np.array_equal(read_levels(grey_png(levels, bits)), levels)


def test_sixteen_bits_and_indices_keep_their_numbers() -> None:
    wide = np.arange(16 * 24, dtype=np.uint16).reshape(16, 24) * 170
    assert np.array_equal(read_levels(encoded(Image.fromarray(wide))), wide)
    assert np.array_equal(read_levels(encoded(Image.fromarray(wide), "TIFF")), wide)
    indexed = Image.fromarray((wide % 7).astype(np.uint8))
    indexed.putpalette([9, 9, 9] * 7)
    file = read_label_file(encoded(indexed))
    assert np.array_equal(file.samples, wide % 7)
    assert file.palette is not None
    assert file.palette[:7].tolist() == [[9, 9, 9]] * 7


def test_alpha_does_not_change_what_is_stored() -> None:
    colours = photo(0)
    for alpha in (0, 7, 255):
        with_alpha = np.dstack([colours, np.full(colours.shape[:2], alpha, np.uint8)])
        assert np.array_equal(read_label_file(encoded(Image.fromarray(with_alpha))).samples, colours)
        grey = Image.merge("LA", [Image.fromarray(colours[..., 0]), Image.new("L", (24, 16), alpha)])
        assert np.array_equal(read_levels(encoded(grey)), colours[..., 0])


def test_numbers_that_would_not_come_as_stored_are_refused() -> None:
    levels = np.arange(16 * 24, dtype=np.uint8).reshape(16, 24) % 20
    for data, message in (
        (encoded(Image.fromarray(levels), "JPEG"), "JPEG"),
        (encoded(Image.fromarray(levels), "TIFF", tiffinfo={262: 0}), "white is zero"),
        (encoded(Image.fromarray(levels), "WEBP", lossless=False), "several channels"),
        (encoded(Image.fromarray(photo(0))), "several channels"),
        (encoded(Image.fromarray(photo(0)).convert("CMYK"), "JPEG"), "several channels"),
        (b"no picture", "not_an_image"),
    ):
        with pytest.raises(PairError, match=message):
            read_levels(data)


def test_a_scale_changes_no_number() -> None:
    levels = np.arange(16 * 24, dtype=np.uint8).reshape(16, 24) % 20
    for maximum in (20, 255):
        assert np.array_equal(read_levels(b"P5 24 16 %d\n" % maximum + levels.tobytes()), levels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_label_is_turned_as_its_image_is(orientation: int) -> None:
    pixels = photo(orientation, 6, 10)
    image = encoded(Image.fromarray(pixels), exif=exif(orientation))
    layout = read_layout(image)
    assert layout == ImageLayout(*decode(image).shape[:2], orientation)
    assert layout.stored_shape == (6, 10)
    assert np.array_equal(turned(pixels, orientation), decode(image))
    assert np.array_equal(align(pixels, layout, declared="stored"), decode(image))


@pytest.mark.parametrize(
    ("shape", "orientation", "own", "declared", "expected"),
    [
        ((6, 10), 1, 1, None, "as it is"),
        ((6, 10), 6, 1, None, "turned"),  # by its size it lies over the stored pixels
        ((10, 6), 6, 1, None, "as it is"),
        ((6, 10), 3, 1, None, "refused"),  # it fits both ways
        ((6, 10), 3, 1, "stored", "turned"),
        ((6, 10), 3, 1, "upright", "as it is"),
        ((10, 6), 6, 1, "stored", "as it is"),  # annotated over the picture as it is displayed
        ((6, 10), 3, 3, None, "turned"),  # its own file says so
        ((6, 10), 1, 3, None, "turned"),
        ((6, 10), 3, 1, "fixed", "refused"),
        ((6, 10), 1, 1, "fixed", "as it is"),
    ],
)
def test_what_fits_two_readings_is_declared_or_refused(
    shape: tuple[int, int], orientation: int, own: int, declared: Orientation | None, expected: str
) -> None:
    height_px, width_px = (10, 6) if orientation >= 5 else (6, 10)
    layout, label = ImageLayout(height_px, width_px, orientation), photo(0, *shape)
    if expected == "refused":
        with pytest.raises(PairError, match="orientation"):
            align(label, layout, own, declared)
        return
    result = align(label, layout, own, declared)
    assert np.array_equal(result, label if expected == "as it is" else turned(label, max(own, orientation)))


@pytest.mark.filterwarnings("ignore:Tag data larger")
def test_hostile_files_raise_nothing_but_pair_errors() -> None:
    generator = np.random.default_rng(5)
    whole = [encoded(Image.fromarray(photo(0)[..., 0]), kind) for kind in ("PNG", "TIFF", "PPM", "GIF")]
    messages = []
    for data in whole * 50:
        damaged = bytearray(data)
        at = int(generator.integers(0, len(data)))
        damaged[at : at + 3] = generator.bytes(int(generator.integers(0, 6)))
        try:
            assert read_label_file(bytes(damaged)).samples.ndim in (2, 3)
        except PairError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert not any("\n" in message for message in messages)
