"""Depth in 8 bits: half a step of error, order kept, and 'none' never confused with 'near'."""

import numpy as np

from covray.tasks.depth import MAX_M, MIN_M, read, render

STEP_M = MAX_M / 255


def test_depth_comes_back_within_half_a_step() -> None:
    depth = np.random.default_rng(0).uniform(0.05, 10, (64, 64)).astype(np.float32)
    assert np.abs(read(render(depth)) - depth).max() <= STEP_M / 2 + 1e-5


def test_what_is_no_depth_is_black_and_stays_none() -> None:
    none = np.array([[0.0, np.nan, np.inf, -np.inf, -1.0, MIN_M * 0.99]])
    assert not render(none).any()
    assert not read(render(none)).any()


def test_a_tiny_depth_never_becomes_none() -> None:
    near = np.geomspace(MIN_M, STEP_M, 50)[None]
    assert (read(render(near)) > 0).all()


def test_order_is_kept_and_the_far_is_white() -> None:
    depth = np.linspace(MIN_M, 3 * MAX_M, 2_000)[None]
    levels = render(depth)[0, :, 0].astype(int)
    assert (np.diff(levels) >= 0).all()
    assert (levels[depth[0] >= MAX_M] == 255).all()
    assert len(np.unique(levels)) == 255


def test_channels_are_equal_and_reading_takes_their_mean() -> None:
    picture = render(np.array([[2.0, 5.0]]))
    assert (picture == picture[..., :1]).all()
    uneven = np.array([[[99, 102, 105]]], np.uint8)
    assert np.isclose(read(uneven)[0, 0], 102 * STEP_M)
