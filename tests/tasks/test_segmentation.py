"""Classes as VOC colours: no two alike, exact both ways, and robust to what a generator does to a colour."""

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from covray.tasks.segmentation import (
    class_table,
    export,
    malformed_classes,
    mean,
    palette,
    read,
    read_classes,
    render,
    score,
)

VOC = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128), (128, 128, 128)]


def test_all_256_classes_come_back() -> None:
    classes = np.arange(256, dtype=np.uint8).reshape(8, 32)
    assert np.array_equal(read_classes(render(classes), 256), classes)


def test_a_large_picture_takes_no_more_memory_than_itself() -> None:
    """All distances at once would be 800 MB."""
    classes = np.random.default_rng(0).integers(0, 256, (500, 400)).astype(np.uint8)
    picture = render(classes)
    tracemalloc.start()
    try:
        assert np.array_equal(read_classes(picture, 256), classes)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


def test_the_colours_are_those_of_voc() -> None:
    assert [tuple(colour) for colour in palette(8).tolist()] == VOC
    assert palette(21)[20].tolist() == [0, 64, 128]  # the tv monitor, last of VOC's twenty


@pytest.mark.parametrize("classes", [2, 9, 21, 256])
def test_noise_of_less_than_half_the_palette_distance_is_forgiven(classes: int) -> None:
    colours = palette(classes).astype(np.float64)
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=2)
    half = distances[~np.eye(classes, dtype=bool)].min() / 2
    rng = np.random.default_rng(0)
    truth = rng.integers(0, classes, (64, 64)).astype(np.uint8)
    noise = rng.normal(size=(64, 64, 3))
    noise *= (half - 1.8) / np.linalg.norm(noise, axis=2, keepdims=True)  # rounding adds up to sqrt(3)
    drawn = palette(classes)[truth] + noise
    seen = np.rint(drawn).clip(0, 255).astype(np.uint8)  # clipping moves a colour towards the palette, never away
    assert np.array_equal(read_classes(seen, classes), truth)


def test_reading_never_answers_a_class_beyond_those_asked_for() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert read_classes(picture, 5).max() == 4


@pytest.mark.parametrize("classes", [0, 257])
def test_a_palette_of_no_or_too_many_classes_is_refused(classes: int) -> None:
    with pytest.raises(ValueError, match="1 to 256"):
        palette(classes)


OWN = {"classes": ["soil", "road", "tree"], "class_numbers": [0, 7, 300], "void": 255, "void_number": 9}


def test_void_is_read_and_not_scored() -> None:
    truth = np.array([[0, 1, 2, 255], [0, 1, 2, 255]], np.uint8)
    answer = np.array([[0, 1, 2, 0], [1, 1, 255, 2]], np.uint8)
    assert np.array_equal(read(render(truth), OWN), truth)
    result = score(render(answer), render(truth), OWN)
    assert result.values["p_acc"] == 4 / 6  # of the six labelled pixels
    # soil 1 of 2; road 2 of 3; tree 1 of 2: void in the answer is wrong, but a class of its own it is not
    assert result.values["iou"] == pytest.approx((1 / 2 + 2 / 3 + 1 / 2) / 3)
    assert score(render(truth), render(truth), OWN).values == {"iou": 1.0, "p_acc": 1.0}
    nothing = np.full((2, 4), 255, np.uint8)
    assert score(render(truth), render(nothing), OWN).values == {"iou": None, "p_acc": None}


def test_void_may_have_the_first_colour() -> None:
    """As in COCO's labels, whose black is void."""
    meta = {"classes": ["void", "person", "car"], "void": 0}
    truth = np.array([[0, 0, 1, 2]], np.uint8).repeat(2, axis=0)
    answer = np.array([[1, 2, 1, 0]], np.uint8).repeat(2, axis=0)
    assert score(render(answer), render(truth), meta).values == {"iou": 0.5, "p_acc": 0.5}
    counted = score(render(answer), render(truth), {"classes": meta["classes"]}).values
    assert counted["p_acc"] == 0.25  # a manifest that declares no void has none


def test_void_does_not_vote() -> None:
    labels = [np.full((2, 2), index, np.uint8) for index in (255, 255, 1)]
    assert (read(mean(map(render, labels), OWN), OWN) == 1).all()
    assert (read(mean(map(render, labels[:2]), OWN), OWN) == 255).all()


def test_answers_are_exported_with_the_users_numbers() -> None:
    indices = np.array([[0, 1, 2, 255]], np.uint8).repeat(2, axis=0)
    exported = Image.open(io.BytesIO(export(render(indices), OWN)["classes.png"]))
    assert np.asarray(exported).tolist() == [[0, 7, 300, 9]] * 2
    small = OWN | {"class_numbers": [0, 7, 30]}
    exported = Image.open(io.BytesIO(export(render(indices), small)["classes.png"]))
    assert (exported.mode, np.asarray(exported).tolist()) == ("L", [[0, 7, 30, 9]] * 2)


@pytest.mark.parametrize(
    "meta",
    [
        None, {}, {"classes": "road"}, {"classes": []}, {"classes": ["x"] * 257}, {"void": 3},
        {"classes": None, "class_numbers": [1]},
    ],
)  # fmt: skip
def test_meta_without_classes_is_pascal_voc(meta: dict[str, object] | None) -> None:
    table = class_table(meta)
    assert (len(table.names), table.numbers, table.void) == (21, tuple(range(21)), None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"classes": "road"}, "classes is not a list"),
        ({"classes": []}, "classes is not a list"),
        ({"class_numbers": [1]}, "class_numbers is not a list of 2"),
        ({"class_numbers": [0, 70_000]}, "class_numbers is not"),
        ({"void": "255"}, "void is not"),
        ({"void": 256}, "void is not"),
        ({"void_number": -1}, "void_number is not"),
    ],
)
def test_what_is_malformed_is_said(wrong: dict[str, object], message: str) -> None:
    whole = {"classes": ["a", "b"], "class_numbers": [3, 7], "void": 255, "void_number": 0}
    assert malformed_classes({}) is None
    assert malformed_classes(whole) is None
    assert message in str(malformed_classes(whole | wrong))


@pytest.mark.parametrize("wrong", [[1], ["a", "b"], [0, -1], [0, 70_000], [True, False], "01", None])
def test_malformed_numbers_count_as_absent(wrong: object) -> None:
    assert class_table({"classes": ["a", "b"], "class_numbers": wrong}).numbers == (0, 1)
    assert class_table({"classes": ["a", "b"], "void": wrong}).void is None
