"""Metrics and means of pictures as pixels, which several tasks share."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

from covray.tasks.base import Metric, Picture, mean_where_valid, require_labels

MSE = Metric("mse", "MSE", "Mean squared error of pixel values in [0, 1].", "lower")
PSNR = Metric("psnr", "PSNR", "Peak signal-to-noise ratio of the answer against the label.", "higher", "dB")
SSIM = Metric("ssim", "SSIM", "Structural similarity of answer and label (Wang et al. 2004).", "higher")
LPIPS = Metric(
    "lpips",
    "LPIPS",
    "Perceptual distance of answer and label, by AlexNet (Zhang et al. 2018).",
    "lower",
    absent="the weights of its network come with no package and are never downloaded",
)


def ssim(answer: Picture, label: Picture) -> float | None:
    """Return the structural similarity, mean over pixels and channels (Wang et al. 2004; Gaussian of sigma 1.5 px).

    None for pictures of less than 11 px, the width of the window.
    """
    if min(label.shape[:2]) < 11:
        return None
    # The paper's own window and covariance: scikit-image has others by default, which give other figures.
    similarity = structural_similarity(
        label, answer, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return float(similarity)


def render_colour(colour: NDArray[np.floating]) -> Picture:
    """Draw colour [h, w, 3] in [0, 1] as a picture [h, w, 3]."""
    return np.rint(np.clip(colour, 0, 1) * 255).astype(np.uint8)


def read_colour(picture: Picture) -> NDArray[np.float32]:
    """Read colour float32 [h, w, 3] in [0, 1]."""
    return picture.astype(np.float32) / np.float32(255)


def mean_colour(task: str, labels: Iterable[Picture]) -> Picture:
    """Return the mean of the pixels of ``labels`` [h, w, 3], at least one."""
    values = (read_colour(label) for label in require_labels(task, labels))
    mean, _ = mean_where_valid(values, lambda value: np.ones((1, 1, 1), bool))
    return render_colour(mean)
