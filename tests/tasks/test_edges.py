"""Edges: strength within half a level both ways."""

import numpy as np

from covray.tasks.edges import read, render


def test_strength_comes_back_within_half_a_level() -> None:
    strength = np.random.default_rng(0).uniform(0, 1, (64, 64))
    assert np.abs(read(render(strength)) - strength).max() <= 1 / 510 + 1e-6


def test_yes_and_no_are_white_and_black() -> None:
    edges = np.eye(8, dtype=bool)
    picture = render(edges)
    assert np.array_equal(picture[..., 0], np.where(edges, 255, 0))
    assert (picture == picture[..., :1]).all()
    assert np.array_equal(read(picture) > 0.5, edges)


def test_strength_beyond_its_range_is_cut_and_not_wrapped() -> None:
    assert render(np.array([[-0.5, 1.5]]))[0, :, 0].tolist() == [0, 255]


def test_reading_takes_the_mean_of_the_channels() -> None:
    assert np.isclose(read(np.array([[[50, 51, 52]]], np.uint8))[0, 0], 0.2)
