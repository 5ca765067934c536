"""Classes as VOC colours: no two alike, exact both ways, and robust to what a generator does to a colour."""

import numpy as np
import pytest

from covray.tasks.segmentation import palette, read_classes, render

VOC = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128), (128, 128, 128)]


def test_all_256_classes_come_back() -> None:
    classes = np.arange(256, dtype=np.uint8).reshape(8, 32)
    assert np.array_equal(read_classes(render(classes), 256), classes)


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
