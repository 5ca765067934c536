from __future__ import annotations

import numpy as np
import pytest

from covray.models.diffusion.slerp import slerp


def latent(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((4, 8, 8)).astype(np.float32)


def test_slerp_ends_exactly_in_its_ends() -> None:
    a, b = latent(0), latent(1) * 3
    assert np.array_equal(slerp(a, b, 0.0), a)
    assert np.array_equal(slerp(a, b, 1.0), b)
    assert slerp(a, b, 0.5).dtype == np.float32


@pytest.mark.parametrize("alpha", [0.1, 1 / 3, 0.5])
def test_slerp_is_symmetric(alpha: float) -> None:
    a, b = latent(0), latent(1) * 3
    np.testing.assert_allclose(slerp(a, b, alpha), slerp(b, a, 1 - alpha), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.1, 1 / 3, 0.5, 0.9])
def test_slerp_of_orthogonal_equals_keeps_the_norm(alpha: float) -> None:
    a, b = np.zeros((4, 8, 8), np.float32), np.zeros((4, 8, 8), np.float32)
    a[:2], b[2:] = 2.0, -2.0
    middle = slerp(a, b, alpha)
    assert np.linalg.norm(middle) == pytest.approx(np.linalg.norm(a), rel=1e-6)
    assert np.arctan2(-middle[2, 0, 0], middle[0, 0, 0]) == pytest.approx(alpha * np.pi / 2, rel=1e-5)


def test_slerp_of_parallel_and_opposite_latents_is_linear() -> None:
    a = latent(0)
    np.testing.assert_allclose(slerp(a, 2 * a, 0.25), 1.25 * a, rtol=1e-6)
    np.testing.assert_allclose(slerp(a, -a, 0.25), 0.5 * a, rtol=1e-6)
    assert np.array_equal(slerp(np.zeros_like(a), a, 0.5), 0.5 * a)
