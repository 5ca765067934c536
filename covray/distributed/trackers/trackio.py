"""Trackio: a local database, or the Space or server that its own environment variables name."""

from __future__ import annotations

import contextlib
import io
import posixpath
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from covray.config import leaves
from covray.distributed.trackers.base import Status, Tracked, require_package
from covray.io import storage


class TrackioTracker:
    """A run in the project that ``tracking.experiment`` names."""

    def __init__(self, config: Tracked, run_id: str | None, command: str):
        """Choose the run; ``Tracker`` explains the arguments.

        Raises:
            ConfigError: Trackio is not installed.
        """
        # No extra of covray's: trackio caps Pillow below what covray reads pictures with.
        require_package("trackio", "trackio", "pip install trackio as docs/training.md says")
        self._config, self._command = config, command
        name = posixpath.basename(config.out.rstrip("/"))
        self._run_id = run_id or f"{name}-{uuid.uuid4().hex[:8]}"
        self._first = 0
        self._run: Any = None

    def start(self) -> str:
        """Begin or continue the run; return its name."""
        import trackio

        settings = dict(leaves(self._config.model_dump(mode="json", exclude={"tracking"})))
        with contextlib.redirect_stdout(io.StringIO()):  # its greeting; a command may print JSON
            self._run = trackio.init(
                project=self._config.tracking.experiment,
                name=self._run_id,
                group=self._command,
                config=settings,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        self._first = getattr(self._run, "_next_step", 0)  # no public function tells it
        return self._run_id

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Log metrics of a step; steps that a continued run has already are left out, but for figures of no step, 0."""
        values = {name: value for name, value in metrics.items() if value is not None}
        if values and (step == 0 or step >= self._first):
            self._run.log(values, step=step)

    def artefacts(self, folder: str, names: Iterable[str]) -> None:
        """Copy files into the project."""
        import trackio

        with tempfile.TemporaryDirectory() as local, contextlib.redirect_stdout(io.StringIO()):
            for name in names:
                copy = Path(local, self._run_id, name)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(storage.read_bytes(storage.join(folder, name)))
                trackio.save(copy, project=self._config.tracking.experiment)

    def finish(self, status: Status) -> bool:
        """Close the run."""
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()
        return True
