"""How good a chain is, from what its build measured: a score that can be had without any model that reads it.

Whether the score predicts what a chain is worth is an experiment: ``covray experiments claims`` reports their rank
correlation, and a training without the worst fifth (``sentences.drop_worst``) beside one with all chains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray


def chain_quality(figures: Mapping[str, float | None] | None) -> float | None:
    """Return the quality of a diffused chain, in (0, 1]; 1 is a straight path between two typical noises.

    It is the direct way over the way through the frames, times e^-|ln r| for the noise of each end, of which r is
    |z_T|/sqrt(d): interpolating noise whose norm is not that of the prior leaves what the prior knows.

    Args:
        figures: ``quality`` of a shard's row.

    Returns:
        The quality; None where the path is unknown, as for an image that is its own label.
    """
    figures = figures or {}
    path = figures.get("diffusion_path")
    if not path:
        return None
    quality = 1 / path
    for end in ("source_noise_rms", "label_noise_rms"):
        # An end whose noise is not known counts as typical.
        rms = figures.get(end)
        if rms:
            quality *= math.exp(-abs(math.log(rms)))
    return quality


def kept_count(rows: int, dropped: float) -> int:
    """Return how many of ``rows`` chains of a task stay where a share ``dropped`` is left out."""
    # Rounded down: with few rows none is dropped.
    return rows - int(dropped * rows)


def best_rows(qualities: Sequence[float | None], dropped: float) -> NDArray[np.int64]:
    """Return which rows stay where the share ``dropped`` of the lowest quality is left out, ascending, int64 [kept].

    An unknown quality is the lowest. Of equal ones the first rows stay.
    """
    values = np.full(len(qualities), -1.0)  # no quality is below 0
    for row, quality in enumerate(qualities):
        if quality is not None:
            values[row] = quality
    # Stable, so that of equal ones the first rows stay.
    order = np.argsort(-values, kind="stable")
    return np.sort(order[: kept_count(len(values), dropped)])
