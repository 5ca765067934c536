"""Baselines: the neighbour's answer, and what stands out of a picture."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, uniform_filter

from covray.evaluation.baselines import nearest_label, saliency

NOISE = np.random.default_rng(0).integers(0, 256, (40, 24, 24, 3), dtype=np.uint8)


def test_the_nearest_label_is_that_of_the_nearest_image() -> None:
    labels = NOISE[::-1]
    for number in (0, 7, 39):
        query = np.clip(NOISE[number].astype(int) + 9, 0, 255).astype(np.uint8)
        assert np.array_equal(nearest_label(query, NOISE, labels), labels[number])
    far = np.stack([np.full((2, 2, 3), level, np.uint8) for level in (255, 120)])
    assert np.array_equal(nearest_label(np.zeros((2, 2, 3), np.uint8), far, far), far[1])  # bytes must not wrap


@pytest.mark.parametrize(("height", "width"), [(64, 64), (24, 40), (150, 90), (256, 256)])
@pytest.mark.parametrize("ground", [0, 60])
def test_a_lone_blob_stands_out(height: int, width: int, ground: int) -> None:
    rows, columns = np.mgrid[:height, :width]
    radius = max(height, width) / 25
    for top, left in [(0.3, 0.6), (0.5, 0.5), (0.75, 0.2)]:
        away = np.hypot(rows - top * height, columns - left * width)
        picture = np.where(away <= radius, 250, ground).astype(np.uint8)[..., None].repeat(3, axis=2)
        found = saliency(picture)
        assert (found.dtype, found.shape) == (np.uint8, picture.shape)
        assert (found == found[..., :1]).all()
        assert away[np.unravel_index(found[..., 0].argmax(), away.shape)] <= radius
        assert found.max() == 255
        assert np.median(found) < 30


def test_saliency_is_the_spectral_residual_as_published() -> None:
    picture = NOISE[0].repeat(3, axis=0)[:64].repeat(3, axis=1)[:, :64]
    spectrum = np.fft.fft2(picture.mean(axis=2))
    logarithm = np.log(np.abs(spectrum))
    residual = logarithm - uniform_filter(logarithm, 3, mode="wrap")
    energy = np.abs(np.fft.ifft2(np.exp(residual + 1j * np.angle(spectrum)))) ** 2
    smooth = gaussian_filter(energy, 2.5, mode="nearest")
    expected = 255 * (smooth - smooth.min()) / np.ptp(smooth)
    assert np.abs(saliency(picture)[..., 0] - expected).max() <= 0.6


@pytest.mark.parametrize("size", [(64, 64), (50, 80)])
def test_saliency_is_the_same_at_any_brightness(size: tuple[int, int]) -> None:
    dim = np.random.default_rng(0).integers(0, 64, (*size, 3), dtype=np.uint8)
    dim[10:20, 10:20] //= 4
    halves = np.zeros_like(dim)
    halves[:, size[1] // 2 :] = 60  # most of its spectrum is zero
    for picture in (dim, halves):
        found = saliency(picture).astype(int)
        for gain in (2, 3, 4):
            assert np.abs(saliency(gain * picture) - found).max() <= 1


@pytest.mark.parametrize("size", [(64, 64), (1, 7), (30, 97), (300, 200)])
@pytest.mark.filterwarnings("error")
def test_nothing_stands_out_of_one_grey(size: tuple[int, int]) -> None:
    for colour in [(0, 0, 0), (255, 255, 255), (13, 200, 90)]:
        assert not saliency(np.broadcast_to(np.array(colour, np.uint8), (*size, 3))).any()


@pytest.mark.filterwarnings("error")
def test_any_picture_has_a_map() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    point = np.zeros((9, 200, 3), np.uint8)
    point[4, 100] = 255
    for picture in (stripes, stripes[:, 1:], point, point[:, ::-1], point[:5, 99:101], *NOISE[:3]):
        assert saliency(picture).max() == 255
        assert np.array_equal(saliency(picture), saliency(picture.copy()))
