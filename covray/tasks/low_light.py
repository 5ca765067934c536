"""Low-light enhancement: from a photograph taken in the dark to the photograph; the label is the photograph itself.

The dark photograph is computed by the noise model of an image sensor, in linear light: photons arrive as a Poisson
process whose mean is the light, the read-out adds Gaussian noise, a converter quantises (Janesick, Photon Transfer,
2007; Foi et al., "Practical Poissonian-Gaussian noise modeling and fitting for single-image raw-data", TIP 2008).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from covray.io.pixels import psnr, to_linear, to_srgb
from covray.tasks.base import Lpips, Meta, Metric, Picture, Resample, Score
from covray.tasks.pictures import PSNR, SSIM, mean_colour, read_colour, render_colour, ssim

name = "low_light"
short = "dark"
resample: Resample = "bicubic"
continuous = True
meta_keys: tuple[str, ...] = ()
metrics: tuple[Metric, ...] = (PSNR, SSIM)

EV_RANGE = (2.0, 4.5)
"""Stops of underexposure: a quarter to a twenty-third of the light, the range between dusk and night."""
FULL_WELL_RANGE_E = (1000.0, 8000.0)
"""Electrons at saturation, the analogue gain of a high ISO included: a small sensor at ISO 3200 up to a large one."""
READ_NOISE_RANGE_E = (1.0, 4.0)
"""Standard deviation of the read noise in electrons; 1 to 4 is what CMOS sensors of the last decade have."""
ADC_BITS = 14
"""Bits of the converter; its step is below the read noise, as in a real camera."""


@dataclass(frozen=True)
class Exposure:
    """How dark, and how noisy, a photograph is taken."""

    ev: float
    """Stops below the right exposure: the light is scaled by 2^-ev."""
    full_well_e: float
    """Electrons of a saturated pixel."""
    read_noise_e: float
    """Standard deviation of the read noise, in electrons."""

    @classmethod
    def sample(cls, generator: np.random.Generator) -> Exposure:
        """Sample an exposure: ev and read noise uniform, full well log-uniform in the ranges of this module."""
        low, high = np.log(FULL_WELL_RANGE_E)
        # Drawn in this order, which decides what a seed gives.
        return cls(
            ev=float(generator.uniform(*EV_RANGE)),
            full_well_e=float(np.exp(generator.uniform(low, high))),
            read_noise_e=float(generator.uniform(*READ_NOISE_RANGE_E)),
        )


def render(photo: NDArray[np.floating]) -> Picture:
    """Draw a photograph [h, w, 3] in [0, 1] as a picture [h, w, 3]."""
    return render_colour(photo)


def read(picture: Picture, meta: Meta | None = None) -> NDArray[np.float32]:
    """Read a photograph float32 [h, w, 3] in [0, 1]."""
    return read_colour(picture)


def score(answer: Picture, label: Picture, meta: Meta | None = None, *, lpips: Lpips | None = None) -> Score:
    """Score the pixels of ``answer`` against those of ``label``."""
    return Score({"psnr": psnr(answer, label), "ssim": ssim(answer, label)})


def mean(labels: Iterable[Picture], meta: Meta | None = None, *, robust: bool = False) -> Picture:
    """Return the mean of the pixels."""
    return mean_colour(name, labels)


def export(answer: Picture, meta: Meta | None = None) -> dict[str, bytes]:
    """Return no files: the picture is the answer."""
    return {}


def darken(
    image: NDArray[np.uint8], generator: np.random.Generator, exposure: Exposure | None = None
) -> NDArray[np.uint8]:
    """Return the photograph ``image`` [h, w, 3] as it comes out in the dark.

    The same state of ``generator`` gives the same picture, for one version of numpy, which owns the Poisson sampler.

    Args:
        image: The photograph, uint8 [h, w, 3].
        generator: Where all random numbers come from.
        exposure: How dark and noisy it is; sampled from ``generator`` when not given.
    """
    if exposure is None:
        exposure = Exposure.sample(generator)
    # In linear light: twice the photons are twice the number there, as they are not in sRGB.
    return render(to_srgb(expose(to_linear(image / 255.0), exposure, generator)))


def expose(light: NDArray[np.floating], exposure: Exposure, generator: np.random.Generator) -> NDArray[np.float64]:
    """Return what a sensor reads, on a scale where 1 is saturation.

    The mean is ``light`` x 2^-ev, the variance (electrons + read noise²)/full well² + step²/12. Noise around black
    goes below zero: sensors record it above a pedestal, and cutting it here would brighten the shadows.

    Args:
        light: Linear light in [0, 1] at the right exposure.
        exposure: How dark and noisy it is.
        generator: Where all random numbers come from.
    """
    electrons = generator.poisson(light * 2.0**-exposure.ev * exposure.full_well_e)
    signal_e = electrons + generator.normal(0.0, exposure.read_noise_e, light.shape)
    steps = 2**ADC_BITS - 1
    return np.minimum(np.rint(signal_e / exposure.full_well_e * steps), steps) / steps
