"""The classes of own masks: which numbers or colours a mask has, and how it becomes a label.

A mask is read by what is declared, or by PASCAL VOC's numbers and colours. What fits two readings, and a number or
colour that is none of the classes, is an error: the nearest class would be a wrong value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from covray.config import read_yaml
from covray.errors import ConfigError, PairError, one_line
from covray.io import storage
from covray.io.codecs.raster import turned
from covray.io.images import decode, encode_png
from covray.pairs.label_files import LabelFile, read_label_file
from covray.tasks import segmentation
from covray.tasks.base import Meta
from covray.tasks.segmentation import class_table, palette

VOID = 255
"""The palette index that void is drawn in: (224, 224, 192), as PASCAL VOC does."""

VOC_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

_UNKNOWN = -1
_WHITE = 255


@dataclass(frozen=True)
class MaskCoding:
    """How masks are to be read. An index is a class's place in ``names``, or ``VOID``."""

    names: tuple[str, ...]
    levels: dict[int, int] | None
    """Index of each number in masks of one channel; None where masks of numbers are not declared."""
    colours: dict[tuple[int, int, int], int] | None
    """Index of each colour in masks of three channels; None where masks of colours are not declared."""
    meta: Meta
    """What ``covray.tasks.segmentation.class_table`` reads of the manifest's rows."""
    tolerance: int = 0
    """How far each channel may lie from a colour, in levels of 255."""
    declared: bool = True
    """False for the coding that is tried where the user has declared none."""


def read_mask(file: LabelFile, coding: MaskCoding) -> NDArray[np.uint8]:
    """Return the index of the class of every pixel, uint8 [h, w].

    Args:
        file: The mask as it is stored.
        coding: How masks are to be read.

    Raises:
        PairError: ``unknown_class`` where a number or colour is none of the classes, ``ambiguous`` where the mask
            fits two readings.
    """
    readings: list[NDArray[np.uint8]] = []
    errors: list[PairError] = []
    # A mask may be read by its numbers and by its colours; where both are possible they must agree.
    for attempt in (*_levels_of(file), _colours_of(file)):
        try:
            reading = _by_level(attempt, file, coding) if attempt.ndim == 2 else _by_colour(attempt, coding)
        except PairError as error:
            errors.append(error)
            continue
        if not any(np.array_equal(reading, other) for other in readings):
            readings.append(reading)
    if not readings:
        raise errors[0]
    if len(readings) > 1:
        raise PairError(
            "ambiguous",
            "the mask's numbers and its colours stand for different classes; save it as grey numbers, or declare only "
            "index or only colour with --classes",
        )
    if not coding.declared:
        _require_recognised(file, readings[0])
    return readings[0]


def _levels_of(file: LabelFile) -> Iterable[NDArray[Any]]:
    """Yield the numbers [h, w] that a mask may mean."""
    if file.samples.ndim == 3:
        if (file.samples == file.samples[..., :1]).all():
            yield file.samples[..., 0]
        return
    yield file.samples
    if file.palette is not None and (file.palette == file.palette[:, :1]).all():
        # Programs that shrink PNGs make grey levels a palette of greys, in an order of their own.
        yield file.colours()[..., 0]


def _colours_of(file: LabelFile) -> NDArray[Any]:
    """Return the colours [h, w, 3] that a mask shows."""
    if file.palette is not None:
        return file.colours()
    if file.samples.ndim == 3:
        return file.samples
    return np.repeat(file.samples[..., None], 3, axis=2)  # a grey is a colour of three equal channels


def _by_level(levels: NDArray[Any], file: LabelFile, coding: MaskCoding) -> NDArray[np.uint8]:
    """Return the index of every pixel [h, w] by its number. Raises PairError."""
    if coding.levels is None:
        raise PairError("unknown_class", "a mask of numbers, where the classes have colours; add index to --classes")
    if file.lossy:
        raise PairError("unsupported", "a lossy file (JPEG), which changes the numbers of a mask; save it as PNG")
    # One look-up for all pixels: a table of every number that 16 bits can hold.
    table = np.full(2**16, _UNKNOWN, np.int16)
    table[list(coding.levels)] = list(coding.levels.values())
    indices = table[levels]
    if (indices == _UNKNOWN).any():
        number = int(levels[indices == _UNKNOWN][0])
        raise PairError("unknown_class", f"number {number} is none of the {_named(coding)}{_advice(coding)}")
    return indices.astype(np.uint8)


def _by_colour(colours: NDArray[Any], coding: MaskCoding) -> NDArray[np.uint8]:
    """Return the index of every pixel [h, w] by its colour, the nearest within the tolerance. Raises PairError."""
    if coding.colours is None:
        raise PairError("unknown_class", "a mask in colour, where the classes have numbers; add colour to --classes")
    if colours.dtype != np.uint8:
        raise PairError("unsupported", "colours of 16 bits; save the mask with 8 bits a channel")
    known = np.array(list(coding.colours), np.int64)
    # A colour as one number: most masks hold exact colours, and a search in a sorted list finds all of them at once.
    codes = _packed(known)
    order = np.argsort(codes)
    pixels = _packed(colours.astype(np.int64))
    nearest = order[np.searchsorted(codes[order], pixels).clip(max=len(codes) - 1)]
    table = np.array(list(coding.colours.values()), np.uint8)
    indices, exact = table[nearest], codes[nearest] == pixels
    if exact.all():
        return indices
    # The others are compared with every class, each odd colour once.
    odd, places = np.unique(pixels[~exact], return_inverse=True)
    channels = np.stack([odd >> 16, odd >> 8 & 255, odd & 255], axis=-1)
    # The distance of colours is the largest of their channels: rounding moves each channel by itself.
    distances = np.abs(channels[:, None] - known).max(axis=-1)  # [odd colours, classes]
    if distances.min(axis=1).max() > coding.tolerance:
        stray = channels[distances.min(axis=1).argmax()].tolist()
        raise PairError("unknown_class", f"colour {tuple(stray)} is none of the {_named(coding)}{_advice(coding)}")
    indices[~exact] = table[distances.argmin(axis=1)][places]
    return indices


def _packed(colours: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return colours [..., 3] as numbers of 24 bits."""
    packed: NDArray[np.int64] = colours[..., 0] << 16 | colours[..., 1] << 8 | colours[..., 2]
    return packed


def _require_recognised(file: LabelFile, indices: NDArray[np.uint8]) -> None:
    """Refuse what an undeclared mask may mean beside PASCAL VOC's classes.

    Raises:
        PairError: ``ambiguous``: black and white, which is void or a class, in one bit also VOC's first one; a palette
            of other colours, whose numbers may be those of the program that chose the colours.
    """
    if file.one_bit and indices.any():
        raise PairError("ambiguous", "one bit a pixel: white is a class of yours? Declare the classes with --classes")
    # A palette of greys, or PASCAL VOC's own, goes with VOC's numbers; any other is another coding.
    if file.palette is not None:
        used = np.unique(file.samples)
        greys = bool((file.palette[used] == used[:, None]).all())
        voc = bool((file.colours() == palette(256)[indices]).all())
        if not greys and not voc:
            raise PairError(
                "ambiguous", "a palette of other colours than PASCAL VOC's; declare the classes with --classes"
            )
    elif not np.isin(indices, (0, VOID)).all() or not (indices == VOID).any():
        return
    elif (_colours_of(file)[indices == VOID] == _WHITE).all():
        raise PairError("ambiguous", "numbers 0 and 255: void or a class? Declare the classes with --classes")


def _named(coding: MaskCoding) -> str:
    if coding.declared:
        return f"{len(coding.names)} classes"
    return "PASCAL VOC's 21 classes and void"


def _advice(coding: MaskCoding) -> str:
    if not coding.declared:
        return "; declare your own with --classes"
    tolerance = ", or set tolerance if the mask is a JPEG" if coding.colours else ""
    return f"; add it to --classes{tolerance}"


# --- codings that need no declaration --------------------------------------------------------------------------------


def voc_coding(names: Iterable[str] = VOC_NAMES, declared: bool = False) -> MaskCoding:
    """Return the coding of PASCAL VOC: number k, or the colour map's colour k, is class k; 255 is void."""
    names = tuple(names)
    colours = {tuple(colour): index for index, colour in enumerate(palette(256)[: len(names)].tolist())}
    # With 256 classes no number is left for void.
    levels = {index: index for index in range(len(names))}
    meta: dict[str, Any] = {"classes": list(names)}
    if len(names) <= VOID:
        levels[VOID] = VOID
        colours[tuple(palette(256)[VOID].tolist())] = VOID
        meta["void"] = VOID
    return MaskCoding(names, levels, colours, meta, declared=declared)


def painter_coding(classes: int, steps: int) -> MaskCoding:
    """Return the coding of Painter's masks: ``classes`` colours, ``steps`` levels a channel from white down; 0 is void.

    Wang et al., "Images Speak in Images", CVPR 2023, section 3.1: 256 // steps between two levels.
    """
    colours: dict[tuple[int, int, int], int] = {(0, 0, 0): VOID}
    for index in range(classes):
        # The index in base ``steps``: a digit a channel.
        red, green, blue = index // steps**2, index // steps % steps, index % steps
        levels = [255 - 256 // steps * place for place in (red, green, blue)]
        colours[levels[0], levels[1], levels[2]] = index
    names = tuple(f"class {number}" for number in range(1, classes + 1))
    meta = {"classes": list(names), "class_numbers": list(range(1, classes + 1)), "void": VOID, "void_number": 0}
    return MaskCoding(names, None, colours, meta)


def coding_of(meta: Meta) -> MaskCoding:
    """Return the coding of the user's own masks that ``meta`` of a manifest's row describes."""
    table = class_table(meta)
    levels = {number: index for index, number in enumerate(table.numbers)}
    colours: dict[tuple[int, int, int], int] | None = None
    if meta.get("class_colours"):
        colours = {}
        for index, colour in enumerate(meta["class_colours"]):
            colours[tuple(colour)] = index
    if table.void is not None and table.void_number is not None:
        levels[table.void_number] = table.void
        if colours is not None and meta.get("void_colour"):
            colours[tuple(meta["void_colour"])] = table.void
    return MaskCoding(table.names, levels, colours, dict(meta))


def draw_mask(data: bytes, meta: Meta) -> bytes:
    """Return a mask in the user's own coding as the picture that a build reads; one that is drawn already as it is.

    Args:
        data: The encoded mask.
        meta: The classes, as in ``meta`` of a manifest's row.

    Raises:
        PairError: The mask shows what is none of the user's own classes. Without own numbers or colours such a mask is
            taken as it is: it may be a picture that a model drew.
    """
    file = read_label_file(data)
    # The user's coding first; a mask that an earlier command has drawn is in covray's own.
    try:
        indices = read_mask(file, coding_of(meta))
    except PairError:
        try:
            indices = read_mask(file, voc_coding(class_table(meta).names, declared=True))
        except PairError:
            if "class_numbers" in meta or "class_colours" in meta:
                raise
            return data
    drawn = turned(segmentation.render(indices), file.orientation)
    # A mask that is drawn already keeps its bytes.
    if np.array_equal(drawn, decode(data)):
        return data
    return encode_png(drawn)


# --- the user's file -------------------------------------------------------------------------------------------------


def _as_colour(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", value):
        return tuple(bytes.fromhex(value[1:]))
    return value


Level = Annotated[int, Field(ge=0, le=255, strict=True)]
Colour = Annotated[tuple[Level, Level, Level], BeforeValidator(_as_colour)]
Number = Annotated[int, Field(ge=0, le=65535, strict=True)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OwnClass(_Part):
    """One class of own masks."""

    name: Annotated[str, Field(min_length=1)]
    """Its name, for tables and pages."""
    index: Number | None = None
    """Its number in masks of one channel, and in the masks that ``covray generate`` returns; null: its place."""
    colour: Colour | None = Field(default=None, validation_alias=AliasChoices("colour", "color"))
    """Its colour in masks of three channels, as [red, green, blue] or "#rrggbb"."""


class Void(_Part):
    """Pixels that are not labelled."""

    index: Number | None = None
    """Their number in masks of one channel."""
    colour: Colour | None = Field(default=None, validation_alias=AliasChoices("colour", "color"))
    """Their colour in masks of three channels."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """Take a number for an index, and a text or a list for a colour: their keys may be left out."""
        if isinstance(value, int):
            return {"index": value}
        if isinstance(value, str | list):
            return {"colour": value}
        return value


class ClassesFile(_Part):
    """What ``--classes`` names: the classes of own masks, as YAML or JSON."""

    classes: Annotated[tuple[OwnClass, ...], Field(min_length=1, max_length=VOID)]
    """The classes in the order in which they get their colours; a plain name is a class whose number is its place."""
    void: Void | None = None
    """Pixels that are not labelled: a number, a colour, or both as ``index`` and ``colour``; null where all are."""
    tolerance: Annotated[int, Field(ge=0, le=127, strict=True)] = 0
    """How far each channel of a pixel may lie from a colour, for masks in JPEG; less than half the way to the next."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """Take a text in the list of classes for the name of one."""
        if not isinstance(value, dict) or not isinstance(value.get("classes"), list):
            return value
        classes = []
        for item in value["classes"]:
            if isinstance(item, str):
                item = {"name": item}
            classes.append(item)
        return {**value, "classes": classes}

    @model_validator(mode="after")
    def _whole(self) -> ClassesFile:
        for key in ("index", "colour"):
            given = [getattr(item, key) for item in self.classes]
            values = [value for value in given if value is not None]
            if 0 < len(values) < len(self.classes):
                raise ValueError(f"some classes have {key} and some have not; give it for all or for none")
            of_void = getattr(self.void, key, None)
            if of_void is not None:
                values.append(of_void)
            if len(set(values)) < len(values):
                raise ValueError(f"two of the classes and void have one {key}")
        names = [item.name for item in self.classes]
        if len(set(names)) < len(names):
            raise ValueError("two classes have one name")
        # Colours that lie too near could both claim a pixel within the tolerance.
        colours = [item.colour for item in self.classes if item.colour is not None]
        if self.void is not None and self.void.colour is not None:
            colours.append(self.void.colour)
        _require_apart(colours, self.tolerance)
        return self

    def coding(self) -> MaskCoding:
        """Return how masks with these classes are read."""
        # All classes have an index or none has, and the same holds for colours; with neither, numbers are their places.
        with_colours = self.classes[0].colour is not None
        with_levels = self.classes[0].index is not None or not with_colours
        numbers: list[int] = []
        levels: dict[int, int] | None = {} if with_levels else None
        colours: dict[tuple[int, int, int], int] | None = {} if with_colours else None
        for place, item in enumerate(self.classes):
            number = item.index if item.index is not None else place
            numbers.append(number)
            if levels is not None:
                levels[number] = place
            if colours is not None and item.colour is not None:
                colours[item.colour] = place
        names = [item.name for item in self.classes]
        meta: dict[str, Any] = {"classes": names}
        if numbers != list(range(len(numbers))):
            meta["class_numbers"] = numbers
        if colours is not None:
            meta["class_colours"] = list(map(list, colours))
        if self.void is not None:
            if levels is not None and self.void.index is not None:
                levels[self.void.index] = VOID
            if colours is not None and self.void.colour is not None:
                colours[self.void.colour] = VOID
                meta["void_colour"] = list(self.void.colour)
            meta["void"] = VOID
            meta["void_number"] = self._void_number(numbers)
        return MaskCoding(tuple(meta["classes"]), levels, colours, meta, self.tolerance)

    def _void_number(self, numbers: list[int]) -> int:
        """Return what void is in the masks that are returned, where it is declared by its colour alone, too."""
        if self.void is not None and self.void.index is not None:
            return self.void.index
        if VOID not in numbers:
            return VOID
        return min(set(range(65536)).difference(numbers))


def load_classes(path: str) -> MaskCoding:
    """Return the coding that the file at ``path`` declares. Raises ConfigError: what is wrong with it, and where."""
    try:
        values = read_yaml(storage.read_bytes(path).decode("utf-8-sig"))
        return ClassesFile.model_validate(values).coding()
    except ValidationError as error:
        # The first error only: later ones often follow from it.
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        place = f"{where}: " if where else ""
        raise ConfigError(f"--classes {path}: {place}{first['msg'].removeprefix('Value error, ')}") from error
    except FileNotFoundError as error:
        raise ConfigError(f"--classes {path}: no such file") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"--classes {path}: cannot be read: {one_line(error)}") from error


def _require_apart(colours: list[tuple[int, int, int]], tolerance: int) -> None:
    """Raise ValueError where ``tolerance`` lets a pixel belong to two of ``colours``."""
    if not tolerance or len(colours) < 2:
        return
    points = np.array(colours, np.int64)
    distances = np.abs(points[:, None] - points).max(axis=-1) + 256 * np.eye(len(points), dtype=np.int64)
    if 2 * tolerance >= distances.min():
        raise ValueError(f"tolerance {tolerance} is not less than half the distance of two colours, {distances.min()}")
