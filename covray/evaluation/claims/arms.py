"""What arms of an experiment say beside each other: differences and gains over the same queries, by several seeds.

An arm is a way to train or to decode. It has scores by seed, task, metric and query. Two arms are compared on the
queries and seeds that both have; intervals resample seeds and queries, so that they say what other trainings on other
queries would give. With one seed they say what other queries would.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from covray.evaluation.answers import ResultRow
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
    def of_rows(cls, rows_by_seed: Mapping[int, Iterable[ResultRow]]) -> ArmScores:
        """Collect the scores of rows of an evaluation (``RESULT_SCHEMA``), all of one subject, by seed."""
        by_seed: dict[int, Values] = {}
        for seed, rows in rows_by_seed.items():
            values: Values = {}
            # Rejected rows have no values and are left out.
            for row in rows:
                for entry in row["values"] or ():
                    # NaN is undefined, too, as in ``statistics``: a mean with it would read as a significant loss.
                    if entry["value"] is not None and not math.isnan(entry["value"]):
                        values.setdefault((row["task"], entry["metric"]), {})[row["pair_id"]] = entry["value"]
            by_seed[seed] = values
        return cls(by_seed)

    @property
    def tasks(self) -> list[str]:
        """The tasks that some seed has scores of, in the order of the table."""
        present: set[str] = set()
        for values in self.by_seed.values():
            for task, _ in values:
                present.add(task)
        return [task for task in TASKS if task in present]

    def mean(self, task: str, metric: str) -> float | None:
        """Return the mean over seeds and queries; None without values."""
        # Seeds count alike, whatever number of queries each has.
        means = []
        for values in self.by_seed.values():
            queries = values.get((task, metric))
            if queries:
                means.append(sum(queries.values()) / len(queries))
        if not means:
            return None
        return sum(means) / len(means)


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
    """Means of some arms on one task, as they are and by resample."""

    means: NDArray[np.float64]
    """[arms]."""
    drawn: NDArray[np.float64]
    """[resamples, arms]; no resamples where one query of one seed is all there is."""
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
    seeds, lower = _common_seeds((first, second)), lower_is_better()
    rows, logarithms, drawn_logarithms, queries = [], [], [], 0
    for task, metric, both in _by_task((first, second), metrics, seeds, seed, resamples):
        queries += both.queries
        # Turned so that above 0 is better, whatever the metric.
        sign = 1
        if metric in lower:
            sign = -1
        ours, theirs = both.means.tolist()
        difference = _estimate(ours - theirs, both.drawn[:, 0] - both.drawn[:, 1])
        rows.append(TaskDifference(task, metric, ours, theirs, difference, _side(difference, sign)))
        # Metrics that can be negative have differences, but take no part in the gain.
        if _has_ratio(metric, both.means):
            logarithms.append(sign * float(_log_ratio(metric, both.means)))
            drawn_logarithms.append(sign * _log_ratio(metric, both.drawn))
    if not rows:
        return None
    gain = None
    # The mean of logarithms over tasks is the geometric mean of their ratios; so is every resample.
    if logarithms:
        gain = _mean_gain(logarithms, drawn_logarithms)
    return Comparison(tuple(rows), gain, len(seeds), queries)


def compare_gains(
    ours: tuple[ArmScores, ArmScores], theirs: tuple[ArmScores, ArmScores], metrics: Mapping[str, str], seed: int = 0
) -> Comparison | None:
    """Return how much more one pair of arms gains than another pair: the ratio of their gains, in percent.

    Args:
        ours: An arm, and the arm that it gains over.
        theirs: The same elsewhere, such as on another backbone.
        metrics: By task.
        seed: Of the resampling.

    Returns:
        The comparison, without differences by task; None where the arms have nothing in common.
    """
    arms = (*ours, *theirs)
    seeds, lower = _common_seeds(arms), lower_is_better()
    logarithms, drawn_logarithms, queries = [], [], 0
    for _, metric, all_four in _by_task(arms, metrics, seeds, seed, RESAMPLES):
        if _has_ratio(metric, all_four.means):
            sign = 1
            if metric in lower:
                sign = -1
            queries += all_four.queries
            first, second = all_four.means[:2], all_four.means[2:]
            logarithms.append(sign * float(_log_ratio(metric, first) - _log_ratio(metric, second)))
            drawn = _log_ratio(metric, all_four.drawn[:, :2]) - _log_ratio(metric, all_four.drawn[:, 2:])
            drawn_logarithms.append(sign * drawn)
    if not logarithms:
        return None
    return Comparison((), _mean_gain(logarithms, drawn_logarithms), len(seeds), queries)


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
    # Ranks of equal figures, or of two, have no correlation.
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


def _common_seeds(arms: Sequence[ArmScores]) -> list[tuple[int, ...]]:
    """Return the seeds that are compared, one of each arm; an arm without training has the seed -1 alone."""
    is_trained = [set(arm.by_seed) != {-1} for arm in arms]
    trained = [set(arm.by_seed) for arm in itertools.compress(arms, is_trained)]
    common = [-1]
    if trained:
        common = sorted(set.intersection(*trained))
    compared = []
    for seed in common:
        of_arms = []
        for each in is_trained:
            of_arms.append(seed if each else -1)
        compared.append(tuple(of_arms))
    return compared


def _by_task(
    arms: Sequence[ArmScores],
    metrics: Mapping[str, str],
    seeds: Sequence[tuple[int, ...]],
    seed: int,
    resamples: int,
) -> Iterator[tuple[str, str, _Resampled]]:
    """Yield task, metric and the means of ``arms``, over the queries that have a value by all arms and seeds."""
    if not seeds:
        return
    generator = np.random.default_rng([seed, len(seeds)])
    drawn_seeds = _counts(generator, len(seeds), resamples)

    for task, metric in metrics.items():
        # By compared seeds, then by arm: the values of the metric by query.
        columns = []
        for of_arms in seeds:
            by_query_of_arms = []
            for arm, own in zip(arms, of_arms, strict=True):
                by_query_of_arms.append(arm.by_seed[own].get((task, metric), {}))
            columns.append(by_query_of_arms)
        common = set(columns[0][0])
        for column in columns:
            common.intersection_update(*column)
        if not common:
            continue

        ordered = sorted(common)
        # [seeds, arms, queries]
        values = np.empty((len(seeds), len(arms), len(ordered)))
        for number, column in enumerate(columns):
            for arm_number, by_query in enumerate(column):
                values[number, arm_number] = [by_query[query] for query in ordered]
        counts = _counts(generator, len(ordered), resamples)
        # [resamples, arms]; resample r weighs the seeds and, independently, the queries.
        drawn = np.einsum("rs,rsa->ra", drawn_seeds, np.einsum("rq,saq->rsa", counts, values))
        # All resamples of a single value are that value: an interval without width would look significant.
        if len(seeds) * len(ordered) == 1:
            drawn = drawn[:0]
        yield task, metric, _Resampled(values.mean(axis=(0, 2)), drawn, len(ordered))


def _counts(generator: np.random.Generator, size: int, resamples: int) -> NDArray[np.float64]:
    """Return how often each of ``size`` is in every resample, over ``size``, float64 [resamples, size]."""
    if not size:
        return np.empty((resamples, 0))
    # Each resample counts in a range of its own, so that one bincount serves all.
    chosen = generator.integers(size, size=(resamples, size)) + size * np.arange(resamples)[:, None]
    counts = np.bincount(chosen.ravel(), minlength=resamples * size).reshape(resamples, size)
    return np.asarray(counts / size)


def _has_ratio(metric: str, means: NDArray[np.float64]) -> bool:
    """Return whether the means of a metric have ratios: logarithms always, others above 0."""
    return metric in _LOGARITHMS or bool((means > 0).all())


def _log_ratio(metric: str, means: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the logarithm of the first of two means over the second, of ``means`` [..., 2]."""
    if metric not in _LOGARITHMS:
        means = np.log(np.maximum(means, 1e-12))  # a resample may have nothing right at all
    return np.asarray(means[..., 0] - means[..., 1])


def _mean_gain(logarithms: Sequence[float], drawn: Sequence[NDArray[np.float64]]) -> Estimate:
    """Return the mean gain over tasks in percent, of the logarithms of their ratios and of the resampled ones."""
    # A task that cannot be resampled leaves the spread of the mean unknown.
    most = min(map(len, drawn))
    return _in_percent(_estimate(float(np.mean(logarithms)), np.mean([task[:most] for task in drawn], axis=0)))


def _estimate(value: float, drawn: NDArray[np.float64]) -> Estimate:
    # Fewer than two resamples have no quantiles.
    if len(drawn) < 2:
        return Estimate(value, None, None)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))


def _side(difference: Estimate, sign: int) -> bool | None:
    if difference.low is None or difference.high is None or difference.low <= 0 <= difference.high:
        return None
    return sign * difference.low > 0


def _in_percent(nats: Estimate) -> Estimate:
    """Return a gain that is given as the logarithm of a ratio."""
    if nats.low is None or nats.high is None:
        return Estimate(_percent(nats.value), None, None)
    return Estimate(_percent(nats.value), _percent(nats.low), _percent(nats.high))


def _percent(nats: float) -> float:
    # exp of more would overflow.
    return 100 * math.expm1(min(nats, 700.0))
