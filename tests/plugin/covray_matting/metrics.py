"""A further metric of the task."""

from __future__ import annotations

import numpy as np

from covray.tasks.base import Meta, Metric, Picture
from covray_matting.task import read


class Gradient:
    """How well the edges of a matte are met (Rhemann et al. 2009), without their smoothing."""

    task = "matting"
    metric = Metric("matte_gradient", "Gradient", "Mean squared difference of the mattes' gradients.", "lower")

    @staticmethod
    def score(answer: Picture, label: Picture, meta: Meta | None = None) -> float:
        """Return the figure of one answer."""
        differences = np.gradient(read(answer) - read(label))
        return float(sum(np.square(part).mean() for part in differences))
