"""Quality of the frames a model paints between its query and its answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from covray.io.pixels import Picture, path_ratio, psnr, step_sizes
from covray.tasks.base import Metric

FRAME_METRICS = (
    Metric("frame_psnr", "Frames: PSNR", "Peak signal-to-noise ratio against the reference frames.", "higher", "dB"),
    Metric(
        "frame_path",
        "Frames: path",
        "Way through the frames over the direct way from query to answer; 1 is straight. Neither more nor less of it "
        "is better as such.",
        None,
    ),
    Metric(
        "frame_step_variation",
        "Frames: step variation",
        "How unequal the steps from frame to frame are; 0 when all are alike.",
        "lower",
    ),
)


def frame_figures(
    query: Picture, frames: NDArray[np.uint8], answer: Picture, references: NDArray[np.uint8]
) -> dict[str, float | None]:
    """Measure the frames between a query and an answer.

    - ``frame_psnr``: agreement, the mean over frames of the PSNR in dB against the reference.
    - ``frame_path``: the way from the query through the frames to the answer over the direct way; 1 is a straight line.
    - ``frame_step_variation``: coefficient of variation (standard deviation over mean) of the steps on that way; 0 is
      an even pace.

    The last two are DiffMorpher's path length and perceptual distance variance (Zhang et al., CVPR 2024) with RMS
    differences of pixels in place of LPIPS, divided by what makes them comparable between pairs.

    Args:
        query: uint8 [s, s, 3].
        frames: uint8 [n, s, s, 3], n >= 0.
        answer: uint8 [s, s, 3].
        references: The same pair's frames as the dataset has them, uint8 [n, s, s, 3].

    Returns:
        The figures by name of ``FRAME_METRICS``. None without frames, where query and answer are equal (path) and
        where nothing moves (variation).

    Raises:
        ValueError: The numbers of frames and references differ.
    """
    if len(frames) != len(references):
        raise ValueError(f"{len(frames)} frames and {len(references)} references do not match")
    if not len(frames):
        return dict.fromkeys(metric.name for metric in FRAME_METRICS)

    pictures = [query, *frames, answer]
    steps = step_sizes(pictures)
    variation = None
    # Steps that are all zero have no variation: nothing moves.
    if any(steps):
        variation = float(np.std(steps) / np.mean(steps))
    agreements = [psnr(frame, reference) for frame, reference in zip(frames, references, strict=True)]
    return {
        "frame_psnr": float(np.mean(agreements)),
        "frame_path": path_ratio(pictures),
        "frame_step_variation": variation,
    }


def candidate_figures(reference: NDArray[np.uint8], written: NDArray[np.uint8]) -> dict[str, float | None]:
    """Return the figures of the frames, of a vote the mean over its candidates.

    Args:
        reference: The query and the frames of the dataset's own chain, [1 + frames, s, s, 3].
        written: What a model wrote, [candidates, frames + 1, s, s, 3].
    """
    query, references = reference[0], reference[1:]
    # Every candidate is a chain of its own: frames of different ones are never mixed.
    figures = []
    for candidate in written:
        figures.append(frame_figures(query, candidate[:-1], candidate[-1], references))
    means = {}
    for name in figures[0]:
        means[name] = _mean([each[name] for each in figures])
    return means


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are defined; None where none is."""
    defined = [value for value in values if value is not None]
    if not defined:
        return None
    return sum(defined) / len(defined)
