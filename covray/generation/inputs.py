"""Pictures as Python has them, as paths, PIL pictures and arrays, and the encoded files that a generator takes."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from covray.errors import ConfigError, PairError, one_line
from covray.generation.request import Example
from covray.io import storage
from covray.io.images import decode
from covray.io.pixels import Picture

PictureLike = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]
"""A path or an address, a PIL picture, or an array uint8 [h, w, 3] (RGB) or [h, w] (grey)."""
ExamplePair = tuple[PictureLike, PictureLike]
"""An image and its label."""

_ACCEPTED = "a path, a PIL picture, or an array uint8 [h, w, 3] or [h, w]"
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""Modes of PIL that PNG stores without loss and without choosing a range."""
_ORIENTATION = 0x0112
"""The tag of EXIF that says how a picture is turned."""


def read_picture(argument: str, value: PictureLike) -> Picture:
    """Return ``value`` as RGB [h, w, 3], with the pixels that ``covray generate`` reads from the same file.

    Args:
        argument: The name of the argument that has it, for messages.
        value: The picture.

    Raises:
        ConfigError: It is not a picture, or it is an array of another dtype or shape.
    """
    return _decode(argument, _encode(argument, value))


def read_examples(examples: Sequence[ExamplePair] | None) -> tuple[Example, ...]:
    """Return ``examples`` as encoded files, once all are known to be pictures; none for None.

    Raises:
        ConfigError: The list is empty, an item is not a pair, or a picture cannot be used.
    """
    if examples is None:
        return ()
    if not isinstance(examples, Sequence) or isinstance(examples, str):
        raise ConfigError(f"examples: is a {type(examples).__name__}; give a list of pairs (image, label)")
    if not examples:
        raise ConfigError("examples: the list is empty; give pairs (image, label), or None to answer without any")
    read = []
    for number, pair in enumerate(examples):
        name = f"examples[{number}]"
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ConfigError(f"{name}: is not a pair; give (image, label)")
        files = []
        for part, value in zip(("image", "label"), pair, strict=True):
            data = _encode(f"{name} {part}", value)
            _decode(f"{name} {part}", data)  # checks that it is a picture
            files.append(data)
        read.append(Example(files[0], files[1], name))
    return tuple(read)


def _encode(argument: str, value: Any) -> bytes:
    """Return ``value`` as an encoded file: a path's own bytes, a PIL picture or an array as PNG."""
    if isinstance(value, str | os.PathLike):
        return _read_file(argument, os.fspath(value))
    if isinstance(value, np.ndarray):
        value = _array_picture(argument, value)
    if not isinstance(value, Image.Image):
        raise ConfigError(f"{argument}: is a {type(value).__name__}; give {_ACCEPTED}")
    if value.mode not in _MODES:
        raise ConfigError(f'{argument}: is a PIL picture of mode {value.mode}; convert it, as by .convert("RGB")')
    buffer = io.BytesIO()
    try:
        # Turned here, so that it does not matter whether the PNG keeps the orientation.
        if value.getexif().get(_ORIENTATION, 1) != 1:
            value = ImageOps.exif_transpose(value)
        # Packed fast: it is unpacked at once.
        value.save(buffer, "PNG", compress_level=1)
    except (OSError, ValueError) as error:  # PIL reads a file's pixels only here, and they may be damaged
        raise ConfigError(f"{argument}: cannot be read ({one_line(error)}); give another picture") from error
    return buffer.getvalue()


def _read_file(argument: str, path: str) -> bytes:
    try:
        return storage.read_bytes(path)
    except FileNotFoundError as error:
        raise ConfigError(f"{argument} {path}: is not there; give a picture file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ConfigError(f"{argument} {path}: cannot be read ({one_line(error)}); give a picture file") from error


def _array_picture(argument: str, array: NDArray[Any]) -> Image.Image:
    """Return an array as a PIL picture. Raises ConfigError for another dtype, range or shape."""
    if array.dtype != np.uint8:
        values = ""
        if array.size and array.dtype.kind in "biuf":
            values = f" with values {array.min():g} to {array.max():g}"
        raise ConfigError(f"{argument}: has dtype {array.dtype}{values}; scale it to 0..255 and give uint8")
    grey = array.ndim == 2
    rgb = array.ndim == 3 and array.shape[2] == 3
    if not (grey or rgb) or not array.size:
        shape = ", ".join(map(str, array.shape))
        raise ConfigError(f"{argument}: has shape [{shape}]; give one picture, [h, w, 3] or [h, w]")
    return Image.fromarray(np.ascontiguousarray(array))


def _decode(argument: str, data: bytes) -> Picture:
    try:
        return decode(data)
    except PairError as error:
        raise ConfigError(f"{argument}: {error}; give another picture") from error
