"""Answers that need no model, to compare with. The simplest needs no code: the query itself is the answer."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import numpy as np
from numpy.typing import NDArray
from skimage.filters import gaussian
from skimage.transform import resize

from covray.evaluation.scores import VOC_CLASSES
from covray.tasks import TASKS, depth, normals, pose, segmentation

SALIENCY_SIDE_PX = 64
"""At which size a picture is looked at for what stands out (Hou & Zhang 2007)."""
SALIENCY_SIGMA_PX = 2.5
"""Smoothing of the map at that size, as in the code Hou & Zhang published."""

Picture = NDArray[np.uint8]


def mean_label(task: str, labels: Iterable[Picture], classes: int = VOC_CLASSES) -> Picture:
    """The mean of a task's labels uint8 [h, w, 3], all of one size, as a picture uint8 [h, w, 3].

    The mean of what a label says, where it says something, is harder to beat than the mean of its colours: the most
    frequent of ``classes`` at every pixel; the mean place of every keypoint that is mostly there; the mean depth, or
    direction, of the pixels that have one. The other tasks' labels are pictures, and so is their mean.
    Raises ValueError without labels.
    """
    totals, count = np.zeros(()), np.zeros(())
    shown, shape = 0, (0, 0)
    for label in labels:
        shape, shown = label.shape[:2], shown + 1
        values, valid = _said(task, label, classes)
        totals = totals + values
        count = count + valid
    if not shown:
        raise ValueError(f"no labels of {task} to take the mean of")
    mean = totals / np.maximum(count, 1)
    if task == "segmentation":
        return segmentation.draw(mean.argmax(axis=2))
    if task == "pose":
        return pose.draw(np.concatenate([mean, 2 * count >= shown], axis=1), *shape)
    if task == "normals":
        return normals.draw(mean / np.maximum(np.linalg.norm(mean, axis=2, keepdims=True), 1e-6))
    drawn: Picture = TASKS[task].draw(mean)
    return drawn


def nearest_label(query: Picture, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Picture:
    """The label of the example whose image is nearest to ``query`` [h, w, 3] by mean squared error.

    ``images``, ``labels``: examples of the task, uint8 [n, h, w, 3], n >= 1; of equally near ones the first.
    """
    errors = [np.mean((image.astype(np.float32) - query) ** 2) for image in images]
    return labels[int(np.argmin(errors))]


def saliency(picture: Picture) -> Picture:
    """What stands out of ``picture`` uint8 [h, w, 3], as a grey map of that shape, 255 where it does most.

    The intermediate frame of the baseline Chain-of-Focus (Zheng et al., ICLR 2025), whose abstract says that frames are
    made "through visual saliency" and not how. This is the spectral residual of Hou & Zhang (CVPR 2007), which needs no
    weights: amplitudes of the grey picture's spectrum over their geometric mean with their neighbours', phases kept. A
    picture of one grey is black.
    """
    height, width = picture.shape[:2]
    scale = SALIENCY_SIDE_PX / max(height, width)
    side = (max(1, round(height * scale)), max(1, round(width * scale)))
    small = resize(picture.mean(axis=2), side, anti_aliasing=scale < 1)
    if np.ptp(small) < 1:  # less than a byte can show: only rounding would stand out
        return np.zeros_like(picture)
    spectrum = np.fft.fft2(small)
    amplitude = np.abs(spectrum)
    logarithm = np.log(np.maximum(amplitude, 1e-8 * amplitude.max()))  # relative, so that brightness does not matter
    around = np.mean([np.roll(logarithm, shift, (0, 1)) for shift in product((-1, 0, 1), repeat=2)], axis=0)
    energy = np.abs(np.fft.ifft2(spectrum / np.exp(around))) ** 2
    found = resize(gaussian(energy, SALIENCY_SIGMA_PX), (height, width))
    levels = np.rint(255 * (found - found.min()) / np.ptp(found)).astype(np.uint8)
    return np.repeat(levels[..., None], 3, axis=2)


def _said(task: str, label: Picture, classes: int) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
    """What the label says, as numbers that can be averaged (0 where it says nothing), and where it says something."""
    if task == "segmentation":
        return np.eye(classes)[segmentation.read(label, classes)], np.ones((1, 1, 1), bool)  # a vote a pixel
    if task == "pose":
        keypoints = pose.read(label)
        return keypoints[:, :2], keypoints[:, 2:] > 0
    values = TASKS[task].read(label)
    if task == "depth":
        return values, values >= depth.MIN_M
    if task == "normals":
        return values, values.any(axis=2, keepdims=True)
    return values, np.ones((1, 1, 1) if values.ndim == 3 else (1, 1), bool)
