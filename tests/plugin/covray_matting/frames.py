"""An interpolation: the label is uncovered from left to right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from covray.methods import Frames


class Wipe:
    """Shows the label up to a column, and the picture beyond it."""

    @staticmethod
    def frames(source: Frames, label: Frames, alphas: Sequence[float]) -> list[Frames]:
        """Return a frame for each of ``alphas``."""
        columns = np.arange(source.shape[1])
        frames = []
        for alpha in alphas:
            shown = (columns < alpha * source.shape[1])[None, :, None]
            frames.append(np.where(shown, label, source))
        return frames
