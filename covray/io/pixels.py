"""Arithmetic on the pixels of pictures: how much two differ, the length of a chain, sRGB and linear light."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]


def mse(first: Picture, second: Picture) -> float:
    """Return the mean squared error of two uint8 pictures of one shape, on a scale of 0 to 1."""
    # Not as bytes, whose differences wrap around below 0.
    return float(np.mean(((first.astype(np.float64) - second) / 255) ** 2))


def psnr(first: Picture, second: Picture, most_db: float = 100.0) -> float:
    """Return the peak signal-to-noise ratio in dB of two uint8 pictures of one shape, at most ``most_db`` (<= 100).

    Equal pictures have no finite ratio, and a mean over pictures would then have none either.
    """
    return min(most_db, -10 * math.log10(max(mse(first, second), 1e-10)))


def step_sizes(pictures: Sequence[Picture]) -> list[float]:
    """Return the root mean squared error, on a scale of 0 to 1, between each of ``pictures`` and the next."""
    return [math.sqrt(mse(first, second)) for first, second in itertools.pairwise(pictures)]


def path_ratio(pictures: Sequence[Picture]) -> float | None:
    """Return the way through ``pictures`` over the direct way from the first to the last; 1 is a straight line.

    Distances are root mean squared errors: DiffMorpher's path length (Zhang et al., CVPR 2024) without LPIPS, divided
    by the direct way so that pairs can be compared. None where the first and the last picture are equal.
    """
    (direct,) = step_sizes([pictures[0], pictures[-1]])
    return sum(step_sizes(pictures)) / direct if direct else None


def to_linear(srgb: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the linear light of sRGB values in [0, 1] (IEC 61966-2-1)."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def to_srgb(light: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the sRGB values of linear light (IEC 61966-2-1); light outside [0, 1] is clipped."""
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
