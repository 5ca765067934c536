"""Depth in metres, drawn as NYUv2 is in the generalist literature: metres / 10 to 8 bits, three equal channels."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from covray.tasks.base import Lpips, Meta, Metric, Picture, Resample, Score, mean_where_valid, npy_file, require_labels

MAX_M = 10.0
"""Depth of full white; what lies further is drawn at it."""
MIN_M = 1e-3
"""Less than this is no depth: the pixel is invalid and drawn black."""

name = "depth"
short = "depth"
resample: Resample = "nearest"
continuous = True
meta_keys: tuple[str, ...] = ()
metrics: tuple[Metric, ...] = (
    Metric("abs_rel", "AbsRel", "Error of depth over depth, mean over pixels.", "lower"),
    Metric("sq_rel", "SqRel", "Squared error of depth over depth, mean over pixels.", "lower", "m"),
    Metric("delta1", "δ < 1.25", "Share of pixels whose depth is wrong by a factor below 1.25.", "higher"),
    Metric("delta2", "δ < 1.25²", "Share of pixels whose depth is wrong by a factor below 1.25².", "higher"),
    Metric("delta3", "δ < 1.25³", "Share of pixels whose depth is wrong by a factor below 1.25³.", "higher"),
)


def render(depth_m: NDArray[np.floating]) -> Picture:
    """Draw depth [h, w] in metres (0, NaN or infinite where there is none) as a picture [h, w, 3]."""
    # Sensors and models write no depth as 0, NaN or infinity.
    valid = np.isfinite(depth_m) & (depth_m >= MIN_M)
    level = np.clip(np.rint(np.where(valid, depth_m, 0.0) / MAX_M * 255), 1, 255)  # 0 is kept for "none"
    return np.repeat(np.where(valid, level, 0).astype(np.uint8)[..., None], 3, axis=2)


def read(picture: Picture, meta: Meta | None = None) -> NDArray[np.float32]:
    """Read depth [h, w] in metres from the mean of the channels; 0 where the picture has none."""
    return (picture.mean(axis=2) / 255 * MAX_M).astype(np.float32)


def score(answer: Picture, label: Picture, meta: Meta | None = None, *, lpips: Lpips | None = None) -> Score:
    """Score the depth of ``answer`` against that of ``label``."""
    return Score(depth_errors(read(answer), read(label)))


def depth_errors(answer_m: NDArray[np.floating], label_m: NDArray[np.floating]) -> dict[str, float | None]:
    """Return the errors of depth [h, w] in metres (Eigen et al. 2014) over the pixels where the label has one.

    ``abs_rel`` = mean |d - p| / d, ``sq_rel`` = mean (d - p)^2 / d, ``delta<k>`` = share with max(d/p, p/d) < 1.25^k.
    Full white is 10 m or anything beyond, so it is left out. The answer is cut to 1 mm .. 10 m, as is usual: a pixel
    without depth is wrong by all of it. Eigen's crop is of NYUv2's own frame and not applied.
    """
    valid = (label_m >= MIN_M) & (label_m < MAX_M)
    if not valid.any():
        return dict.fromkeys(metric.name for metric in metrics)
    truth = label_m[valid].astype(np.float64)
    answered = np.clip(answer_m[valid].astype(np.float64), MIN_M, MAX_M)
    error, ratio = np.abs(truth - answered), np.maximum(truth / answered, answered / truth)
    deltas = {f"delta{k}": float((ratio < 1.25**k).mean()) for k in (1, 2, 3)}
    return {"abs_rel": float((error / truth).mean()), "sq_rel": float((error**2 / truth).mean()), **deltas}


def mean(labels: Iterable[Picture], meta: Meta | None = None, *, robust: bool = False) -> Picture:
    """Return the mean depth of the labels that have one at a pixel.

    With ``robust`` it is their median, and none where less than half of the labels have a depth.
    """
    values = (read(label) for label in require_labels(name, labels))
    if not robust:
        metres, _ = mean_where_valid(values, lambda depth_m: depth_m >= MIN_M)
        return render(metres)
    stacked = np.stack(list(values)).astype(np.float64)
    valid = stacked >= MIN_M
    shown = 2 * valid.sum(axis=0) >= len(stacked)
    depth_m = np.zeros(shown.shape)
    # Only where some label has a depth: the median of nothing but NaN is a warning.
    if shown.any():
        depth_m[shown] = np.nanmedian(np.where(valid, stacked, np.nan)[:, shown], axis=0)
    return render(depth_m)


def export(answer: Picture, meta: Meta | None = None) -> dict[str, bytes]:
    """Return depth in metres, float32 [h, w]."""
    return {"depth_m.npy": npy_file(read(answer))}
