"""The table of the programme: accuracies with intervals, paired with ThinkDiff-LVLM over the same episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from covray.evaluation.statistics import Difference, Mean, mean_interval, paired_difference
from covray.io.records import RecordPart
from covray.recipes.thinking.rows import RowVerdicts
from covray.thinking.cells import is_held_out
from covray.thinking.episodes import Episode

CHANCE = 0.01
SIGNIFICANT = 0.01

Verdicts = Sequence[RowVerdicts]
"""A row's verdicts, one for each seed."""


class RowScores(RecordPart):
    """A row of the table: shares of right answers, the mean over seeds."""

    right: Mean
    right_by_seed: list[float]
    named: float
    hidden: float
    seen: Mean | None
    """Over episodes whose answer is a cell that trainings have seen."""
    held_out: Mean | None
    """Over the other episodes; a small budget may ask for none."""
    by_task: dict[str, float]
    seconds: float
    """Of answering and judging."""
    below_reference: Difference | None = None
    """The reference less this row; absent in the reference."""
    tasks_below_reference: int | None = None
    """In how many tasks the reference is significantly better; absent in the reference."""
    decoded_text: Mean | None = None
    """Of an aligner: of what the frozen decoder writes for its features; absent in other rows."""


class ShotTable(RecordPart):
    """The rows of a number of shots."""

    chance: float
    rows: dict[str, RowScores]


def table_of(
    rows: Mapping[int, Mapping[str, Verdicts]],
    proxies: Mapping[int, Mapping[str, Verdicts]],
    episodes: Mapping[int, Sequence[Episode]],
    reference: str,
) -> dict[str, ShotTable]:
    """Return the tables, by shots as ``2 shots``.

    An episode's score in a row is its mean over the row's seeds.

    Args:
        rows: By shots and name.
        proxies: Of aligners, the verdicts on what the frozen decoder writes, by shots and name.
        episodes: By shots.
        reference: The row that others are compared with.
    """
    tables = {}
    for shots, by_name in rows.items():
        compared = _scores(by_name[reference], "right")
        results = {}
        for name, verdicts in by_name.items():
            row = _row(verdicts, episodes[shots])
            if name != reference:
                row = _compared(row, compared, _scores(verdicts, "right"), episodes[shots])
            if name in proxies[shots]:
                decoded = mean_interval(_scores(proxies[shots][name], "right"))
                row = row.model_copy(update={"decoded_text": decoded})
            results[name] = row
        tables[f"{shots} shots"] = ShotTable(chance=CHANCE, rows=results)
    return tables


def _row(verdicts: Verdicts, episodes: Sequence[Episode]) -> RowScores:
    scores = _scores(verdicts, "right")
    # Seen and held-out cells apart; a small budget may ask for no held-out one, and its mean is None.
    unseen = np.array([is_held_out(episode.task.theme, episode.answer) for episode in episodes])
    by_task = {}
    for task, places in _tasks(episodes).items():
        by_task[task] = round(float(scores[places].mean()), 4)
    right = mean_interval(scores)
    assert right is not None
    return RowScores(
        right=right,
        right_by_seed=[round(float(np.mean(own.right)), 4) for own in verdicts],
        named=round(float(_scores(verdicts, "named").mean()), 4),
        hidden=round(float(_scores(verdicts, "hidden").mean()), 4),
        seen=mean_interval(scores[~unseen]),
        held_out=mean_interval(scores[unseen]),
        by_task=by_task,
        seconds=round(float(np.mean([own.seconds for own in verdicts])), 1),
    )


def _compared(
    row: RowScores, compared: NDArray[np.float64], scores: NDArray[np.float64], episodes: Sequence[Episode]
) -> RowScores:
    """Return the row with the difference of the reference from it, over all episodes and by task at p < 0.01.

    Args:
        row: The row.
        compared: The reference's scores, [episodes].
        scores: The row's own, [episodes].
        episodes: The episodes.
    """
    better = 0
    for places in _tasks(episodes).values():
        own = paired_difference(compared[places], scores[places])
        if own is not None and own.mean > 0 and own.p_value < SIGNIFICANT:
            better += 1
    whole = paired_difference(compared, scores)
    return row.model_copy(update={"below_reference": whole, "tasks_below_reference": better})


def _scores(verdicts: Verdicts, key: str) -> NDArray[np.float64]:
    """Return the mean over seeds for each episode, [episodes]."""
    # Seeds of one episode are no independent episodes: counted singly they would narrow the intervals.
    return np.mean([getattr(own, key) for own in verdicts], axis=0, dtype=np.float64)


def _tasks(episodes: Sequence[Episode]) -> dict[str, list[int]]:
    """Return the places of each task's episodes."""
    places: dict[str, list[int]] = {}
    for place, episode in enumerate(episodes):
        places.setdefault(episode.task.name, []).append(place)
    return places
