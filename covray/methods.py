"""How the frames between two pictures are made: covray's own ways, and those of other packages.

A package adds a way by an entry point of the group ``covray.priors``; its name is that of the method, in
``build.methods`` and everywhere a chain's method is named.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from covray.errors import PairError, one_line
from covray.plugins import PRIORS_GROUP, Refused, Registry, own_entry, require_attributes

NO_FRAMES = "none"
"""The method of chains that have no frames."""
BY_ENGINE = "diffusion"
"""The method that ``covray.models.diffusion.engine`` computes."""
BY_BLOCK = (BY_ENGINE, "copy", "coarse")
"""The methods whose frames follow from more than two pictures and the alphas."""

Frames = NDArray[np.uint8]


class FrameMaker(Protocol):
    """What an entry point of ``covray.priors`` names: an interpolation of its own between two pictures."""

    def frames(self, source: Frames, label: Frames, alphas: Sequence[float]) -> Sequence[Frames]:
        """Return the frames between two pictures, which follow from the arguments alone.

        Args:
            source: The picture at alpha 0, uint8 [h, w, 3].
            label: The picture at alpha 1, of the same shape.
            alphas: Where the frames stand, ascending; often none.

        Returns:
            A frame for each of ``alphas``, uint8 [h, w, 3].
        """


class Linear:
    """Mixes pixels: the paper's baseline."""

    @staticmethod
    def frames(source: Frames, label: Frames, alphas: Sequence[float]) -> list[Frames]:
        """Return a mix for each of ``alphas``."""
        return [mix_pixels(source, label, alpha) for alpha in alphas]


class OfBlock:
    """Holds a name of ``BY_BLOCK``: ``covray.chains.build`` makes these frames for a whole block."""

    frames = None


def mix_pixels(source: Frames, label: Frames, alpha: float) -> Frames:
    """Mix the pixels of two pictures, uint8 [h, w, 3] each, linearly."""
    return np.rint((1 - alpha) * source.astype(np.float64) + alpha * label.astype(np.float64)).astype(np.uint8)


def _name(entry: str, maker: Any) -> str:
    if entry == NO_FRAMES:
        raise Refused(f"has the name of chains without frames, {NO_FRAMES}")
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,39}", entry):  # names of folders are made of it
        raise Refused("has a name of other characters than a-z, 0-9, _ and -")
    return entry


@functools.cache
def frame_makers() -> Registry[FrameMaker]:
    """Return the ways to make frames, which are loaded when they are asked for."""
    own = [
        own_entry("linear", "covray.methods:Linear"),
        *(own_entry(name, "covray.methods:OfBlock") for name in BY_BLOCK),
    ]
    return Registry(PRIORS_GROUP, "method", own, require_attributes("method", ["frames"]), _name)


def make_frames(method: str, source: Frames, label: Frames, alphas: Sequence[float]) -> list[Frames]:
    """Return the frames by ``method``, any but those of ``BY_BLOCK``.

    Raises:
        PairError: ``interpolation``: the plug-in failed, or returned what are no frames.
    """
    maker = frame_makers().find(method)
    try:
        frames = list(maker.frames(source, label, alphas))
    except Exception as error:
        raise PairError("interpolation", f"{method} failed ({one_line(error)})") from error
    if len(frames) != len(alphas):
        raise PairError("interpolation", f"{method} returned {len(frames)} frames, not {len(alphas)}")
    for frame in frames:
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.shape != source.shape:
            raise PairError("interpolation", f"{method} returned a frame that is not uint8 {list(source.shape)}")
    return frames
