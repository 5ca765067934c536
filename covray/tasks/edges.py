"""Edges: strength a pixel, white on black."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from skimage.morphology import dilation

from covray.tasks.base import (
    Counts,
    Lpips,
    Meta,
    Metric,
    Picture,
    Resample,
    Score,
    mean_where_valid,
    npy_file,
    require_labels,
)

TOLERANCE = 0.0075
"""How far from an edge still is the edge, as a share of the picture's diagonal (BSDS500)."""
THRESHOLDS = np.arange(1, 100) / 100
"""Strengths from which an answer's pixel counts as an edge (BSDS500's 99)."""


def render(edges: NDArray[np.bool_] | NDArray[np.floating]) -> Picture:
    """Draw edge strength [h, w] in [0, 1] as a picture [h, w, 3]."""
    level = np.rint(np.clip(edges.astype(np.float64), 0, 1) * 255).astype(np.uint8)
    return np.repeat(level[..., None], 3, axis=2)


def read(picture: Picture, meta: Meta | None = None) -> NDArray[np.float32]:
    """Read edge strength float32 [h, w] in [0, 1] from the mean of the channels."""
    return (picture.mean(axis=2) / 255).astype(np.float32)


def score(answer: Picture, label: Picture, meta: Meta | None = None, *, lpips: Lpips | None = None) -> Score:
    """Score the edges of ``answer`` against those of ``label``, at the answer's own best threshold."""
    counts = edge_counts(read(answer), read(label) >= 0.5)
    best = float(f_measure(counts).max()) if counts[2, 0] else None
    return Score({"f": best}, counts)


def edge_counts(answer: NDArray[np.floating], label: NDArray[np.bool_]) -> Counts:
    """Count what edge strength [h, w] in [0, 1] gets right of the edges [h, w]; int64 [4, thresholds].

    The rows: pixels of at least the threshold; of these, within the tolerance of an edge; edge pixels; of these, within
    the tolerance of a pixel of at least the threshold. BSDS500 (Martin et al. 2004; Arbelaez et al. 2011) matches
    pixels one to one and thins the answer before; this is the simple variant that matches by distance alone and leaves
    lines as wide as they are drawn, as labels are. Below 134 px of diagonal the tolerance is less than a pixel.
    """
    height, width = label.shape
    tolerance_px = TOLERANCE * math.hypot(height, width)
    offsets = np.arange(-math.floor(tolerance_px), math.floor(tolerance_px) + 1)
    disc = offsets[:, None] ** 2 + offsets**2 <= tolerance_px**2
    # A pixel lies within the tolerance of one of strength t exactly when the strongest in its disc has t: one dilation
    # serves all thresholds.
    near_edge, near_answer = dilation(label, disc), dilation(answer, disc)
    shown, right = _count_from_thresholds(answer), _count_from_thresholds(answer[near_edge])
    met = _count_from_thresholds(near_answer[label])
    return np.stack([shown, right, np.full_like(met, label.sum()), met])


def _count_from_thresholds(strength: NDArray[np.floating]) -> Counts:
    """Count the values that are at least each of the thresholds."""
    return strength.size - np.searchsorted(np.sort(strength, axis=None), THRESHOLDS.astype(strength.dtype))


def f_measure(counts: Counts) -> NDArray[np.float64]:
    """Return 2 P R / (P + R) of ``edge_counts`` [4, ...]; 0 where nothing is shown or nothing is right."""
    shown, right, truth, met = counts
    precision, recall = right / np.maximum(shown, 1), met / np.maximum(truth, 1)
    return np.asarray(2 * precision * recall / np.maximum(precision + recall, 1e-12))


def ods_f(counts: Sequence[Counts]) -> float | None:
    """Return F at the one threshold that is best for the set, from summed counts as BSDS500 computes it."""
    if not _edge_pixels(counts):
        return None
    return float(f_measure(np.sum(counts, axis=0)).max())


def ois_f(counts: Sequence[Counts]) -> float | None:
    """Return F at every picture's own best threshold, from summed counts as BSDS500 computes it."""
    if not _edge_pixels(counts):
        return None
    # Of equally good thresholds the highest: where nothing is right it has the fewest wrong pixels.
    best = [each[:, len(THRESHOLDS) - 1 - f_measure(each)[::-1].argmax()] for each in counts]
    return float(f_measure(np.sum(best, axis=0)))


def _edge_pixels(counts: Sequence[Counts]) -> int:
    """Return the edge pixels of all labels, which are the third of ``edge_counts`` and the same at every threshold."""
    return sum(int(each[2, 0]) for each in counts)


def mean(labels: Iterable[Picture], meta: Meta | None = None, *, robust: bool = False) -> Picture:
    """Return the mean edge strength."""
    values = (read(label) for label in require_labels(name, labels))
    strength, _ = mean_where_valid(values, lambda value: np.ones((1, 1), bool))
    return render(strength)


def export(answer: Picture, meta: Meta | None = None) -> dict[str, bytes]:
    """Return edge strength in [0, 1], float32 [h, w]."""
    return {"edges.npy": npy_file(read(answer))}


name = "edges"
short = "edges"
resample: Resample = "bicubic"
continuous = False
meta_keys: tuple[str, ...] = ()
metrics: tuple[Metric, ...] = (
    Metric("f", "F", "F measure of the edges at each picture's own best threshold, mean over episodes.", "higher"),
    Metric(
        "ods_f",
        "ODS F",
        "F measure of the edges at the one threshold that is best for the set, from summed counts; no interval.",
        "higher",
        of_set=ods_f,
    ),
    Metric(
        "ois_f",
        "OIS F",
        "F measure of the edges at each picture's own best threshold, from summed counts; no interval.",
        "higher",
        of_set=ois_f,
    ),
)
