"""From episodes to the table: means with intervals, differences between subjects, as JSON and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from covray.evaluation.metrics import MODEL_METRICS, OWN, REFERENCE, lower_is_better
from covray.evaluation.scores import aggregate
from covray.evaluation.statistics import mean_interval, paired_difference
from covray.evaluation.subjects import Subject
from covray.tasks import TASKS
from covray.tasks.base import Score

VERSION = 1
Rank = Literal["best", "median", "worst"]
_LOGARITHMS = (OWN, REFERENCE)
_MODELS = ("untuned", "focus", "adapter")


def tabulate(rows: Iterable[Mapping[str, Any]], subjects: Sequence[Subject], seed: int) -> dict[str, Any]:
    """What ``results.json`` says of the rows (``RESULT_SCHEMA``) of an evaluation.

    ``subjects``, ``tasks`` (episodes, metrics, those absent and why), ``scores`` (mean and 95% interval by task,
    subject and metric), ``differences`` of every adapter from the others (paired, primary metric), ``failed`` episodes.
    Does not depend on the order of ``rows``.
    """
    by_task: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        by_task[row["task"]][row["subject"]][row["pair_id"]] = row
    tasks: dict[str, Any] = {}
    scores: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for task in sorted(by_task, key=list(TASKS).index):
        found = by_task[task]
        pairs = sorted({pair_id for episodes in found.values() for pair_id in episodes})
        broken = {pair_id for episodes in found.values() for pair_id, row in episodes.items() if row["error"]}
        of_task = TASKS[task].metrics
        metrics = [metric.name for metric in (*of_task, *MODEL_METRICS)]
        columns = {name: _columns(found[name], pairs) for name in (s.name for s in subjects) if name in found}
        present = {metric.name for metric in of_task if metric.of_set is not None}.union(*columns.values())
        tasks[task] = {
            "episodes": len(pairs),
            "primary": of_task[0].name,
            "metrics": [metric for metric in metrics if metric in present],
            "absent": {
                metric.name: metric.absent for metric in of_task if metric.absent and metric.name not in present
            },
            "rejected": len(broken),
        }
        for name, values in columns.items():
            scores += _scores(task, name, found[name], pairs, values, metrics, seed)
        differences += _differences(task, subjects, columns, seed)
        for name, episodes in found.items():
            failed += [
                {"task": task, "subject": name, "pair_id": pair_id, "error": row["error"]}
                for pair_id, row in sorted(episodes.items())
                if row["error"]
            ]
    return {
        "version": VERSION,
        "subjects": [subject.as_json() for subject in subjects],
        "tasks": tasks,
        "lower_is_better": lower_is_better(),
        "scores": scores,
        "differences": differences,
        "failed": failed,
    }


def to_csv(results: Mapping[str, Any]) -> str:
    """``scores`` of ``tabulate`` as CSV, a line a score."""
    lines = io.StringIO()
    writer = csv.DictWriter(
        lines, ["task", "subject", "metric", "mean", "low", "high", "episodes"], lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(results["scores"])
    return lines.getvalue()


def choose_episodes(rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> dict[str, dict[Rank, int]]:
    """The pair of the best, the median and the worst episode of every task, to be looked at.

    By the primary metric of the first adapter, where there is none of the first subject that is a model, or at all.
    """
    kinds = {subject["name"]: subject["kind"] for subject in results["subjects"]}
    chosen: dict[str, dict[Rank, int]] = {}
    for task, about in results["tasks"].items():
        valued = defaultdict(list)
        for row in rows:
            value = None if row["task"] != task or row["error"] else _value(row, about["primary"])
            if value is not None:
                valued[row["subject"]].append((value, row["pair_id"]))
        order = sorted(
            valued, key=lambda name: (kinds[name] != "adapter", kinds[name] not in _MODELS, list(kinds).index(name))
        )
        if order:
            lower = about["primary"] in results["lower_is_better"]
            ranked = sorted(valued[order[0]], reverse=not lower)
            places: dict[Rank, int] = {"best": 0, "median": (len(ranked) - 1) // 2, "worst": len(ranked) - 1}
            chosen[task] = {rank: ranked[place][1] for rank, place in places.items()}
    return chosen


def _columns(episodes: Mapping[int, Mapping[str, Any]], pairs: Sequence[int]) -> dict[str, list[float | None]]:
    """The values of one subject by metric, one for each of ``pairs``; None where undefined or failed."""
    columns: dict[str, list[float | None]] = {}
    for place, pair_id in enumerate(pairs):
        for entry in episodes.get(pair_id, {}).get("values") or ():
            columns.setdefault(entry["metric"], [None] * len(pairs))[place] = entry["value"]
    return columns


def _scores(
    task: str,
    subject: str,
    episodes: Mapping[int, Mapping[str, Any]],
    pairs: Sequence[int],
    columns: Mapping[str, list[float | None]],
    metrics: Sequence[str],
    seed: int,
) -> list[dict[str, Any]]:
    counted = [Score({}, np.array(row["counts"])) for _, row in sorted(episodes.items()) if row["counts"] is not None]
    of_set = aggregate(task, counted)
    found: list[dict[str, Any]] = []
    for metric in metrics:
        key = {"task": task, "subject": subject, "metric": metric}
        if metric in of_set:
            found.append(key | {"mean": of_set[metric], "low": None, "high": None, "episodes": len(counted)})
        elif metric in columns:
            mean = mean_interval(columns[metric], seed)
            figures = {"mean": None, "low": None, "high": None, "episodes": 0} if mean is None else vars(mean)
            if metric in _LOGARITHMS:
                figures = {name: _exp(value) if name != "episodes" else value for name, value in figures.items()}
            found.append(key | figures)
    return found


def _differences(
    task: str, subjects: Sequence[Subject], columns: Mapping[str, Mapping[str, list[float | None]]], seed: int
) -> list[dict[str, Any]]:
    """Every adapter against all who stand before it, but not against the ceiling."""
    metric = TASKS[task].metrics[0].name
    names = [
        subject.name for subject in subjects if subject.kind != "ceiling" and metric in columns.get(subject.name, {})
    ]
    found = []
    for first in (subject.name for subject in subjects if subject.kind == "adapter" and subject.name in names):
        for second in names[: names.index(first)]:
            difference = paired_difference(columns[first][metric], columns[second][metric], seed)
            if difference is not None:
                key = {"task": task, "metric": metric, "first": first, "second": second}
                found.append(key | vars(difference))
    return found


def _value(row: Mapping[str, Any], metric: str) -> float | None:
    return next((entry["value"] for entry in row["values"] or () if entry["metric"] == metric), None)


def _exp(value: float | None) -> float | None:
    return None if value is None else math.exp(value)
