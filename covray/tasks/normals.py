"""Surface normals in camera coordinates, drawn as rgb = (n + 1) / 2; black is "no normal"."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from covray.tasks.base import Lpips, Meta, Metric, Picture, Resample, Score, mean_where_valid, npy_file, require_labels

name = "normals"
short = "normals"
resample: Resample = "nearest"
continuous = True
meta_keys: tuple[str, ...] = ()
metrics: tuple[Metric, ...] = (
    Metric(
        "mean_angle_deg", "Mean angle", "Angle between normals of answer and label, mean over pixels.", "lower", "°",
        short="angle",
    ),
    Metric(
        "median_angle_deg", "Median angle", "The same angle, median over the pixels of an episode.", "lower", "°"
    ),
    Metric("within_11_deg", "< 11.25°", "Share of pixels whose normal is less than 11.25° off.", "higher"),
    Metric("within_22_deg", "< 22.5°", "Share of pixels whose normal is less than 22.5° off.", "higher"),
    Metric("within_30_deg", "< 30°", "Share of pixels whose normal is less than 30° off.", "higher"),
)  # fmt: skip


def render(normals: NDArray[np.floating]) -> Picture:
    """Draw unit normals [h, w, 3] (the zero vector where there is none) as a picture [h, w, 3]."""
    valid = np.linalg.norm(normals, axis=2) > 0.5
    return np.where(valid[..., None], np.rint((normals + 1) / 2 * 255).clip(0, 255), 0).astype(np.uint8)


def read(picture: Picture, meta: Meta | None = None) -> NDArray[np.float32]:
    """Read unit normals float32 [h, w, 3]; zero where the picture is black or its colour is no direction."""
    vectors = picture.astype(np.float32) / 255 * 2 - 1
    length = np.linalg.norm(vectors, axis=2, keepdims=True)
    valid = picture.any(axis=2, keepdims=True) & (length > 1e-3)
    # The maximum only keeps zero vectors, which become zero all the same, from being divided by zero.
    return np.where(valid, vectors / np.maximum(length, 1e-3), 0).astype(np.float32)


def score(answer: Picture, label: Picture, meta: Meta | None = None, *, lpips: Lpips | None = None) -> Score:
    """Score the directions of ``answer`` against those of ``label``."""
    return Score(angle_figures(read(answer), read(label)))


def angle_figures(answer: NDArray[np.floating], label: NDArray[np.floating]) -> dict[str, float | None]:
    """Return the angles between normals [h, w, 3], zero where there is none, over the label's valid pixels.

    Mean and median in degrees, and the shares below 11.25, 22.5 and 30 degrees (Fouhey et al. 2013). Where the answer
    has no direction its cosine with any is 0, an error of 90 degrees.
    """
    valid = label.any(axis=2)
    if not valid.any():
        return dict.fromkeys(metric.name for metric in metrics)
    cosine = (answer[valid].astype(np.float64) * label[valid]).sum(axis=1)
    angle = np.rad2deg(np.arccos(np.clip(cosine, -1, 1)))
    shares = {f"within_{int(limit)}_deg": float((angle < limit).mean()) for limit in (11.25, 22.5, 30.0)}
    return {"mean_angle_deg": float(angle.mean()), "median_angle_deg": float(np.median(angle)), **shares}


def mean(labels: Iterable[Picture], meta: Meta | None = None, *, robust: bool = False) -> Picture:
    """Return the mean direction of the labels that have one at a pixel, as a unit vector."""
    values = (read(label) for label in require_labels(name, labels))
    direction, _ = mean_where_valid(values, lambda normals: np.any(normals != 0, axis=2, keepdims=True))
    return render(direction / np.maximum(np.linalg.norm(direction, axis=2, keepdims=True), 1e-6))


def export(answer: Picture, meta: Meta | None = None) -> dict[str, bytes]:
    """Return unit normals, float32 [h, w, 3]."""
    return {"normals.npy": npy_file(read(answer))}
