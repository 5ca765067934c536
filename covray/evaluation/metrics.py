"""Every metric an evaluation knows: those of the tasks, and those of answers that a model wrote."""

from __future__ import annotations

from collections.abc import Iterator

from covray.evaluation.frames import FRAME_METRICS
from covray.evaluation.probes import PROBE_METRICS
from covray.tasks import TASKS
from covray.tasks.base import Metric
from covray.tasks.metrics import metrics_of

OWN, REFERENCE = "perplexity_own", "perplexity_reference"
"""Rows hold the negative log likelihood of the reference answer in nats a token, after the model's own frames and after
the reference's; the exponent of its mean is the perplexity."""
MODEL_METRICS = (
    Metric(
        OWN,
        "Perplexity, own frames",
        "Of the reference answer's tokens, after the frames the model wrote itself.",
        "lower",
    ),
    Metric(
        REFERENCE,
        "Perplexity, reference frames (leak the label)",
        "Of the reference answer's tokens, after the frames of the reference chain. These are computed from the label "
        "and leak it, so that a low value does not show reasoning.",
        "lower",
    ),
    *FRAME_METRICS,
    *PROBE_METRICS,
)


def all_metrics() -> Iterator[Metric]:
    """Yield the metrics of all tasks and of models; one that several tasks share comes several times."""
    for name in TASKS:
        yield from metrics_of(name)
    yield from MODEL_METRICS


def find_metric(name: str) -> Metric | None:
    """Return the metric of that name; None for one that is of no installed task."""
    for metric in all_metrics():
        if metric.name == name:
            return metric
    return None


def lower_is_better() -> list[str]:
    """Return the names of the metrics of which less is better, sorted."""
    # A set, as several tasks have one metric.
    return sorted({metric.name for metric in all_metrics() if metric.better == "lower"})


def short_metric(name: str) -> str:
    """Return what a narrow table calls the metric; its name where no installed task has it."""
    metric = find_metric(name)
    if metric is None:
        return name
    return metric.short or metric.label


def short_task(name: str) -> str:
    """Return what a narrow table calls the task; its name where it is not installed."""
    if name not in TASKS:
        return name
    return TASKS[name].short
