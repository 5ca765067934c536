"""The solvers on the nano prior and rendered scenes: what docs/solvers.md says of their quality, in small."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from covray.config import EngineConfig, PriorConfig
from covray.io.pixels import psnr
from covray.models.diffusion.engine import ChainEngine, Interpolation, Request
from covray.models.diffusion.prior import Prior, find_prior, load_prior, read_schedule
from covray.pairs.scenes.pairs import labelled
from covray.pairs.scenes.render import render_scene

CPU = EngineConfig(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def prior() -> Prior:
    return load_prior(PriorConfig(), CPU, verify=False)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """A scene and its label, of two tasks, uint8 [4, 64, 64, 3]."""
    pictures: list[np.ndarray] = []
    for seed, task in ((7, "depth"), (8, "normals")):
        pictures += labelled(render_scene(seed)[0], task, np.random.default_rng(0))
    return np.stack(pictures)


def test_dpm_returns_pictures_better_and_fewer_evaluations_keep_the_frames(prior: Prior, images: np.ndarray) -> None:
    reconstruction = prior.decode(prior.encode(torch.from_numpy(images)))[0].numpy()

    def interpolate(config: PriorConfig) -> Interpolation:
        schedule = read_schedule(find_prior(config), config)
        engine = ChainEngine(replace(prior, schedule=schedule), CPU, batch=4)
        return engine.interpolate(images, [Request(0, 1, (0.5,)), Request(2, 3, (0.5,))], endpoints=range(4))

    def round_trip(result: Interpolation) -> float:
        return float(np.mean([psnr(reconstruction[i], result.returned[i], most_db=99.0) for i in range(4)]))

    def likeness(result: Interpolation) -> float:
        pairs = zip(result.frames, ddim.frames, strict=True)
        return float(np.mean([psnr(frames[0], expected[0], most_db=99.0) for frames, expected in pairs]))

    ddim = interpolate(PriorConfig())
    dpm = interpolate(PriorConfig(solver="dpm"))
    fewer = interpolate(PriorConfig(evaluations=16))
    assert (ddim.evaluations, dpm.evaluations, fewer.evaluations) == (500, 120, 160)
    assert round_trip(dpm) > round_trip(ddim) + 3
    assert round_trip(fewer) > round_trip(ddim) - 2
    assert likeness(fewer) > 42 > likeness(dpm)
