"""Metrics as pages write them: heads of columns, titles of axes, and the glossary."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from covray.evaluation.metrics import find_metric
from covray.report.formatting import readable
from covray.tasks.base import Metric


@dataclass(frozen=True)
class MetricHead:
    """A metric as the head of a column."""

    label: str
    """With the unit, if any."""
    about: str
    """Its definition, one sentence."""
    arrow: str
    """Points up where more is better, down where less is, and is empty where neither is."""


def metric_of(name: str) -> Metric:
    """Return the metric of this name in ``results.json``; one that no installed task has is shown under its name."""
    return find_metric(name) or Metric(name, readable(name), "", "higher")


def metric_head(name: str, lower_is_better: Collection[str]) -> MetricHead:
    """Return the head of a metric's column; ``lower_is_better`` names the metrics of which less is better."""
    metric = metric_of(name)
    arrow = ""
    # Without better or worse (a rate, for instance) there is no arrow.
    if metric.better is not None:
        arrow = "↑"
        if name in lower_is_better:
            arrow = "↓"
    return MetricHead(metric.with_unit, metric.about, arrow)


def axis_title(name: str, lower_is_better: Collection[str]) -> str:
    """Return the metric with its unit, and in words which way is better."""
    metric = metric_of(name)
    if metric.better is None:
        return metric.with_unit
    better = "more"
    if name in lower_is_better:
        better = "less"
    return f"{metric.with_unit} ({better} is better)"


def glossary(metrics: Iterable[Iterable[str]]) -> list[MetricHead]:
    """Return the metrics of all tasks, each once, in their order."""
    # A dict serves as an ordered set: tasks share metrics, and the page explains each once.
    names: dict[str, None] = {}
    for of_task in metrics:
        names.update(dict.fromkeys(of_task))
    return [metric_head(name, ()) for name in names]
