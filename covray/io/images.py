"""Pictures: fetched from bytes or a URI, decoded, made square, written as PNG.

What is read here was made by others. A picture that cannot be used raises PairError with a reason, whatever its bytes
or its URI hold, and nothing outside the manifest's root is opened.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import posixpath
import stat
import struct
import urllib.parse
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import ExifTags, Image

from covray.errors import ConfigError, PairError, one_line
from covray.io import storage

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
"""What is decoded. Nothing that runs a program (EPS), draws (PDF, SVG) or fetches."""
MAX_PIXELS = 64 * 2**20
MAX_FILE_BYTES = 512 * 2**20

_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"II*\0", b"MM\0*", b"BM", b"GIF8")
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow raises on hostile files. Its plugins parse bytes with plain Python, so the list is long.
_HOSTILE = (
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


@dataclass(frozen=True)
class Picture:
    """A picture of a manifest: its encoded bytes, or a URI below the manifest's root. Neither: it is missing."""

    uri: str | None = None
    bytes: bytes | None = None


def load_picture(picture: Mapping[str, Any] | Picture, root: str | None) -> bytes:
    """The encoded bytes of a picture, given as ``Picture`` or as a manifest's struct of ``uri`` and ``bytes``.

    Bytes win over the URI. A relative URI is taken below ``root``; an absolute one must lie below it. ``root`` is a
    local folder, or a folder on any storage pyarrow knows; without one no URI is opened. Links are followed only
    while they stay inside.
    Raises PairError: ``missing``, ``outside_root``, ``unreadable``, ``empty``, ``too_large`` (the file, in bytes).
    """
    if isinstance(picture, Picture):
        uri, data = picture.uri, picture.bytes
    else:
        uri, data = picture.get("uri"), picture.get("bytes")
    if data is None:
        if not uri:
            raise PairError("missing", "the manifest names neither a URI nor bytes")
        data = _fetch(uri, root)
    if not data:
        raise PairError("empty", f"{_show(uri)} holds no bytes" if uri else "the manifest holds zero bytes")
    return data


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The picture in an encoded file of one of ``FORMATS``, as RGB [h, w, 3], upright by its EXIF orientation.

    - Transparent pixels are composited on black: in label pictures black is "nothing here", and showing the hidden
      colour below would invent content.
    - One channel of 16 bits is scaled to 8 (v / 257, rounded), not cut; of colours Pillow keeps the high byte. Floating
      point has no agreed range and is refused.
    - Values are taken as sRGB, as LVM does; colour profiles are not applied, so a broken one does no harm.
    - Animations and multi-page files are refused, since taking the first frame would drop the others silently; a
      JPEG with further pictures attached (MPO: previews, gain maps) is its main picture.

    The size in the header is checked against ``max_pixels`` (default 64 Mi) before any pixel is decoded.
    Raises PairError: ``empty``, ``not_an_image``, ``truncated``, ``damaged``, ``animated``, ``unsupported``,
    ``too_small`` (a side under 2 px), ``too_large``.
    """
    with _opened(data, max_pixels) as image:
        return _rgb(_upright(image))


def decode_levels(data: bytes, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """The one channel [h, w] of an encoded file as it is stored: grey levels of 8 or 16 bits, or indices of a palette.

    For labels whose numbers mean something, such as classes or millimetres: neither scaled to 8 bits, nor looked up as
    colours, nor turned. Limits and errors are those of ``decode``; a picture of several channels is ``unsupported``.
    """
    with _opened(data, max_pixels) as image:
        if image.mode in ("L", "P"):
            return np.array(image)
        if image.mode == "I" or image.mode.startswith("I;16"):
            return _sixteen_bits(image)
        raise PairError("unsupported", f"pixels of mode {image.mode}, where one channel of whole numbers is needed")


@contextlib.contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """The decoded picture; whatever goes wrong with it, here or in the ``with`` block, is a PairError."""
    if not data:
        raise PairError("empty", "zero bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width_px, height_px = image.size
            if width_px * height_px > max_pixels:
                raise PairError("too_large", f"{width_px} x {height_px} px, more than {max_pixels} pixels")
            if min(width_px, height_px) < 2:
                raise PairError("too_small", f"{width_px} x {height_px} px")
            if image.format != "MPO" and getattr(image, "is_animated", False):
                raise PairError("animated", f"{image.format} of several frames; give one picture a file")
            image.load()
            yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PairError("too_large", one_line(error)) from error
    except MemoryError as error:
        raise PairError("too_large", "does not fit into memory") from error
    except Image.UnidentifiedImageError as error:
        if not data.startswith(_MAGIC):
            raise PairError("not_an_image", f"none of {', '.join(FORMATS)}") from error
        raise _broken(data, error) from error
    except _HOSTILE as error:
        raise _broken(data, error) from error


def square(
    image: NDArray[np.uint8],
    size_px: int,
    fit: Literal["stretch", "crop"] = "stretch",
    resample: Literal["bicubic", "nearest"] = "bicubic",
) -> NDArray[np.uint8]:
    """``image`` [h, w, 3] as [size_px, size_px, 3]; a picture of that size comes back as it is.

    ``stretch`` resizes the whole picture, as LVM does; ``crop`` takes the centre square first. ``nearest`` is for
    labels whose in-between colours would mean something else; ``bicubic`` averages when it shrinks (Pillow).
    """
    height_px, width_px = image.shape[:2]
    if fit == "crop" and height_px != width_px:
        side_px = min(height_px, width_px)
        top, left = (height_px - side_px) // 2, (width_px - side_px) // 2
        image = image[top : top + side_px, left : left + side_px]
    return resize(image, size_px, size_px, resample)


def resize(
    image: NDArray[np.uint8], height_px: int, width_px: int, resample: Literal["bicubic", "nearest"] = "bicubic"
) -> NDArray[np.uint8]:
    """``image`` [h, w, 3] as [height_px, width_px, 3] by Pillow; a picture of that size comes back as it is."""
    if image.shape[:2] == (height_px, width_px):
        return image
    method = Image.Resampling.BICUBIC if resample == "bicubic" else Image.Resampling.NEAREST
    return np.array(Image.fromarray(np.ascontiguousarray(image)).resize((width_px, height_px), method))


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """``image`` [h, w, 3] as PNG. The same pixels give the same bytes (for one build of Pillow and zlib).

    Level 3 packs a photograph in a third of the time of the usual 6, and 8% larger.
    """
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


def picture_identity(picture: Picture) -> str:
    """What a picture is known by: the SHA-256 of its bytes, else its URI, else ``missing``."""
    if picture.bytes is not None:
        return f"sha256:{hashlib.sha256(picture.bytes).hexdigest()}"
    return f"uri:{picture.uri}" if picture.uri else "missing"


def _fetch(uri: str, root: str | None) -> bytes:
    """The file at ``uri`` below ``root``."""
    if root is None:
        raise PairError("outside_root", f"{_show(uri)}: the manifest has no root, so that no URI may be opened")
    local_root = _local(os.path.expanduser(root))
    try:
        if local_root is not None:
            return _fetch_local(uri, local_root)
        return _fetch_remote(uri, root)
    except FileNotFoundError as error:
        raise PairError("missing", f"{_show(uri)} is not below the root") from error
    except (OSError, ValueError, pa.ArrowException, ConfigError) as error:  # ValueError: a NUL in the path
        raise PairError("unreadable", f"{_show(uri)}: {one_line(error)}") from error


def _fetch_local(uri: str, root: str) -> bytes:
    path = _local(uri)
    if path is None:
        raise PairError("outside_root", f"{_show(uri)} is not below the manifest's root")
    real_root = os.path.realpath(root)
    real = os.path.realpath(os.path.join(real_root, path))
    if os.path.commonpath((real_root, real)) != real_root:
        raise PairError("outside_root", f"{_show(uri)} leads out of the manifest's root")
    status = os.stat(real)
    if not stat.S_ISREG(status.st_mode):  # a pipe or a device would block for ever
        raise PairError("unreadable", f"{_show(uri)} is not a regular file")
    _check_size(uri, status.st_size)
    with open(real, "rb") as file:
        return file.read()


def _fetch_remote(uri: str, root: str) -> bytes:
    # The user's URI is never parsed as storage: its host or query (endpoint_override) would choose what is contacted.
    base = root.partition("?")[0].rstrip("/") + "/"
    if uri.startswith(base):
        uri = uri.removeprefix(base)
    path = posixpath.normpath(uri)
    if "://" in uri or path.startswith(("/", "../")) or path in ("..", "."):
        raise PairError("outside_root", f"{_show(uri)} is not below the manifest's root")
    filesystem, inner = _remote_root(root)
    with filesystem.open_input_file(posixpath.join(inner, path)) as file:
        _check_size(uri, file.size())
        return bytes(file.read())


@functools.lru_cache(maxsize=8)
def _remote_root(root: str) -> tuple[Any, str]:
    """Cached, because opening an object store asks it for the bucket's region."""
    return storage.resolve(root)


def _local(path: str) -> str | None:
    """The local path of a path or a file:// URI; None for what lies elsewhere."""
    if path.startswith("file://"):
        host, _, inner = path.removeprefix("file://").partition("/")
        return urllib.parse.unquote("/" + inner) if host in ("", "localhost") else None
    return None if "://" in path else path


def _check_size(uri: str, size_bytes: int) -> None:
    if size_bytes > MAX_FILE_BYTES:
        raise PairError("too_large", f"{_show(uri)} has {size_bytes} bytes, more than {MAX_FILE_BYTES}")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except _HOSTILE:  # broken metadata around sound pixels: shown as stored, as browsers do
        return image
    turn = _TURN.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode == "F":
        raise PairError("unsupported", "floating point pixels have no agreed range; save 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = _sixteen_bits(image).astype(np.int64)
        return np.repeat(((levels + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        cut_out = image.convert("RGBA")
        ground = Image.new("RGBA", cut_out.size, (0, 0, 0, 255))
        image = Image.alpha_composite(ground, cut_out)
    return np.array(image.convert("RGB"))


def _sixteen_bits(image: Image.Image) -> NDArray[np.uint16]:
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise PairError("unsupported", "integers beyond 16 bits have no agreed range; save 8 or 16 bits")
    return levels.astype(np.uint16)


def _broken(data: bytes, error: BaseException) -> PairError:
    """Truncated, the common damage of an interrupted download, is told from other damage."""
    order: Literal["big", "little"] = "big" if data.startswith(b"MM") else "little"
    number = int.from_bytes(data[4:8], order)
    short_webp = data.startswith(b"RIFF") and number + 8 > len(data)  # the length of what follows
    short_tiff = data.startswith((b"II*\0", b"MM\0*")) and number >= len(data)  # where the directory lies
    cut = short_webp or short_tiff or isinstance(error, EOFError) or "truncated" in str(error).lower()
    return PairError("truncated" if cut else "damaged", one_line(error))


def _show(uri: str | None) -> str:
    """A URI for a message: on one line, and not endless."""
    text = repr(uri)
    return text if len(text) <= 200 else text[:197] + "..."
