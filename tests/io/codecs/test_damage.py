"""Metadata never costs the pixels, and pixels that are lost never pass: PNG and JPEG, alone and within TIFF."""

from __future__ import annotations

import contextlib
import io
import struct
import time
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from covray.errors import PairError
from covray.io.codecs.jpeg import MAX_SCANS
from covray.io.images import decode
from tests.support.picture_files import Tiff, exif_orientation, png_chunk, png_file


def photo(height_px: int = 96, width_px: int = 128) -> NDArray[np.uint8]:
    """Structure of every size, so that a lost byte of a JPEG moves what follows."""
    generator = np.random.default_rng(0)
    small = Image.fromarray(generator.integers(0, 256, (height_px // 6, width_px // 6, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width_px, height_px), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + generator.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)


def jpeg_file(pixels: NDArray[np.uint8] | None = None, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(photo() if pixels is None else pixels).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def refusal(data: bytes) -> str:
    with pytest.raises(PairError) as caught:
        decode(data)
    return str(caught.value)


GREY = np.arange(64).reshape(8, 8, 1)
RGB = np.arange(192).reshape(8, 8, 3)
BOMB = zlib.compress(bytes(2**24))


@pytest.mark.parametrize(
    "chunk",
    [
        (b"iCCP", b"p\0\0" + zlib.compress(bytes(1_500_000))),
        (b"iCCP", b"p\0\0" + BOMB),
        (b"iCCP", b""),
        (b"zTXt", b"workflow\0\0" + zlib.compress(b'{"node": 1}' * 150_000)),
        (b"zTXt", b"Raw profile type exif\0\0" + BOMB),
        (b"tEXt", b"prompt\0" + bytes(3_000_000)),
        (b"iTXt", b"prompt\0\1\0\0\0" + BOMB),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<broken"),
        (b"tEXt", b"Raw profile type exif\0\nexif\n4\nzz"),
        (b"gAMA", b""), (b"cHRM", b"?"), (b"sRGB", b""), (b"pHYs", b"1"), (b"prVt", bytes(9)), (b"eXIf", b"garbage"),
    ],
)  # fmt: skip
def test_metadata_is_passed_over_or_bounded(chunk: tuple[bytes, bytes]) -> None:
    assert np.array_equal(decode(png_file(RGB, 2, 8, [chunk])), RGB)


def test_a_wrong_checksum_counts_where_pixels_depend_on_it() -> None:
    whole = png_file(RGB, 2, 8, [(b"tEXt", b"a\0b"), (b"tRNS", bytes(6))])
    for name in (b"IHDR", b"tRNS", b"IDAT", b"tEXt"):
        at = whole.index(name)
        length = int.from_bytes(whole[at - 4 : at], "big")
        broken = bytearray(whole)
        broken[at + 4 + length] ^= 1
        if name == b"tEXt":
            assert decode(bytes(broken)).shape == RGB.shape
        else:
            assert refusal(bytes(broken)) == f"damaged: the checksum of chunk {name!r} is wrong"


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 4, 7])
def test_a_png_whose_data_ends_early_is_truncated(rows: int, interlaced: bool) -> None:
    """The stream is closed properly, so that only its length tells."""
    samples = np.full((8, 8, 1), 200)
    lines = 15 if interlaced else 8
    whole_bytes = 64 + lines
    data = zlib.compress(b"\0" * (whole_bytes * rows // 8))
    assert refusal(png_file(samples, 0, 8, data=data, interlaced=interlaced)).startswith("truncated: ")


@pytest.mark.parametrize("interlaced", [False, True])
def test_a_black_png_is_whole(interlaced: bool) -> None:
    for size in ((8, 8), (2, 2), (9, 3), (3, 9)):
        assert decode(png_file(np.zeros((*size, 1), int), 0, 1, interlaced=interlaced)).max() == 0


def test_what_is_not_png_by_its_header_is_damaged() -> None:
    for depth, colour in ((3, 0), (16, 3), (4, 2), (8, 1), (8, 5)):
        header = struct.pack(">2I5B", 8, 8, depth, colour, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(72)))
        assert refusal(data).startswith("damaged: the header has")
    assert refusal(b"\x89PNG\r\n\x1a\n" + png_chunk(b"IDAT", b"")).startswith("damaged: begins with")
    assert refusal(b"\x89PNG\n\x1a\n" + bytes(50)).startswith("damaged: the signature")
    assert refusal(png_file(GREY, 3, 8)).startswith("damaged: a palette")
    assert refusal(png_file(GREY, 3, 8, [(b"PLTE", bytes(9))])) == (
        "damaged: a pixel of colour 63, where the palette has 3 colours"
    )
    assert refusal(png_file(RGB, 2, 8, [(b"tRNS", bytes(2))])).startswith("damaged: the transparent colour")


def test_frames_and_hdr_of_png_are_refused() -> None:
    assert refusal(png_file(RGB, 2, 8, [(b"acTL", struct.pack(">2I", 2, 0))])).startswith("animated: ")
    assert decode(png_file(RGB, 2, 8, [(b"acTL", struct.pack(">2I", 1, 0))])).shape == RGB.shape
    for transfer, name in ((16, "PQ"), (18, "HLG")):
        assert refusal(png_file(RGB, 2, 8, [(b"cICP", bytes([9, transfer, 0, 1]))])) == (
            f"unsupported: PNG of HDR ({name}); map its tones to sRGB first"
        )
    assert np.array_equal(decode(png_file(RGB, 2, 8, [(b"cICP", bytes([1, 13, 0, 1]))])), RGB)


def test_png_is_turned_by_exif_and_else_by_xmp() -> None:
    exif = exif_orientation(6)
    text = b"\nexif\n%d\n%s" % (len(exif) + 6, (b"Exif\0\0" + exif).hex().encode())
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<rdf tiff:Orientation="6"/>'
    turned = np.rot90(RGB, -1)
    for chunks in (
        [(b"eXIf", exif)], [(b"tEXt", b"Raw profile type exif\0" + text)], [(b"iTXt", xmp)],
        [(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))],
        [(b"eXIf", exif), (b"iTXt", xmp.replace(b"6", b"3"))],
    ):  # fmt: skip
        assert np.array_equal(decode(png_file(RGB, 2, 8, chunks)), turned)


KINDS = [
    {}, {"progressive": True}, {"restart_marker_blocks": 4}, {"quality": 95, "subsampling": 0}, {"mode": "L"},
    {"mode": "CMYK"}, {"mode": "CMYK", "progressive": True}, {"optimize": True, "quality": 30},
]  # fmt: skip


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_half_a_jpeg_that_is_closed_is_truncated(options: dict[str, object]) -> None:
    data = jpeg_file(**options)  # type: ignore[arg-type]
    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    for share in (0.5, 0.8, 0.95):
        cut = data[: int(share * len(data))].rstrip(b"\xff")
        assert refusal(cut + b"\xff\xd9").startswith("truncated: "), share
        assert refusal(cut).startswith("truncated: "), share


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_jpeg_with_a_hole_is_refused(options: dict[str, object]) -> None:
    """Of holes of 1,000 bytes all but those after which, by chance, as many blocks follow as before."""
    data = jpeg_file(photo(192, 288), **options)  # type: ignore[arg-type]
    generator = np.random.default_rng(0)
    scan = data.index(b"\xff\xda") + 14
    passed = 0
    for filler in (bytes(1000), generator.integers(0, 255, 1000, dtype=np.uint8).tobytes()):
        for at in np.linspace(scan, len(data) - 1100, 15, dtype=int):
            with contextlib.suppress(PairError):
                decode(data[:at] + filler + data[at + 1000 :])
                passed += 1
    assert passed <= 3


def test_bytes_lost_or_doubled_in_a_jpeg_are_found() -> None:
    data = jpeg_file(quality=90)
    at = len(data) // 2
    assert decode(data).shape == photo().shape
    assert refusal(data[:at] + data[at + 300 :])
    assert refusal(data[:at] + data[at - 300 :])


def test_what_cameras_do_to_jpegs_is_no_damage() -> None:
    data = jpeg_file()
    pixels = decode(data)
    comment = b"\xff\xfe\0\x06abcd"
    oddities = [
        data[:-2] + bytes(64) + data[-2:],  # padding before the end marker
        data[:-2] + b"\xff" * 64 + data[-2:],
        data + bytes(4096), data + b"a trailer", data + data,  # what follows the end
        data[:2] + comment + data[2:],
        data[:2] + b"\xff\xe1\0\x10Exif\0\0" + bytes(8) + data[2:],
        data[:2] + b"\xff\xff\xff" + data[2:],  # fill bytes before a marker
    ]  # fmt: skip
    for number, odd in enumerate(oddities):
        assert np.array_equal(decode(odd), pixels), number


def test_depths_and_channels_of_jpeg_that_are_not_read_are_named() -> None:
    data = bytearray(jpeg_file())
    data[data.index(b"\xff\xc0") + 4] = 12
    assert refusal(bytes(data)) == "unsupported: JPEG of 12 bits and 3 channels; save 8 bits and RGB"


def test_cmyk_of_jpeg_is_read_where_adobes_marker_says_how() -> None:
    colour = np.full((16, 16, 3), (200, 30, 40), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colour).convert("CMYK").save(buffer, "JPEG", quality=95)
    data = buffer.getvalue()
    assert np.abs(decode(data).astype(int) - colour).max() <= 2
    start = data.index(b"\xff\xee")
    end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    assert data[start + 4 : start + 9] == b"Adobe"
    assert refusal(data[:start] + data[end:]).startswith("unsupported: JPEG of 4 channels without Adobe's marker")


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = jpeg_file(progressive=True)
    last = data.rindex(b"\xff\xda")
    assert refusal(data[:-2] + data[last:-2] * (MAX_SCANS + 1) + data[-2:]).startswith("damaged: more than")


def test_jpeg_within_tiff_is_held_to_the_same() -> None:
    buffer = io.BytesIO()
    Image.fromarray(photo()).save(buffer, "TIFF", compression="jpeg", quality=90)
    data = buffer.getvalue()
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode(data), expected)
    start, end = data.index(b"\xff\xda"), data.index(b"\xff\xd9", data.index(b"\xff\xda"))
    at = (start + end) // 2
    assert refusal(data[:at] + bytes(300) + data[at + 300 :])
    assert refusal(data[:at] + b"\xff\xd9" + data[at + 2 :]).startswith("truncated: ")


def test_strips_that_share_bytes_cannot_multiply_work() -> None:
    tiff = Tiff(np.zeros((64, 64, 1), int), 8, 1, rows_per_strip=1, tags=((259, 3, (7,)),))
    data = bytes(tiff)
    many = bytes(Tiff(tiff.samples, 8, 1, rows_per_strip=1, tags=((259, 3, (7,)), (279, 4, (len(data) // 2,) * 64))))
    assert refusal(many).startswith(("damaged: strips overlap", "truncated: "))


def test_numbers_of_a_tiff_that_nothing_could_hold_cost_no_time() -> None:
    started = time.monotonic()
    of_bits = Tiff(GREY, 8, 1, deflated=True, tags=((258, 4, (200_000_000,)),))
    assert refusal(bytes(of_bits)) == "unsupported: TIFF of 200000000 bits; save 8 or 16 bits"
    of_channels = Tiff(GREY, 8, 1, deflated=True, planar=True, tags=((277, 4, (2**25,)),))
    assert refusal(bytes(of_channels)).startswith("too_large: 8 x 8 px of 33554432 samples")
    assert time.monotonic() - started < 1


def test_known_formats_that_are_not_read_are_named() -> None:
    for data, name in [
        (b"\0\0\0\x18ftypheic" + bytes(60), "HEIF (HEIC)"), (b"\xff\x0a" + bytes(60), "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(60), "JPEG XL"), (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(60), "JPEG 2000"),
        (b"8BPS" + bytes(60), "Photoshop (PSD)"), (b"v/1\x01" + bytes(60), "OpenEXR"),
        (b"P7\nWIDTH 2\n", "PAM (P7)"), (b"\0\0\x01\0\x01\0" + bytes(60), "an icon (ICO)"),
    ]:  # fmt: skip
        assert refusal(data) == f"unsupported: {name} is not read; save the picture as PNG or JPEG"


def test_what_a_failed_download_left_is_named() -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n"
    assert refusal(pointer) == "not_an_image: a pointer of Git LFS; fetch the file itself with git lfs pull"
    for page in (b"<!DOCTYPE html><p>404", b"\n<HTML><body>"):
        assert refusal(page) == "not_an_image: a web page (HTML); download the picture again"


def test_avif_and_webp_with_alpha_lie_on_black() -> None:
    pixels = np.full((16, 16, 4), (200, 100, 50, 255), np.uint8)
    pixels[:8, :, 3] = 0
    for kind, tolerance in (("AVIF", 4), ("WEBP", 0)):
        buffer = io.BytesIO()
        options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": "4:4:4"}
        Image.fromarray(pixels).save(buffer, kind, **options)
        rgb = decode(buffer.getvalue()).astype(int)
        assert rgb[:8].max() <= tolerance
        assert np.abs(rgb[8:] - (200, 100, 50)).max() <= tolerance


def test_hdr_of_avif_is_refused() -> None:
    buffer = io.BytesIO()
    Image.fromarray(photo()).save(buffer, "AVIF")
    data = bytearray(buffer.getvalue())
    at = data.index(b"colrnclx") + 8
    data[at + 2 : at + 4] = (16).to_bytes(2, "big")
    assert refusal(bytes(data)) == "unsupported: AVIF of HDR (PQ); map its tones to sRGB first"
