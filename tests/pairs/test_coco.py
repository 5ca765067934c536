"""COCO: every category keeps its colour, every keypoint its pixel; what the files say wrongly is told or rejected."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from covray.errors import ConfigError, ManifestError
from covray.io.images import Picture
from covray.pairs.coco import KEYPOINTS, STUFF_CLASSES, coco_pairs
from covray.pairs.manifest import ManifestWriter, Pair
from covray.pairs.manifest_reading import check_manifest
from covray.tasks import pose, segmentation
from tests.support.photographs import bomb, label_of, photo, reasons, save

THINGS = [*range(1, 12), *range(13, 26), 27, 28, *range(31, 45), *range(46, 66), 67, 70, *range(72, 83), *range(84, 91)]
STUFF = [
    92, 93, 95, 100, 107, 109, 112, 118, 119, 122, 125, 128, 130, 133, 138, 141, 144, 145, 147, 148, 149, 151, 154, 155,
    156, 159, 161, 166, 168, 171, 175, 176, 177, 178, 180, 181, *range(184, 201),
]  # fmt: skip
TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What EXIF's orientations ask for."""
CATEGORIES = THINGS + STUFF
"""The ids of the 133 categories of COCO panoptic."""


def image(image_id: int, height_px: int = 16, width_px: int = 24) -> dict[str, Any]:
    return {
        "id": image_id, "file_name": f"{image_id:012d}.jpg", "height": height_px, "width": width_px, "license": 1,
        "coco_url": "", "flickr_url": "", "date_captured": "2013-11-14 17:02:52",
    }  # fmt: skip


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"info": {"year": 2018}, "licenses": [], **content}))


def coloured(ids: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Segment ids [h, w] as the format's colours: id = R + 256 G + 65536 B."""
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2).astype(np.uint8)


class Panoptic:
    """A panoptic split, written as the format describes it."""

    def __init__(self, root: Path, split: str = "val"):
        self.root, self.folder = root, f"{split}2017"
        self.name = f"annotations/panoptic_{self.folder}"
        self.content: dict[str, Any] = {
            "images": [],
            "annotations": [],
            "categories": [
                {"id": number, "name": f"category {number}", "supercategory": "", "isthing": int(number < 92)}
                for number in CATEGORIES
            ],
        }

    def add(self, image_id: int, ids: NDArray[np.integer], categories: dict[int, int]) -> None:
        """An image of noise with segments ``ids`` of ``categories``."""
        save(self.root / self.folder / f"{image_id:012d}.jpg", photo(image_id, *ids.shape))
        save(self.root / self.name / f"{image_id:012d}.png", coloured(ids))
        segments = [
            {"id": number, "category_id": category, "iscrowd": 0, "area": 1, "bbox": [0, 0, 1, 1]}
            for number, category in categories.items()
        ]
        self.content["images"].append(image(image_id, *ids.shape))
        self.content["annotations"].append(
            {"image_id": image_id, "file_name": f"{image_id:012d}.png", "segments_info": segments}
        )

    def write(self) -> None:
        write(self.root / f"{self.name}.json", self.content)


def three(root: Path) -> Panoptic:
    """Three images: one segment of 16 x 20 pixels beside void, of the categories 1, 92 and 200."""
    panoptic = Panoptic(root)
    for image_id, category in ((9, 1), (25, 92), (30, 200)):
        ids = np.zeros((16, 24), np.int64)
        ids[:, :20] = 70_000 + image_id
        panoptic.add(image_id, ids, {70_000 + image_id: category})
    panoptic.write()
    return panoptic


def person(image_id: int, points: dict[str, tuple[float, float, int]], **more: Any) -> dict[str, Any]:
    keypoints = [value for name in KEYPOINTS for value in points.get(name, (0, 0, 0))]
    return {
        "id": 1, "image_id": image_id, "category_id": 1, "iscrowd": 0, "num_keypoints": len(points), "area": 1.0,
        "bbox": [0, 0, 1, 1], "segmentation": [[0, 0, 1, 0, 1, 1]], "keypoints": keypoints, **more,
    }  # fmt: skip


def people(root: Path, annotations: list[dict[str, Any]], images: list[dict[str, Any]], split: str = "val") -> None:
    for one in images:
        save(root / f"{split}2017" / one["file_name"], photo(one["id"], one["height"], one["width"]))
    categories = [
        {"id": 1, "name": "person", "supercategory": "person", "keypoints": KEYPOINTS, "skeleton": [[16, 14]]}
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write(root / f"annotations/person_keypoints_{split}2017.json", content)


def apart(height_px: int, width_px: int) -> dict[str, tuple[float, float, int]]:
    """All 17 keypoints, so that no disc touches another, nor the neck's."""
    cells = [(row, column) for row in range(4) for column in range(5) if (row, column) != (2, 2)][: len(KEYPOINTS)]
    grid = {
        name: (round((column + 0.5) * width_px / 5), round((row + 0.5) * height_px / 4), 2)
        for name, (row, column) in zip(KEYPOINTS, cells, strict=True)
    }
    left, right = KEYPOINTS.index("left_shoulder"), KEYPOINTS.index("right_shoulder")
    assert {cells[left], cells[right]} == {(1, 0), (1, 1)}
    grid["right_shoulder"] = (grid["right_shoulder"][0] - 8, grid["right_shoulder"][1], 1)
    return grid


# --- panoptic ------------------------------------------------------------------------------------------------------


def test_a_segments_class_is_at_its_pixels(tmp_path: Path) -> None:
    panoptic = Panoptic(tmp_path)
    ids = np.zeros((16, 24), np.int64)
    ids[0, 0], ids[1:4, 2:9], ids[8:, :], ids[8, 5] = 1, 3_937_500, 16_777_215, 256
    panoptic.add(142238, ids, {1: 44, 3_937_500: 1, 16_777_215: 200, 256: 92, 77: 3})
    panoptic.write()
    (pair,) = coco_pairs(tmp_path, split="val")
    assert (pair.task, pair.split) == ("segmentation", "val")
    assert pair.image == Picture(uri="val2017/000000142238.jpg")
    classes = segmentation.read_classes(label_of(pair, tmp_path), 134)
    expected = np.zeros((16, 24), np.uint8)
    expected[0, 0] = CATEGORIES.index(44) + 1
    expected[1:4, 2:9], expected[8:, :], expected[8, 5] = 1, 133, CATEGORIES.index(92) + 1
    assert np.array_equal(classes, expected)
    names = pair.meta["classes"]
    assert (len(names), names[0], names[1], names[133]) == (134, "void", "category 1", "category 200")
    assert names[expected[0, 0]] == "category 44"


def test_all_133_categories_and_void_come_back(tmp_path: Path) -> None:
    assert len(CATEGORIES) == len(set(CATEGORIES)) == 133
    panoptic = Panoptic(tmp_path)
    ids = np.arange(12 * 12).reshape(12, 12) % 134 * 100_003
    panoptic.add(1, ids, {(index + 1) * 100_003: category for index, category in enumerate(CATEGORIES)})
    panoptic.content["categories"].reverse()  # the order of the file does not matter
    panoptic.write()
    (pair,) = coco_pairs(tmp_path, split="val")
    assert np.array_equal(segmentation.read_classes(label_of(pair, tmp_path), 134), ids // 100_003)


def test_a_draw_does_not_depend_on_the_order_of_the_file(tmp_path: Path) -> None:
    panoptic = three(tmp_path)

    def drawn(count: int | None, seed: int = 0) -> list[Pair]:
        return list(coco_pairs(tmp_path, split="val", count=count, seed=seed))

    before = [drawn(count) for count in (1, 2, None)]
    panoptic.content["annotations"].reverse()
    panoptic.content["images"].reverse()
    panoptic.write()
    assert [drawn(count) for count in (1, 2, None)] == before
    uris = [{pair.image.uri for pair in pairs} for pairs in before]
    assert uris[0] < uris[1] < uris[2]
    assert len({drawn(1, seed)[0].image.uri for seed in range(9)}) > 1
    assert [pair.pair_id for pair in drawn(2)] == [pair.pair_id for pair in before[1]]


def test_pairs_that_cannot_be_used_are_rows_with_their_reason(tmp_path: Path) -> None:
    root = tmp_path / "coco"
    panoptic = three(root)
    ids = np.full((16, 24), 7)
    for image_id in range(100, 111):
        panoptic.add(image_id, ids, {7: 1})
    by_id = {one["image_id"]: one for one in panoptic.content["annotations"]}
    images = {one["id"]: one for one in panoptic.content["images"]}
    save(tmp_path / "secret.png", coloured(ids))
    save(tmp_path / "secret.jpg", photo(0))
    labels, pictures = root / panoptic.name, root / panoptic.folder
    by_id[100]["segments_info"][0]["category_id"] = 12  # a street sign: COCO has none
    by_id[101]["segments_info"] = []
    save(labels / "000000000102.png", coloured(ids[:, :20]))
    (labels / "000000000103.png").unlink()
    bomb(labels / "000000000104.png")
    (pictures / "000000000105.jpg").unlink()
    by_id[106]["file_name"] = "../../../secret.png"
    by_id[107]["file_name"] = str(tmp_path / "secret.png")
    (labels / "000000000108.png").unlink()
    (labels / "000000000108.png").symlink_to(tmp_path / "secret.png")
    images[109]["file_name"] = "../../secret.jpg"
    panoptic.content["images"] = [one for one in panoptic.content["images"] if one["id"] != 110]
    panoptic.write()
    pairs = list(coco_pairs(root, split="val"))
    assert len(pairs) == 14
    bad = {
        100: "unknown_class", 101: "unknown_segment", 102: "label_shape", 103: "missing", 104: "too_large",
        105: "missing", 106: "outside_root", 107: "missing", 108: "outside_root", 110: "missing",
    }  # fmt: skip
    expected = {f"val2017/{number:012d}.jpg": reason for number, reason in bad.items()}
    assert reasons(pairs, root) == {**expected, "val2017/../../secret.jpg": "outside_root"}
    with ManifestWriter(tmp_path / "pairs.parquet", root) as writer:
        assert all(writer.add(pair) for pair in pairs)
    assert check_manifest(tmp_path / "pairs.parquet").rows == 14


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (("annotations", 1, "image_id"), "25", r"annotations\[1\]\.image_id: Input should be a valid integer"),
        (("annotations", 2, "file_name"), None, r"annotations\[2\]\.file_name: Input should be a valid string"),
        (("annotations", 0, "segments_info"), {}, r"annotations\[0\]\.segments_info: Input should be a valid"),
        (("annotations", 0, "segments_info", 0), 3, r"annotations\[0\]\.segments_info\[0\]: Input should be an object"),
        (("annotations", 0, "segments_info", 0, "id"), 1.5, r"segments_info\[0\]\.id: Input should be a valid integer"),
        (("images", 0, "file_name"), ["x"], r"images\[0\]\.file_name: Input should be a valid string"),
        (("images", 0, "height"), 0, r"images\[0\]\.height: Input should be greater"),
        (("categories",), "all", "categories: Input should be a valid (array|list)"),
        (("categories", 3, "id"), True, r"categories\[3\]\.id: Input should be a valid integer"),
    ],
)  # fmt: skip
def test_entries_of_the_wrong_kind_are_named(tmp_path: Path, place: tuple[Any, ...], value: Any, told: str) -> None:
    panoptic = three(tmp_path)
    inner: Any = panoptic.content
    for part in place[:-1]:
        inner = inner[part]
    inner[place[-1]] = value
    panoptic.write()
    with pytest.raises(ManifestError, match=rf"annotations/panoptic_val2017\.json, .*{told}[^\n]*$"):
        coco_pairs(tmp_path, split="val")


@pytest.mark.parametrize("content", [b"", b'{"images": [', b"[]", b"\xff\xfe", b"[" * 100_000, b'{"images": []}'])
def test_what_is_no_such_json_is_one_line(tmp_path: Path, content: bytes) -> None:
    three(tmp_path)
    (tmp_path / "annotations/panoptic_val2017.json").write_bytes(content)
    with pytest.raises(ManifestError, match=r"panoptic_val2017\.json[^\n]*: [^\n]+$"):
        coco_pairs(tmp_path, split="val")


def test_more_categories_than_colours_are_refused(tmp_path: Path) -> None:
    panoptic = three(tmp_path)
    panoptic.content["categories"] = [{"id": number, "name": "x"} for number in range(256)]
    panoptic.write()
    with pytest.raises(ManifestError, match="has 256 categories; 255 can be drawn"):
        coco_pairs(tmp_path, split="val")


# --- stuff ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "P"])
def test_stuff_is_the_index_less_one_and_255_is_unlabeled(tmp_path: Path, mode: str) -> None:
    levels = (np.arange(14 * 14).reshape(14, 14) % 183 - 1).astype(np.uint8)  # 255, 0, 1, ... 181
    save(tmp_path / "train2017/000000000009.jpg", photo(0, 14, 14))
    labels = tmp_path / "stuffthingmaps/train2017"
    labels.mkdir(parents=True)
    indexed = Image.fromarray(levels)
    if mode == "P":
        indexed.putpalette([5, 6, 7] * 256)  # the colours of a palette say nothing
    indexed.save(labels / "000000000009.png")
    assert Image.open(labels / "000000000009.png").mode == mode
    (pair,) = coco_pairs(tmp_path, labels="stuff")
    classes = segmentation.read_classes(label_of(pair, tmp_path), len(pair.meta["classes"]))
    assert np.array_equal(classes, np.arange(14 * 14).reshape(14, 14) % 183)
    assert pair.image.uri == "train2017/000000000009.jpg"
    assert pair.meta["classes"] == list(STUFF_CLASSES)
    named = {0: "unlabeled", 1: "person", 92: "banner", 124: "grass", 157: "sky-other", 182: "wood"}
    assert {number: STUFF_CLASSES[number] for number in named} == named
    assert len(set(STUFF_CLASSES)) == 183


def test_stuff_of_no_class_is_rejected(tmp_path: Path) -> None:
    labels = tmp_path / "stuffthingmaps/train2017"
    levels = {"182": 182, "254": 254, "65535": 65535, "rgb": None, "181": 181, "person": 0, "car": 2, "void": 255}
    for name, level in levels.items():
        save(tmp_path / f"train2017/{name}.jpg", photo(0))
        kind = np.uint16 if level == 65535 else np.uint8
        save(labels / f"{name}.png", photo(0) if level is None else np.full((16, 24), level, kind))
    save(labels / "alone.png", np.zeros((16, 24), np.uint8))
    assert reasons(coco_pairs(tmp_path, labels="stuff"), tmp_path) == {
        "train2017/182.jpg": "unknown_class", "train2017/254.jpg": "unknown_class", "train2017/rgb.jpg": "unsupported",
        "train2017/65535.jpg": "unknown_class", "train2017/alone.jpg": "missing",
    }  # fmt: skip


def maps(root: Path, place: str, *columns: list[int]) -> None:
    """Maps of stuff, each of 24 columns that repeat these levels."""
    for number, levels in enumerate(columns):
        save(root / f"val2017/{number}.jpg", photo(number))
        save(root / f"{place}/{number}.png", np.tile(np.resize(levels, 24).astype(np.uint8), (16, 1)))


def named(pair: Pair, root: Path) -> list[str]:
    """The names of the classes along the label's first row."""
    names = pair.meta["classes"]
    return [names[index] for index in segmentation.read_classes(label_of(pair, root), len(names))[0]]


@pytest.mark.parametrize("place", ["stuffthingmaps/val2017", "annotations/stuff_val2017_pixelmaps"])
def test_pixel_maps_are_read_by_their_own_numbering(tmp_path: Path, place: str) -> None:
    maps(tmp_path, place, [157, 124, 92, 182], [0, 183, 157])
    kinds = ("stuff", "pixelmaps") if place.startswith("stuff") else ("pixelmaps",)
    for kind in kinds:
        first, second = coco_pairs(tmp_path, labels=kind, split="val")
        assert named(first, tmp_path)[:4] == ["sky-other", "grass", "banner", "wood"]
        assert named(second, tmp_path)[:3] == ["unlabeled", "other", "sky-other"]
        assert (first.meta["source"], first.meta["void"], len(first.meta["classes"])) == ("coco pixelmaps", 0, 184)


def test_maps_whose_levels_fit_both_kinds_are_refused_until_declared(tmp_path: Path) -> None:
    maps(tmp_path, "stuffthingmaps/val2017", [157, 124])
    with pytest.raises(ManifestError, match=r"--labels stuffthingmaps or --labels pixelmaps$"):
        coco_pairs(tmp_path, labels="stuff", split="val")
    (pair,) = coco_pairs(tmp_path, labels="pixelmaps", split="val")
    assert named(pair, tmp_path)[:2] == ["sky-other", "grass"]
    (pair,) = coco_pairs(tmp_path, labels="stuffthingmaps", split="val")
    assert named(pair, tmp_path)[:2] == ["skyscraper", "gravel"]


def test_a_map_of_the_other_kind_is_rejected(tmp_path: Path) -> None:
    maps(tmp_path, "stuffthingmaps/val2017", [183], [182, 0], [0, 5], [157])
    pairs = list(coco_pairs(tmp_path, labels="stuff", split="val"))
    assert reasons(pairs, tmp_path) == {"val2017/2.jpg": "unknown_class"}
    assert set(named(pairs[3], tmp_path)) == {"sky-other"}


# --- what goes wrong without a word --------------------------------------------------------------------------------


def turn(path: Path, orientation: int) -> None:
    """Write the image again, as a camera that was held otherwise would."""
    with Image.open(path) as picture:
        data = picture.getexif()
        data[274] = orientation
        picture.save(path, exif=data)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_labels_turn_with_their_images(tmp_path: Path, orientation: int) -> None:
    ids = np.zeros((16, 24), np.int64)
    ids[1:4, 2:9] = 70_000
    panoptic = Panoptic(tmp_path)
    panoptic.add(9, ids, {70_000: 7})
    panoptic.write()
    maps(tmp_path, "stuffthingmaps/val2017", [0, 5, 255, 90])
    people(tmp_path, [person(9, {"nose": (3, 12, 2)})], [image(9)])
    for name in ("000000000009", "0"):
        turn(tmp_path / f"val2017/{name}.jpg", orientation)
    upright = Image.fromarray((ids > 0).astype(np.uint8)).transpose(TURN[orientation])
    (pair,) = coco_pairs(tmp_path, split="val")
    assert np.array_equal(label_of(pair, tmp_path).any(axis=2), np.array(upright, bool))
    (pair,) = coco_pairs(tmp_path, labels="stuff", split="val")
    levels = np.tile(np.resize([1, 6, 0, 91], 24).astype(np.uint8), (16, 1))
    upright = Image.fromarray(levels).transpose(TURN[orientation])
    assert np.array_equal(segmentation.read_classes(label_of(pair, tmp_path), 183), np.array(upright))
    (pair,) = coco_pairs(tmp_path, "pose", split="val")
    dot = np.zeros((16, 24), np.uint8)
    dot[12, 3] = 1
    row, column = np.argwhere(np.array(Image.fromarray(dot).transpose(TURN[orientation])))[0]
    drawn = np.argwhere(label_of(pair, tmp_path).any(axis=2))
    assert np.abs(drawn.mean(axis=0) - (row, column)).max() < 0.5


def test_ids_are_read_whatever_alpha_says(tmp_path: Path) -> None:
    panoptic = three(tmp_path)
    expected = [label_of(pair, tmp_path) for pair in coco_pairs(tmp_path, split="val")]
    for path in (tmp_path / panoptic.name).glob("*.png"):
        colours = np.array(Image.open(path))
        save(path, np.dstack([colours, np.zeros_like(colours[..., :1])]))
    result = [label_of(pair, tmp_path) for pair in coco_pairs(tmp_path, split="val")]
    assert np.array_equal(result, expected)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_the_json(tmp_path: Path, encoding: str) -> None:
    panoptic = three(tmp_path)
    path = tmp_path / f"{panoptic.name}.json"
    path.write_text(path.read_text(), encoding=encoding)
    assert len([pair for pair in coco_pairs(tmp_path, split="val") if "error" not in pair.meta]) == 3


def test_an_image_that_two_records_name_is_told(tmp_path: Path) -> None:
    panoptic = three(tmp_path)
    images = panoptic.content["images"]
    images[1]["file_name"] = images[0]["file_name"]
    panoptic.write()
    pairs = list(coco_pairs(tmp_path, split="val"))
    assert reasons(pairs, tmp_path) == {"val2017/000000000009.jpg": "ambiguous"}
    assert pairs[0].meta["error"] == "ambiguous: the image has 2 annotations, of the image ids 9 and 25"
    people(tmp_path, [person(9, {"nose": (1, 1, 2)}), person(25, {"nose": (2, 2, 2)})], [image(9), image(25)])
    content = json.loads((tmp_path / "annotations/person_keypoints_val2017.json").read_text())
    content["images"][1]["file_name"] = content["images"][0]["file_name"]
    write(tmp_path / "annotations/person_keypoints_val2017.json", content)
    assert reasons(coco_pairs(tmp_path, "pose", split="val"), tmp_path) == {"val2017/000000000009.jpg": "ambiguous"}


def test_what_a_file_says_twice_and_differently_is_told(tmp_path: Path) -> None:
    panoptic = three(tmp_path)
    annotations, images = panoptic.content["annotations"], panoptic.content["images"]
    annotations.append(annotations[0])  # an image annotated twice
    segment = annotations[1]["segments_info"][0]
    annotations[1]["segments_info"].append({**segment, "category_id": 3})
    images.append({**images[2], "file_name": "other.jpg"})
    panoptic.write()
    found = reasons(coco_pairs(tmp_path, split="val"), tmp_path)
    assert found == {f"val2017/{number:012d}.jpg": "ambiguous" for number in (9, 25, 30)}
    panoptic.content["categories"].append({"id": 1, "name": "again"})
    panoptic.write()
    with pytest.raises(ManifestError, match="two categories of one id"):
        coco_pairs(tmp_path, split="val")


# --- keypoints -----------------------------------------------------------------------------------------------------


def test_keypoints_come_back_at_their_pixels(tmp_path: Path) -> None:
    points = apart(256, 320)
    people(tmp_path, [person(9, points)], [image(9, 256, 320)])
    (pair,) = coco_pairs(tmp_path, "pose", split="val")
    assert (pair.task, pair.image.uri, pair.meta["people"]) == ("pose", "val2017/000000000009.jpg", 1)
    found = pose.read(label_of(pair, tmp_path))
    for name, (x, y, _) in points.items():
        assert np.abs(found[pose.KEYPOINTS.index(name)] - (x + 0.5, y + 0.5, 1)).max() < 0.05, name
    left, right = points["left_shoulder"], points["right_shoulder"]
    neck = ((left[0] + right[0] + 1) / 2, (left[1] + right[1] + 1) / 2, 1)
    assert np.abs(found[pose.KEYPOINTS.index("neck")] - neck).max() < 0.05


@pytest.mark.parametrize("gone", ["left_shoulder", "right_shoulder", "nose"])
def test_what_is_not_labelled_is_not_drawn(tmp_path: Path, gone: str) -> None:
    points = apart(256, 320) | {gone: (40, 50, 0)}
    people(tmp_path, [person(9, points)], [image(9, 256, 320)])
    (pair,) = coco_pairs(tmp_path, "pose", split="val")
    found = pose.read(label_of(pair, tmp_path))
    absent = {pose.KEYPOINTS[index] for index in np.flatnonzero(found[:, 2] == 0)}
    assert absent == {gone} | ({"neck"} if "shoulder" in gone else set())


def test_what_lies_beside_the_picture_is_not_drawn(tmp_path: Path) -> None:
    points = apart(256, 320) | {"nose": (-3, 5, 2), "left_eye": (320, 5, 2), "right_eye": (5, 1e300, 1)}
    people(tmp_path, [person(9, points)], [image(9, 256, 320)])
    (pair,) = coco_pairs(tmp_path, "pose", split="val")
    found = pose.read(label_of(pair, tmp_path))
    assert {pose.KEYPOINTS[index] for index in np.flatnonzero(found[:, 2] == 0)} == {"nose", "left_eye", "right_eye"}


def test_everybody_is_drawn_but_crowds_and_those_without_keypoints(tmp_path: Path) -> None:
    left = {"nose": (10, 10, 2), "left_wrist": (20, 50, 1)}
    right = {"nose": (80, 12, 2), "right_knee": (90, 40, 2)}
    crowd = person(9, {"nose": (50, 50, 2)}, iscrowd=1)
    people(
        tmp_path,
        [person(9, left), crowd, person(9, {}), person(9, right), person(25, {}), {**crowd, "image_id": 30}],
        [image(number, 64, 100) for number in (9, 25, 30, 44)],
    )
    (pair,) = coco_pairs(tmp_path, "pose", split="val")
    assert (pair.image.uri, pair.meta["people"]) == ("val2017/000000000009.jpg", 2)
    drawn = np.zeros((2, 18, 3))
    for index, points in enumerate((left, right)):
        for name, (x, y, _) in points.items():
            drawn[index, pose.KEYPOINTS.index(name)] = (x + 0.5, y + 0.5, 1)
    label = label_of(pair, tmp_path)
    assert np.array_equal(label, pose.render(drawn, 64, 100))
    for x, y in ((10, 10), (20, 50), (80, 12), (90, 40)):
        assert label[y, x].any()
    assert not label[50, 50].any()


def test_people_that_cannot_be_used_are_rows_with_their_reason(tmp_path: Path) -> None:
    images = [image(number, 64, 100) for number in (1, 2, 3)]
    people(tmp_path, [person(number, {"nose": (9, 9, 2)}) for number in (1, 2, 3, 4)], images)
    save(tmp_path / "val2017/000000000001.jpg", photo(0, 100, 64))  # of another size than annotated
    (tmp_path / "val2017/000000000002.jpg").unlink()
    assert reasons(coco_pairs(tmp_path, "pose", split="val"), tmp_path) == {
        "val2017/000000000001.jpg": "label_shape", "val2017/000000000002.jpg": "missing",
        "val2017/000000000004.jpg": "missing",
    }  # fmt: skip
    huge = {**images[2], "height": 10**6, "width": 10**6}
    write(
        tmp_path / "annotations/person_keypoints_val2017.json",
        {"images": [huge], "annotations": [person(3, {"nose": (9, 9, 2)})]},
    )
    assert list(reasons(coco_pairs(tmp_path, "pose", split="val"), tmp_path).values()) == ["too_large"]


@pytest.mark.parametrize(
    ("keypoints", "told"),
    [
        ([1, 2, 2] * 16, r"annotations\[1\]\.keypoints: List should have at least 51 items"),
        ([1, 2, 2] * 16 + [1, float("nan"), 2], r"annotations\[1\]\.keypoints\[49\]: Input should be a finite number"),
        ([1, 2, 2] * 16 + [1, "3", 2], r"annotations\[1\]\.keypoints\[49\]: Input should be a valid number"),
        (None, r"annotations\[1\]\.keypoints: "),
    ],
)
def test_keypoints_of_the_wrong_kind_are_named(tmp_path: Path, keypoints: Any, told: str) -> None:
    wrong = person(9, {}) | {"keypoints": keypoints}
    people(tmp_path, [person(9, {"nose": (1, 1, 2)}), wrong], [image(9)])
    with pytest.raises(ManifestError, match=rf"person_keypoints_val2017\.json, {told}"):
        coco_pairs(tmp_path, "pose", split="val")


# --- the whole -----------------------------------------------------------------------------------------------------


def test_what_is_missing_is_named_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"train2017 is missing; unpack train2017\.zip there"):
        coco_pairs(tmp_path)
    (tmp_path / "val2017").mkdir()
    with pytest.raises(ManifestError, match=r"annotations/panoptic_val2017\.json is missing; unpack panoptic_ann"):
        coco_pairs(tmp_path, split="val")
    panoptic = three(tmp_path)
    (tmp_path / panoptic.name).rename(tmp_path / "panoptic_val2017")
    with pytest.raises(ManifestError, match=r"annotations/panoptic_val2017 is missing; .*, and panoptic_val2017\.zip"):
        coco_pairs(tmp_path, split="val")
    with pytest.raises(ManifestError, match=r"annotations/person_keypoints_val2017\.json is missing; unpack ann"):
        coco_pairs(tmp_path, "pose", split="val")
    with pytest.raises(ManifestError, match=r"stuffthingmaps/val2017 is missing; unpack stuffthingmaps"):
        coco_pairs(tmp_path, labels="stuff", split="val")
    people(tmp_path, [person(9, {})], [image(9)])
    with pytest.raises(ManifestError, match="holds no pairs of pose for val"):
        coco_pairs(tmp_path, "pose", split="val")
    for options, told in (
        ({"task": "depth"}, r"task: COCO gives segmentation and pose \(got depth\)"),
        ({"split": "test"}, "split: COCO gives train and val"),
        ({"labels": "things"}, "labels: COCO gives panoptic and stuff and stuffthingmaps"),
    ):
        with pytest.raises(ConfigError, match=told):
            coco_pairs(tmp_path, **options)


def test_the_command_writes_a_manifest_of_uris_and_labels(
    tmp_path: Path, command: Callable[..., tuple[Any, str]]
) -> None:
    root, out = tmp_path / "coco", tmp_path / "pairs.parquet"
    three(root)
    answer, told = command("coco", root, "--split", "val", "--count", 10_000, "--seed", 1, "--out", out)
    assert (answer["per_task"], answer["splits"]) == ({"segmentation": 3}, {"val": 3})
    assert told == "covray: 10000 pairs asked for, only 3 present: all were taken\n"
    assert check_manifest(out).root == str(root)
    people(root, [person(9, {"nose": (9, 9, 2)})], [image(9)])
    answer, told = command("coco", root, "--task", "pose", "--split", "val", "--out", out)
    assert (answer["per_task"], told) == ({"pose": 1}, "")
    save(root / "stuffthingmaps/val2017/000000000025.png", np.full((16, 24), 255, np.uint8))
    answer, told = command("coco", root, "--labels", "stuff", "--split", "val", "--out", out)
    assert (answer["per_task"], told) == ({"segmentation": 1}, "")
