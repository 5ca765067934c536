"""What arms of an experiment say beside each other: differences and gains over the same queries, by several seeds.

An arm is a way to train or to decode. It has scores by seed, task, metric and query. Two arms are compared on the
queries and seeds that both have; intervals resample seeds and queries, so that they say what other trainings on other
queries would give. With one seed they say what other queries would.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from covray.evaluation.metrics import OWN, REFERENCE, lower_is_better
from covray.evaluation.statistics import LEVEL
from covray.tasks import TASKS

RESAMPLES = 2000
_LOGARITHMS = (OWN, REFERENCE)
"""Metrics whose values are logarithms already: nats a token."""

Values = dict[tuple[str, str], dict[int, float]]
"""By task and metric, the value of every query."""


@dataclass(frozen=True)
class ArmScores:
    """The scores of an arm."""

    by_seed: Mapping[int, Values]

    @classmethod
    def of_rows(cls, rows_by_seed: Mapping[int, Iterable[Mapping[str, Any]]]) -> ArmScores:
        """Collect the scores of rows of an evaluation (``RESULT_SCHEMA``), all of one subject, by seed."""
        by_seed: dict[int, Values] = {}
        for seed, rows in rows_by_seed.items():
            values: Values = {}
            for row in rows:
                for entry in row["values"] or ():
                    if entry["value"] is not None:
                        values.setdefault((row["task"], entry["metric"]), {})[row["pair_id"]] = entry["value"]
            by_seed[seed] = values
        return cls(by_seed)

    @property
    def tasks(self) -> list[str]:
        """The tasks that some seed has scores of, in the order of the table."""
        present: set[str] = set()
        for values in self.by_seed.values():
            present.update(task for task, _ in values)
        return [task for task in TASKS if task in present]

    def of_tasks(self, metrics: Mapping[str, str]) -> ArmScores:
        """Return the scores of one metric a task, by task."""
        kept = {}
        for seed, values in self.by_seed.items():
            kept[seed] = {key: queries for key, queries in values.items() if metrics.get(key[0]) == key[1]}
        return ArmScores(kept)

    def mean(self, task: str, metric: str) -> float | None:
        """Return the mean over seeds and queries; None where there is no value."""
        means = []
        for values in self.by_seed.values():
            queries = values.get((task, metric))
            if queries:
                means.append(sum(queries.values()) / len(queries))
        return sum(means) / len(means) if means else None


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval; without bounds where it cannot be resampled."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class TaskDifference:
    """The first arm less the second on one task."""

    task: str
    metric: str
    first: float
    second: float
    difference: Estimate
    better: bool | None
    """Whether the interval says that the first is better (True) or worse (False); None: it holds zero."""


@dataclass(frozen=True)
class Comparison:
    """Two arms beside each other."""

    rows: tuple[TaskDifference, ...]
    gain: Estimate | None
    """How much better the first is, in percent: the geometric mean over tasks of the ratios of means."""
    seeds: int
    queries: int
    """Queries of all tasks."""


@dataclass(frozen=True)
class _Resampled:
    """Means of two arms on one task: as they are, and by resample."""

    first: float
    second: float
    first_drawn: NDArray[np.float64]
    second_drawn: NDArray[np.float64]
    queries: int


def primary_metrics(tasks: Iterable[str]) -> dict[str, str]:
    """Return the first metric of every task."""
    return {task: TASKS[task].metrics[0].name for task in tasks}


def compare(
    first: ArmScores, second: ArmScores, metrics: Mapping[str, str], seed: int = 0, resamples: int = RESAMPLES
) -> Comparison | None:
    """Compare two arms.

    An arm without training has one seed, and stands beside every seed of the other.

    Args:
        first: The arm that may be better.
        second: The arm it is compared with.
        metrics: By task.
        seed: Of the resampling.
        resamples: Bootstrap samples; 0: no intervals.

    Returns:
        The comparison; None where the arms have nothing in common.
    """
    seeds = _common_seeds(first, second)
    generator = np.random.default_rng([seed, len(seeds)])
    drawn_seeds = _counts(generator, len(seeds), resamples)
    lower = lower_is_better()
    rows, logarithms, drawn_logarithms, queries = [], [], [], 0
    for task, metric in metrics.items():
        both = _resampled(first, second, (task, metric), seeds, drawn_seeds, generator)
        if both is None:
            continue
        queries += both.queries
        sign = -1 if metric in lower else 1
        difference = _estimate(both.first - both.second, both.first_drawn - both.second_drawn)
        rows.append(TaskDifference(task, metric, both.first, both.second, difference, _side(difference, sign)))
        ratio = _log_ratio(metric, both.first, both.second)
        if ratio is not None:
            logarithms.append(sign * ratio)
            drawn_logarithms.append(sign * _drawn_ratio(metric, both))
    if not rows:
        return None
    gain = None
    if logarithms:
        mean = _estimate(float(np.mean(logarithms)), np.mean(drawn_logarithms, axis=0))
        gain = Estimate(_percent(mean.value), None, None)
        if mean.low is not None and mean.high is not None:
            gain = Estimate(gain.value, _percent(mean.low), _percent(mean.high))
    return Comparison(tuple(rows), gain, len(seeds), queries)


def rank_correlation(first: Mapping[int, float], second: Mapping[int, float], seed: int = 0) -> Estimate | None:
    """Return Spearman's rank correlation of two figures of the same queries; None where it is undefined.

    Args:
        first: A figure by query.
        second: Another one.
        seed: Of the resampling.
    """
    common = sorted(first.keys() & second.keys())
    ours = np.array([first[query] for query in common])
    theirs = np.array([second[query] for query in common])
    if len(common) < 3 or not np.ptp(ours) or not np.ptp(theirs):
        return None
    generator = np.random.default_rng([seed, 2])
    drawn = []
    for _ in range(RESAMPLES // 4):  # ranks are not cheap
        chosen = generator.integers(len(common), size=len(common))
        if np.ptp(ours[chosen]) and np.ptp(theirs[chosen]):
            drawn.append(spearmanr(ours[chosen], theirs[chosen]).statistic)
    return _estimate(float(spearmanr(ours, theirs).statistic), np.array(drawn))


def joined(parts: Mapping[str, ArmScores]) -> ArmScores:
    """Return the arm that has of every task the scores of one arm: ``parts`` by task."""
    seeds: set[int] = set()
    for part in parts.values():
        seeds.update(part.by_seed)
    by_seed: dict[int, Values] = {}
    for seed in sorted(seeds):
        by_seed[seed] = {}
        for task, part in parts.items():
            for key, queries in part.by_seed.get(seed, {}).items():
                if key[0] == task:
                    by_seed[seed][key] = queries
    return ArmScores(by_seed)


def _common_seeds(first: ArmScores, second: ArmScores) -> list[tuple[int, int]]:
    """Return the pairs of seeds that are compared."""
    ours, theirs = sorted(first.by_seed), sorted(second.by_seed)
    if len(theirs) == 1 and theirs[0] < 0:
        return [(seed, theirs[0]) for seed in ours]
    if len(ours) == 1 and ours[0] < 0:
        return [(ours[0], seed) for seed in theirs]
    return [(seed, seed) for seed in ours if seed in second.by_seed]


def _resampled(
    first: ArmScores,
    second: ArmScores,
    key: tuple[str, str],
    seeds: Sequence[tuple[int, int]],
    drawn_seeds: NDArray[np.float64],
    generator: np.random.Generator,
) -> _Resampled | None:
    """Return the means of two arms by a metric of a task, over the queries that have a value by both and all seeds."""
    columns = [(first.by_seed[ours].get(key, {}), second.by_seed[theirs].get(key, {})) for ours, theirs in seeds]
    if not columns:
        return None
    common = set.intersection(*(ours.keys() & theirs.keys() for ours, theirs in columns))
    if not common:
        return None
    ordered = sorted(common)
    values = np.array([[[column[query] for query in ordered] for column in both] for both in columns])
    counts = _counts(generator, len(ordered), len(drawn_seeds))
    drawn = np.einsum("rq,saq->rsa", counts, values)  # [resamples, seeds, arms]
    means = np.einsum("rs,rsa->ra", drawn_seeds, drawn)
    whole = values.mean(axis=(0, 2))
    return _Resampled(float(whole[0]), float(whole[1]), means[:, 0], means[:, 1], len(ordered))


def _counts(generator: np.random.Generator, size: int, resamples: int) -> NDArray[np.float64]:
    """Return how often each of ``size`` is in every resample, over ``size``, float64 [resamples, size]."""
    if not size:
        return np.empty((resamples, 0))
    chosen = generator.integers(size, size=(resamples, size)) + size * np.arange(resamples)[:, None]
    counts = np.bincount(chosen.ravel(), minlength=resamples * size).reshape(resamples, size)
    return np.asarray(counts / size)


def _log_ratio(metric: str, first: float, second: float) -> float | None:
    if metric in _LOGARITHMS:
        return first - second
    return math.log(first / second) if first > 0 and second > 0 else None


def _drawn_ratio(metric: str, both: _Resampled) -> NDArray[np.float64]:
    """Return ``_log_ratio`` of every resample."""
    if metric in _LOGARITHMS:
        return both.first_drawn - both.second_drawn
    least = 1e-12  # a resample may have nothing right at all
    return np.log(np.maximum(both.first_drawn, least) / np.maximum(both.second_drawn, least))


def _estimate(value: float, drawn: NDArray[np.float64]) -> Estimate:
    if len(drawn) < 2:
        return Estimate(value, None, None)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))


def _side(difference: Estimate, sign: int) -> bool | None:
    if difference.low is None or difference.high is None or difference.low <= 0 <= difference.high:
        return None
    return sign * difference.low > 0


def _percent(nats: float) -> float:
    return 100 * math.expm1(min(nats, 700.0))
