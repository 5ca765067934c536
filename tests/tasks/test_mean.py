"""Means of labels: of what they say, where they say it, in any order; medians where one stray label must not count."""

from __future__ import annotations

import numpy as np
import pytest

from covray.evaluation.scores import score
from covray.tasks import TASKS, depth, normals, pose, segmentation

NOISE = np.random.default_rng(0).integers(0, 256, (40, 24, 24, 3), dtype=np.uint8)


def test_the_mean_of_one_label_is_the_label() -> None:
    person = np.zeros((18, 3))
    person[:5] = [(4, 4, 1), (12, 4, 1), (20, 12, 1), (4, 20, 1), (12, 20, 1)]
    labels = dict.fromkeys(TASKS, NOISE[0]) | {
        "segmentation": segmentation.render(np.arange(576).reshape(24, 24) % 21),
        "pose": pose.render(person, 24, 24),
        "normals": normals.render(np.broadcast_to([0.0, 0.6, 0.8], (24, 24, 3))),
        "edges": np.repeat(NOISE[0, ..., :1], 3, axis=2),
        "depth": depth.render(np.linspace(0, 9, 576).reshape(24, 24)),
    }
    for task, label in labels.items():
        mean = TASKS[task].mean([label])
        assert mean.dtype == np.uint8
        if task == "pose":  # a hidden part of a disc moves what is read by less than a pixel
            assert score(task, mean, label).values["pck"] == 1
        else:
            assert np.abs(mean.astype(int) - label).max() <= 1


@pytest.mark.parametrize("task", ["colorization", "low_light"])
def test_pictures_have_the_mean_of_their_pixels(task: str) -> None:
    mean = TASKS[task].mean(iter(NOISE))
    assert np.abs(mean - NOISE.mean(axis=0)).max() <= 0.5 + 1e-3
    # The mean is the constant answer of least squared error.
    errors = [np.mean([score("colorization", a, b).values["mse"] for b in NOISE]) for a in (mean, NOISE[0], mean ^ 16)]
    assert errors[0] == min(errors)


def test_classes_have_a_majority_at_every_pixel() -> None:
    first, second = np.zeros((4, 4), int), np.full((4, 4), 5)
    labels = [segmentation.render(classes) for classes in (first, second, second)]
    assert (segmentation.read(segmentation.mean(labels, {"classes": ["name"] * 9})) == 5).all()


@pytest.mark.parametrize("size", [(24, 32), (64, 48)])
def test_keypoints_have_their_mean_place_where_most_have_them(size: tuple[int, int]) -> None:
    people = np.zeros((3, 18, 3))
    people[:, 0] = [(8, 10, 1), (12, 10, 1), (16, 10, 1)]
    people[:2, 3] = [(10, 20, 1), (14, 20, 1)]  # two of three have it
    people[0, 6] = (24, 8, 1)  # one of three
    found = pose.read(pose.mean([pose.render(person, *size) for person in people]))
    assert found[:, 2].nonzero()[0].tolist() == [0, 3]
    assert np.abs(found[[0, 3], :2] - [(12, 10), (12, 20)]).max() < 1


def test_nothing_is_no_depth_and_no_direction_in_a_mean() -> None:
    metres = np.stack([np.full((4, 4), 2.0), np.full((4, 4), 4.0), np.zeros((4, 4))])
    metres[:, 0, 0] = 0
    mean = depth.read(depth.mean([depth.render(each) for each in metres]))
    assert mean[0, 0] == 0
    assert np.abs(mean.ravel()[1:] - 3).max() < 0.05
    ways = np.zeros((3, 4, 4, 3))
    ways[0, ..., :], ways[1, ..., :] = (0.6, 0, 0.8), (-0.6, 0, 0.8)
    towards = normals.read(normals.mean([normals.render(each) for each in ways]))
    assert np.abs(towards - (0, 0, 1)).max() < 0.02


def test_no_labels_have_no_mean() -> None:
    with pytest.raises(ValueError, match="no labels of depth"):
        depth.mean([])


# --- votes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("robust", [False, True])
def test_the_order_of_labels_does_not_matter(task: str, robust: bool) -> None:
    labels = NOISE[:7]
    if task == "pose":
        rng = np.random.default_rng(1)
        people = [np.concatenate([rng.uniform(2, 22, (18, 2)), rng.random((18, 1)) > 0.3], axis=1) for _ in range(7)]
        labels = np.stack([pose.render(person, 24, 24) for person in people])
    expected = TASKS[task].mean(labels, robust=robust)
    for order in ([6, 5, 4, 3, 2, 1, 0], [3, 0, 6, 1, 5, 2, 4]):
        assert np.array_equal(TASKS[task].mean(labels[order], robust=robust), expected)


@pytest.mark.parametrize("task", TASKS)
def test_one_candidate_and_equal_candidates_are_that_candidate_read_and_rendered(task: str) -> None:
    candidate = NOISE[0] if task != "pose" else pose.render(np.ones((18, 3)) * 9, 24, 24)
    value = TASKS[task].read(candidate)
    expected = pose.render(value, 24, 24) if task == "pose" else TASKS[task].render(value)
    for count in (1, 2, 5):
        assert np.array_equal(TASKS[task].mean([candidate] * count, robust=True), expected)


def test_a_stray_candidate_does_not_move_a_median() -> None:
    near, far = depth.render(np.full((4, 4), 2.0)), depth.render(np.full((4, 4), 9.0))
    assert np.array_equal(depth.mean([near, near, far], robust=True), near)
    assert depth.read(depth.mean([near, near, far])).mean() > 4
    people = np.zeros((3, 18, 3))
    people[:, 2] = [(8, 10, 1), (8, 10, 1), (50, 50, 1)]
    drawn = [pose.render(person, 64, 64) for person in people]
    middle = pose.read(pose.mean(drawn, robust=True))
    assert np.abs(middle[2, :2] - (8, 10)).max() < 1
    assert pose.read(pose.mean(drawn))[2, 0] > 20


def test_depth_that_most_candidates_lack_is_none() -> None:
    metres = np.zeros((5, 2, 2))
    metres[:3, 0, 0] = (1, 2, 6)
    metres[:2, 1, 1] = (1, 2)
    joined = depth.read(depth.mean([depth.render(each) for each in metres], robust=True))
    assert joined[0, 0] == pytest.approx(2, abs=0.03)
    assert joined[1, 1] == joined[0, 1] == 0
