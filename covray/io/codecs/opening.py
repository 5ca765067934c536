"""Opening of untrusted files: limits before any pixel is decoded, and one error, whatever a file provokes."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Literal

from PIL import ExifTags, Image

from covray.errors import PairError, one_line

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF")
"""What is decoded. Nothing that runs a program (EPS), draws (PDF, SVG) or fetches."""

MIN_SIDE_PX = 2

# What Pillow raises on hostile files. Its plugins parse bytes with plain Python, so the list is long.
HOSTILE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    AssertionError,
    struct.error,
    zlib.error,
    Warning,  # where the caller has turned warnings into errors
)

_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"BM", b"GIF8")
_NOT_READ = {
    "HEIF (HEIC)": re.compile(rb"....ftyp(hei[cmsx]|hev[cmx]|mif1|msf1)", re.DOTALL),
    "JPEG XL": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "),
    "JPEG 2000": re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
    "Photoshop (PSD)": re.compile(rb"8BPS"),
    "PAM (P7)": re.compile(rb"P7\s"),
    "OpenEXR": re.compile(rb"v/1\x01"),
    "Radiance HDR": re.compile(rb"#\?RADIANCE|#\?RGBE"),
    "an icon (ICO)": re.compile(rb"\0\0\x01\0"),
    "AVIF, which this build of Pillow lacks": re.compile(rb"....ftypavi[fs]", re.DOTALL),
}
"""Picture formats that are known by their first bytes and not decoded, so that the reason can name them."""

_NO_PICTURE = {
    "a pointer of Git LFS; fetch the file itself with git lfs pull": re.compile(rb"version https://git-lfs"),
    "a web page (HTML); download the picture again": re.compile(rb"\s*<(!doctype\s+html|html)", re.IGNORECASE),
}
"""What a failed download leaves under a picture's name."""


@contextlib.contextmanager
def refusing(data: bytes) -> Iterator[None]:
    """Turn whatever goes wrong with ``data`` in the ``with`` block into a PairError."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PairError("too_large", one_line(error)) from error
    except MemoryError as error:
        raise PairError("too_large", "does not fit into memory") from error
    except Image.UnidentifiedImageError as error:
        raise _unidentified(data) from error
    except HOSTILE as error:
        raise broken(data, error) from error


@contextlib.contextmanager
def opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """Yield the picture in ``data`` opened by Pillow, its limits checked and its pixels not yet decoded.

    Raises:
        PairError: for whatever is wrong, here or in the ``with`` block.
    """
    with refusing(data), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        check_size(*image.size, max_pixels)
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise several_frames(str(image.format))
        yield image


def check_size(width_px: int, height_px: int, max_pixels: int) -> None:
    """Raise PairError ``too_large`` above ``max_pixels``, ``too_small`` where a side is under 2 px."""
    if width_px * height_px > max_pixels:
        raise PairError("too_large", f"{width_px} x {height_px} px, more than {max_pixels} pixels")
    if min(width_px, height_px) < MIN_SIDE_PX:
        raise PairError("too_small", f"{width_px} x {height_px} px")


def several_frames(kind: str) -> PairError:
    """Return the error of a file with several pictures, of which taking the first would drop the others silently."""
    return PairError("animated", f"{kind} of several frames; give one picture a file")


def require_no_hdr(kind: str, transfer: int) -> None:
    """Raise PairError where the transfer characteristics (ITU-T H.273) are of HDR: as sRGB it is another picture."""
    name = {16: "PQ", 18: "HLG"}.get(transfer)
    if name is not None:
        raise PairError("unsupported", f"{kind} of HDR ({name}); map its tones to sRGB first")


def orientation_of(image: Image.Image) -> int:
    """Return EXIF's orientation of ``image``, 1 where there is none or the metadata is broken, as browsers do."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except HOSTILE:
        return 1
    return orientation if isinstance(orientation, int) else 1


def broken(data: bytes, error: BaseException) -> PairError:
    """Return the PairError of a broken file; truncated, as by an interrupted download, is told from other damage."""
    order: Literal["big", "little"] = "big" if data.startswith(b"MM") else "little"
    number = int.from_bytes(data[4:8], order)
    short_webp = data.startswith(b"RIFF") and number + 8 > len(data)  # the length of what follows
    short_tiff = data.startswith((b"II*\0", b"MM\0*")) and number >= len(data)  # where the directory lies
    ends_early = isinstance(error, EOFError) or re.search("truncated|not enough", str(error).lower())
    cut = short_webp or short_tiff or ends_early
    return PairError("truncated" if cut else "damaged", one_line(error))


def _unidentified(data: bytes) -> PairError:
    for name, magic in _NOT_READ.items():
        if magic.match(data):
            return PairError("unsupported", f"{name} is not read; save the picture as PNG or JPEG")
    for name, magic in _NO_PICTURE.items():
        if magic.match(data):
            return PairError("not_an_image", name)
    if data.startswith(_MAGIC):
        return broken(data, ValueError("the header cannot be read"))
    return PairError("not_an_image", f"none of {', '.join(FORMATS)}")
