"""Pixels: errors and path lengths by hand and as others compute them, sRGB by its standard."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from torchmetrics.functional.image import peak_signal_noise_ratio as torch_psnr

from covray.io.pixels import mse, path_ratio, psnr, step_sizes, to_linear, to_srgb

BLACK, GREY, WHITE = (np.full((16, 16, 3), level, np.uint8) for level in (0, 100, 255))
NOISE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def test_psnr_and_mse_by_hand_and_as_others_have_them() -> None:
    assert mse(BLACK, WHITE) == 1
    assert psnr(BLACK, WHITE) == 0
    assert psnr(NOISE, NOISE) == pytest.approx(100)
    assert psnr(NOISE, NOISE, most_db=99.0) == 99
    close = NOISE.copy()
    close[0, 0, 0] ^= 1
    assert psnr(close, NOISE) < 100
    for answer in (close, 255 - NOISE, BLACK):
        assert psnr(answer, NOISE) == pytest.approx(peak_signal_noise_ratio(NOISE, answer, data_range=255))
        pair = torch.from_numpy(answer).double(), torch.from_numpy(NOISE).double()
        assert psnr(answer, NOISE) == pytest.approx(float(torch_psnr(*pair, data_range=255.0)))


def test_a_detour_is_longer_than_the_straight_way() -> None:
    assert step_sizes([BLACK, GREY, WHITE]) == pytest.approx([100 / 255, 155 / 255])
    assert path_ratio([BLACK, WHITE]) == 1
    assert path_ratio([BLACK, GREY, WHITE]) == pytest.approx(1)
    assert path_ratio([GREY, BLACK, WHITE]) == pytest.approx((100 + 255) / 155)
    assert path_ratio([BLACK, WHITE, BLACK]) is None


def test_gamma_is_srgb_and_inverts() -> None:
    values = np.arange(256) / 255
    assert np.allclose(to_srgb(to_linear(values)), values, atol=1e-9)
    assert to_linear(np.array([0.5]))[0] == pytest.approx(0.21404, abs=1e-5)  # the standard's own mid grey
    assert to_srgb(np.array([-0.1, 1.5])).tolist() == pytest.approx([0.0, 1.0])
