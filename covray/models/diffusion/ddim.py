"""Deterministic DDIM with a step and a direction per sample, so that one batch inverts and denoises at once.

Source: Song et al., Denoising Diffusion Implicit Models (arXiv:2010.02502), equations 12 and 16 with eta = 0. Timesteps
and their ends are those of diffusers' ``DDIMScheduler`` (denoising) and ``DDIMInverseScheduler`` (inversion); tests
compare them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler

from covray.errors import ConfigError, WeightsError

PREDICTION_TYPES = ("epsilon", "v_prediction")
_PNDM = {"clip_sample": False, "set_alpha_to_one": False}
"""Defaults of PNDMScheduler, which Stable Diffusion's repositories name, where DDIMScheduler has others: it never
clips."""


@dataclass(frozen=True)
class Schedule:
    """The tables of DDIM with a fixed number of steps: step ``k`` evaluates the network at ``timesteps[k]``.

    Steps are numbered by rising noise: an inversion takes 0, 1, ..., a denoising takes them backwards. With epsilon
    and with v-prediction, a step is linear in the latent and in the network's output, x' = a x + b output, so that the
    whole scheduler is two table look-ups and one multiply-add.
    """

    prediction_type: str
    train_timesteps: int
    timesteps: torch.Tensor  # [steps] int64, ascending
    latent_scale: torch.Tensor  # [2, steps] float32: a of denoising, a of inversion
    output_scale: torch.Tensor  # [2, steps] float32: b of denoising, b of inversion

    @property
    def steps(self) -> int:
        """Network evaluations of one inversion, or of one denoising."""
        return len(self.timesteps)

    def to(self, device: torch.device) -> Schedule:
        """Return the same tables on ``device``."""
        return replace(
            self,
            timesteps=self.timesteps.to(device),
            latent_scale=self.latent_scale.to(device),
            output_scale=self.output_scale.to(device),
        )

    def step(
        self, latents: torch.Tensor, output: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        """Return the latents after one DDIM step of every sample, float32 [B, c, h, w].

        Args:
            latents: Before the step, float32 [B, c, h, w].
            output: The network's output for them at ``timesteps[index]``, float32 [B, c, h, w].
            index: Step of each sample, int64 [B].
            inverse: 1 for a step towards noise, 0 for a step towards the picture, int64 [B].
        """
        a = self.latent_scale[inverse, index].view(-1, 1, 1, 1)
        b = self.output_scale[inverse, index].view(-1, 1, 1, 1)
        return torch.addcmul(latents * a, output, b)


def make_schedule(config: dict[str, Any], steps: int) -> Schedule:
    """Return the schedule of ``steps`` steps for a diffusers scheduler configuration (``scheduler_config.json``).

    Raises:
        WeightsError: The configuration asks for what is not implemented.
        ConfigError: The number of steps does not divide the training steps: diffusers would end before the last
            timesteps without an error.
    """
    if config.get("_class_name") == "PNDMScheduler":
        config = _PNDM | config
    _refuse_unknown(config)
    try:
        scheduler = DDIMScheduler.from_config(config)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise WeightsError(f"scheduler_config.json: {error}; covray needs a DDIM-compatible schedule") from error
    train_timesteps = int(scheduler.config.num_train_timesteps)
    if steps > train_timesteps or train_timesteps % steps:
        raise ConfigError(f"prior.steps: {steps} does not divide the {train_timesteps} training steps; set 50")
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.flip(0)
    if int(timesteps[-1]) >= train_timesteps:
        raise ConfigError(
            f"prior.steps: {steps} steps with steps_offset {scheduler.config.steps_offset} end at timestep "
            f"{int(timesteps[-1])} of {train_timesteps}; set fewer"
        )
    signal = scheduler.alphas_cumprod.double()
    before = timesteps - train_timesteps // steps  # the less noisy end of each step; below zero it is the picture
    clean = torch.where(before >= 0, signal[before.clamp(min=0)], scheduler.final_alpha_cumprod.double())
    noisy = signal[timesteps]
    prediction_type = str(scheduler.config.prediction_type)
    denoise = _coefficients(prediction_type, start=noisy, end=clean)
    invert = _coefficients(prediction_type, start=clean, end=noisy)
    return Schedule(
        prediction_type=prediction_type,
        train_timesteps=train_timesteps,
        timesteps=timesteps,
        latent_scale=torch.stack([denoise[0], invert[0]]).float(),
        output_scale=torch.stack([denoise[1], invert[1]]).float(),
    )


def slerp(start: np.ndarray, end: np.ndarray, alpha: float) -> np.ndarray:
    """Interpolate spherically between two latents (Shoemake 1985), at ``alpha`` in [0, 1], as float32 of their shape.

    A latent is one vector. The angle is that between the directions, in float64; the latents are mixed with their own
    lengths, as in DiffMorpher. Where the sine of the angle is 0 (parallel or opposite latents), the mix is linear.

    It is computed in numpy for one pair at a time, so that sums have one order whatever is interpolated in the batch.
    """
    z0, z1 = start.astype(np.float64), end.astype(np.float64)
    lengths = math.sqrt(float(np.square(z0).sum()) * float(np.square(z1).sum()))
    cosine = float((z0 * z1).sum()) / lengths if lengths > 0 else 1.0
    theta = math.acos(min(1.0, max(-1.0, cosine))) if math.isfinite(cosine) else 0.0
    sine = math.sin(theta)
    if sine < 1e-6:
        weights = (1.0 - alpha, alpha)
    else:
        weights = (math.sin((1.0 - alpha) * theta) / sine, math.sin(alpha * theta) / sine)
    return np.asarray(weights[0] * z0 + weights[1] * z1, dtype=np.float32)


def _coefficients(prediction_type: str, start: torch.Tensor, end: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a and b of x' = a x + b output, each float64 [steps].

    ``start`` and ``end`` are the alphas_cumprod before and after each step, float64 [steps].
    """
    signal0, noise0 = start.sqrt(), (1 - start).sqrt()
    signal1, noise1 = end.sqrt(), (1 - end).sqrt()
    if prediction_type == "epsilon":  # picture = (x - noise0 output) / signal0
        return signal1 / signal0, noise1 - signal1 * noise0 / signal0
    # v: picture = signal0 x - noise0 output, noise = signal0 output + noise0 x (Salimans & Ho, arXiv:2202.00512)
    return signal1 * signal0 + noise1 * noise0, noise1 * signal0 - signal1 * noise0


def _refuse_unknown(config: dict[str, Any]) -> None:
    # Key, diffusers' default for an absent key, and what is implemented. clip_sample's default would ruin latents
    # without an error.
    supported = {
        "prediction_type": ("epsilon", PREDICTION_TYPES),
        "clip_sample": (True, (False,)),
        "thresholding": (False, (False,)),
        "rescale_betas_zero_snr": (False, (False,)),
        "timestep_spacing": ("leading", ("leading",)),
    }
    for key, (default, allowed) in supported.items():
        value = config.get(key, default)
        if value not in allowed:
            stated = repr(value) if key in config else f"absent, which means {value!r}"
            choices = " or ".join(repr(choice) for choice in allowed)
            raise WeightsError(f"scheduler_config.json: {key} is {stated}; covray implements {choices}")
