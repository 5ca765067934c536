"""Label files as they are stored: their numbers, their palette, and how they lie to their image.

``covray.io.images.decode`` returns a picture as it looks. The numbers of a label mean something, so nothing here is
scaled, looked up, composited or turned unless it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from covray.errors import PairError
from covray.io.codecs.raster import to_rgb, turned
from covray.io.images import read_raster

Orientation = Literal["stored", "upright", "fixed"]
"""How a label lies to an image whose EXIF turns it: over the pixels as they are stored, or as they are displayed;
``fixed`` labels cannot be turned, since their values are directions."""

ASPECT_TOLERANCE = 0.02
"""Label and image have one shape where their aspects differ by less than this share."""


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
    """Whether the format (JPEG, AVIF, most WebP) changes values when it packs them."""
    one_bit: bool = False
    """Whether the file has one bit a pixel: black and white, or 0 and 1."""
    maximum: int = 255
    """The level of full intensity in ``samples`` or ``palette``: 1, 3 or 15 in a PNG of so few bits."""

    def colours(self) -> NDArray[np.uint8]:
        """Return what the palette shows, red, green and blue [h, w, 3]. Raises PairError for an index beyond it."""
        assert self.palette is not None
        if self.samples.max() >= len(self.palette):
            raise PairError("damaged", f"a pixel of colour {self.samples.max()}, the palette has {len(self.palette)}")
        return self.palette[self.samples]


@dataclass(frozen=True)
class ImageLayout:
    """The size of an image as it is displayed, and how EXIF turns it for that."""

    height_px: int
    width_px: int
    orientation: int

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Height and width of the pixels as they are stored."""
        swapped = self.orientation >= 5  # EXIF's 5 to 8 turn a picture by a quarter
        return (self.width_px, self.height_px) if swapped else (self.height_px, self.width_px)


def read_label_file(data: bytes) -> LabelFile:
    """Return what the encoded picture ``data`` stores.

    Levels of 1, 2 and 4 bits keep their numbers: 3 stays 3, and does not become white.

    Raises:
        PairError: as ``covray.io.images.decode`` does; ``unsupported`` for samples that are no whole numbers of at most
            16 bits, and for inverted levels.
    """
    raster = read_raster(data)
    samples = raster.samples
    if raster.white_is_zero:
        raise PairError("unsupported", "a TIFF whose white is zero, so that a number has two readings; save it as PNG")
    if samples.dtype not in (np.uint8, np.uint16):
        if samples.min() < 0 or samples.max() > 65535:
            raise PairError("unsupported", "integers beyond 16 bits; save 8 or 16 bits")
        samples = samples.astype(np.uint16)
    palette = None if raster.palette is None else raster.palette[:, :3]
    maximum = 255
    if palette is None:
        maximum = raster.maximum or 65535  # wide integers name no range; they were fitted into 16 bits above
    return LabelFile(samples, palette, raster.orientation, _is_lossy(data), maximum == 1, maximum)


def _is_lossy(data: bytes) -> bool:
    # The first bytes tell: RIFF's form of WebP (only its chunk VP8L is lossless), JPEG's marker, AVIF's box.
    if data[8:12] == b"WEBP":
        return b"VP8L" not in data
    return data.startswith(b"\xff\xd8\xff") or data[4:8] == b"ftyp"


def read_levels(data: bytes) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Return the one channel [h, w] of the encoded picture ``data`` as it is stored.

    Raises:
        PairError: as ``read_label_file``; ``unsupported`` for several channels and for a lossy format.
    """
    file = read_label_file(data)
    if file.samples.ndim != 2:
        raise PairError("unsupported", "pixels of several channels, where one channel of whole numbers is needed")
    if file.lossy:
        raise PairError("unsupported", "a lossy file (JPEG), which changes its numbers; save the label as PNG")
    return file.samples


def read_layout(data: bytes) -> ImageLayout:
    """Return the layout of the encoded picture ``data``. Raises PairError as ``covray.io.images.decode`` does."""
    raster = read_raster(data)
    height_px, width_px = to_rgb(raster).shape[:2]
    return ImageLayout(height_px, width_px, raster.orientation)


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
