"""Several sampled answers joined into one, and how much they disagree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from covray.io.pixels import Picture
from covray.tasks import TASKS
from covray.tasks.base import Meta

PLAIN_TASK = "colorization"
"""How answers without a task are handled: resized as photographs are, and joined as pictures."""


def join_answers(task: str | None, answers: Sequence[Picture], meta: Meta | None) -> Picture:
    """Join the answers of one query's candidates into one picture, in the data of their task.

    Args:
        task: Its ``mean`` joins them; None joins them as pictures.
        answers: uint8 [s, s, 3] each; their order does not matter. One answer is returned as it is.
        meta: By which the task reads them.
    """
    if len(answers) == 1:
        return answers[0]
    return TASKS[task or PLAIN_TASK].mean(answers, meta, robust=True)


def draw_spread(answers: Sequence[Picture]) -> Picture:
    """Draw where candidates disagree: grey [s, s, 3], black where all are alike.

    The standard deviation of a pixel over the candidates, as the root mean square of its three channels; white is the
    largest possible one, of which half are 0 and half 255.
    """
    deviation = np.stack(answers).astype(np.float64).std(axis=0)  # [s, s, 3]
    level = np.sqrt((deviation**2).mean(axis=2)) / 127.5
    return np.repeat(np.rint(255 * level).clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
