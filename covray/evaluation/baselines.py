"""Answers that need no model, to compare with.

The query itself needs no code, and the mean label is ``mean`` of the task.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray
from skimage.filters import gaussian
from skimage.transform import resize

from covray.tasks.base import Picture

SALIENCY_SIDE_PX = 64
"""At which size a picture is looked at for what stands out (Hou & Zhang 2007)."""
SALIENCY_SIGMA_PX = 2.5
"""Smoothing of the map at that size, as in the code Hou & Zhang published."""


def nearest_label(query: Picture, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Picture:
    """Return the label of the example whose image is nearest to ``query`` by mean squared error.

    Args:
        query: uint8 [h, w, 3].
        images: Of the task's examples, uint8 [n, h, w, 3], n >= 1; of equally near ones the first wins.
        labels: Of the same examples, uint8 [n, h, w, 3].
    """
    # float32, as the difference of two bytes would overflow.
    errors = [np.mean((image.astype(np.float32) - query) ** 2) for image in images]
    return labels[int(np.argmin(errors))]


def saliency(picture: Picture) -> Picture:
    """Return a grey map [h, w, 3] of what stands out of ``picture`` uint8 [h, w, 3]: 255 where it does most.

    It is the intermediate frame of the baseline Chain-of-Focus (Zheng et al., ICLR 2025), whose abstract says that
    frames are made "through visual saliency" and not how. This is the spectral residual of Hou & Zhang (CVPR 2007),
    which needs no weights: amplitudes of the grey picture's spectrum over their geometric mean with their neighbours',
    phases kept. The map of a picture of one grey is black.
    """
    height, width = picture.shape[:2]
    scale = SALIENCY_SIDE_PX / max(height, width)
    side = (max(1, round(height * scale)), max(1, round(width * scale)))  # at least a pixel of a narrow picture
    small = resize(picture.mean(axis=2), side, anti_aliasing=scale < 1)
    if np.ptp(small) < 1:  # less than a byte can show: only rounding would stand out
        return np.zeros_like(picture)
    spectrum = np.fft.fft2(small)
    amplitude = np.abs(spectrum)
    logarithm = np.log(np.maximum(amplitude, 1e-8 * amplitude.max()))  # relative, so that brightness does not matter
    # The geometric mean of 3 x 3 neighbours is the mean of their logarithms; the spectrum wraps around.
    neighbours = [np.roll(logarithm, shift, (0, 1)) for shift in product((-1, 0, 1), repeat=2)]
    around = np.mean(neighbours, axis=0)
    # What is left of the amplitude is the residual; with the phases it goes back to a picture.
    energy = np.abs(np.fft.ifft2(spectrum / np.exp(around))) ** 2
    smooth = resize(gaussian(energy, SALIENCY_SIGMA_PX), (height, width))
    levels = np.rint(255 * (smooth - smooth.min()) / np.ptp(smooth)).astype(np.uint8)
    return np.repeat(levels[..., None], 3, axis=2)
