"""The table of the programme: accuracies with intervals, paired with ThinkDiff-LVLM over the same episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covray.evaluation.statistics import mean_interval, paired_difference
from covray.thinking.cells import is_held_out
from covray.thinking.episodes import Episode

CHANCE = 0.01
SIGNIFICANT = 0.01

Verdicts = Sequence[Mapping[str, Any]]
"""A row's verdicts, one for each seed."""


def table_of(
    rows: Mapping[int, Mapping[str, Verdicts]],
    proxies: Mapping[int, Mapping[str, Verdicts]],
    episodes: Mapping[int, Sequence[Episode]],
    reference: str,
) -> dict[str, Any]:
    """Return the table, by shots and row.

    An episode's score in a row is its mean over the row's seeds.

    Args:
        rows: By shots and name.
        proxies: Of aligners, the verdicts on what the frozen decoder writes, by shots and name.
        episodes: By shots.
        reference: The row that others are compared with.
    """
    table: dict[str, Any] = {}
    for shots, by_name in rows.items():
        compared = _scores(by_name[reference], "right")
        results = {}
        for name, verdicts in by_name.items():
            results[name] = _row(verdicts, episodes[shots])
            if name != reference:
                results[name] |= _differences(compared, _scores(verdicts, "right"), episodes[shots])
            if name in proxies[shots]:
                results[name]["decoded_text"] = _mean(_scores(proxies[shots][name], "right"))
        table[f"{shots} shots"] = {"chance": CHANCE, "rows": results}
    return table


def _row(verdicts: Verdicts, episodes: Sequence[Episode]) -> dict[str, Any]:
    scores = _scores(verdicts, "right")
    # Seen and held-out cells apart; a small budget may ask for no held-out one, and its mean is None.
    unseen = np.array([is_held_out(episode.task.theme, episode.answer) for episode in episodes])
    by_task = {}
    for task, places in _tasks(episodes).items():
        by_task[task] = round(float(scores[places].mean()), 4)
    return {
        "right": _mean(scores),
        "right_by_seed": [round(float(np.mean(own["right"])), 4) for own in verdicts],
        "named": round(float(_scores(verdicts, "named").mean()), 4),
        "hidden": round(float(_scores(verdicts, "hidden").mean()), 4),
        "seen": _mean(scores[~unseen]),
        "held_out": _mean(scores[unseen]),
        "by_task": by_task,
        "seconds": round(float(np.mean([own["seconds"] for own in verdicts])), 1),
    }


def _differences(
    compared: NDArray[np.float64], scores: NDArray[np.float64], episodes: Sequence[Episode]
) -> dict[str, Any]:
    """Return the difference of the compared row from this one, and in how many tasks it is better at p < 0.01."""
    whole = paired_difference(compared, scores)
    better = 0
    for places in _tasks(episodes).values():
        own = paired_difference(compared[places], scores[places])
        if own is not None and own.mean > 0 and own.p_value < SIGNIFICANT:
            better += 1
    return {"below_reference": None if whole is None else asdict(whole), "tasks_below_reference": better}


def _scores(verdicts: Verdicts, key: str) -> NDArray[np.float64]:
    """Return the mean over seeds for each episode, [episodes]."""
    # Seeds of one episode are no independent episodes: counted singly they would narrow the intervals.
    return np.mean([own[key] for own in verdicts], axis=0, dtype=np.float64)


def _mean(scores: NDArray[np.float64]) -> dict[str, Any] | None:
    mean = mean_interval(scores)
    return None if mean is None else asdict(mean)


def _tasks(episodes: Sequence[Episode]) -> dict[str, list[int]]:
    """Return the places of each task's episodes."""
    places: dict[str, list[int]] = {}
    for place, episode in enumerate(episodes):
        places.setdefault(episode.task.name, []).append(place)
    return places
