"""Tiny random priors in the layout of diffusers: the right shapes, no training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file

from covray.config import EngineConfig, PriorConfig
from covray.models.diffusion.prior import Prior, load_prior

CPU = EngineConfig(device="cpu", image_batch=3)
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""How Stable Diffusion's scheduler is configured."""


def write_prior(folder: Path, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """A prior of 32 px pictures and 8x8x4 latents, with self- and cross-attention, random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # diffusers initialises from the global generator only
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=24,
            attention_head_dim=2,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=32,
            scaling_factor=6.0,  # brings these random latents near unit variance
        )
        context = torch.randn(1, 5, 24)
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    DDIMScheduler(**SCHEDULER, prediction_type=prediction_type).save_pretrained(folder / "scheduler")
    save_file({"context": context}, folder / "empty_prompt.safetensors")
    return folder


@pytest.fixture
def prior_folder(tmp_path: Path) -> Path:
    """A folder of its own, to break."""
    return write_prior(tmp_path / "prior")


@pytest.fixture(scope="session")
def priors(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Prior]:
    """The loaded prior of a prediction type, five steps; one for the whole session, not to be changed."""
    loaded: dict[str, Prior] = {}

    def load(prediction_type: str) -> Prior:
        if prediction_type not in loaded:
            folder = write_prior(tmp_path_factory.mktemp(prediction_type), prediction_type)
            loaded[prediction_type] = load_prior(PriorConfig(path=str(folder), steps=5), CPU, verify=False)
        return loaded[prediction_type]

    return load
