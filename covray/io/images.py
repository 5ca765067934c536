"""Pictures: loaded from bytes or a URI, decoded, made square, written as PNG.

Files and URIs are untrusted. A picture that cannot be used raises PairError with a reason, whatever its bytes or its
URI hold, and nothing outside the manifest's root is opened. The formats are in ``covray.io.codecs``.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import posixpath
import stat
import urllib.parse
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from covray.errors import ConfigError, PairError, one_line
from covray.io import storage
from covray.io.codecs import plain, png, tiff, tiff_directory
from covray.io.codecs.opening import refusing
from covray.io.codecs.raster import Raster, to_rgb

MAX_PIXELS = 64 * 2**20
MAX_FILE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Picture:
    """A picture of a manifest: its encoded bytes, or a URI below the manifest's root. With neither it is missing."""

    uri: str | None = None
    bytes: bytes | None = None


class PictureColumn(TypedDict, total=False):
    """A picture of a manifest as pyarrow gives it."""

    uri: str | None
    bytes: bytes | None


def picture_of(column: PictureColumn | None) -> Picture:
    """Return the picture that a manifest's row names; a missing one for null."""
    return Picture() if column is None else Picture(column.get("uri"), column.get("bytes"))


def load_picture(picture: PictureColumn | Picture, root: str | None) -> bytes:
    """Return the encoded bytes of ``picture``, a ``Picture`` or a manifest's struct of ``uri`` and ``bytes``.

    Bytes win over the URI. A relative URI is taken below ``root``; an absolute one must lie below it. ``root`` is a
    local folder, or a folder on any storage that pyarrow knows; without one no URI is opened. Links are followed only
    while they stay inside.

    Raises:
        PairError: ``missing``, ``outside_root``, ``unreadable``, ``empty``, ``too_large`` (the file, in bytes).
    """
    if not isinstance(picture, Picture):
        picture = picture_of(picture)
    uri, data = picture.uri, picture.bytes
    if data is None:
        if not uri:
            raise PairError("missing", "the manifest names neither a URI nor bytes")
        data = _fetch(uri, root)
    if not data:
        raise PairError("empty", f"{_show(uri)} holds no bytes" if uri else "the manifest holds zero bytes")
    return data


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Return the picture in an encoded file of one of ``FORMATS`` as RGB [h, w, 3], upright by its EXIF orientation.

    - Intensities of any depth are scaled to 8 bits (255 v / maximum, rounded). Floating point, signed and 32-bit
      numbers have no agreed range and are refused.
    - Transparent pixels are composited on black: in label pictures black is "nothing here", and showing the hidden
      colour below would invent content.
    - Values are taken as sRGB, as LVM does; colour profiles and gamma are not applied, so a broken one does no harm.
      HDR (PQ, HLG) is refused.
    - Animations and multi-page files are refused, since taking the first frame would drop the others silently; a
      JPEG with further pictures attached (MPO: previews, gain maps) is its main picture.

    docs/datasets.md has the table of formats. The size in the header is checked before any pixel is decoded.

    Args:
        data: the file.
        max_pixels: width x height that is accepted at most, by default 64 Mi.

    Raises:
        PairError: ``empty``, ``not_an_image``, ``truncated``, ``damaged``, ``animated``, ``unsupported``,
            ``too_small`` (a side under 2 px), ``too_large``.
    """
    with refusing(data):
        return to_rgb(_read(data, max_pixels))


def read_raster(data: bytes, max_pixels: int = MAX_PIXELS) -> Raster:
    """Return the samples of an encoded file as they are stored, and what they mean.

    For labels whose numbers mean something, such as classes or millimetres: a level of 4 bits is 0 to 15, one of 12
    bits 0 to 4095; samples are not inverted, looked up as colours, composited or turned. Limits and errors are those
    of ``decode``.
    """
    with refusing(data):
        return _read(data, max_pixels)


def _read(data: bytes, max_pixels: int) -> Raster:
    if not data:
        raise PairError("empty", "zero bytes")
    # By its first half: a transfer as text breaks the second, and is then named as the reason.
    if data.startswith(png.SIGNATURE[:4]):
        return png.read_png(data, max_pixels)
    if data.startswith(tiff_directory.MAGIC):
        return tiff.read_tiff(data, max_pixels)
    return plain.read_plain(data, max_pixels)


def square(
    image: NDArray[np.uint8],
    size_px: int,
    fit: Literal["stretch", "crop"] = "stretch",
    resample: Literal["bicubic", "nearest"] = "bicubic",
) -> NDArray[np.uint8]:
    """Return ``image`` as a square; a picture of that size comes back as it is.

    Args:
        image: uint8 [h, w, 3].
        size_px: side of the square.
        fit: ``stretch`` resizes the whole picture, as LVM does; ``crop`` takes the centre square first.
        resample: ``nearest`` for labels whose in-between colours would mean something else; ``bicubic`` averages when
            it shrinks (Pillow).
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
    """Return ``image`` [h, w, 3] as [height_px, width_px, 3], by Pillow; of that size it comes back as it is."""
    if image.shape[:2] == (height_px, width_px):
        return image
    method = Image.Resampling.BICUBIC if resample == "bicubic" else Image.Resampling.NEAREST
    return np.array(Image.fromarray(np.ascontiguousarray(image)).resize((width_px, height_px), method))


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Return ``image`` [h, w, 3] as PNG. The same pixels give the same bytes, with one build of Pillow and zlib.

    Level 3 packs a photograph in a third of the time of the usual 6, and 8% larger.
    """
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


def picture_identity(picture: Picture) -> str:
    """Return what tells ``picture`` from others: the SHA-256 of its bytes, else its URI, else ``missing``."""
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
    # Links are followed before the comparison: one within the root may lead out of it.
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


def _show(uri: str | None) -> str:
    """A URI for a message: on one line, and not endless."""
    text = repr(uri)
    return text if len(text) <= 200 else text[:197] + "..."
