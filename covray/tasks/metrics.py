"""Metrics of the tasks: those that a task scores itself, and those that other packages add to a task.

A metric of another package is an entry point of the group ``covray.metrics``. It is called ``task/name``, and computed
where an evaluation asks for it (``evaluate.metrics``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from covray.errors import ConfigError
from covray.io.pixels import Picture
from covray.plugins import METRICS_GROUP, Entry, Refused, Registry, require_attributes
from covray.tasks import REGISTRY, TASKS
from covray.tasks.base import Meta, Metric


class TaskMetric(Protocol):
    """What an entry point of ``covray.metrics`` names: a figure of an answer, beside those of its task."""

    task: str
    """The name of the task."""
    metric: Metric
    """Its name and how pages show it; a mean over episodes, so without ``of_set``."""

    def score(self, answer: Picture, label: Picture, meta: Meta | None = None) -> float | None:
        """Return the figure of ``answer`` against ``label``, both uint8 [h, w, 3]: finite, or None if undefined."""


class _OfTask:
    """A metric that its task scores itself."""

    def __init__(self, task: str, metric: Metric):
        self.task, self.metric = task, metric

    def score(self, answer: Picture, label: Picture, meta: Meta | None = None) -> float | None:
        return TASKS[self.task].score(answer, label, meta).values.get(self.metric.name)


def _check(loaded: Any) -> None:
    if isinstance(loaded, _OfTask):
        return
    require_attributes("metric", ("task", "metric", "score"))(loaded)
    if not isinstance(loaded.metric, Metric):
        raise Refused("is no metric: its metric is no covray.tasks.base.Metric")
    if loaded.metric.of_set is not None:
        raise Refused("is no metric of single answers: it has of_set")
    if loaded.task not in TASKS:
        raise Refused(f"is of a task that is not installed, {loaded.task}")
    for task in TASKS.values():  # tables of several tasks have a column for each name
        for metric in task.metrics:
            if metric.name == loaded.metric.name and task.name != loaded.task and metric != loaded.metric:
                raise Refused(f"has the name of another metric, {metric.name} of {task.name}")


def _own_entries() -> Iterable[Entry]:
    """Yield the metrics that the tasks score themselves, each of the package of its task."""
    for plugin in REGISTRY.load_all():
        if plugin.problem:
            continue
        for metric in TASKS[plugin.name].metrics:
            load = functools.partial(_OfTask, plugin.name, metric)
            yield Entry(f"{plugin.name}/{metric.name}", plugin.target, plugin.package, plugin.version, load)


@functools.cache
def metric_registry() -> Registry[TaskMetric]:
    """Return the metrics of all tasks, called ``task/name``."""
    registry = Registry[TaskMetric](
        METRICS_GROUP, "metric", _own_entries(), _check, lambda _, metric: f"{metric.task}/{metric.metric.name}"
    )
    registry.load_all()
    return registry


def is_added(metric: TaskMetric) -> bool:
    """Return whether a metric is one that its task does not score itself."""
    return not isinstance(metric, _OfTask)


def added_metrics() -> list[str]:
    """Return the metrics, called ``task/name``, that other packages add to the tasks."""
    return [name for name, metric in metric_registry().objects.items() if is_added(metric)]


def metrics_of(task: str) -> tuple[Metric, ...]:
    """Return the metrics that an answer of ``task`` may have: the task's own, then those of other packages."""
    added = [each.metric for each in metric_registry().objects.values() if each.task == task and is_added(each)]
    return (*TASKS[task].metrics, *added)


def added_values(
    task: str, chosen: Sequence[str], answer: Picture, label: Picture, meta: Meta | None
) -> dict[str, float | None]:
    """Return the figures of the metrics of other packages.

    Args:
        task: The task of the answer.
        chosen: The metrics to compute, as ``task/name``, also of other tasks.
        answer: uint8 [h, w, 3].
        label: uint8, of the same shape.
        meta: Of the pair's manifest row.

    Raises:
        ConfigError: A metric is not installed, or returned what is no number.
    """
    values: dict[str, float | None] = {}
    for name in chosen:
        if name.partition("/")[0] != task:
            continue
        metric = metric_registry().find(name)
        returned = metric.score(answer, label, meta)
        value: float | None = None
        if returned is not None:
            try:
                value = float(returned)  # what computes with arrays may return a number of NumPy's or torch's
            except (TypeError, ValueError):
                value = math.nan
            if not math.isfinite(value):
                raise ConfigError(f"metrics: {name} returned {returned}; a metric returns a finite number, or None")
        values[metric.metric.name] = value
    return values


def require_added(name: str) -> str:
    """Return ``name`` if it is a metric that another package adds to a task.

    Raises:
        ValueError: It is not; the message lists those that are.
    """
    added = added_metrics()
    if name in added:
        return name
    if name in metric_registry().objects:
        raise ValueError(f"{name} is scored by its task, without being asked for; leave it out")
    known = f"the installed ones are {', '.join(added)}" if added else "no installed package adds any"
    raise ValueError(f"{name}: no such metric of another package; {known} (covray plugins)")
