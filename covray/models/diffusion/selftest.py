"""A golden self-test of a prior: sixteen numbers of a tiny chain of two fixed pictures, compared with recorded ones.

Weights that are damaged, of another revision, or run with other settings give other numbers. Another machine does not:
differences of float32 arithmetic stay far below ``TOLERANCE``. ``golden.json`` has the recorded numbers by fingerprint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from covray.config import EngineConfig, PriorConfig
from covray.models.diffusion.engine import ChainEngine
from covray.models.diffusion.prior import PROBE_LATENTS, Prior, load_prior, probe_pictures, verify_prior

STEPS = 5
TOLERANCE = 1e-3
"""Measured on the nano prior: threads, vector units and memory formats move a number by 3e-6 at most, bfloat16 by
0.017, ``steps_offset`` 0 by 0.026, a scaling factor 1% off by 0.009."""
GOLDEN_FILE = Path(__file__).with_name("golden.json")
_MASKS = 73 * np.arange(1, 9)  # of the eight Walsh functions that a latent is projected on


@dataclass(frozen=True)
class Golden:
    """The digest of a prior, as ``golden.json`` has it."""

    digest: list[float]
    """Sixteen numbers of order 1; see ``digest``."""
    size_px: int
    """Side of the two pictures."""
    steps: int


@dataclass(frozen=True)
class SelfTest(Golden):
    """The digest of a prior, as this machine computes it."""

    fingerprint: str
    """Of the prior."""
    seconds: float
    """With loading."""


def self_test(path: str, revision: str | None = None) -> SelfTest:
    """Load a prior and compute its digest, in float32 on the CPU: 3 runs of 5 steps at latents of 16 x 16.

    ``path`` and ``revision`` are those of ``PriorConfig``. Raises WeightsError for a prior that cannot be loaded or
    fails ``verify_prior``.
    """
    start = time.perf_counter()
    config = PriorConfig(path=path, revision=revision, steps=STEPS)
    prior = small(load_prior(config, EngineConfig(device="cpu", dtype="float32"), verify=False))
    verify_prior(prior, path)
    return SelfTest(
        digest=digest(prior),
        size_px=prior.size_px,
        steps=STEPS,
        fingerprint=prior.fingerprint,
        seconds=round(time.perf_counter() - start, 1),
    )


def small(prior: Prior) -> Prior:
    """Return ``prior`` for pictures whose latents are 16 x 16."""
    channels, _, side = prior.latent_shape
    size_px = PROBE_LATENTS * (prior.size_px // side)
    return replace(prior, size_px=size_px, latent_shape=(channels, PROBE_LATENTS, PROBE_LATENTS))


def digest(prior: Prior) -> list[float]:
    """Return eight projections of the first probe picture's noise, and eight of the latent of the frame halfway.

    Both probe pictures are inverted, and the frame between them is denoised.
    """
    # Two rows: one wave inverts both pictures, a second one denoises the frame beside a row of padding.
    engine = ChainEngine(prior, EngineConfig(device="cpu"), batch=2)
    latents = prior.encode(torch.from_numpy(probe_pictures(prior.size_px))).cpu().numpy()
    halfway = (0, 1, 0.5)
    diffusion = engine.diffuse(dict(enumerate(latents)), {}, [halfway])
    return [*_projections(diffusion.noise[0]), *_projections(diffusion.latents[halfway])]


def golden(fingerprint: str) -> Golden | None:
    """Return what is recorded for the prior of this fingerprint, or None."""
    recorded = json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))
    return Golden(**recorded[fingerprint]) if fingerprint in recorded else None


def compare(digest: Sequence[float], recorded: Sequence[float]) -> float:
    """Return the largest difference of two digests, to compare with ``TOLERANCE``; infinity for values not finite."""
    # NaN is neither more nor less than the tolerance: it must count as the largest difference.
    with np.errstate(invalid="ignore"):
        difference = np.abs(np.subtract(digest, recorded, dtype=np.float64))
    return float(np.where(np.isfinite(difference), difference, np.inf).max())


def _projections(latent: np.ndarray) -> list[float]:
    """Return sums of ``latent`` [c, h, w] under the signs of Walsh functions, of order 1 for unit variance."""
    index = np.arange(latent.size)
    signs = 1.0 - 2.0 * (np.bitwise_count(index & _MASKS[:, None]) & 1)
    sums = signs @ latent.astype(np.float64).reshape(-1) / np.sqrt(latent.size)
    return [round(float(value), 6) for value in sums]
