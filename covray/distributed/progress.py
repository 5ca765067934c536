"""How a pool is getting on: what its actors report, and the lines and bars a person reads."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import pyarrow as pa
import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from covray.distributed.metrics import ACTORS, BUSY_SECONDS, UNET_EVALUATIONS, MetricKind, Recorder
from covray.distributed.session import here
from covray.progress import own_display, time_left

POLL_S = 0.5
"""A bar is drawn again this often."""
LINE_EVERY_S = 8.0
"""Seconds between two lines of progress where there is no terminal; at most ten are promised."""
_COUNTING_SHARE = 0.05  # of the time at most is spent on counting what is written: on S3 that takes requests


@dataclass(frozen=True)
class BlockReport:
    """One block that an actor has computed."""

    actor: str
    started: float
    """Seconds since the epoch, as ``finished``."""
    finished: float
    rows: int
    rejected: int
    evaluations: int = 0
    """Forward passes of the UNet, counted by picture."""
    padded: int = 0
    """Further passes that only filled batches."""
    by_task: Mapping[tuple[str, bool], int] = field(default_factory=dict)
    """Rows by task, and by whether they were rejected."""


def rows_by_task(rows: pa.Table) -> dict[tuple[str, bool], int]:
    """Count rows with the columns ``task`` and ``error`` for a ``BlockReport``."""
    counts: Counter[tuple[str, bool]] = Counter()
    for task, error in zip(rows["task"].to_pylist(), rows["error"].to_pylist(), strict=True):
        counts[task, error is not None] += 1
    return dict(counts)


@dataclass(frozen=True)
class PoolCounts:
    """What the actors have done so far."""

    rows: int
    """Rows computed, in this run."""
    rejected: int
    actors: int
    """Actors that have loaded their models."""


@dataclass(frozen=True)
class PoolUsage:
    """How the actors of a pool spent their time; None where nothing was computed. ``Audit`` explains the figures."""

    actors: int = 0
    chains_per_s: float | None = None
    busy_share: float | None = None
    row_s: float | None = None
    load_s: float | None = None
    last_block_s: float | None = None
    unet_evaluations: int = 0
    padded_share: float | None = None


class ProgressActor:
    """Adds up what the actors of a pool report, for the driver and for Prometheus."""

    def __init__(self, out: str | None = None, rows: MetricKind | None = None) -> None:
        """Begin with nothing; the time until the first block counts from now.

        Args:
            out: The folder of the command.
            rows: The counter of its rows; None records no metrics.
        """
        self._rows = rows
        self._recorder = Recorder(out)
        self.created = time.time()
        self.reports: dict[str, list[BlockReport]] = {}
        self.ready: set[str] = set()

    def join(self, actor: str) -> None:
        """Note that ``actor`` has loaded its models and takes blocks; its first may take minutes."""
        self.ready.add(actor)
        if self._rows is not None:
            self._recorder.set(ACTORS, len(self.ready))

    def report(self, block: BlockReport) -> None:
        """Note a block that was computed."""
        self.reports.setdefault(block.actor, []).append(block)
        if self._rows is None:
            return
        for (task, rejected), rows in block.by_task.items():
            status = "written"
            if rejected:
                status = "rejected"
            self._recorder.add(self._rows, rows, task=task, status=status)
        self._recorder.add(UNET_EVALUATIONS, block.evaluations)
        self._recorder.add(BUSY_SECONDS, block.finished - block.started)

    def counts(self) -> PoolCounts:
        """Return what was done so far."""
        rows, rejected = 0, 0
        for block in self._all_blocks():
            rows += block.rows
            rejected += block.rejected
        return PoolCounts(rows, rejected, len(self.ready))

    def usage(self) -> PoolUsage:
        """Return how the actors spent their time.

        An actor's first block is its warm-up, and left out where the actor had more than one. Time a block spends
        queued counts as idle time.
        """
        if not self.reports:
            return PoolUsage()
        # Of each actor its warm blocks: busy while it computes one, present from its first to its last.
        busy_s = present_s = 0.0
        warm_rows = 0
        starts, ends = [], []
        for of_actor in self.reports.values():
            ordered = sorted(of_actor, key=lambda block: block.started)
            warm = ordered[1:] or ordered
            busy_s += sum(block.finished - block.started for block in warm)
            present_s += warm[-1].finished - warm[0].started
            warm_rows += sum(block.rows for block in warm)
            starts.append(warm[0].started)
            ends.append(warm[-1].finished)
        spent_s = max(ends) - min(starts)
        blocks = self._all_blocks()
        evaluations = sum(block.evaluations for block in blocks)
        padded = sum(block.padded for block in blocks)
        passes = evaluations + padded
        row_s = 0.0
        if warm_rows:
            row_s = busy_s / warm_rows
        return PoolUsage(
            actors=len(self.reports),
            chains_per_s=_ratio(warm_rows, spent_s, 3),
            busy_share=_ratio(busy_s, present_s, 4),
            row_s=round(row_s, 6) if row_s else None,
            load_s=round(self._mean_load_s(row_s), 2),
            last_block_s=round(max(ends) - self.created, 2),
            unet_evaluations=evaluations,
            padded_share=_ratio(padded, passes, 4),
        )

    def _all_blocks(self) -> list[BlockReport]:
        blocks: list[BlockReport] = []
        for of_actor in self.reports.values():
            blocks += of_actor
        return blocks

    def _mean_load_s(self, row_s: float) -> float:
        """Return what the actors took on average, beyond their rows, until their first block was done."""
        loads = []
        for of_actor in self.reports.values():
            first = min(of_actor, key=lambda block: block.started)
            loads.append(first.finished - first.rows * row_s - self.created)
        return max(0.0, sum(loads) / len(loads))


def _ratio(amount: float, whole: float, digits: int) -> float | None:
    """Return ``amount`` over ``whole``, rounded; None where there is nothing of the whole."""
    if not whole:
        return None
    return round(amount / whole, digits)


def start_progress_actor(out: str | None = None, rows: MetricKind | None = None) -> Any:
    """Start a ``ProgressActor`` on the driver's node, for the actors of a pool to report to; return its handle."""
    return ray.remote(num_cpus=0)(ProgressActor).options(scheduling_strategy=here()).remote(out, rows)


class PoolProgress:
    """Shows what a pool has written until the block ends, as a bar on a terminal, or as a line every ten seconds.

    Rows count when they are written: those that were only computed are lost by a kill.
    """

    def __init__(self, total: int, unit: str, written: Callable[[], int], counts: Callable[[], PoolCounts]):
        """Prepare the display.

        Args:
            total: Rows to write, those of earlier runs included.
            unit: What a row is called, in the plural.
            written: Counts the rows that are written, those of earlier runs included. May raise OSError while the
                storage is away.
            counts: What the actors have done.
        """
        self._total, self._unit = total, unit
        self._count_written, self._counts = written, counts
        self._written = self._before = written()
        self._first: tuple[float, int] | None = None  # when rows of this run were first seen, and how many there were
        self._count_due = 0.0
        self._stop = threading.Event()
        self._console = Console(stderr=True)
        self._own_display = own_display()
        self._thread = threading.Thread(target=self._watch, name="covray-pool-progress", daemon=True)

    def __enter__(self) -> PoolProgress:
        """Say what is written already, and begin to watch."""
        if self._before:
            self._console.print(f"continuing: {self._before} of {self._total} {self._unit} are written already")
        self._own_display.__enter__()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching."""
        self._stop.set()
        self._thread.join()
        self._own_display.__exit__(kind, error, trace)

    def _watch(self) -> None:
        if sys.stderr.isatty():
            self._watch_bar()
        else:
            self._watch_lines()

    def _watch_bar(self) -> None:
        columns = (
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"), TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )  # fmt: skip
        with Progress(*columns, console=self._console) as bar:
            task = bar.add_task("starting actors", total=self._total, completed=self._before, note="")
            while True:
                stopped = self._stop.wait(POLL_S)
                counts = self._look(last=stopped)  # once more after the end, for the blocks committed since
                description, *notes = self._facts(counts)
                bar.update(task, completed=self._written, description=description, note=", ".join(notes))
                if stopped:
                    return

    def _watch_lines(self) -> None:
        line_due = time.monotonic()  # at once: the last line of another display may be some seconds old
        while not self._stop.wait(POLL_S):
            counts = self._look()
            if time.monotonic() < line_due:
                continue
            line_due = time.monotonic() + LINE_EVERY_S
            facts = [f"{self._written}/{self._total} {self._unit} written", *self._facts(counts)]
            rate = self._rate()
            if rate:
                facts.append(time_left((self._total - self._written) / rate))
            self._console.print(", ".join(facts), highlight=False, soft_wrap=True)

    def _look(self, last: bool = False) -> PoolCounts:
        """Count anew; what is written not at every look, where counting takes long."""
        began = time.monotonic()
        if last or began >= self._count_due:
            with contextlib.suppress(OSError):  # the storage is away: what was counted stays written
                self._written = self._count_written()
            now = time.monotonic()
            self._count_due = now + (now - began) / _COUNTING_SHARE
            # The rate counts from the first rows: what was before is the start of the actors.
            if self._first is None and self._written > self._before:
                self._first = (now, self._written)
        return self._counts()

    def _facts(self, counts: PoolCounts) -> list[str]:
        """Return the actors at work, and what else there is to say."""
        if not counts.actors:
            return ["starting actors"]
        facts = ["1 actor"]
        if counts.actors > 1:
            facts = [f"{counts.actors} actors"]
        rate = self._rate()
        if rate:
            facts.append(f"{rate:.2f} {self._unit}/s")
        # The rate is unknown until the first shard is written; the computed rows are counted instead.
        elif self._written == self._before:
            facts.append(f"{counts.rows} computed")
        if counts.rejected:
            facts.append(f"{counts.rejected} rejected")
        return facts

    def _rate(self) -> float:
        """Return the rows written in a second since the first were seen; 0 before there are more."""
        if self._first is None or self._written <= self._first[1]:
            return 0.0
        return (self._written - self._first[1]) / (time.monotonic() - self._first[0])
