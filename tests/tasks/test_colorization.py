"""Colorization: the picture is its own label, and grey is BT.601's luma."""

import numpy as np

from covray.tasks.colorization import grey, read, render


def test_every_level_comes_back_exactly() -> None:
    picture = np.arange(768, dtype=np.int64).astype(np.uint8).reshape(16, 16, 3)
    assert read(picture).dtype == np.float32
    assert np.array_equal(render(read(picture)), picture)


def test_colours_beyond_their_range_are_cut_and_not_wrapped() -> None:
    assert render(np.array([[[-0.1, 0.5, 1.1]]])).tolist() == [[[0, 128, 255]]]


def test_grey_weighs_the_channels_as_lvm_does() -> None:
    primaries = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8)
    levels = [round(255 * weight) for weight in (0.2989, 0.5870, 0.1140)]
    assert grey(primaries)[0, :, 0].tolist() == [*levels, 255]


def test_grey_has_equal_channels_and_keeps_grey_pictures() -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    assert np.array_equal(grey(ramp), ramp)
    colour = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    flat = grey(colour)
    assert (flat == flat[..., :1]).all()
    assert np.array_equal(grey(flat), flat)
