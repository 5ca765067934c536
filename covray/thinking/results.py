"""From verdicts to the table: shares of right answers with intervals, and paired differences over the same episodes."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Sequence

from covray.evaluation.statistics import mean_interval, paired_difference
from covray.thinking.episodes import VALUES
from covray.thinking.records import ReasoningDifference, ReasoningScore
from covray.thinking.rows import AnswerRow, EpisodeRow

SIDES = ("both", "detail", "object", "named", "hidden")
MEAN = "mean"
"""The task that stands for all of them."""
CHANCE = 1 / VALUES**2

_Key = tuple[str, str, int]
"""Row of the table, task and shots."""


def tabulate(
    rows: Sequence[EpisodeRow], names: Sequence[str], aligners: Sequence[str], seed: int
) -> tuple[list[ReasoningScore], list[ReasoningDifference]]:
    """Return scores, and differences of every aligner from every other row.

    Args:
        rows: The rows of an evaluation. Those with an error count as wrong.
        names: The rows of the table.
        aligners: Those of them that are aligners.
        seed: Of the intervals.
    """
    # By row of the table, task and shots; the mean over tasks is a task of its own.
    verdicts = _verdicts(rows, names)
    scores = []
    for (name, task, shots), sides in verdicts.items():
        for side in SIDES:
            mean = mean_interval(sides[side], seed)
            assert mean is not None
            scores.append(ReasoningScore(row=name, task=task, shots=shots, side=side, **vars(mean)))
    differences = []
    for name, task, shots in verdicts:
        if name not in aligners:
            continue
        # Every other row: baselines and the other aligners.
        for other in names:
            if other == name:
                continue
            first, second = verdicts[name, task, shots]["both"], verdicts[other, task, shots]["both"]
            difference = paired_difference(first, second, seed)
            assert difference is not None
            differences.append(
                ReasoningDifference(first=name, second=other, task=task, shots=shots, **vars(difference))
            )
    return scores, differences


def to_csv(scores: Sequence[ReasoningScore]) -> str:
    """Return the scores as a CSV table."""
    text = io.StringIO()
    columns = ("row", "task", "shots", "side", "mean", "low", "high", "episodes")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for score in scores:
        writer.writerow([getattr(score, column) for column in columns])
    return text.getvalue()


def _verdicts(rows: Sequence[EpisodeRow], names: Sequence[str]) -> dict[_Key, dict[str, list[float]]]:
    """Return the verdicts of every row of the table by task and side, in the order of the episodes."""
    verdicts: dict[_Key, dict[str, list[float]]] = {}
    ordered = sorted(rows, key=lambda row: (row.shots, row.task, row.number))
    for name in names:
        for row in ordered:
            answers = {answer.row: answer for answer in row.answers or ()}
            own = answers.get(name)  # None where the episode failed, which counts as wrong
            for task in (row.task, MEAN):
                sides = verdicts.setdefault((name, task, row.shots), defaultdict(list))
                for side in SIDES:
                    sides[side].append(_is_right(own, side))
    return verdicts


def _is_right(answer: AnswerRow | None, side: str) -> float:
    if answer is None:
        return 0.0
    return float(answer.right if side == "both" else getattr(answer, side))
