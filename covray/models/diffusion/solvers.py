"""The solvers of the probability-flow ODE, as tables: which timesteps the network is asked at, and what follows.

Every solver here is one and the same step. With x a latent, alpha and sigma its signal and noise (x = alpha data +
sigma noise) and ``out`` the network's output,

    x' = a x + b out + c previous      data = p x + r out      previous' = data

so a solver is five numbers a step and one latent of memory a sample. They follow from the exact solution of the ODE
for constant data (Lu et al., DPM-Solver++, arXiv:2211.01095, equation 9), which is also the step of DDIM (Song et al.,
arXiv:2010.02502, equation 12 with eta = 0):

    x' = (sigma' / sigma) x + (alpha' - alpha sigma' / sigma) data
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

RHO = 7.0
"""Exponent of the grid of sigmas (Karras et al., arXiv:2206.00364, equation 5). 5 and 10 cost 2 dB of the round trip
of pictures on the nano prior, steps uniform in the timestep 14 dB."""


@dataclass(frozen=True)
class Levels:
    """Noise levels in the order in which a solver passes them, from alphas_cumprod."""

    signal: torch.Tensor
    """alpha of each level, float64 [n]."""
    noise: torch.Tensor
    """sigma of each level, float64 [n]."""

    @classmethod
    def of(cls, alphas_cumprod: torch.Tensor) -> Levels:
        """Return the levels of ``alphas_cumprod``, float64 [n]."""
        return cls(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt())

    def flip(self) -> Levels:
        """Return the levels in reverse order."""
        return Levels(self.signal.flip(0), self.noise.flip(0))


@dataclass(frozen=True)
class Tables:
    """One direction of a solver: entry k belongs to the k-th evaluation of the network."""

    timesteps: torch.Tensor
    """int64 [n]."""
    latent_scale: torch.Tensor
    """a, float64 [n]; so are the others."""
    output_scale: torch.Tensor
    """b."""
    previous_scale: torch.Tensor
    """c; 0 for the first step, which has no previous data."""
    data_latent_scale: torch.Tensor
    """p."""
    data_output_scale: torch.Tensor
    """r."""


def ddim_tables(prediction_type: str, levels: Levels, timesteps: torch.Tensor, evaluated: np.ndarray) -> Tables:
    """Return DDIM whose network is evaluated at some of the steps only.

    At the other steps the predicted data is extrapolated from the last two evaluations, linearly in the coordinate of
    ``sigma_grid``. The states stay those of DDIM, so this approximates DDIM itself, not the ODE behind it. Where every
    step is evaluated, it is DDIM to the bit.

    Args:
        prediction_type: ``epsilon`` or ``v_prediction``.
        levels: The levels between the steps, in the order of the steps: n + 1.
        timesteps: The timestep that the network gets at each step, int64 [n].
        evaluated: The steps at which it is evaluated, ascending, 0 the first.
    """
    latent_scale, output_scale = _evaluated_step(prediction_type, levels)
    latent_kept, data_scale = _data_step(levels)
    p, r = _data_prediction(prediction_type, levels)
    # The coordinate in which the grid is uniform; the data is extrapolated along it.
    place = (levels.noise / levels.signal) ** (1 / RHO)
    steps = len(timesteps)
    rows = []
    previous = None
    for first, end in zip(evaluated, [*evaluated[1:], steps], strict=True):
        a, b, c = latent_scale[first], output_scale[first], torch.zeros((), dtype=torch.float64)
        for step in range(first + 1, end):  # the steps in between, folded into one
            ahead = torch.zeros((), dtype=torch.float64)
            if previous is not None:
                ahead = (place[step] - place[first]) / (place[first] - place[previous])
            weight = data_scale[step]
            a = latent_kept[step] * a + weight * (1 + ahead) * p[first]
            b = latent_kept[step] * b + weight * (1 + ahead) * r[first]
            c = latent_kept[step] * c - weight * ahead
        rows.append((a, b, c))
        previous = first
    a, b, c = torch.tensor(rows, dtype=torch.float64).unbind(1)
    chosen = torch.from_numpy(evaluated)
    return Tables(timesteps[chosen], a, b, c, p[chosen], r[chosen])


def ddim_groups(levels: Levels, evaluations: int) -> np.ndarray:
    """Return the borders of the groups of DDIM steps that share one evaluation, int64 [evaluations + 1].

    They are near the grid of ``sigma_grid``, and every group has a step, so that all of ``evaluations`` are used.

    Args:
        levels: The levels between the steps, by rising noise: n + 1.
        evaluations: At most n.
    """
    steps = len(levels.signal) - 1
    borders = sigma_grid((levels.noise / levels.signal).numpy(), evaluations)
    for number in range(1, evaluations + 1):
        borders[number] = max(borders[number], borders[number - 1] + 1)
    borders[-1] = steps
    for number in reversed(range(evaluations)):  # moving borders up may have gone beyond the last step
        borders[number] = min(borders[number], borders[number + 1] - 1)
    return borders


def dpm_tables(prediction_type: str, levels: Levels, timesteps: torch.Tensor) -> Tables:
    """Return multistep DPM-Solver++ of second order, 2M (Lu et al., algorithm 2), of the midpoint kind.

    The data is extrapolated to the middle of the step in log-SNR, from this evaluation and the one before. The first
    step, which has none before it, is of first order. The last is not: diffusers' ``lower_order_final`` is for a last
    level without noise, and costs 7 dB here.

    Args:
        prediction_type: ``epsilon`` or ``v_prediction``.
        levels: The levels between the steps, in the order of the steps: n + 1, none without noise.
        timesteps: The timestep of each level but the last, int64 [n].
    """
    latent_kept, data_scale = _data_step(levels)
    p, r = _data_prediction(prediction_type, levels)
    log_snr = torch.log(levels.signal / levels.noise)
    lengths = log_snr.diff()
    ahead = torch.zeros_like(lengths)
    ahead[1:] = lengths[1:] / (2 * lengths[:-1])  # half a step ahead, in units of the step before
    weight = data_scale * (1 + ahead)
    return Tables(
        timesteps=timesteps,
        latent_scale=latent_kept + weight * p,
        output_scale=weight * r,
        previous_scale=-data_scale * ahead,
        data_latent_scale=p,
        data_output_scale=r,
    )


def sigma_grid(sigmas: np.ndarray, steps: int) -> np.ndarray:
    """Return the places of ``sigmas`` that are nearest to a grid of ``steps`` steps over all of them.

    The grid is uniform in sigma ** (1 / RHO): fine where there is little noise, as a network's answer changes there.

    Args:
        sigmas: sigma / alpha of each level, ascending, float64 [n].
        steps: Steps of the grid, at least 2.

    Returns:
        int64 [steps + 1], from 0 to n - 1. Places repeat where the grid is finer than ``sigmas``.
    """
    ends = sigmas[0] ** (1 / RHO), sigmas[-1] ** (1 / RHO)
    grid = np.linspace(*ends, steps + 1) ** RHO
    # The nearest level, as a network is trained on whole timesteps.
    distance = np.abs(sigmas[None, :] - grid[:, None])
    return distance.argmin(axis=1)


def _evaluated_step(prediction_type: str, levels: Levels) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a and b of DDIM's x' = a x + b out between neighbouring ``levels``, each float64 [steps]."""
    signal0, signal1 = levels.signal[:-1], levels.signal[1:]
    noise0, noise1 = levels.noise[:-1], levels.noise[1:]
    if prediction_type == "epsilon":  # picture = (x - noise0 output) / signal0
        return signal1 / signal0, noise1 - signal1 * noise0 / signal0
    # v: picture = signal0 x - noise0 output, noise = signal0 output + noise0 x (Salimans & Ho, arXiv:2202.00512)
    return signal1 * signal0 + noise1 * noise0, noise1 * signal0 - signal1 * noise0


def _data_step(levels: Levels) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of x and of the data in the exact step between neighbouring ``levels``, float64 [steps].

    The step from a level without noise has no such form; its factors are not finite, and nobody may use them.
    """
    kept = levels.noise[1:] / levels.noise[:-1]
    return kept, levels.signal[1:] - levels.signal[:-1] * kept


def _data_prediction(prediction_type: str, levels: Levels) -> tuple[torch.Tensor, torch.Tensor]:
    """Return p and r of data = p x + r out at each of ``levels`` but the last, each float64 [steps]."""
    signal, noise = levels.signal[:-1], levels.noise[:-1]
    if prediction_type == "epsilon":
        return 1 / signal, -noise / signal
    return signal, -noise
