"""Scores of an answer picture against its label, by the metrics of its task."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from covray.tasks import TASKS
from covray.tasks.base import Lpips, Meta, Picture, Score


def score(task: str, answer: Picture, label: Picture, meta: Meta | None = None, lpips: Lpips | None = None) -> Score:
    """Score ``answer`` against ``label``.

    Args:
        task: The name of the task.
        answer: uint8 [h, w, 3].
        label: uint8, of the same shape.
        meta: Of the pair's manifest row; its ``classes`` are the names of a segmentation's classes, by index.
        lpips: Distance of two pictures. Its weights come with no package and are never downloaded, so the caller
            passes the function if it has them.

    Raises:
        ValueError: The task is unknown, or the pictures do not match.
    """
    # Sizes are the caller's to match: a silent resize would change scores.
    if answer.shape != label.shape or (answer.dtype, label.dtype) != (np.uint8, np.uint8):
        raise ValueError(f"answer {answer.dtype} {answer.shape} and label {label.dtype} {label.shape} do not match")
    if task not in TASKS:
        raise ValueError(f"no such task: {task}")
    return TASKS[task].score(answer, label, meta, lpips=lpips)


def aggregate(task: str, scores: Sequence[Score]) -> dict[str, float | None]:
    """Return the metrics of a set that are no mean over its episodes; empty for most tasks.

    None where the set has nothing to score.
    """
    # A rejected episode has no counts.
    counts = [each.counts for each in scores if each.counts is not None]
    figures = {}
    for metric in TASKS[task].metrics:
        if metric.of_set is not None:
            figures[metric.name] = metric.of_set(counts)
    return figures
