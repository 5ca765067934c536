"""Normals as colours: half a degree both ways, and black is nobody's direction."""

import numpy as np

from covray.tasks.normals import read, render


def _directions(count: int) -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(count, 1, 3))
    return vectors / np.linalg.norm(vectors, axis=2, keepdims=True)


def test_directions_come_back_within_half_a_degree() -> None:
    axes = np.concatenate([np.eye(3), -np.eye(3)])[:, None]
    normals = np.concatenate([_directions(20_000), axes])
    back = read(render(normals))
    angle = np.rad2deg(np.arccos(np.clip((back * normals).sum(axis=2), -1, 1)))
    assert angle.max() < 0.5
    assert np.allclose(np.linalg.norm(back, axis=2), 1, atol=1e-5)


def test_no_normal_stays_none() -> None:
    none = np.zeros((2, 2, 3), np.float32)
    assert not render(none).any()
    assert not read(render(none)).any()


def test_no_direction_is_drawn_black() -> None:
    corner = np.full((1, 1, 3), -1 / np.sqrt(3))  # the darkest of all directions
    assert render(np.concatenate([_directions(20_000), corner])).any(axis=2).all()


def test_towards_the_camera_is_the_usual_blue() -> None:
    assert render(np.array([[[0.0, 0.0, 1.0]]])).tolist() == [[[128, 128, 255]]]
