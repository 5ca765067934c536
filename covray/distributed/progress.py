"""How a pool of actors is getting on: what they report, and the line a person reads."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

POLL_S = 0.5
LINE_EVERY_S = 30.0


class Tally:
    """Adds up what the actors report, a block at a time."""

    def __init__(self) -> None:
        self.created = time.time()
        self.rows = self.rejected = self.evaluations = self.padded = 0
        self.spans: dict[str, list[tuple[float, float, int]]] = {}
        self.ready: set[str] = set()

    def join(self, actor: str) -> None:
        """``actor`` has loaded its models and takes blocks; its first may take minutes."""
        self.ready.add(actor)

    def report(
        self, actor: str, started: float, finished: float, rows: int, rejected: int, evaluations: int, padded: int
    ) -> None:
        """One block computed by ``actor`` between two times (seconds since the epoch)."""
        self.rows += rows
        self.rejected += rejected
        self.evaluations += evaluations
        self.padded += padded
        self.spans.setdefault(actor, []).append((started, finished, rows))

    def counts(self) -> tuple[int, int, int]:
        """Rows computed, rows rejected, actors at work."""
        return self.rows, self.rejected, len(self.ready)

    def usage(self) -> dict[str, Any]:
        """What the audit says of the run: chains/s, and the share of the actors' time spent computing.

        An actor's first block is its warm-up and left out where it had more than one. A block in a queue counts as
        waiting, whoever is to blame. For ``covray benchmark``: ``row_s``, an actor's seconds for a row; ``load_s``,
        what an actor took beyond its rows until its first block was done; ``last_block_s``, when the last one was.
        """
        spans = [sorted(blocks)[1:] or blocks for blocks in self.spans.values()]
        busy = sum(end - start for blocks in spans for start, end, _ in blocks)
        present = sum(blocks[-1][1] - blocks[0][0] for blocks in spans)
        warm_rows = sum(rows for blocks in spans for _, _, rows in blocks)
        spent = max((blocks[-1][1] for blocks in spans), default=0.0) - min((b[0][0] for b in spans), default=0.0)
        evaluated = self.evaluations + self.padded
        row_s = busy / warm_rows if warm_rows else 0.0
        firsts = [min(blocks) for blocks in self.spans.values()]
        loads = [end - rows * row_s - self.created for _, end, rows in firsts]
        return {
            "actors": len(self.spans),
            "chains_per_s": round(warm_rows / spent, 3) if spent else None,
            "busy_share": round(busy / present, 4) if present else None,
            "row_s": round(row_s, 6) if row_s else None,
            "load_s": round(max(0.0, sum(loads) / len(loads)), 2) if loads else None,
            "last_block_s": round(max(blocks[-1][1] for blocks in spans) - self.created, 2) if spans else None,
            "unet_evaluations": self.evaluations,
            "padded_share": round(self.padded / evaluated, 4) if evaluated else None,
        }


Meter = ray.remote(num_cpus=0)(Tally)
"""The tally as an actor, for all others to report to."""


class PoolProgress:
    """Shows rows done, rate and time left until the block ends: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int, done: int, meter: Any, unit: str):
        self._total, self._before, self._meter, self._unit = total, done, meter, unit
        self._stop = threading.Event()
        self._console = Console(stderr=True)
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PoolProgress:
        if self._before:
            self._console.print(f"continuing: {self._before} of {self._total} {self._unit} are written already")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        if sys.stderr.isatty():
            self._watch_bar()
        else:
            self._watch_lines()

    def _watch_bar(self) -> None:
        columns = (
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"), TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )  # fmt: skip
        with Progress(*columns, console=self._console) as bar:
            task = bar.add_task("starting actors", total=self._total, completed=self._before, rate="")
            first: tuple[float, int] | None = None
            while True:
                stopped = self._stop.wait(POLL_S)
                rows, rejected, actors = ray.get(self._meter.counts.remote())
                if rows and first is None:
                    first = (time.monotonic(), rows)
                rate = _rate(first, rows)
                note = f"{rate:.2f} {self._unit}/s" if rate else ""
                note += f", {rejected} rejected" if rejected else ""
                done = min(self._before + rows, self._total)
                bar.update(task, completed=done, description=_at_work(actors), rate=note)
                if stopped:
                    return

    def _watch_lines(self) -> None:
        first: tuple[float, int] | None = None
        while not self._stop.wait(LINE_EVERY_S):
            rows, rejected, actors = ray.get(self._meter.counts.remote())
            if rows and first is None:
                first = (time.monotonic(), rows)
            rate = _rate(first, rows)
            if not rows:
                self._console.print(f"{_at_work(actors)}, no block done yet" if actors else _at_work(actors))
                continue
            said = [f"{self._before + rows}/{self._total} {self._unit}", _at_work(actors)]
            said += [f"{rate:.2f} {self._unit}/s"] if rate else []
            said += [f"{rejected} rejected"] if rejected else []
            said += [time_left((self._total - self._before - rows) / rate)] if rate else []
            self._console.print(", ".join(said), highlight=False, soft_wrap=True)


def _at_work(actors: int) -> str:
    return f"{actors} actor{'s' if actors != 1 else ''}" if actors else "starting actors"


def time_left(seconds: float) -> str:
    """``seconds`` for a reader who waits for them."""
    if seconds < 90:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.0f} min left" if seconds < 5400 else f"{seconds / 3600:.1f} h left"


def _rate(first: tuple[float, int] | None, rows: int) -> float:
    """Pairs a second since the first report; 0 before there are two."""
    if first is None or rows <= first[1]:
        return 0.0
    return (rows - first[1]) / (time.monotonic() - first[0])
