"""Scores of an answer picture against its label, by the definitions of the literature.

Answers are whatever a model paints, labels may have nothing to score: every metric here is finite, or None where it is
undefined (a label without valid pixels, without keypoints, without edges). What an answer leaves out counts against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity
from skimage.morphology import dilation

from covray.io.pixels import Picture, mse, psnr
from covray.tasks import depth, edges, normals, pose, segmentation

METRICS: dict[str, tuple[str, ...]] = {
    "segmentation": ("iou", "p_acc"),
    "pose": ("pck", "lpips", "mse"),
    "colorization": ("mse", "lpips", "psnr"),
    "normals": ("mean_angle_deg", "median_angle_deg", "within_11_deg", "within_22_deg", "within_30_deg"),
    "edges": ("f",),
    "depth": ("abs_rel", "sq_rel", "delta1", "delta2", "delta3"),
    "low_light": ("psnr", "ssim"),
}
"""The metrics of an episode by task, the one to rank answers by first."""
SET_METRICS: dict[str, tuple[str, ...]] = {"segmentation": ("miou",), "edges": ("ods_f", "ois_f")}
"""The metrics of a set of episodes that are no mean over them; see ``aggregate``."""
LOWER_IS_BETTER = frozenset({"mse", "lpips", "mean_angle_deg", "median_angle_deg", "abs_rel", "sq_rel"})
"""Of all other metrics, more is better."""

VOC_CLASSES = 21
"""Classes of a segmentation whose ``meta`` names none: PASCAL VOC's twenty and the background."""
PCK_ALPHA = 0.1
EDGE_TOLERANCE = 0.0075
"""How far from an edge still is the edge, as a share of the picture's diagonal (BSDS500)."""
EDGE_THRESHOLDS = np.arange(1, 100) / 100
"""Strengths from which an answer's pixel counts as an edge (BSDS500's 99)."""

Lpips = Callable[[Picture, Picture], float]


@dataclass(frozen=True)
class Score:
    """How good one answer is."""

    values: dict[str, float | None]
    """By metric of ``METRICS``; None where it is undefined. ``lpips`` is missing where no network for it is at hand."""
    counts: NDArray[np.int64] | None = None
    """What ``aggregate`` sums over a set: ``class_counts`` or ``edge_counts``; None for the other tasks."""


def score(
    task: str,
    answer: Picture,
    label: Picture,
    meta: Mapping[str, Any] | None = None,
    lpips: Lpips | None = None,
) -> Score:
    """Score ``answer`` against ``label``, both uint8 [h, w, 3].

    ``meta``: of the pair's manifest row; its ``classes`` are the names of a segmentation's classes, by index.
    ``lpips``: distance of two pictures (Zhang et al. 2018); its weights come with no package and are never downloaded,
    so whoever has them hands the function in. Raises ValueError for an unknown task and for pictures that do not match.
    """
    if answer.shape != label.shape or (answer.dtype, label.dtype) != (np.uint8, np.uint8):
        raise ValueError(f"answer {answer.dtype} {answer.shape} and label {label.dtype} {label.shape} do not match")
    perceptual = {} if lpips is None else {"lpips": float(lpips(answer, label))}
    if task == "segmentation":
        classes = class_count(meta or {})
        found, truth = segmentation.read(answer, classes), segmentation.read(label, classes)
        counts = class_counts(found, truth, classes)
        return Score({"iou": mean_iou(counts), "p_acc": float((found == truth).mean())}, counts)
    if task == "pose":
        radius_px = pose.disc_radius_px(*label.shape[:2])
        share = pck(pose.read(answer), pose.read(label), least_px=radius_px)
        return Score({"pck": share, **perceptual, "mse": mse(answer, label)})
    if task == "colorization":
        return Score({"mse": mse(answer, label), **perceptual, "psnr": psnr(answer, label)})
    if task == "normals":
        return Score(angle_figures(normals.read(answer), normals.read(label)))
    if task == "edges":
        counts = edge_counts(edges.read(answer), edges.read(label) >= 0.5)
        best = float(f_measure(counts).max()) if counts[2, 0] else None
        return Score({"f": best}, counts)
    if task == "depth":
        return Score(depth_errors(depth.read(answer), depth.read(label)))
    if task == "low_light":
        return Score({"psnr": psnr(answer, label), "ssim": ssim(answer, label)})
    raise ValueError(f"no such task: {task}")


def aggregate(task: str, scores: Sequence[Score]) -> dict[str, float | None]:
    """The figures of a set that are no mean over its episodes, from what their scores counted; empty for most tasks.

    Segmentation: ``miou``, the IoU of every class over all pixels of the set, then the mean over classes. Edges: F at
    the one threshold that is best for the set (``ods_f``), and at every picture's own best one (``ois_f``), both from
    summed counts as the BSDS500 benchmark computes them. None where the set has nothing to score.
    """
    counts = [one.counts for one in scores if one.counts is not None]
    if task == "segmentation":
        total = np.zeros((2, max((one.shape[1] for one in counts), default=0)), np.int64)
        for one in counts:  # sources of fewer classes count in the first of them
            total[:, : one.shape[1]] += one
        return {"miou": mean_iou(total)}
    if task == "edges":
        if not sum(int(one[2, 0]) for one in counts):
            return dict.fromkeys(SET_METRICS["edges"])
        # Of equally good thresholds the highest: where nothing is right it has the fewest wrong pixels.
        best = [one[:, len(EDGE_THRESHOLDS) - 1 - f_measure(one)[::-1].argmax()] for one in counts]
        return {
            "ods_f": float(f_measure(np.sum(counts, axis=0)).max()),
            "ois_f": float(f_measure(np.sum(best, axis=0))),
        }
    return {}


def class_counts(answer: NDArray[np.integer], label: NDArray[np.integer], classes: int) -> NDArray[np.int64]:
    """Pixels of every class in answer and label both, and in either; int64 [2, classes] of classes [h, w]."""
    pairs = label.astype(np.int64).ravel() * classes + answer.ravel()
    confusion = np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    both = confusion.diagonal()
    return np.stack([both, confusion.sum(axis=0) + confusion.sum(axis=1) - both])


def mean_iou(counts: NDArray[np.int64]) -> float | None:
    """Mean of intersection over union over the classes that occur, from ``class_counts``; the background is a class.

    Everingham et al. 2010 (PASCAL VOC), for the classes present in answer or label: others have no union to divide by.
    """
    both, either = counts[:, counts[1] > 0]
    return float((both / either).mean()) if either.size else None


def pck(
    answer: NDArray[np.floating], label: NDArray[np.floating], *, least_px: float, alpha: float = PCK_ALPHA
) -> float | None:
    """Percentage of correct keypoints, as a share in [0, 1], of keypoints [n, 3] of (x px, y px, visible).

    A keypoint of the label is correct when the answer has it within ``alpha`` times the longer side of the box around
    the label's keypoints (Yang & Ramanan 2013), or within ``least_px``: what the picture cannot resolve is no error,
    and a lone keypoint has no box. None where the label has no keypoints. One person a picture, as ``pose.read``.
    """
    visible = label[:, 2] > 0
    if not visible.any():
        return None
    truth, found = label[visible].astype(np.float64), answer[visible].astype(np.float64)
    tolerance_px = max(alpha * float(np.ptp(truth[:, :2], axis=0).max()), least_px)
    distance_px = np.linalg.norm(found[:, :2] - truth[:, :2], axis=1)
    return float(((found[:, 2] > 0) & (distance_px <= tolerance_px)).mean())


def ssim(answer: Picture, label: Picture) -> float | None:
    """Structural similarity, mean over pixels and channels (Wang et al. 2004: Gaussian window of sigma 1.5 px).

    None for pictures of less than 11 px, the window's width.
    """
    if min(label.shape[:2]) < 11:
        return None
    similarity = structural_similarity(
        label, answer, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return float(similarity)


def angle_figures(answer: NDArray[np.floating], label: NDArray[np.floating]) -> dict[str, float | None]:
    """Angles between normals [h, w, 3], zero where there is none (Fouhey et al. 2013), over the label's valid pixels.

    Mean and median in degrees, and the shares below 11.25, 22.5 and 30 degrees. Where the answer has no direction its
    cosine is 0 with any, an error of 90 degrees.
    """
    valid = label.any(axis=2)
    if not valid.any():
        return dict.fromkeys(METRICS["normals"])
    cosine = (answer[valid].astype(np.float64) * label[valid]).sum(axis=1)
    angle = np.rad2deg(np.arccos(np.clip(cosine, -1, 1)))
    shares = {f"within_{int(limit)}_deg": float((angle < limit).mean()) for limit in (11.25, 22.5, 30.0)}
    return {"mean_angle_deg": float(angle.mean()), "median_angle_deg": float(np.median(angle)), **shares}


def class_count(meta: Mapping[str, Any]) -> int:
    """Classes of a segmentation: as many as ``meta`` of its manifest row names in ``classes``, else PASCAL VOC's."""
    names = meta.get("classes")
    return len(names) if isinstance(names, list) and 1 <= len(names) <= 256 else VOC_CLASSES


def edge_counts(answer: NDArray[np.floating], label: NDArray[np.bool_]) -> NDArray[np.int64]:
    """What edge strength [h, w] in [0, 1] gets right of the edges [h, w], int64 [4, thresholds].

    The rows: pixels of at least the threshold; of these, within the tolerance of an edge; edge pixels; of these, within
    the tolerance of a pixel of at least the threshold. BSDS500 (Martin et al. 2004; Arbelaez et al. 2011) matches
    pixels one to one and thins the answer before; this is the simple variant that matches by distance alone and leaves
    lines as wide as they are drawn, as labels are. Below 134 px of diagonal the tolerance is less than a pixel.
    """
    height, width = label.shape
    tolerance_px = EDGE_TOLERANCE * math.hypot(height, width)
    offsets = np.arange(-math.floor(tolerance_px), math.floor(tolerance_px) + 1)
    disc = offsets[:, None] ** 2 + offsets**2 <= tolerance_px**2
    # A pixel lies within the tolerance of one of strength t exactly when the strongest in its disc has t: one dilation
    # serves all thresholds.
    near_edge, near_answer = dilation(label, disc), dilation(answer, disc)
    counts = [_at_least(part) for part in (answer, answer[near_edge])]
    found = _at_least(near_answer[label])
    return np.stack([*counts, np.full_like(found, label.sum()), found])


def _at_least(strength: NDArray[np.floating]) -> NDArray[np.int64]:
    """How many values are at least each of the thresholds."""
    return strength.size - np.searchsorted(np.sort(strength, axis=None), EDGE_THRESHOLDS.astype(strength.dtype))


def f_measure(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """2 P R / (P + R) of ``edge_counts`` [4, ...]; 0 where nothing is found or nothing is right."""
    found, right, truth, met = counts
    precision, recall = right / np.maximum(found, 1), met / np.maximum(truth, 1)
    return np.asarray(2 * precision * recall / np.maximum(precision + recall, 1e-12))


def depth_errors(answer_m: NDArray[np.floating], label_m: NDArray[np.floating]) -> dict[str, float | None]:
    """Errors of depth [h, w] in metres (Eigen et al. 2014) over the pixels where the label has one, below 10 m.

    ``abs_rel`` = mean |d - p| / d, ``sq_rel`` = mean (d - p)^2 / d, ``delta<k>`` = share with max(d/p, p/d) < 1.25^k.
    Full white is 10 m or anything beyond, so it is left out. The answer is cut to 1 mm .. 10 m, as is usual: what has
    no depth is wrong by all of it. Eigen's crop is of NYUv2's own frame and not applied.
    """
    valid = (label_m >= depth.MIN_M) & (label_m < depth.MAX_M)
    if not valid.any():
        return dict.fromkeys(METRICS["depth"])
    truth = label_m[valid].astype(np.float64)
    found = np.clip(answer_m[valid].astype(np.float64), depth.MIN_M, depth.MAX_M)
    error, ratio = np.abs(truth - found), np.maximum(truth / found, found / truth)
    deltas = {f"delta{k}": float((ratio < 1.25**k).mean()) for k in (1, 2, 3)}
    return {"abs_rel": float((error / truth).mean()), "sq_rel": float((error**2 / truth).mean()), **deltas}
