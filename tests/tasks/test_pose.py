"""Pose: discs come back as keypoints, limbs join only what is seen, and neither is taken for the other."""

import numpy as np
import pytest

from covray.tasks.pose import COLOURS, KEYPOINTS, LIMB_BRIGHTNESS, LIMBS, disc_radius_px, read, render

LIMB_COLOURS = (COLOURS[: len(LIMBS)] * LIMB_BRIGHTNESS).astype(np.uint8)


def _apart(size: int, rng: np.random.Generator, margin: float) -> np.ndarray:
    """18 visible keypoints whose discs do not overlap: jittered cells of a grid, in random order."""
    cell = size / 5
    jitter = max(0.0, cell / 2 - margin)
    grid = np.stack(np.meshgrid(np.arange(5), np.arange(5)), axis=-1).reshape(-1, 2)[rng.permutation(25)[:18]]
    points = (grid + 0.5) * cell + rng.uniform(-jitter, jitter, (18, 2))
    return np.concatenate([points, np.ones((18, 1))], axis=1)


@pytest.mark.parametrize("size", [64, 256])
def test_keypoints_come_back_within_a_pixel(size: int) -> None:
    rng = np.random.default_rng(size)
    for _ in range(20):
        keypoints = _apart(size, rng, disc_radius_px(size, size) + 1)
        back = read(render(keypoints, size, size))
        assert (back[:, 2] == 1).all()
        assert np.abs(back[:, :2] - keypoints[:, :2]).max() < 1


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("dim", "least"), [(0.85, 0.9), (0.75, 0.5)])
def test_keypoints_are_found_where_colours_have_suffered(size: int, dim: float, least: float) -> None:
    """Tokens dim small discs, at worst until each is nearer to a limb's colour than to its own, and limbs cross."""
    rng = np.random.default_rng(size)
    found = []
    for _ in range(10):
        keypoints = _apart(size, rng, disc_radius_px(size, size) + 1)
        picture = dim * render(keypoints, size, size) + rng.normal(0, 5, (size, size, 3))
        away = read(np.clip(picture, 0, 255).astype(np.uint8)) - keypoints
        found.append((away[:, 2] == 0) & (np.linalg.norm(away[:, :2], axis=1) < 2 * disc_radius_px(size, size)))
    assert np.mean(found) > least


@pytest.mark.parametrize("size", [64, 256])
def test_stray_pixels_do_not_move_a_keypoint(size: int) -> None:
    rng = np.random.default_rng(size)
    keypoints = _apart(size, rng, disc_radius_px(size, size) + 1)
    picture = render(keypoints, size, size)
    for _ in range(3):  # far fewer than a disc has, anywhere on the ground
        for colour in COLOURS:
            ground = np.argwhere(~picture.any(axis=2))
            picture[tuple(ground[rng.integers(len(ground))])] = colour
    assert np.abs(read(picture) - keypoints).max() < 1


@pytest.mark.parametrize("size", [64, 256])
def test_what_is_not_visible_stays_so_and_has_no_limbs(size: int) -> None:
    rng = np.random.default_rng(size)
    for _ in range(10):
        keypoints = _apart(size, rng, disc_radius_px(size, size) + 1)
        keypoints[:, 2] = rng.random(18) < 0.6
        picture = render(keypoints, size, size)
        assert np.array_equal(read(picture)[:, 2], keypoints[:, 2])
        drawn = {tuple(colour) for colour in picture.reshape(-1, 3).tolist()}
        for (start, end), colour in zip(LIMBS, LIMB_COLOURS.tolist(), strict=True):
            if not (keypoints[start, 2] and keypoints[end, 2]):
                assert tuple(colour) not in drawn


def test_every_limb_joins_its_two_ends() -> None:
    """A limb alone is drawn between its keypoints: its colour lies on the way, and nowhere far from it."""
    for (start, end), colour in zip(LIMBS, LIMB_COLOURS, strict=True):
        keypoints = np.zeros((18, 3))
        keypoints[start], keypoints[end] = (40.5, 60.5, 1), (200.5, 180.5, 1)
        limb = np.argwhere((render(keypoints, 256, 256) == colour).all(axis=2))[:, ::-1] + 0.5
        along = (limb - keypoints[start, :2]) @ np.array([0.8, 0.6])
        across = (limb - keypoints[start, :2]) @ np.array([-0.6, 0.8])
        assert along.min() < 10
        assert along.max() > 190
        assert np.abs(across).max() < 6


def test_limbs_are_a_body() -> None:
    """They join all keypoints into one tree, and never a left one to a right one."""
    joined = {KEYPOINTS.index("neck")}
    for _ in LIMBS:
        joined |= {end for limb in LIMBS if joined & set(limb) for end in limb}
    assert len(LIMBS) == len(KEYPOINTS) - 1
    assert joined == set(range(len(KEYPOINTS)))
    for limb in LIMBS:
        assert len({KEYPOINTS[end].split("_")[0] for end in limb} & {"left", "right"}) <= 1


def test_no_colour_of_a_disc_is_near_one_of_a_limb() -> None:
    everything = np.concatenate([COLOURS, LIMB_COLOURS, np.zeros((1, 3))]).astype(float)
    distances = np.linalg.norm(everything[:, None] - everything[None], axis=2)
    assert distances[~np.eye(len(everything), dtype=bool)].min() > 40
    assert (COLOURS.max(axis=1) == 255).all()
    assert (LIMB_COLOURS.max(axis=1) == 153).all()


def test_several_people_share_a_picture() -> None:
    rng = np.random.default_rng(0)
    left, right = _apart(64, rng, 3), _apart(64, rng, 3)
    right[:, 0] += 64
    together = render(np.stack([left, right]), 64, 128)
    alone = render(left, 64, 128)
    assert np.array_equal(together[:, :60], alone[:, :60])
    assert together[:, 68:].any()


def test_nobody_is_black_and_read_as_nobody() -> None:
    picture = render(np.zeros((len(KEYPOINTS), 3)), 32, 48)
    assert picture.shape == (32, 48, 3)
    assert not picture.any()
    assert not read(picture).any()


@pytest.mark.parametrize("level", [1, 77, 128, 255])
def test_any_picture_can_be_read(level: int) -> None:
    rng = np.random.default_rng(level)
    for picture in (np.full((20, 30, 3), level, np.uint8), rng.integers(0, level + 1, (20, 30, 3), dtype=np.uint8)):
        found = read(picture)
        assert (found.dtype, found.shape) == (np.float32, (18, 3))
        assert np.isin(found[:, 2], (0, 1)).all()
        assert (found >= 0).all()
        assert (found[:, :2] <= (30, 20)).all()
