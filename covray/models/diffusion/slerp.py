"""Spherical interpolation of two latents."""

from __future__ import annotations

import math

import numpy as np


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
