"""COCO 2017: panoptic and stuff labels as classes, keypoints as skeletons (formats: cocodataset.org/#format-data)."""

from __future__ import annotations

import functools
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError

from covray.errors import ConfigError, ManifestError, PairError
from covray.io import storage
from covray.io.images import MAX_PIXELS, load_picture
from covray.pairs.label_files import read_label_file, read_levels
from covray.pairs.manifest import Picture
from covray.pairs.sources import Entry, as_utf8, draw, labelled, list_below, read_file, require
from covray.pairs.work import PairWork
from covray.tasks import pose, segmentation

SPLITS = ("train", "val")
LABELS = ("panoptic", "stuff", "stuffthingmaps", "pixelmaps")

STUFF_CLASSES = (
    "unlabeled", "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "street sign", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "hat", "backpack", "umbrella", "shoe",
    "eye glasses", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat",
    "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", "plate", "wine glass", "cup", "fork",
    "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza",
    "donut", "cake", "chair", "couch", "potted plant", "bed", "mirror", "dining table", "window", "desk", "toilet",
    "door", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "blender", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
    "hair brush", "banner", "blanket", "branch", "bridge", "building-other", "bush", "cabinet", "cage", "cardboard",
    "carpet", "ceiling-other", "ceiling-tile", "cloth", "clothes", "clouds", "counter", "cupboard", "curtain",
    "desk-stuff", "dirt", "door-stuff", "fence", "floor-marble", "floor-other", "floor-stone", "floor-tile",
    "floor-wood", "flower", "fog", "food-other", "fruit", "furniture-other", "grass", "gravel", "ground-other", "hill",
    "house", "leaves", "light", "mat", "metal", "mirror-stuff", "moss", "mountain", "mud", "napkin", "net", "paper",
    "pavement", "pillow", "plant-other", "plastic", "platform", "playingfield", "railing", "railroad", "river", "road",
    "rock", "roof", "rug", "salad", "sand", "sea", "shelf", "sky-other", "skyscraper", "snow", "solid-other", "stairs",
    "stone", "straw", "structural-other", "table", "tent", "textile-other", "towel", "tree", "vegetable", "wall-brick",
    "wall-concrete", "wall-other", "wall-panel", "wall-stone", "wall-tile", "wall-wood", "water-other", "waterdrops",
    "window-blind", "window-other", "wood",
)  # fmt: skip
"""COCO-Stuff's own indices, 0 to 182 (Caesar et al., CVPR 2018)."""

STUFF_IDS = range(92, 183)
"""Those of ``STUFF_CLASSES`` that are stuff; the others are things, and names that COCO dropped."""

OTHER = 183
"""The class of every thing in COCO's pixel maps of stuff."""

KEYPOINTS = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
)  # fmt: skip
"""COCO's 17, in its order; the neck of the 18 that are drawn is the mean of the shoulders."""

_MAX_CLASSES = 256  # of the palette, void included
_MAPS_READ = 200
"""Maps that are read to tell of which kind a folder's are."""


# What is used of the files; other keys are ignored. Plain slots: the training files hold a million of these.

_Side = Annotated[int, Field(ge=1)]
_Number = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(slots=True)
class _Image:
    id: int
    file_name: str
    height: _Side
    width: _Side


@dataclass(slots=True)
class _Category:
    id: int
    name: str


@dataclass(slots=True)
class _Segment:
    id: int
    category_id: int


@dataclass(slots=True)
class _Segmented:
    image_id: int
    file_name: str
    segments_info: list[_Segment]


@dataclass(slots=True)
class _Panoptic:
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Segmented]


@dataclass(slots=True)
class _Person:
    image_id: int
    keypoints: Annotated[list[_Number], Field(min_length=3 * len(KEYPOINTS), max_length=3 * len(KEYPOINTS))]
    iscrowd: int = 0


@dataclass(slots=True)
class _People:
    images: list[_Image]
    annotations: list[_Person]


T = TypeVar("T")


def coco_pairs(
    root: str | os.PathLike[str],
    task: str = "segmentation",
    labels: str = "panoptic",
    split: str = "train",
    count: int | None = None,
    seed: int = 0,
) -> PairWork:
    """Return pairs of COCO 2017. Images are ``{split}2017/*.jpg``; labels lie over their pixels as stored.

    - segmentation, ``panoptic``: ``annotations/panoptic_{split}2017.json`` and the PNGs in the folder of that name.
      Class 0 is void, class k the k-th of the file's categories by id: 133 in COCO;
    - segmentation, ``stuff``: ``stuffthingmaps/{split}2017/*.png``. These are COCO-Stuff's maps (class less 1, 255 for
      unlabeled) or COCO's pixel maps (the class itself, 183 for things); which of the two the levels tell;
    - segmentation, ``stuffthingmaps`` or ``pixelmaps``: the same, where the levels do not tell it. Pixel maps may also
      lie in ``annotations/stuff_{split}2017_pixelmaps``;
    - pose: ``annotations/person_keypoints_{split}2017.json``. All people of an image who have a keypoint are drawn, as
      ``covray.tasks.pose`` does; crowds are not, and images of nobody else are left out. A keypoint is drawn if it is
      labelled (v > 0), seen or covered, and lies in the image.

    ``meta`` holds the names of the classes and the index of void, or the number of people. An image that two records
    of the file name is a pair that cannot be used: which of the labels is its own is not known. See
    ``covray.pairs.sources.labelled`` for such pairs. The JSON file is read at once, and needs memory of several times
    its size.

    Args:
        root: Folder of the dataset, on any storage.
        task: ``segmentation`` or ``pose``.
        labels: Of segmentation: ``panoptic``, ``stuff``, ``stuffthingmaps`` or ``pixelmaps``.
        split: ``train`` or ``val``.
        count: How many pairs to sample, by ``seed`` and the image's name; None for all.
        seed: Seed of the sample.

    Raises:
        ConfigError: An unknown task, split or kind of labels.
        ManifestError: A file is missing or not of its format, or the levels of ``stuff`` fit both kinds of maps.
    """
    root, folder = os.fspath(root), f"{split}2017"
    for name, value, known in (
        ("task", task, ("segmentation", "pose")),
        ("labels", labels, LABELS),
        ("split", split, SPLITS),
    ):
        if value not in known:
            raise ConfigError(f"{name}: COCO gives {' and '.join(known)} (got {value})")
    require(root, folder, f"unpack {folder}.zip there")
    if task == "pose":
        entries = _poses(root, folder)
    elif labels == "panoptic":
        entries = _panoptic(root, folder)
    else:
        entries = _stuff(root, folder, labels)
    return labelled(task, split, root, entries, count, seed)


def openpose(keypoints: NDArray[np.floating], height: int, width: int) -> NDArray[np.float64]:
    """Return COCO's keypoints [people, 17, 3] of (x px, y px, v) as those of ``covray.tasks.pose`` [people, 18, 3].

    COCO counts pixels from 0, so that its (x, y) is the middle of a pixel; one outside the picture is not drawn.
    """
    # COCO gives pixels by number; half a pixel further is their middle.
    x, y = keypoints[..., 0] + 0.5, keypoints[..., 1] + 0.5
    visible = (keypoints[..., 2] > 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    points = np.stack([x, y, visible], axis=-1) * visible[..., None]
    left = points[:, KEYPOINTS.index("left_shoulder")]
    right = points[:, KEYPOINTS.index("right_shoulder")]
    # COCO has no neck: it is the middle of the shoulders, where both are seen.
    neck = (left + right) / 2 * (left[:, 2:] * right[:, 2:])
    columns = []
    for name in pose.KEYPOINTS:
        columns.append(points[:, KEYPOINTS.index(name)] if name in KEYPOINTS else neck)
    return np.stack(columns, axis=1)


# --- panoptic ------------------------------------------------------------------------------------------------------


def _panoptic(root: str, folder: str) -> dict[str, Entry]:
    name = f"annotations/panoptic_{folder}"
    hint = "unpack panoptic_annotations_trainval2017.zip there"
    file = _read(root, f"{name}.json", hint, _Panoptic)
    require(root, name, f"{hint}, and panoptic_{folder}.zip, which comes out of it, in annotations")
    categories = sorted(file.categories, key=lambda category: category.id)
    if len(categories) >= _MAX_CLASSES:
        raise ManifestError(f"{root}: {name}.json has {len(categories)} categories; {_MAX_CLASSES - 1} can be drawn")
    # 0 is void; classes count from 1 in the order of COCO's ids.
    classes = {category.id: index for index, category in enumerate(categories, 1)}
    if len(classes) < len(categories):
        raise ManifestError(f"{root}: {name}.json has two categories of one id; give the file as COCO made it")
    category_names = [category.name for category in categories]
    names = ["void", *category_names]
    images = _Images(folder, file.images)
    # All annotations are counted before any is used: an image with two has no clear label.
    for annotation in file.annotations:
        images.use(annotation.image_id)
    entries: dict[str, Entry] = {}
    for annotation in file.annotations:
        render = functools.partial(_draw_panoptic, root, f"{name}/{annotation.file_name}", annotation, classes)
        meta = {"source": "coco panoptic", "image_id": annotation.image_id, "classes": names, "void": 0}
        entries[images.uri(annotation.image_id)] = Entry(images.checked(annotation.image_id, render), meta)
    return entries


def _draw_panoptic(root: str, uri: str, annotation: _Segmented, classes: dict[int, int]) -> NDArray[np.uint8]:
    samples = read_label_file(load_picture(Picture(uri=uri), root)).samples
    if samples.ndim != 3 or samples.dtype != np.uint8:
        raise PairError("unsupported", f"{uri}: is no picture of red, green and blue, which spell the segments' ids")
    red, green, blue = np.moveaxis(samples.astype(np.uint32), 2, 0)
    # COCO's panoptic format spells a segment's id in the three bytes of its colour.
    ids = red + 256 * green + 65536 * blue
    categories: dict[int, int] = {}
    for segment in annotation.segments_info:
        if segment.category_id not in classes:
            raise PairError("unknown_class", f"{uri}: category {segment.category_id} of segment {segment.id}")
        if categories.setdefault(segment.id, segment.category_id) != segment.category_id:
            raise PairError("ambiguous", f"{uri}: segment {segment.id} is of two categories")
    # Id 0 is what nobody has labelled.
    drawn, named = np.zeros(ids.shape, np.uint8), ids == 0
    for number, category in categories.items():
        covered = ids == number
        drawn[covered] = classes[category]
        named |= covered
    if not named.all():
        raise PairError("unknown_segment", f"{uri}: segment {ids[~named][0]} has no class")
    return segmentation.render(drawn)


# --- stuff ---------------------------------------------------------------------------------------------------------


def _stuff(root: str, folder: str, kind: str) -> dict[str, Entry]:
    place = _stuff_folder(root, folder, kind)
    hint = "unpack stuffthingmaps_trainval2017.zip in stuffthingmaps"
    labels = list_below(root, place, hint)
    if kind == "stuff":
        kind = _kind_of_maps(root, place, labels)
    meta = {"source": "coco stuff", "classes": list(STUFF_CLASSES), "void": 0}
    if kind == "pixelmaps":
        meta = {"source": "coco pixelmaps", "classes": [*STUFF_CLASSES, "other"], "void": 0}
    render = _draw_pixelmap if kind == "pixelmaps" else _draw_stuffthingmap
    entries: dict[str, Entry] = {}
    for label in labels:
        stem = label.removeprefix(f"{place}/").rpartition(".")[0]
        entries[f"{folder}/{stem}.jpg"] = Entry(functools.partial(render, root, label), meta)
    return entries


def _stuff_folder(root: str, folder: str, kind: str) -> str:
    if kind == "pixelmaps":
        unpacked = f"annotations/stuff_{folder}_pixelmaps"
        if storage.exists(storage.join(root, unpacked)):
            return unpacked
    return f"stuffthingmaps/{folder}"


def _kind_of_maps(root: str, place: str, labels: list[str]) -> str:
    """Return ``stuffthingmaps`` or ``pixelmaps``: of which of the two the folder's levels are.

    Both have 92 to 181, one class apart. Only COCO-Stuff's maps have 1 to 91 and 255; only pixel maps have 182 and 183.
    A map with levels of the kind that it is not is rejected when it is drawn.
    """
    votes: Counter[str] = Counter()
    # A sample, the same each time: COCO has 118,000 maps.
    for uri in draw(labels, None if len(labels) < _MAPS_READ else _MAPS_READ, 0):
        try:
            levels = set(np.unique(read_levels(load_picture(Picture(uri=uri), root))).tolist())
        except PairError:  # it will be a rejected pair
            continue
        # The two kinds of maps number classes one apart; levels that only one of them has decide.
        fits_pixelmaps = levels <= {0, *STUFF_IDS, OTHER}
        fits_stuffthingmaps = levels <= {*range(len(STUFF_CLASSES) - 1), 255}
        if fits_pixelmaps != fits_stuffthingmaps:
            votes["pixelmaps" if fits_pixelmaps else "stuffthingmaps"] += 1
    if votes["pixelmaps"] == votes["stuffthingmaps"]:
        raise ManifestError(
            f"{root}: the levels in {place} fit COCO-Stuff's maps and COCO's pixel maps, whose classes are one apart; "
            "give --labels stuffthingmaps or --labels pixelmaps"
        )
    return votes.most_common(1)[0][0]


def _draw_stuffthingmap(root: str, uri: str) -> NDArray[np.uint8]:
    levels = read_levels(load_picture(Picture(uri=uri), root)).astype(np.int64)
    classes = np.where(levels == 255, 0, levels + 1)
    if classes.max() >= len(STUFF_CLASSES):
        raise PairError("unknown_class", f"{uri}: {classes.max() - 1} is no class of COCO-Stuff (0 to 181, 255)")
    return segmentation.render(classes)


def _draw_pixelmap(root: str, uri: str) -> NDArray[np.uint8]:
    levels = read_levels(load_picture(Picture(uri=uri), root))
    unknown = ~np.isin(levels, [0, *STUFF_IDS, OTHER])
    if unknown.any():
        raise PairError("unknown_class", f"{uri}: {levels[unknown][0]} is no class of COCO's stuff (0, 92 to 183)")
    return segmentation.render(levels)


# --- keypoints -----------------------------------------------------------------------------------------------------


def _poses(root: str, folder: str) -> dict[str, Entry]:
    hint = "unpack annotations_trainval2017.zip there"
    file = _read(root, f"annotations/person_keypoints_{folder}.json", hint, _People)
    people: dict[int, list[_Person]] = defaultdict(list)
    for person in file.annotations:
        # Crowds have no single skeleton, and people without a visible point have nothing to draw.
        if not person.iscrowd and any(v > 0 for v in person.keypoints[2::3]):
            people[person.image_id].append(person)
    images = _Images(folder, file.images)
    for image_id in people:
        images.use(image_id)
    entries: dict[str, Entry] = {}
    for image_id, group in people.items():
        meta = {"source": "coco keypoints", "image_id": image_id, "people": len(group)}
        render = functools.partial(_draw_pose, images.by_id.get(image_id), group)
        entries[images.uri(image_id)] = Entry(images.checked(image_id, render), meta)
    return entries


def _draw_pose(image: _Image | None, people: list[_Person]) -> NDArray[np.uint8]:
    assert image is not None  # checked before
    # At the size the annotations were made for: a pair whose image has another is rejected.
    if image.height * image.width > MAX_PIXELS:
        raise PairError("too_large", f"annotated as {image.width}x{image.height} px")
    keypoints = np.array([person.keypoints for person in people]).reshape(len(people), -1, 3)
    return pose.render(openpose(keypoints, image.height, image.width), image.height, image.width)


# --- the files -----------------------------------------------------------------------------------------------------


class _Images:
    """The images that a file names, and what is wrong with those that annotations use."""

    def __init__(self, folder: str, images: list[_Image]):
        self.by_id: dict[int, _Image] = {}
        self._folder = folder
        self._doubled: set[int] = set()
        self._users: dict[str, list[int]] = defaultdict(list)
        for image in images:
            known = self.by_id.setdefault(image.id, image)
            if known.file_name != image.file_name:
                self._doubled.add(image.id)

    def use(self, image_id: int) -> None:
        """Count an annotation of ``image_id``."""
        self._users[self.uri(image_id)].append(image_id)

    def uri(self, image_id: int) -> str:
        """Return where the image lies; one that the file does not name is expected where COCO 2017 puts that id."""
        image = self.by_id.get(image_id)
        name = image.file_name if image else f"{image_id:012d}.jpg"
        return f"{self._folder}/{name}"

    def checked(self, image_id: int, render: Callable[[], NDArray[np.uint8]]) -> Callable[[], NDArray[np.uint8]]:
        """Return ``render``, or what raises PairError if it is not clear which label the image has."""
        users = self._users[self.uri(image_id)]
        if image_id not in self.by_id:
            error = PairError("missing", f"image {image_id} is annotated, but not among the file's images")
        elif image_id in self._doubled:
            error = PairError("ambiguous", f"two images of the file have the id {image_id}")
        elif len(users) > 1:
            named = " and ".join(map(str, users[:3]))
            error = PairError("ambiguous", f"the image has {len(users)} annotations, of the image ids {named}")
        else:
            return render
        # Raised when the pair is made, so that it becomes a row with its reason.
        return functools.partial(_raise, error)


def _raise(error: PairError) -> NDArray[np.uint8]:
    raise error


def _read(root: str, path: str, hint: str, kind: type[T]) -> T:
    """Return the JSON file at ``path`` as ``kind``; ManifestError names the first entry that is not of the format."""
    try:
        # Strict: "5" for 5 would otherwise pass, and a wrong file be read half.
        return TypeAdapter(kind).validate_json(as_utf8(read_file(root, path, hint)), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ""
        for part in first["loc"]:
            where += f"[{part}]" if isinstance(part, int) else f".{part}"
        separator = ", " if where else ""
        raise ManifestError(f"{root}: {path}{separator}{where[1:]}: {first['msg']}") from error
