"""Counters and gauges of commands on Ray's metrics ports, from where Prometheus takes them.

Ray exports a counter ``name`` as ``ray_name_total``, a gauge as ``ray_name`` and a histogram as ``ray_name_bucket``,
``_sum`` and ``_count``, a few seconds later. ``cluster/grafana/covray.json`` shows them.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from typing import Any, Literal

OUTPUT = "output"
"""The label that every metric of a folder has: the folder's name."""
_SECONDS = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0]


@dataclass(frozen=True)
class MetricKind:
    """A metric, as Prometheus knows it but for Ray's prefix and endings."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    about: str
    labels: tuple[str, ...]

    @property
    def exported(self) -> tuple[str, ...]:
        """Return the names under which Ray exports the metric."""
        if self.kind == "counter":
            return (f"ray_{self.name}_total",)
        if self.kind == "gauge":
            return (f"ray_{self.name}",)
        return tuple(f"ray_{self.name}_{ending}" for ending in ("bucket", "sum", "count"))


_TASK = (OUTPUT, "task", "status")
PAIRS = MetricKind("counter", "covray_pairs", "Pairs that a build computed; status: written or rejected.", _TASK)
DATASET_PAIRS = MetricKind(
    "gauge", "covray_dataset_pairs", "Pairs of a finished dataset, as its audit counts them.", _TASK
)
UNET_EVALUATIONS = MetricKind(
    "counter", "covray_unet_evaluations", "Forward passes of the UNet, counted by picture.", (OUTPUT,)
)
EPISODES = MetricKind(
    "counter", "covray_episodes", "Episodes that an evaluation computed; status: written or rejected.", _TASK
)
BUSY_SECONDS = MetricKind(
    "counter", "covray_actor_busy_seconds", "Seconds that the actors of a pool spent computing.", (OUTPUT,)
)
ACTORS = MetricKind("gauge", "covray_actors", "Actors of a pool that have loaded their models.", (OUTPUT,))
TOKENS = MetricKind("counter", "covray_train_tokens", "Tokens of the steps of a training.", (OUTPUT,))
STEP = MetricKind("gauge", "covray_train_step", "The last step of a training.", (OUTPUT,))
LOSS = MetricKind("gauge", "covray_train_loss", "Loss of the last step, in nats a token.", (OUTPUT,))
VALIDATION_LOSS = MetricKind("gauge", "covray_train_validation_loss", "Loss of the last validation.", (OUTPUT,))
REQUESTS = MetricKind("counter", "covray_serve_requests", "Requests of answers, by HTTP status.", ("status",))
LATENCY = MetricKind(
    "histogram", "covray_serve_latency_seconds", "Seconds from a request to its answer's end.", ("status",)
)
METRICS = (
    PAIRS, DATASET_PAIRS, UNET_EVALUATIONS, EPISODES, BUSY_SECONDS, ACTORS,
    TOKENS, STEP, LOSS, VALIDATION_LOSS, REQUESTS, LATENCY,
)  # fmt: skip


class Recorder:
    """Records the metrics of one process, which must be part of a Ray."""

    def __init__(self, out: str | None = None):
        """Record for the folder ``out`` of a command, if it has one."""
        self._output: dict[str, str] = {}
        if out is not None:
            self._output[OUTPUT] = posixpath.basename(out.rstrip("/"))
        self._metrics: dict[str, Any] = {}

    def add(self, kind: MetricKind, amount: float, **labels: str) -> None:
        """Add to a counter; Ray takes no zero."""
        if amount > 0:
            self._of(kind).inc(amount, self._output | labels)

    def set(self, kind: MetricKind, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._of(kind).set(value, self._output | labels)

    def observe(self, kind: MetricKind, value: float, **labels: str) -> None:
        """Add a value to a histogram."""
        self._of(kind).observe(value, self._output | labels)

    def _of(self, kind: MetricKind) -> Any:
        """Return Ray's object of a metric, which is made at its first use."""
        if kind.name not in self._metrics:
            from ray.util import metrics

            if kind.kind == "counter":
                made: Any = metrics.Counter(kind.name, kind.about, kind.labels)
            elif kind.kind == "gauge":
                made = metrics.Gauge(kind.name, kind.about, kind.labels)
            else:
                made = metrics.Histogram(kind.name, kind.about, _SECONDS, kind.labels)
            self._metrics[kind.name] = made
        return self._metrics[kind.name]
