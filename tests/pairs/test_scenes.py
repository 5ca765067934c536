"""Scenes: one seed, one scene; and all labels of a view tell of the same scene."""

from __future__ import annotations

import colorsys
import itertools
from collections import Counter

import numpy as np
import pytest

from covray.io.images import decode
from covray.pairs.manifest import Pair
from covray.pairs.scenes import (
    CLASSES,
    SPLITS,
    View,
    labelled,
    render_scene,
    scene_pairs,
    scene_seed,
)
from covray.pairs.scenes.render import Camera
from covray.tasks import TASKS, depth, normals, pose, segmentation

PERSON = CLASSES.index("person") + 1
FLOOR = CLASSES.index("floor") + 1
TORSO = (2, 5, 8, 11)
SEEDS = range(8)
SATURATED = 0.25


@pytest.fixture(scope="module")
def views() -> list[View]:
    return [render_scene(seed)[0] for seed in SEEDS]


def _generator() -> np.random.Generator:
    return np.random.default_rng(0)


def _fields(view: View) -> list[np.ndarray]:
    return list(vars(view).values())


def test_a_seed_is_a_scene(views: list[View]) -> None:
    again = render_scene(0)[0]
    assert all(np.array_equal(first, second) for first, second in zip(_fields(views[0]), _fields(again), strict=True))
    assert all(not np.array_equal(views[0].colour, other.colour) for other in views[1:])


def test_further_views_show_the_same_scene_and_leave_the_first_alone(views: list[View]) -> None:
    first, second = render_scene(0, views=2)
    assert np.array_equal(first.colour, views[0].colour)
    assert not np.array_equal(first.colour, second.colour)
    assert len(np.intersect1d(first.classes, second.classes)) >= 2


def test_splits_and_seeds_share_no_scene() -> None:
    numbers = [scene_seed(seed, split, i) for seed in (0, 1) for split in SPLITS for i in range(200)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 2**64 for number in numbers)


def test_a_larger_picture_shows_the_same() -> None:
    for seed in (1, 2):
        small, large = render_scene(seed, 64)[0], render_scene(seed, 128)[0]
        # The centre of a small pixel is the corner of four large ones.
        quads = large.depth_m.reshape(64, 2, 64, 2).transpose(0, 2, 1, 3).reshape(64, 64, 4)
        smooth = (quads.min(axis=2) > 0) & (np.ptp(quads, axis=2) < 0.05)
        assert smooth.mean() > 0.5
        assert np.abs(quads.mean(axis=2) - small.depth_m)[smooth].max() < 0.03
        assert np.allclose(large.keypoints[:, :2], 2 * small.keypoints[:, :2], atol=1e-2)
        assert np.array_equal(large.keypoints[:, 2], small.keypoints[:, 2])
        brightness = large.colour.astype(float).reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
        assert np.abs(brightness - small.colour).mean() < 4


def test_the_sky_has_no_depth_and_all_else_has(views: list[View]) -> None:
    assert any((view.classes == 0).any() for view in views)
    for view in views:
        solid = view.classes > 0
        assert np.array_equal(view.depth_m > 0, solid)
        assert np.isfinite(view.depth_m).all()
        assert np.allclose(np.linalg.norm(view.normals, axis=2), solid, atol=1e-5)
        assert view.classes.max() <= len(CLASSES)


def _back_projected(view: View, focal_px: float) -> np.ndarray:
    """Points [h, w, 3] in the camera's frame (x right, y up, looking along -z), from depth along the optical axis."""
    size = view.depth_m.shape[0]
    offset = np.arange(size) + 0.5 - size / 2
    x, y = np.meshgrid(offset, -offset)
    rays = np.stack([x / focal_px, y / focal_px, -np.ones_like(x)], axis=-1)
    return rays * view.depth_m[..., None].astype(np.float64)


@pytest.fixture
def focal_lengths(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Filled with the focal length of every camera made."""
    found: list[float] = []
    made = Camera.__init__

    def remember(self: Camera, *args: object) -> None:
        made(self, *args)  # type: ignore[arg-type]
        found.append(float(self.focal_px))

    monkeypatch.setattr(Camera, "__init__", remember)
    return found


def test_normals_are_those_of_the_depth_and_face_the_camera(focal_lengths: list[float]) -> None:
    compared = 0
    for seed in SEEDS:
        view = render_scene(seed, 96)[0]
        points = _back_projected(view, focal_lengths[-1])
        rays = points / np.maximum(np.linalg.norm(points, axis=2, keepdims=True), 1e-9)
        assert ((view.normals * rays).sum(axis=2) < 1e-3).all()
        # Central differences of the points, where a pixel and all its neighbours lie on one plane.
        right = points[1:-1, 2:] - points[1:-1, :-2]
        up = points[:-2, 1:-1] - points[2:, 1:-1]
        geometric = np.cross(right, up)
        geometric /= np.maximum(np.linalg.norm(geometric, axis=2, keepdims=True), 1e-12)
        neighbours = np.stack(
            [np.roll(view.normals, shift, (0, 1)) for shift in itertools.product((-1, 0, 1), repeat=2)]
        )
        same_class = np.stack(
            [np.roll(view.classes, shift, (0, 1)) == view.classes for shift in itertools.product((-1, 0, 1), repeat=2)]
        )
        turn = np.abs(neighbours - view.normals).max(axis=(0, 3))
        flat = ((turn < 1e-4) & same_class.all(axis=0) & (view.classes > 0))[1:-1, 1:-1]
        cosine = (geometric * view.normals[1:-1, 1:-1]).sum(axis=2)[flat]
        angles = np.rad2deg(np.arccos(np.clip(cosine, -1, 1)))
        # Two faces of one class and one normal may lie behind each other: a few pixels.
        assert np.mean(angles < 3) > 0.98
        compared += flat.sum()
    assert compared > 10_000


def test_the_floor_is_below_and_level(views: list[View]) -> None:
    """Everywhere on the floor the normal is the same direction, and it is up, not down."""
    seen = 0
    for view in views:
        ground = view.normals[view.classes == FLOOR]
        seen += len(ground)
        assert np.allclose(ground, ground[:1], atol=1e-3) if len(ground) else True
        assert (ground[:, 1] > 0.5).all()
    assert seen > 1_000


def test_edges_lie_where_classes_change(views: list[View]) -> None:
    for view in views:
        right = np.zeros_like(view.edges)
        right[:, :-1] |= view.classes[:, :-1] != view.classes[:, 1:]
        right[:-1] |= view.classes[:-1] != view.classes[1:]
        assert view.edges[right].all()
        assert 0.01 < view.edges.mean() < 0.4
        person = view.classes == PERSON
        inside = person[:-1, :-1] & person[1:, :-1] & person[:-1, 1:]
        assert not view.edges[:-1, :-1][inside].any()  # a figure is one object, whatever its limbs do


def test_keypoints_lie_on_the_figure(views: list[View]) -> None:
    near, visible, hidden = 0, 0, 0
    for seed in range(24):
        view = views[seed] if seed in SEEDS else render_scene(seed)[0]
        rows, columns = np.nonzero(view.classes == PERSON)
        if not rows.size:  # a solid stands before the whole figure: seed 16 alone
            hidden += 1
            continue
        x, y = view.keypoints[:, 0], view.keypoints[:, 1]
        inside = (x >= 0) & (x < 64) & (y >= 0) & (y < 64)
        assert not (view.keypoints[:, 2].astype(bool) & ~inside).any()
        for joint in TORSO:
            if view.keypoints[joint, 2]:
                visible += 1
                distance = np.hypot(columns + 0.5 - x[joint], rows + 0.5 - y[joint]).min()
                near += distance < 2
    assert hidden <= 1
    assert visible > 60
    assert near / visible > 0.95  # the rest stands behind a solid


@pytest.mark.parametrize("index", [70, 115, 287])
def test_no_camera_stands_behind_the_side_wall(index: int) -> None:
    """Scenes whose camera lay behind it, so that the picture was a wall with a pose in its label."""
    view = render_scene(scene_seed(0, "train", index))[0]
    assert (view.classes == PERSON).sum() > 50


def test_the_figure_stands_upright_and_its_left_is_left() -> None:
    """Faces turn to the camera on average, so a figure's right is mostly on the picture's left."""
    mirrored = []
    for seed in range(16):
        keypoints = render_scene(seed)[0].keypoints
        names = {name: keypoints[index] for index, name in enumerate(pose.KEYPOINTS)}
        assert names["nose"][1] < names["right_hip"][1] < max(names["right_ankle"][1], names["left_ankle"][1])
        mirrored.append(names["right_shoulder"][0] < names["left_shoulder"][0])
    assert np.mean(mirrored) > 0.7


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_its_image_and_its_label(task: str, views: list[View]) -> None:
    view = views[0]
    image, label = labelled(view, task, _generator())
    assert image.shape == label.shape == (64, 64, 3)
    assert image.dtype == label.dtype == np.uint8
    if task in ("colorization", "low_light"):
        assert np.array_equal(label, view.colour)
        assert not np.array_equal(image, label)
    else:
        assert np.array_equal(image, view.colour)
    if task == "segmentation":
        assert np.array_equal(segmentation.read_classes(label, len(CLASSES) + 1), view.classes)
    if task == "depth":
        read = depth.read(label)
        assert np.array_equal(read > 0, view.depth_m > 0)
        assert np.abs(read - np.minimum(view.depth_m, depth.MAX_M)).max() <= depth.MAX_M / 510 + 1e-5
    if task == "normals":
        cosine = (normals.read(label) * view.normals).sum(axis=2)[view.classes > 0]
        assert np.rad2deg(np.arccos(np.clip(cosine, -1, 1))).max() < 0.5
    if task == "edges":
        assert np.array_equal(label[..., 0] > 127, view.edges)
    if task == "pose":
        hidden = view.keypoints[:, 2] == 0
        assert not pose.read(label)[hidden, 2].any()
    if task == "colorization":
        assert (image == image[..., :1]).all()
    if task == "low_light":
        assert image.mean() < 0.7 * label.mean()


def test_an_unknown_task_is_refused(views: list[View]) -> None:
    with pytest.raises(ValueError, match="weather"):
        labelled(views[0], "weather", _generator())


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return list(scene_pairs(10, size_px=16, seed=3))


def test_every_scene_gives_a_pair_a_task_side_by_side(pairs: list[Pair]) -> None:
    assert len(pairs) == 10 * len(TASKS)
    assert len({pair.pair_id for pair in pairs}) == len(pairs)
    for start in range(0, len(pairs), len(TASKS)):
        scene = pairs[start : start + len(TASKS)]
        assert [pair.task for pair in scene] == list(TASKS)
        assert len({(pair.split, pair.meta["scene"]) for pair in scene}) == 1
        # One photograph, five drawn labels: the build inverts it once.
        assert len({pair.image.bytes for pair in scene if pair.task not in ("colorization", "low_light")}) == 1


def test_splits_have_their_shares(pairs: list[Pair]) -> None:
    assert Counter(pair.split for pair in pairs[:: len(TASKS)]) == {"train": 8, "val": 1, "test": 1}
    chosen = list(scene_pairs(6, ["depth"], 16, 3, {"a": 1, "b": 2}))
    assert Counter(pair.split for pair in chosen) == {"a": 2, "b": 4}
    assert [pair.task for pair in chosen] == ["depth"] * 6


def test_pairs_are_repeatable_whatever_else_is_asked_for(pairs: list[Pair]) -> None:
    dark = list(scene_pairs(10, ["low_light"], 16, 3))
    assert [pair.pair_id for pair in dark] == [pair.pair_id for pair in pairs if pair.task == "low_light"]
    other = next(scene_pairs(10, ["low_light"], 16, 4))
    assert other.pair_id != dark[0].pair_id


def test_pictures_are_png_of_the_size_asked_for(pairs: list[Pair]) -> None:
    for pair in pairs[: len(TASKS)]:
        for picture in (pair.image, pair.label):
            assert picture.bytes is not None
            assert decode(picture.bytes).shape == (16, 16, 3)
    assert pairs[0].meta["classes"] == ["sky", *CLASSES]


def test_things_have_their_colours() -> None:
    """Or nothing but a guess could colour a grey scene."""
    hues: dict[int, list[float]] = {}
    for seed in range(24):
        view = render_scene(seed)[0]
        for number in np.unique(view.classes):
            low, high = (part(view.colour[view.classes == number], axis=1) for part in (np.min, np.max))
            clear = (high > 60) & (high - low > SATURATED * high)  # neither in the dark nor grey
            if number in (0, PERSON) or clear.sum() < 20:
                continue
            pixels = view.colour[view.classes == number][clear] / 255
            hue = np.median([colorsys.rgb_to_hsv(*pixel)[0] for pixel in pixels[:200]])
            hues.setdefault(int(number), []).append(float(hue))
    turned = {number: np.exp(2j * np.pi * np.array(found)) for number, found in hues.items() if len(found) > 2}
    assert len(turned) >= 5
    assert all(abs(found.mean()) > 0.9 for found in turned.values())  # those of a class agree
    means = [found.mean() / abs(found.mean()) for found in turned.values()]
    assert all(abs(first - second) > 0.3 for first, second in itertools.combinations(means, 2))  # classes do not
