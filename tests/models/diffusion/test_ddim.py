from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, PNDMScheduler

from covray.errors import ConfigError, WeightsError
from covray.models.diffusion.ddim import make_schedule, slerp

STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def network(latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Any function of latent and timestep; samples are independent."""
    return torch.tanh(latents * 0.7) + torch.sin(timesteps.float() / 100).view(-1, 1, 1, 1)


def random_latents(count: int, seed: int) -> torch.Tensor:
    return torch.randn((count, 4, 3, 3), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("ends", [{}, {"set_alpha_to_one": True, "steps_offset": 0}])
@pytest.mark.parametrize("steps", [50, 8])
def test_every_step_is_that_of_diffusers(prediction_type: str, ends: dict[str, int], steps: int) -> None:
    config = STABLE_DIFFUSION | ends | {"prediction_type": prediction_type}
    schedule = make_schedule(config, steps)
    inverse, forward = DDIMInverseScheduler.from_config(config), DDIMScheduler.from_config(config)
    inverse.set_timesteps(steps)
    forward.set_timesteps(steps)
    ours = random_latents(2, seed=1)
    inverted, denoised = ours[:1].clone(), ours[1:].clone()
    for k, (up, down) in enumerate(zip(inverse.timesteps, forward.timesteps, strict=True)):
        index, direction = torch.tensor([k, steps - 1 - k]), torch.tensor([1, 0])
        assert schedule.timesteps[index].tolist() == [int(up), int(down)]
        ours = schedule.step(ours, network(ours, schedule.timesteps[index]), index, direction)
        inverted = inverse.step(network(inverted, up[None]), int(up), inverted).prev_sample
        denoised = forward.step(network(denoised, down[None]), int(down), denoised).prev_sample
        torch.testing.assert_close(ours, torch.cat([inverted, denoised]), rtol=2e-5, atol=2e-5)


def test_denoising_undoes_inversion_under_one_noise() -> None:
    schedule = make_schedule(STABLE_DIFFUSION, 50)
    picture, noise = random_latents(1, seed=2), random_latents(1, seed=3)
    latents = picture
    for k in range(50):
        latents = schedule.step(latents, noise, torch.tensor([k]), torch.tensor([1]))
    assert not torch.allclose(latents, picture, atol=0.1)
    for k in reversed(range(50)):
        latents = schedule.step(latents, noise, torch.tensor([k]), torch.tensor([0]))
    torch.testing.assert_close(latents, picture, rtol=1e-4, atol=1e-4)


def test_absent_keys_of_pndm_mean_what_pndm_means() -> None:
    """Stable Diffusion's repositories name PNDMScheduler, which never clips and ends at the first training step."""
    stated = make_schedule(STABLE_DIFFUSION, 50)
    pndm = {key: STABLE_DIFFUSION[key] for key in ("beta_start", "beta_end", "beta_schedule", "steps_offset")}
    pndm |= {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "trained_betas": None}
    theirs = PNDMScheduler.from_config(pndm)
    theirs.set_timesteps(50)
    for config in (pndm, pndm | {"clip_sample": False, "set_alpha_to_one": False}):
        schedule = make_schedule(config, 50)
        assert set(schedule.timesteps.tolist()) == set(theirs.timesteps.tolist())
        assert torch.equal(schedule.latent_scale, stated.latent_scale)
        assert torch.equal(schedule.output_scale, stated.output_scale)
        # The first step ends at the signal that PNDM ends at, not at the picture itself.
        end, start = theirs.final_alpha_cumprod, theirs.alphas_cumprod[1]
        torch.testing.assert_close(schedule.latent_scale[0, 0], (end / start).sqrt())
    with pytest.raises(WeightsError, match="clip_sample is absent"):
        make_schedule(pndm | {"_class_name": "DDIMScheduler"}, 50)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"clip_sample": True}, "clip_sample is True"),
        ({"clip_sample": None}, "clip_sample is absent, which means True"),
        ({"thresholding": True}, "thresholding"),
        ({"prediction_type": "sample"}, "prediction_type is 'sample'"),
        ({"timestep_spacing": "linspace"}, "timestep_spacing is 'linspace'"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"beta_schedule": "unheard_of"}, "unheard_of"),
    ],
)
def test_a_schedule_that_is_not_implemented_is_refused_by_name(change: dict[str, object], named: str) -> None:
    config = {key: value for key, value in (STABLE_DIFFUSION | change).items() if value is not None}
    with pytest.raises(WeightsError, match=named):
        make_schedule(config, 50)


@pytest.mark.parametrize("steps", [30, 999, 2000, 1000])
def test_steps_that_cannot_cover_the_schedule_are_refused(steps: int) -> None:
    with pytest.raises(ConfigError, match=f"prior.steps: {steps}"):
        make_schedule(STABLE_DIFFUSION, steps)


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
