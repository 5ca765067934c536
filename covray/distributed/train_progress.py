"""Follow a training from its driver: show its progress, log its metrics to MLflow, pass its messages on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from covray.distributed.metrics import LOSS, STEP, TOKENS, VALIDATION_LOSS, Recorder
from covray.distributed.progress import time_left
from covray.distributed.trackers.together import RunTrackers
from covray.progress import Stage, own_display, stage
from covray.training.metrics_log import Metrics, MetricsTail

_LOG = logging.getLogger("covray")
_STARTING = "starting workers"


class TrainProgress:
    """Follows ``metrics.jsonl`` of a run and the messages of its workers, for the length of a ``with`` block."""

    def __init__(self, out: str, tracker: RunTrackers, control: Any, watch: Callable[[Metrics], None] | None):
        """Follow the run folder ``out``.

        Args:
            out: The run folder.
            tracker: The run in its trackers.
            control: The handle of the ``ControlActor`` of the workers.
            watch: Called with every record of the metrics, once.
        """
        self._tail = MetricsTail(out)
        self._tracker, self._control, self._watch = tracker, control, watch
        self._display: _Bar | _Line = _Line()
        if sys.stderr.isatty():
            self._display = _Bar()
        self._validation = ""
        self._recorder = Recorder(out)

    def __enter__(self) -> TrainProgress:
        """Take the metrics of earlier processes of this run, which MLflow may lack; begin to show progress."""
        for record in self._tail.read_new():
            self._take(record)
        self._display.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the display."""
        self._display.__exit__(kind, error, trace)

    def update(self) -> None:
        """Take and show what is new."""
        for message in ray.get(self._control.take_messages.remote()):
            _LOG.info(message)
        last_step: Metrics | None = None
        for record in self._tail.read_new():
            self._take(record)
            if "validation_loss" in record:
                self._validation = f", validation {record['validation_loss']:.3f}"
            if "loss" in record:
                last_step = record
        if last_step is not None:
            text = f"loss {last_step['loss']:.3f}{self._validation}, {last_step['tokens_per_s']:.0f} tokens/s"
            self._display.show(int(last_step["step"]), int(last_step["steps"]), last_step["seconds"], text)

    def _take(self, record: Metrics) -> None:
        """Give a record to Prometheus, to the trackers and to the display of the training."""
        _record(self._recorder, record)
        values = {key: value for key, value in record.items() if key not in ("step", "steps")}
        self._tracker.log(int(record["step"]), values)
        if self._watch is not None:
            self._watch(record)


def _record(recorder: Recorder, record: Metrics) -> None:
    """Record a line of the metrics; what is said again after a restart counts in a new process, from zero."""
    if "loss" in record:
        recorder.add(TOKENS, record["tokens"])
        recorder.set(STEP, record["step"])
        recorder.set(LOSS, record["loss"])
    if "validation_loss" in record:
        recorder.set(VALIDATION_LOSS, record["validation_loss"])


class _Bar:
    """A bar, for a terminal."""

    def __init__(self) -> None:
        columns = (
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )  # fmt: skip
        self._progress = Progress(*columns, console=Console(stderr=True, emoji=False))
        self._task = self._progress.add_task(_STARTING, total=None)
        self._stack = ExitStack()

    def __enter__(self) -> _Bar:
        self._stack.enter_context(own_display())
        self._stack.enter_context(self._progress)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def show(self, step: int, steps: int, seconds: float, text: str) -> None:
        """Show a step of ``steps`` that took ``seconds``, and what ``text`` says of it."""
        self._progress.update(self._task, completed=step, total=steps, description=text)


class _Line:
    """A line every now and then, as ``covray.progress`` shows it."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._stage = Stage(_STARTING)

    def __enter__(self) -> _Line:
        self._stage = self._stack.enter_context(stage(_STARTING))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def show(self, step: int, steps: int, seconds: float, text: str) -> None:
        """Show a step of ``steps`` that took ``seconds``, and what ``text`` says of it."""
        self._stage.say(f"step {step}/{steps}, {text}, {time_left(seconds * (steps - step))}")
