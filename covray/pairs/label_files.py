"""Label files as they are stored: their numbers, their palette, and how they lie to their image.

``covray.io.images.decode`` returns a picture as it looks. The numbers of a label mean something, so nothing here is
scaled, looked up, composited or turned unless it is asked for.
"""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from covray.errors import PairError, one_line
from covray.io.images import FORMATS, decode

Orientation = Literal["stored", "upright", "fixed"]
"""How a label lies to an image whose EXIF turns it: over the pixels as they are stored, or as they are displayed;
``fixed`` labels cannot be turned, since their values are directions."""

ASPECT_TOLERANCE = 0.02
"""Label and image have one shape where their aspects differ by less than this share."""

_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF
_WHITE_IS_ZERO = 0
_PNM_MAXIMUM = re.compile(rb"P[25](?:(?:\s|#[^\n]*\n)+\d+){2}(?:\s|#[^\n]*\n)+(\d+)")
_BROKEN = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, SyntaxError, struct.error)


@dataclass(frozen=True, eq=False)
class LabelFile:
    """The samples of a label as its file stores them."""

    samples: NDArray[np.uint8] | NDArray[np.uint16]
    """Grey levels or indices of a palette [h, w], or red, green and blue [h, w, 3]; alpha is left out."""
    palette: NDArray[np.uint8] | None
    """Red, green and blue of each index, uint8 [n, 3]; None where the samples are no indices."""
    orientation: int
    """EXIF's 1 to 8; 1 where the file names none."""
    lossy: bool
    """Whether the format (JPEG) changes values when it packs them."""


@dataclass(frozen=True)
class ImageLayout:
    """The size of an image as it is displayed, and how EXIF turns it for that."""

    height_px: int
    width_px: int
    orientation: int

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Height and width of the pixels as they are stored."""
        swapped = self.orientation >= 5
        return (self.width_px, self.height_px) if swapped else (self.height_px, self.width_px)


def read_label_file(data: bytes) -> LabelFile:
    """Return what the encoded picture ``data`` stores.

    Grey PNGs and TIFFs of 1, 2 and 4 bits keep their numbers: 3 stays 3, and does not become white.

    Raises:
        PairError: as ``covray.io.images.decode`` does; ``unsupported`` for samples that are no whole numbers of at most
            16 bits, and for files whose numbers Pillow cannot return as they are stored.
    """
    decode(data)  # the limits, and one error for whatever a hostile file provokes
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            lossy = image.format in ("JPEG", "MPO")
            return LabelFile(_samples(image, data), _palette(image), _orientation(image), lossy)
    except _BROKEN as error:
        raise PairError("damaged", one_line(error)) from error


def read_levels(data: bytes) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Return the one channel [h, w] of the encoded picture ``data`` as it is stored.

    Raises:
        PairError: as ``read_label_file``; ``unsupported`` for several channels and for a lossy format.
    """
    file = read_label_file(data)
    if file.samples.ndim != 2:
        raise PairError("unsupported", "pixels of several channels, where one channel of whole numbers is needed")
    if file.lossy:
        raise PairError("unsupported", "a JPEG, which changes the numbers it stores; save the label as PNG")
    return file.samples


def read_layout(data: bytes) -> ImageLayout:
    """Return the layout of the encoded picture ``data``. Raises PairError as ``covray.io.images.decode`` does."""
    height_px, width_px = decode(data).shape[:2]
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return ImageLayout(height_px, width_px, _orientation(image))
    except _BROKEN:  # broken metadata around sound pixels
        return ImageLayout(height_px, width_px, 1)


def turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Return ``pixels`` [h, w, ...] as EXIF's ``orientation`` displays them (EXIF 3.0, tag 274)."""
    if orientation in (5, 6, 7, 8):
        pixels = np.swapaxes(pixels, 0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def align(
    label: NDArray[np.uint8], image: ImageLayout, own_orientation: int = 1, declared: Orientation | None = None
) -> NDArray[np.uint8]:
    """Return ``label`` as it lies over its image when both are displayed.

    Args:
        label: Pixels as they are stored, uint8 [h, w, 3].
        image: The layout of the label's image.
        own_orientation: EXIF's orientation of the label's own file, which decides where it is not 1.
        declared: How labels lie where only their image is turned; None: as their size tells.

    Raises:
        PairError: ``orientation`` where the label fits its image in both ways, or cannot be turned.
    """
    if own_orientation == 1 and image.orientation == 1:
        return label
    if declared == "fixed":
        raise PairError("orientation", "EXIF turns the picture, and directions do not turn with it; save it upright")
    if own_orientation != 1:
        return turned(label, own_orientation)
    upright_shape = (image.height_px, image.width_px)
    if declared is None:
        declared = _orientation_by_size(label.shape[:2], image)
    elif label.shape[:2] == upright_shape != image.stored_shape:
        declared = "upright"
    return turned(label, image.orientation) if declared == "stored" else label


def same_aspect(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    """Whether two shapes (height, width) differ by scale alone."""
    return abs(first[0] * second[1] / (first[1] * second[0]) - 1) <= ASPECT_TOLERANCE


def _orientation_by_size(label_shape: tuple[int, ...], image: ImageLayout) -> Orientation:
    fits_stored = same_aspect(label_shape, image.stored_shape)
    fits_upright = same_aspect(label_shape, (image.height_px, image.width_px))
    if fits_stored and fits_upright:
        raise PairError(
            "orientation",
            f"EXIF turns the image (orientation {image.orientation}) and not its label, which fits both ways; save the "
            "image upright, or give --label-orientation stored or upright",
        )
    return "stored" if fits_stored else "upright"


def _samples(image: Image.Image, data: bytes) -> NDArray[np.uint8] | NDArray[np.uint16]:
    if image.mode in ("1", "L", "LA"):
        levels = np.array(image if image.mode == "1" else image.getchannel("L")).astype(np.uint8)
        return levels // _scale_of_levels(image, data)
    if image.mode in ("P", "PA"):
        return np.array(image if image.mode == "P" else image.getchannel("P"), np.uint8)
    if image.mode == "I" or image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise PairError("unsupported", "integers beyond 16 bits; save 8 or 16 bits")
        _scale_of_levels(image, data)
        return wide.astype(np.uint16)
    if image.mode in ("RGB", "RGBA"):
        return np.array(image)[..., :3]
    raise PairError("unsupported", f"pixels of mode {image.mode}, where grey, a palette or RGB is needed")


def _scale_of_levels(image: Image.Image, data: bytes) -> int:
    """Return by how much Pillow has multiplied grey levels, to make 8 bits of fewer.

    Raises:
        PairError: ``unsupported`` where Pillow changes levels in another way.
    """
    bits = 8
    if image.format == "PNG":
        bits = data[24]  # of IHDR, which the format puts first
    elif image.format == "TIFF":
        tags = getattr(image, "tag_v2", {})
        bits = int(np.ravel(tags.get(_BITS_PER_SAMPLE, 1))[0])
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            raise PairError("unsupported", "a TIFF whose white is zero; save the label as PNG")
        if bits not in (1, 2, 4, 8, 16):
            raise PairError("unsupported", f"a TIFF of {bits} bits; save the label as PNG of 8 or 16 bits")
    elif image.format == "PPM":
        match = _PNM_MAXIMUM.match(data)
        if match is not None and int(match[1]) not in (255, 65535):
            raise PairError("unsupported", f"a PGM whose white is {int(match[1])}; save the label as PNG")
    return 1 if bits >= 8 or image.mode == "1" else 255 // (2**bits - 1)


def _palette(image: Image.Image) -> NDArray[np.uint8] | None:
    if image.mode not in ("P", "PA"):
        return None
    colours = image.getpalette("RGB") or []
    return np.array(colours, np.uint8).reshape(-1, 3)


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except _BROKEN:
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1
