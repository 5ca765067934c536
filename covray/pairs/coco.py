"""COCO 2017: panoptic and stuff labels as classes, keypoints as skeletons (formats: cocodataset.org/#format-data)."""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError

from covray.errors import ConfigError, ManifestError, PairError
from covray.io.images import MAX_PIXELS, decode, decode_levels, load_picture
from covray.pairs.manifest import Pair, Picture
from covray.pairs.sources import Entry, labelled, list_below, read_file, require
from covray.tasks import pose, segmentation

SPLITS = ("train", "val")
LABELS = ("panoptic", "stuff")

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
"""COCO-Stuff's own indices, 0 to 182 (Caesar et al., CVPR 2018). Its PNGs hold the index less 1, and 255 for 0."""

KEYPOINTS = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
)  # fmt: skip
"""COCO's 17, in its order; the neck of the 18 that are drawn is the mean of the shoulders."""

_MAX_CLASSES = 256  # of the palette, void included


# What is used of the files; other keys are passed over. Plain slots: the training files hold a million of these.


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
) -> Iterator[Pair]:
    """Pairs of COCO 2017 below ``root``, ``count`` of them drawn by ``seed`` and the image's name (all by default).

    Images are ``{split}2017/*.jpg``. What each task reads beside them:
    - segmentation, ``labels="panoptic"``: ``annotations/panoptic_{split}2017.json`` and the PNGs in the folder of that
      name. Class 0 is void, class k the k-th of the file's categories by id: 133 in COCO;
    - segmentation, ``labels="stuff"``: ``stuffthingmaps/{split}2017/*.png``, classes ``STUFF_CLASSES``;
    - pose: ``annotations/person_keypoints_{split}2017.json``. All people of an image who have a keypoint are drawn, as
      ``covray.tasks.pose`` does; crowds are not, and images of nobody else are left out. A keypoint is drawn if it is
      labelled (v > 0), seen or covered, and lies in the image.

    ``meta``: the classes' names by index, or the number of people. See ``covray.pairs.sources.labelled`` for pairs
    that cannot be used. Raises ConfigError for an unknown task, split or kind of labels, ManifestError where a file is
    missing or not of its format; the JSON file is read at once, and needs memory of several times its size.
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
        entries = _stuff(root, folder)
    return labelled(task, split, root, entries, count, seed)


def openpose(keypoints: NDArray[np.floating], height: int, width: int) -> NDArray[np.float64]:
    """COCO's keypoints [people, 17, 3] of (x px, y px, v) as those of ``covray.tasks.pose`` [people, 18, 3].

    COCO counts pixels from 0, so that its (x, y) is the middle of a pixel; one outside the picture is not drawn.
    """
    x, y = keypoints[..., 0] + 0.5, keypoints[..., 1] + 0.5
    visible = (keypoints[..., 2] > 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    points = np.stack([x, y, visible], axis=-1) * visible[..., None]
    left, right = (points[:, KEYPOINTS.index(f"{side}_shoulder")] for side in ("left", "right"))
    neck = (left + right) / 2 * (left[:, 2:] * right[:, 2:])
    found = [points[:, KEYPOINTS.index(name)] if name in KEYPOINTS else neck for name in pose.KEYPOINTS]
    return np.stack(found, axis=1)


def _panoptic(root: str, folder: str) -> dict[str, Entry]:
    name = f"annotations/panoptic_{folder}"
    hint = "unpack panoptic_annotations_trainval2017.zip there"
    file = _read(root, f"{name}.json", hint, _Panoptic)
    require(root, name, f"{hint}, and panoptic_{folder}.zip, which comes out of it, in annotations")
    categories = sorted(file.categories, key=lambda category: category.id)
    if len(categories) >= _MAX_CLASSES:
        raise ManifestError(f"{root}: {name}.json has {len(categories)} categories; {_MAX_CLASSES - 1} can be drawn")
    classes = {category.id: index for index, category in enumerate(categories, 1)}
    names = ["void", *(category.name for category in categories)]
    images = {image.id: image for image in file.images}
    entries = {}
    for annotation in file.annotations:
        draw = functools.partial(_draw_panoptic, root, f"{name}/{annotation.file_name}", annotation, classes)
        meta = {"source": "coco panoptic", "image_id": annotation.image_id, "classes": names}
        uri, known = _uri(folder, annotation.image_id, images)
        entries[uri] = Entry(draw if known else functools.partial(_unknown_image, annotation.image_id), meta)
    return entries


def _draw_panoptic(root: str, uri: str, annotation: _Segmented, classes: dict[int, int]) -> NDArray[np.uint8]:
    red, green, blue = np.moveaxis(decode(load_picture(Picture(uri=uri), root)).astype(np.uint32), 2, 0)
    ids = red + 256 * green + 65536 * blue
    found, named = np.zeros(ids.shape, np.uint8), ids == 0
    for segment in annotation.segments_info:
        if segment.category_id not in classes:
            raise PairError("unknown_class", f"{uri}: category {segment.category_id} of segment {segment.id}")
        covered = ids == segment.id
        found[covered] = classes[segment.category_id]
        named |= covered
    if not named.all():
        raise PairError("unknown_segment", f"{uri}: segment {ids[~named][0]} has no class")
    return segmentation.render(found)


def _stuff(root: str, folder: str) -> dict[str, Entry]:
    place = f"stuffthingmaps/{folder}"
    labels = list_below(root, place, "unpack stuffthingmaps_trainval2017.zip in stuffthingmaps")
    meta = {"source": "coco stuff", "classes": list(STUFF_CLASSES)}
    stems = {label.removeprefix(f"{place}/").rpartition(".")[0]: label for label in labels}
    return {
        f"{folder}/{stem}.jpg": Entry(functools.partial(_draw_stuff, root, label), meta)
        for stem, label in stems.items()
    }


def _draw_stuff(root: str, uri: str) -> NDArray[np.uint8]:
    levels = decode_levels(load_picture(Picture(uri=uri), root)).astype(np.int64)
    classes = np.where(levels == 255, 0, levels + 1)
    if classes.max() >= len(STUFF_CLASSES):
        raise PairError("unknown_class", f"{uri}: {classes.max() - 1} is no class of COCO-Stuff (0 to 181, 255)")
    return segmentation.render(classes)


def _poses(root: str, folder: str) -> dict[str, Entry]:
    hint = "unpack annotations_trainval2017.zip there"
    file = _read(root, f"annotations/person_keypoints_{folder}.json", hint, _People)
    people: dict[int, list[_Person]] = defaultdict(list)
    for person in file.annotations:
        if not person.iscrowd and any(v > 0 for v in person.keypoints[2::3]):
            people[person.image_id].append(person)
    images = {image.id: image for image in file.images}
    entries = {}
    for image_id, group in people.items():
        meta = {"source": "coco keypoints", "image_id": image_id, "people": len(group)}
        uri, known = _uri(folder, image_id, images)
        draw = functools.partial(_draw_pose, known, group) if known else functools.partial(_unknown_image, image_id)
        entries[uri] = Entry(draw, meta)
    return entries


def _draw_pose(image: _Image, people: list[_Person]) -> NDArray[np.uint8]:
    # At the size the annotations were made for: if the image has another, the caller will see it.
    if image.height * image.width > MAX_PIXELS:
        raise PairError("too_large", f"annotated as {image.width}x{image.height} px")
    keypoints = np.array([person.keypoints for person in people]).reshape(len(people), -1, 3)
    return pose.render(openpose(keypoints, image.height, image.width), image.height, image.width)


def _uri(folder: str, image_id: int, images: dict[int, _Image]) -> tuple[str, _Image | None]:
    """Where the image lies; one that the file does not name is expected where COCO 2017 puts that id."""
    image = images.get(image_id)
    return f"{folder}/{image.file_name if image else f'{image_id:012d}.jpg'}", image


def _unknown_image(image_id: int) -> NDArray[np.uint8]:
    raise PairError("missing", f"image {image_id} is annotated, but not among the file's images")


def _read(root: str, path: str, hint: str, kind: type[T]) -> T:
    """The JSON file at ``path`` as ``kind``, or ManifestError with the first entry that is not of the format."""
    try:
        return TypeAdapter(kind).validate_json(read_file(root, path, hint), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
        raise ManifestError(f"{root}: {path}{', ' if where else ''}{where[1:]}: {first['msg']}") from error
