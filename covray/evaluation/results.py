"""From episodes to the table: means with intervals, differences between subjects, as a record and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from covray.evaluation.answers import ResultRow
from covray.evaluation.lengths import best_lengths
from covray.evaluation.metrics import MODEL_METRICS, OWN, REFERENCE, lower_is_better
from covray.evaluation.records import (
    Difference,
    EvaluationTable,
    FailedEpisode,
    SubjectEntry,
    SubjectScore,
    TaskSummary,
)
from covray.evaluation.scores import aggregate
from covray.evaluation.statistics import mean_interval, paired_difference, perplexity
from covray.evaluation.subjects import Subject
from covray.tasks import TASKS, table_order
from covray.tasks.base import Score
from covray.tasks.metrics import metrics_of

Rank = Literal["best", "median", "worst"]
_LOGARITHMS = (OWN, REFERENCE)
_MODELS = ("untuned", "focus", "adapter")


@dataclass(frozen=True)
class _SubjectRows:
    """The rows of one subject and one task, and their values as columns over all pairs of the task."""

    name: str
    rows: dict[int, ResultRow]
    """By pair, sorted."""
    columns: dict[str, list[float | None]]
    """By metric, one value a pair of the task; None where it is undefined or the episode failed."""


class _Figures(NamedTuple):
    """The figures of a score."""

    mean: float | None
    low: float | None
    """The lower end of the interval."""
    high: float | None
    """The upper end of the interval."""
    episodes: int


def tabulate(rows: Iterable[ResultRow], subjects: Sequence[Subject], seed: int) -> EvaluationTable:
    """Make the table of an evaluation.

    Args:
        rows: One an episode, in any order, on which the table does not depend.
        subjects: Everyone that was evaluated, in the order of the table.
        seed: Of the bootstrap and of the sign-flip test.
    """
    # By task, subject and pair: an episode is unique by these, so that the order of rows does not matter.
    by_task: dict[str, dict[str, dict[int, ResultRow]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], {}).setdefault(row["subject"], {})[row["pair_id"]] = row
    tasks: dict[str, TaskSummary] = {}
    scores: list[SubjectScore] = []
    differences: list[Difference] = []
    failed: list[FailedEpisode] = []
    # In the order of the tasks' registry, which is that of every table.
    for task in sorted(by_task, key=table_order):
        table = _gather(by_task[task], subjects)
        tasks[task] = _summary(task, by_task[task], table)
        for subject in table:
            scores += _scores(task, subject, seed)
        differences += _differences(task, subjects, table, seed)
        for name, episodes in by_task[task].items():
            failed += _failed(task, name, episodes)

    entries = [SubjectEntry.of(subject) for subject in subjects]
    whole = EvaluationTable(
        subjects=tuple(entries),
        tasks=tasks,
        lower_is_better=tuple(lower_is_better()),
        scores=tuple(scores),
        differences=tuple(differences),
        failed=tuple(failed),
    )
    lengths = best_lengths(entries, scores, tasks, whole.lower_is_better)
    if not lengths:
        # Absent, not empty, so that results of one length stay as they were.
        return whole
    return whole.model_copy(update={"best_lengths": lengths})


def to_csv(table: EvaluationTable) -> str:
    """Return the scores as CSV, a line a score."""
    lines = io.StringIO()
    columns = ["task", "subject", "metric", "mean", "low", "high", "episodes"]
    writer = csv.DictWriter(lines, columns, lineterminator="\n")
    writer.writeheader()
    for score in table.scores:
        writer.writerow({column: getattr(score, column) for column in columns})
    return lines.getvalue()


def choose_episodes(rows: Sequence[ResultRow], table: EvaluationTable) -> dict[str, dict[Rank, int]]:
    """Choose the pair of the best, the median and the worst episode of every task, to be looked at.

    They are ranked by the primary metric of the first adapter; where there is none, of the first subject that is a
    model, else of the first subject.
    """
    names, kinds = [], {}
    for subject in table.subjects:
        names.append(subject.name)
        kinds[subject.name] = subject.kind

    def rank(name: str) -> tuple[bool, bool, int]:
        """Order subjects: adapters first, then other models, then the rest, each as in the table."""
        return kinds[name] != "adapter", kinds[name] not in _MODELS, names.index(name)

    chosen: dict[str, dict[Rank, int]] = {}
    for task, about in table.tasks.items():
        valued: dict[str, list[tuple[float, int]]] = {}
        for row in rows:
            # A failed answer has no score to rank it by.
            if row["task"] != task or row["error"]:
                continue
            value = _value(row, about.primary)
            if value is not None:
                valued.setdefault(row["subject"], []).append((value, row["pair_id"]))
        # Of an even number of episodes the median is the lower one: it must be an episode that can be looked at.
        # Of several subjects the first by `rank` decides, so that all of them are shown on the same pairs.
        if valued:
            ranked = sorted(valued[min(valued, key=rank)], reverse=about.primary not in table.lower_is_better)
            chosen[task] = {
                "best": ranked[0][1],
                "median": ranked[(len(ranked) - 1) // 2][1],
                "worst": ranked[-1][1],
            }
    return chosen


def _gather(by_subject: Mapping[str, dict[int, ResultRow]], subjects: Sequence[Subject]) -> list[_SubjectRows]:
    """Return the rows of one task by subject, in the order of the table."""
    pair_ids = sorted(set().union(*by_subject.values()))  # of all subjects, so that columns are of one length
    table = []
    for subject in subjects:
        if subject.name in by_subject:
            rows = dict(sorted(by_subject[subject.name].items()))
            table.append(_SubjectRows(subject.name, rows, _columns(rows, pair_ids)))
    return table


def _columns(rows: Mapping[int, ResultRow], pair_ids: Sequence[int]) -> dict[str, list[float | None]]:
    """Return the values of one subject by metric, one for each of ``pair_ids``."""
    columns: dict[str, list[float | None]] = {}
    for index, pair_id in enumerate(pair_ids):
        # A rejected episode has no values; its place stays None.
        for entry in rows.get(pair_id, {}).get("values") or ():
            columns.setdefault(entry["metric"], [None] * len(pair_ids))[index] = entry["value"]
    return columns


def _summary(task: str, by_subject: Mapping[str, dict[int, ResultRow]], table: Sequence[_SubjectRows]) -> TaskSummary:
    """Return what was measured of one task.

    Args:
        task: Its name.
        by_subject: All its rows.
        table: The same rows, of the subjects of the table.
    """
    metrics = metrics_of(task)
    # Metrics of the whole set have no column of their own.
    present = {metric.name for metric in metrics if metric.of_set is not None}
    for subject in table:
        present.update(subject.columns)
    pair_ids: set[int] = set()
    rejected: set[int] = set()
    for rows in by_subject.values():
        pair_ids.update(rows)
        # A pair is rejected where any subject failed on it.
        for pair_id, row in rows.items():
            if row["error"]:
                rejected.add(pair_id)

    measured = []
    for metric in (*metrics, *MODEL_METRICS):
        if metric.name in present:
            measured.append(metric.name)
    # A metric that cannot be computed here brings its reason.
    absent = {}
    for metric in metrics:
        if metric.absent and metric.name not in present:
            absent[metric.name] = metric.absent
    return TaskSummary(
        episodes=len(pair_ids),
        primary=metrics[0].name,
        metrics=tuple(measured),
        absent=absent,
        rejected=len(rejected),
    )


def _scores(task: str, subject: _SubjectRows, seed: int) -> list[SubjectScore]:
    """Return the means of one subject in the order of the metrics; without those that no episode has."""
    # Some metrics, as mIoU, are of the counts of all episodes together, and have no interval.
    counted = []
    for row in subject.rows.values():
        if row["counts"] is not None:
            counted.append(Score({}, np.array(row["counts"])))
    of_set = aggregate(task, counted)
    scores = []
    for metric in (*metrics_of(task), *MODEL_METRICS):
        name = metric.name
        if name in of_set:
            figures = _Figures(of_set[name], None, None, len(counted))
        elif name in subject.columns:
            figures = _interval(subject.columns[name], seed, exponent=name in _LOGARITHMS)
        else:
            continue
        scores.append(SubjectScore(task=task, subject=subject.name, metric=name, **figures._asdict()))
    return scores


def _interval(values: Sequence[float | None], seed: int, *, exponent: bool) -> _Figures:
    """Return the figures of a score.

    Args:
        values: One an episode; None where it has no such score.
        seed: Of the bootstrap.
        exponent: The values are logarithms: mean and bounds are returned as their exponents, a geometric mean.
    """
    found = mean_interval(values, seed)
    if found is None:
        return _Figures(None, None, None, 0)
    mean, low, high = found.mean, found.low, found.high
    if exponent:
        # The mean of logarithms is that of a geometric mean; its bounds are logarithms, too.
        mean, low, high = perplexity(mean), _exp(low), _exp(high)
    return _Figures(mean, low, high, found.episodes)


def _differences(task: str, subjects: Sequence[Subject], table: Sequence[_SubjectRows], seed: int) -> list[Difference]:
    """Compare every adapter with all subjects that stand before it, but for the ceiling, by the primary metric.

    Args:
        task: Its name.
        subjects: In the order of the table.
        table: The rows of the task.
        seed: Of bootstrap and test.
    """
    metric = TASKS[task].metrics[0].name
    kinds = {subject.name: subject.kind for subject in subjects}
    compared = []
    for row in table:
        if kinds[row.name] != "ceiling" and metric in row.columns:
            compared.append(row)
    differences = []
    for index, first in enumerate(compared):
        if kinds[first.name] != "adapter":
            continue
        # All that stands before it in the table: baselines, untuned backbones, and the adapters named earlier.
        for second in compared[:index]:
            difference = paired_difference(first.columns[metric], second.columns[metric], seed)
            if difference is not None:
                differences.append(
                    Difference(task=task, metric=metric, first=first.name, second=second.name, **vars(difference))
                )
    return differences


def _failed(task: str, subject: str, episodes: Mapping[int, ResultRow]) -> list[FailedEpisode]:
    """Return the episodes of one subject that have no scores, by pair."""
    failed = []
    for pair_id, row in sorted(episodes.items()):
        if row["error"]:
            failed.append(FailedEpisode(task=task, subject=subject, pair_id=pair_id, error=row["error"]))
    return failed


def _value(row: ResultRow, metric: str) -> float | None:
    for entry in row["values"] or ():
        if entry["metric"] == metric:
            return entry["value"]
    return None


def _exp(value: float | None) -> float | None:
    if value is None:
        return None
    return perplexity(value)
