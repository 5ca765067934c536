from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler

from covray.errors import ConfigError, WeightsError
from covray.models.diffusion.schedule import Schedule, make_schedule
from tests.support.priors import SCHEDULER

Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
STABLE_DIFFUSION = {"num_train_timesteps": 1000, **SCHEDULER}


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
    direction = torch.tensor([1, 0])
    data = torch.zeros_like(ours)
    for k, (up, down) in enumerate(zip(inverse.timesteps, forward.timesteps, strict=True)):
        timesteps = schedule.timesteps[direction, k]
        assert timesteps.tolist() == [int(up), int(down)]
        ours, data = schedule.step(ours, network(ours, timesteps), data, k, direction)
        inverted = inverse.step(network(inverted, up[None]), int(up), inverted).prev_sample
        denoised = forward.step(network(denoised, down[None]), int(down), denoised).prev_sample
        torch.testing.assert_close(ours, torch.cat([inverted, denoised]), rtol=2e-5, atol=2e-5)


def solve(schedule: Schedule, latents: torch.Tensor, answer: Network, inverse: int) -> torch.Tensor:
    """Latents taken through all steps in one direction, with the answers of a network to latents and timesteps."""
    direction = torch.full((len(latents),), inverse)
    data = torch.zeros_like(latents)
    for k in range(schedule.evaluations):
        output = answer(latents, schedule.timesteps[direction, k])
        latents, data = schedule.step(latents, output, data, k, direction)
    return latents


def test_denoising_undoes_inversion_under_one_noise() -> None:
    schedule = make_schedule(STABLE_DIFFUSION, 50)
    picture, noise = random_latents(1, seed=2), random_latents(1, seed=3)
    latents = solve(schedule, picture, lambda *_: noise, inverse=1)
    assert not torch.allclose(latents, picture, atol=0.1)
    returned = solve(schedule, latents, lambda *_: noise, inverse=0)
    torch.testing.assert_close(returned, picture, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("inverse", [0, 1])
@pytest.mark.parametrize("steps", [8, 12, 20])
def test_every_dpm_step_is_that_of_diffusers(prediction_type: str, inverse: int, steps: int) -> None:
    """Both ways on our levels: those of diffusers' own inverse scheduler end in a step of length 0."""
    config = STABLE_DIFFUSION | {"prediction_type": prediction_type}
    schedule = make_schedule(config, steps, "dpm")
    theirs = DPMSolverMultistepScheduler.from_config(
        config, lower_order_final=False, final_sigmas_type="sigma_min", solver_type="midpoint"
    )
    borders = torch.cat([schedule.timesteps[inverse], schedule.timesteps[1 - inverse, :1]])
    signal = theirs.alphas_cumprod.double()[borders]
    theirs.set_timesteps(steps)
    theirs.sigmas = ((1 - signal) / signal).sqrt()
    theirs.timesteps = borders[:-1]
    theirs.set_begin_index(0)
    latents = random_latents(1, seed=4).double()
    ours, data, direction = latents.float(), torch.zeros(latents.shape), torch.tensor([inverse])
    for k, timestep in enumerate(theirs.timesteps):
        ours, data = schedule.step(ours, network(ours, timestep[None]), data, k, direction)
        latents = theirs.step(network(latents, timestep[None]), timestep, latents).prev_sample
        torch.testing.assert_close(ours.double(), latents, rtol=1e-4, atol=2e-5)


def test_the_grid_of_dpm_is_fine_where_there_is_little_noise() -> None:
    schedule = make_schedule(STABLE_DIFFUSION, 12, "dpm")
    nodes = [0, 4, 17, 54, 135, 259, 404, 544, 664, 764, 848, 920, 981]
    assert schedule.timesteps[1].tolist() == nodes[:-1]
    assert schedule.timesteps[0].tolist() == nodes[:0:-1]
    assert make_schedule(STABLE_DIFFUSION | {"set_alpha_to_one": True}, 12, "dpm").previous_scale.isfinite().all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("inverse", [0, 1])
def test_dpm_is_of_second_order_on_an_exact_score(prediction_type: str, inverse: int) -> None:
    """Data of one Gaussian of deviation d: the ODE keeps x / sqrt(d^2 alpha^2 + sigma^2). Half the step, a quarter of
    the error."""
    deviation, config = 0.7, STABLE_DIFFUSION | {"prediction_type": prediction_type}
    alphas = DDIMScheduler.from_config(config).alphas_cumprod.double()

    def spread(timesteps: torch.Tensor) -> torch.Tensor:
        return (deviation**2 * alphas[timesteps] + 1 - alphas[timesteps]).sqrt()

    def answer(latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        signal, noise = alphas[timesteps].sqrt(), (1 - alphas[timesteps]).sqrt()
        epsilon = noise * latents / spread(timesteps) ** 2
        return epsilon if prediction_type == "epsilon" else (epsilon - noise * latents) / signal

    errors = []
    for steps in (12, 24):
        schedule = make_schedule(config, steps, "dpm")
        start = torch.ones((1, 1, 1, 1), dtype=torch.float64)
        end = solve(schedule, start, answer, inverse)
        first, last = schedule.timesteps[inverse, :1], schedule.timesteps[1 - inverse, :1]
        errors.append(abs(float(end / (spread(last) / spread(first)) - 1)))
    assert errors[0] > 3 * errors[1]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddim_with_every_step_evaluated_is_ddim_to_the_bit(prediction_type: str) -> None:
    config = STABLE_DIFFUSION | {"prediction_type": prediction_type}
    plain, full = make_schedule(config, 50), make_schedule(config, 50, "ddim", 50)
    assert not full.multistep
    for table in ("timesteps", "latent_scale", "output_scale"):
        assert torch.equal(getattr(plain, table), getattr(full, table))


@pytest.mark.parametrize("ends", [{}, {"set_alpha_to_one": True, "steps_offset": 0}])
@pytest.mark.parametrize("inverse", [0, 1])
def test_fewer_evaluations_are_ddim_with_the_data_extrapolated(ends: dict[str, int], inverse: int) -> None:
    """Folded steps equal the 50 steps of DDIM one after the other, with what the network would answer extrapolated."""
    config = STABLE_DIFFUSION | ends
    plain, fewer = make_schedule(config, 50), make_schedule(config, 50, "ddim", 16)
    assert fewer.evaluations == 16
    assert fewer.timesteps.diff().abs().min() > 0
    timesteps = plain.timesteps[inverse].tolist()
    evaluated = [timesteps.index(timestep) for timestep in fewer.timesteps[inverse].tolist()]
    assert evaluated[0] == 0
    picture = random_latents(1, seed=5).double()
    levels = _levels(config, inverse)
    place = ((1 - levels) / levels) ** (1 / 14)  # sigma ** (1 / 7)
    latents, history = picture, []
    for k in range(50):
        start, end = levels[k], levels[k + 1]
        if k in evaluated:
            epsilon = network(latents, torch.tensor([timesteps[k]]))
            history = [*history, (place[k], (latents - (1 - start).sqrt() * epsilon) / start.sqrt())][-2:]
        else:
            (at, before), (last, now) = history[0], history[-1]
            # The first answer has no history: what it predicts is kept as it is.
            slope = 0.0 if len(history) == 1 else (now - before) / (last - at)
            data = now + slope * (place[k] - last)
            epsilon = (latents - start.sqrt() * data) / (1 - start).sqrt()
        data = (latents - (1 - start).sqrt() * epsilon) / start.sqrt()
        latents = end.sqrt() * data + (1 - end).sqrt() * epsilon
    ours = solve(fewer, picture.float(), network, inverse)
    torch.testing.assert_close(ours.double(), latents, rtol=1e-4, atol=5e-5)


def _levels(config: dict[str, object], inverse: int) -> torch.Tensor:
    """alphas_cumprod at the borders of the 50 steps, in the order of one direction, float64 [51]."""
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(50)
    levels = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    levels = torch.cat([levels, scheduler.final_alpha_cumprod.double()[None]])
    return levels.flip(0) if inverse else levels


@pytest.mark.parametrize("evaluations", [2, 3, 8, 25, 49])
def test_any_number_of_evaluations_is_used(evaluations: int) -> None:
    schedule = make_schedule(STABLE_DIFFUSION, 50, "ddim", evaluations)
    assert schedule.evaluations == evaluations
    assert set(schedule.timesteps.flatten().tolist()) <= set(make_schedule(STABLE_DIFFUSION, 50).timesteps[0].tolist())


def test_absent_keys_of_pndm_mean_what_pndm_means() -> None:
    """Stable Diffusion's repositories name PNDMScheduler, which never clips and ends at the first training step."""
    stated = make_schedule(STABLE_DIFFUSION, 50)
    pndm = {key: STABLE_DIFFUSION[key] for key in ("beta_start", "beta_end", "beta_schedule", "steps_offset")}
    pndm |= {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "trained_betas": None}
    theirs = PNDMScheduler.from_config(pndm)
    theirs.set_timesteps(50)
    for config in (pndm, pndm | {"clip_sample": False, "set_alpha_to_one": False}):
        schedule = make_schedule(config, 50)
        assert set(schedule.timesteps[0].tolist()) == set(theirs.timesteps.tolist())
        assert torch.equal(schedule.latent_scale, stated.latent_scale)
        assert torch.equal(schedule.output_scale, stated.output_scale)
        # The first step ends at the signal that PNDM ends at, not at the picture itself.
        end, start = theirs.final_alpha_cumprod, theirs.alphas_cumprod[1]
        torch.testing.assert_close(schedule.latent_scale[0, -1], (end / start).sqrt())
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


@pytest.mark.parametrize("steps", [200, 1000])
def test_dpm_steps_finer_than_the_training_steps_are_refused(steps: int) -> None:
    with pytest.raises(ConfigError, match=f"prior.steps: {steps} steps of dpm"):
        make_schedule(STABLE_DIFFUSION, steps, "dpm")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_train_timesteps": -4}, "num_train_timesteps is -4, not a whole number from 1"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps is 'many', not a whole number"),
        ({"steps_offset": -60}, "steps_offset is -60, not a whole number from 0"),
        ({"steps_offset": None}, "steps_offset is None, not a whole number"),
        ({"trained_betas": [0.1, 0.2]}, "has 2 trained_betas for 1000 training steps"),
        ({"beta_end": 1.5}, "its betas leave no signal"),
        ({"trained_betas": [0.1] * 999 + [1.0]}, "its betas leave no signal"),
    ],
)
@pytest.mark.parametrize("solver", ["ddim", "dpm"])
def test_a_damaged_schedule_is_refused_in_one_line(changes: dict[str, Any], message: str, solver: Any) -> None:
    with pytest.raises(WeightsError, match=f"^scheduler_config.json: .*{message}.*; ") as raised:
        make_schedule(STABLE_DIFFUSION | changes, 50 if solver == "ddim" else 12, solver)
    assert "\n" not in str(raised.value)
