from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from covray.config import EngineConfig
from covray.models.diffusion.engine import ChainEngine, Interpolation, Request, distinct_denoisings
from covray.models.diffusion.prior import Prior
from covray.models.diffusion.schedule import make_schedule
from covray.models.diffusion.slerp import slerp
from tests.support.priors import SCHEDULER

Priors = Callable[[str], Prior]


def make_engine(prior: Prior, batch: int = 4) -> ChainEngine:
    return ChainEngine(prior, EngineConfig(device="cpu", image_batch=3), batch)


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


SOLVERS = {"ddim": (5, "ddim", None), "dpm": (8, "dpm", None), "ddim, 3 evaluations": (5, "ddim", 3)}


@pytest.fixture
def engine(priors: Priors) -> ChainEngine:
    return make_engine(priors("epsilon"))


@pytest.fixture(params=SOLVERS)
def solver_engine(priors: Priors, request: pytest.FixtureRequest) -> ChainEngine:
    prior = priors("epsilon")
    return make_engine(replace(prior, schedule=make_schedule(SCHEDULER, *SOLVERS[request.param])))


def reference_latents(prior: Prior, image: np.ndarray, label: np.ndarray, alphas: tuple[float, ...]) -> np.ndarray:
    """Frames of one pair with diffusers' own schedulers, a picture at a time, float32 [K, c, h, w]."""
    config = SCHEDULER | {"prediction_type": prior.prediction_type}
    inverse, forward = DDIMInverseScheduler.from_config(config), DDIMScheduler.from_config(config)
    inverse.set_timesteps(prior.schedule.evaluations)
    forward.set_timesteps(prior.schedule.evaluations)
    noise, frames = [], []
    with torch.inference_mode():
        for picture in (image, label):
            pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
            latents = prior.vae.encode(pixels).latent_dist.mode() * prior.vae.config.scaling_factor
            for t in inverse.timesteps:
                latents = inverse.step(prior.unet(latents, t, prior.context).sample, t, latents).prev_sample
            noise.append(latents.numpy())
        for alpha in alphas:
            latents = torch.from_numpy(slerp(noise[0], noise[1], alpha))
            for t in forward.timesteps:
                latents = forward.step(prior.unet(latents, t, prior.context).sample, t, latents).prev_sample
            frames.append(latents.numpy())
    return np.concatenate(frames)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_frames_are_those_of_diffusers_a_pair_at_a_time(priors: Priors, prediction_type: str) -> None:
    prior = priors(prediction_type)
    engine, images, alphas = make_engine(prior), pictures(4), (1 / 3, 2 / 3)
    requests = [Request(0, 1, alphas), Request(2, 3, alphas)]
    latents = engine._encode(images, range(4))
    frames = engine.diffuse(latents, {}, distinct_denoisings(requests, ())).latents
    for request in requests:
        reference = reference_latents(prior, images[request.source], images[request.label], alphas)
        ours = np.stack([frames[request.source, request.label, float(np.float32(alpha))] for alpha in alphas])
        np.testing.assert_allclose(ours, reference, atol=2e-4 * np.abs(reference).max())


def test_pictures_are_the_rounded_decoded_latents(priors: Priors, engine: ChainEngine) -> None:
    prior, images = priors("epsilon"), pictures(2)
    latents = reference_latents(prior, images[0], images[1], (0.5,))
    with torch.inference_mode():
        pixels = prior.vae.decode(torch.from_numpy(latents) / prior.vae.config.scaling_factor).sample[0]
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    frame = engine.interpolate(images, [Request(0, 1, (0.5,))]).frames[0][0]
    np.testing.assert_allclose(frame, expected, atol=0.51)


def same(a: Interpolation, b: Interpolation, requests: dict[int, int], images: dict[int, int]) -> None:
    """Whether requests and images of ``a`` have the same bits in ``b``, where they have other numbers."""
    for i, j in requests.items():
        assert np.array_equal(a.frames[i], b.frames[j])
    for i, j in images.items():
        assert np.array_equal(a.noise[i], b.noise[j])


REQUESTS = [
    Request(0, 1, (1 / 3, 2 / 3)),
    Request(2, 3, (0.25,)),
    Request(0, 4, (1 / 3, 0.5, 2 / 3)),
    Request(4, 1, ()),
    Request(3, 5, (0.5,)),
]


@pytest.mark.parametrize("seed", range(3))
def test_order_changes_no_bit(solver_engine: ChainEngine, seed: int) -> None:
    generator, images = np.random.default_rng(seed), pictures(6)
    plain = solver_engine.interpolate(images, REQUESTS, endpoints=[1, 5])
    moved = generator.permutation(6)  # picture moved[j] now stands at j
    place = {int(i): j for j, i in enumerate(moved)}
    order = generator.permutation(len(REQUESTS))
    requests = [replace(REQUESTS[k], source=place[REQUESTS[k].source], label=place[REQUESTS[k].label]) for k in order]
    other = solver_engine.interpolate(images[moved], requests, endpoints=[place[5], place[1]])
    same(plain, other, {int(k): at for at, k in enumerate(order)}, place)
    for i in (1, 5):
        assert np.array_equal(plain.returned[i], other.returned[place[i]])


def test_company_changes_no_bit(solver_engine: ChainEngine) -> None:
    """Each request alone, in batches that are mostly padding, equals all of them together."""
    images = pictures(6)
    together = solver_engine.interpolate(images, REQUESTS)
    for at, request in enumerate(REQUESTS):
        ends = [request.source, request.label]
        alone = solver_engine.interpolate(images[ends], [Request(0, 1, request.alphas)], endpoints=[0])
        same(together, alone, {at: 0}, {ends[0]: 0, ends[1]: 1})


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_every_batch_size_keeps_the_identity(priors: Priors, batch: int) -> None:
    engine, images = make_engine(priors("v_prediction"), batch), pictures(6)
    together = engine.interpolate(images, REQUESTS)
    alone = engine.interpolate(images[[3, 2]], [Request(1, 0, (0.25,))])
    same(together, alone, {1: 0}, {2: 1, 3: 0})


def test_a_broken_neighbour_changes_no_bit_and_is_reported(solver_engine: ChainEngine) -> None:
    images, requests = pictures(4), [Request(0, 1, (0.5,)), Request(2, 3, (0.5,)), Request(3, 1, ())]
    plain = solver_engine.interpolate(images, requests)
    broken = np.full(solver_engine.prior.latent_shape, np.nan, np.float32)
    result = solver_engine.interpolate(images, requests, noise={3: broken}, endpoints=[3])
    same(plain, result, {0: 0}, {0: 0, 1: 1, 2: 2})
    assert plain.finite_requests.tolist() == [True, True, True]
    assert result.finite_requests.tolist() == [True, False, False]
    assert result.finite_images.tolist() == [True, True, True, False]
    assert result.returned[3].shape == (32, 32, 3)


def test_values_that_are_not_finite_stay_in_their_wave(priors: Priors) -> None:
    """The history of a solver starts anew in every wave: 0 times a leftover NaN would be NaN."""
    schedule = make_schedule(SCHEDULER, 8, "dpm")
    engine = make_engine(replace(priors("epsilon"), schedule=schedule), batch=2)
    images, broken = pictures(3), np.full(engine.prior.latent_shape, np.nan, np.float32)
    noise = engine.interpolate(images, []).noise
    given = {0: noise[0], 1: noise[1], 2: broken}
    plain = engine.interpolate(images, [Request(0, 1, (0.5, 0.75))], noise=given)
    after = engine.interpolate(images, [Request(2, 0, (0.25, 0.5)), Request(0, 1, (0.5, 0.75))], noise=given)
    assert after.finite_requests.tolist() == [False, True]
    same(plain, after, {0: 1}, {})


def test_given_noise_is_used_and_costs_no_inversion(engine: ChainEngine) -> None:
    images, requests = pictures(3), [Request(0, 1, (0.5,)), Request(1, 2, (0.25, 0.75))]
    plain = engine.interpolate(images, requests)
    again = engine.interpolate(images, requests, noise={0: plain.noise[0], 2: plain.noise[2]})
    same(plain, again, {0: 0, 1: 1}, {0: 0, 1: 1, 2: 2})
    assert plain.evaluations - again.evaluations == 2 * 5
    other = engine.interpolate(images, requests, noise={0: plain.noise[1]})
    assert not np.array_equal(plain.frames[0], other.frames[0])


def test_alphas_are_float32_and_equal_denoisings_run_once(engine: ChainEngine) -> None:
    third = float(np.float32(1 / 3))
    assert distinct_denoisings([Request(0, 1, (1 / 3, 0.5)), Request(0, 1, (third,))], [0, 1, 0]) == [
        (0, 1, third),
        (0, 1, 0.5),
        (0, 0, 0.0),
        (1, 1, 0.0),
    ]
    result = engine.interpolate(pictures(2), [Request(0, 1, (1 / 3, 0.5)), Request(0, 1, (third,))])
    assert result.evaluations == (2 + 2) * 5
    assert np.array_equal(result.frames[0][:1], result.frames[1])


@pytest.mark.parametrize(
    ("images", "frames", "waves"),
    [(8, 8, 4), (6, 2, 2), (6, 6, 3), (2, 1, 2), (5, 7, 3)],  # batch 4; (5, 7): 4, then 1 beside 3 frames, then 4
)
def test_only_what_must_wait_leaves_slots_empty(engine: ChainEngine, images: int, frames: int, waves: int) -> None:
    latents = {i: np.zeros(engine.prior.latent_shape, np.float32) for i in range(images)}
    wanted = [(0, 1, k / 16) for k in range(1, frames + 1)]
    result = engine.diffuse(latents, {}, wanted)
    assert result.evaluations == (images + frames) * 5
    assert result.padded == (waves * 4 - images - frames) * 5
    assert list(result.latents) == wanted


def test_frames_come_in_the_order_of_the_alphas(engine: ChainEngine) -> None:
    images = pictures(2)
    result = engine.interpolate(images, [Request(0, 1, (0.75, 0.25)), Request(0, 1, (0.25, 0.75)), Request(1, 0, ())])
    assert np.array_equal(result.frames[0], result.frames[1][::-1])
    assert not np.array_equal(result.frames[0][0], result.frames[0][1])
    assert result.frames[2].shape == (0, 32, 32, 3)


def test_no_pictures_give_nothing(engine: ChainEngine) -> None:
    result = engine.interpolate(pictures(0), [])
    assert result.frames == []
    assert result.noise.shape == (0, 4, 8, 8)
    assert result.evaluations == result.padded == 0
