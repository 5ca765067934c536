"""The schedule of a prior: which timesteps its network is asked at, and what each answer does to the latents.

Timesteps and noise levels are those of diffusers' ``DDIMScheduler`` (denoising) and ``DDIMInverseScheduler``
(inversion), or those of multistep DPM-Solver++; tests compare all three. The mathematics is in ``solvers``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

import torch

from covray.config.section import JsonObject
from covray.errors import ConfigError, WeightsError, one_line
from covray.models.diffusion.solvers import (
    Levels,
    Tables,
    ddim_groups,
    ddim_tables,
    dpm_tables,
    sigma_grid,
)

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

PREDICTION_TYPES = ("epsilon", "v_prediction")
_PNDM = {"clip_sample": False, "set_alpha_to_one": False}
"""Defaults of PNDMScheduler, which Stable Diffusion's repositories name, where DDIMScheduler has others: it never
clips."""
_PAPER_STEPS = 50
"""DPM-Solver++ ends at the timestep where DDIM of so many steps ends, 981 of 1000. Up to 999 its pictures come back
3 dB worse."""


@dataclass(frozen=True)
class Schedule:
    """The tables of a solver, each [2, n]: row 0 denoises, row 1 inverts, and column k is the k-th evaluation.

    All samples of a batch take their k-th step at the same time, each in its own direction; so their histories agree,
    and a whole scheduler is a few table look-ups and multiply-adds.
    """

    prediction_type: str
    train_timesteps: int
    multistep: bool
    """Whether a step uses the data that the step before predicted."""
    timesteps: torch.Tensor
    """The timesteps that the network gets, int64 [2, n]."""
    latent_scale: torch.Tensor
    """a of ``solvers``, float32 [2, n]; so are the others."""
    output_scale: torch.Tensor
    """b."""
    previous_scale: torch.Tensor
    """c."""
    data_latent_scale: torch.Tensor
    """p."""
    data_output_scale: torch.Tensor
    """r."""

    @property
    def evaluations(self) -> int:
        """Network evaluations of one inversion, or of one denoising."""
        return self.timesteps.shape[1]

    def to(self, device: torch.device) -> Schedule:
        """Return the same tables on ``device``."""
        tables = {field.name: getattr(self, field.name).to(device) for field in fields(Tables)}
        return replace(self, **tables)

    def step(
        self, latents: torch.Tensor, output: torch.Tensor, previous: torch.Tensor, number: int, inverse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the latents after one step of every sample, and the data to pass as ``previous`` to the next step.

        Args:
            latents: Before the step, float32 [B, c, h, w].
            output: The network's output for them at ``timesteps[inverse, number]``, float32 [B, c, h, w].
            previous: The data that the step before predicted, float32 [B, c, h, w]; zeros at the first step. Its factor
                is 0 there, and 0 times a leftover NaN would be NaN.
            number: The step, counted from the start of the inversion or the denoising.
            inverse: 1 for a step towards noise, 0 for a step towards the picture, int64 [B].
        """

        def scale(table: torch.Tensor) -> torch.Tensor:
            return table[inverse, number].view(-1, 1, 1, 1)

        stepped = torch.addcmul(latents * scale(self.latent_scale), output, scale(self.output_scale))
        if not self.multistep:
            return stepped, previous
        stepped = torch.addcmul(stepped, previous, scale(self.previous_scale))
        data = torch.addcmul(latents * scale(self.data_latent_scale), output, scale(self.data_output_scale))
        return stepped, data


def make_schedule(
    config: JsonObject, steps: int, solver: Literal["ddim", "dpm"] = "ddim", evaluations: int | None = None
) -> Schedule:
    """Return the schedule for a diffusers scheduler configuration (``scheduler_config.json``).

    Args:
        config: Keys and values of the file.
        steps: Steps of an inversion, and of a denoising.
        solver: ``ddim``, or ``dpm`` for multistep DPM-Solver++.
        evaluations: With ``ddim``, the steps that evaluate the network; None for all.

    Raises:
        WeightsError: The configuration asks for what is not implemented.
        ConfigError: The solver cannot take that many steps between these training steps.
    """
    from diffusers import DDIMScheduler  # where it is needed: it takes seconds

    if config.get("_class_name") == "PNDMScheduler":
        config = _PNDM | config
    _refuse_unknown(config)
    try:
        scheduler = DDIMScheduler.from_config(config)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(
            f"scheduler_config.json: {one_line(error)}; covray needs a DDIM-compatible schedule"
        ) from error
    _require_levels(scheduler)
    if solver == "dpm":
        denoise, invert = _dpm(scheduler, steps)
    else:
        denoise, invert = _ddim(scheduler, steps, evaluations or steps)
    tables: dict[str, torch.Tensor] = {}
    for field in fields(Tables):
        both = torch.stack([getattr(denoise, field.name), getattr(invert, field.name)])
        tables[field.name] = both if field.name == "timesteps" else both.float()
    return Schedule(
        prediction_type=str(scheduler.config.prediction_type),
        train_timesteps=int(scheduler.config.num_train_timesteps),
        multistep=bool(tables["previous_scale"].any()),
        **tables,
    )


def _require_levels(scheduler: DDIMScheduler) -> None:
    """Refuse betas that are no noise levels: a step divides by the signal. Raises WeightsError."""
    signal, steps = scheduler.alphas_cumprod, scheduler.config.num_train_timesteps
    # diffusers takes ``trained_betas`` of any number; a timestep beyond them would be read from nowhere.
    if len(signal) != steps:
        raise WeightsError(
            f"scheduler_config.json: has {len(signal)} trained_betas for {steps} training steps; get the folder again"
        )
    if not bool(((signal > 0) & (signal <= 1)).all()):
        raise WeightsError("scheduler_config.json: its betas leave no signal at some step; get the folder again")


def _ddim(scheduler: DDIMScheduler, steps: int, evaluations: int) -> tuple[Tables, Tables]:
    """Return the tables of denoising and of inversion."""
    train_timesteps = int(scheduler.config.num_train_timesteps)
    # diffusers would end before the last timesteps, without an error.
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
    start = int(timesteps[0]) - train_timesteps // steps  # the clean end of the first step; below zero, the picture
    first = signal[start] if start >= 0 else scheduler.final_alpha_cumprod.double()
    levels = Levels.of(torch.cat([first[None], signal[timesteps]]))
    # An inversion, too, tells the network the noisy end of each step, as DDIMInverseScheduler does.
    borders = ddim_groups(levels, evaluations)
    prediction_type = str(scheduler.config.prediction_type)
    invert = ddim_tables(prediction_type, levels, timesteps, borders[:-1])
    denoise = ddim_tables(prediction_type, levels.flip(), timesteps.flip(0), steps - borders[:0:-1])
    return denoise, invert


def _dpm(scheduler: DDIMScheduler, steps: int) -> tuple[Tables, Tables]:
    """Return the tables of denoising and of inversion."""
    train_timesteps = int(scheduler.config.num_train_timesteps)
    last = (_PAPER_STEPS - 1) * (train_timesteps // _PAPER_STEPS) + int(scheduler.config.steps_offset)
    signal = scheduler.alphas_cumprod.double()[: last + 1]
    sigmas = ((1 - signal) / signal).sqrt()
    timesteps = torch.from_numpy(sigma_grid(sigmas.numpy(), steps))
    if not bool((timesteps.diff() > 0).all()):
        raise ConfigError(
            f"prior.steps: {steps} steps of dpm are finer than the {train_timesteps} training steps; set 12"
        )
    levels = Levels.of(signal[timesteps])
    prediction_type = str(scheduler.config.prediction_type)
    invert = dpm_tables(prediction_type, levels, timesteps[:-1])
    denoise = dpm_tables(prediction_type, levels.flip(), timesteps.flip(0)[:-1])
    return denoise, invert


def _refuse_unknown(config: JsonObject) -> None:
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
    # Negative offsets would count timesteps from the end of the tables, without an error.
    for key, least in (("num_train_timesteps", 1), ("steps_offset", 0)):
        value = config.get(key, least)
        if not isinstance(value, int) or value < least:
            raise WeightsError(
                f"scheduler_config.json: {key} is {value!r}, not a whole number from {least}; get the folder again"
            )
