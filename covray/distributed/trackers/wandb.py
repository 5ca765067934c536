"""Weights & Biases, online where the machine is logged in, else in files that ``wandb sync`` sends later."""

from __future__ import annotations

import os
import posixpath
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from covray.distributed.trackers.base import Status, Tracked, require_package
from covray.distributed.tracking_file import beside
from covray.io import storage


class WandbTracker:
    """A run in the project that ``tracking.experiment`` names."""

    def __init__(self, config: Tracked, run_id: str | None, command: str):
        """Choose the run; ``Tracker`` explains the arguments.

        Raises:
            ConfigError: wandb is not installed.
        """
        require_package("wandb", "wandb", "pip install 'covray[wandb]'")
        self._config, self._command = config, command
        self._run_id = run_id or uuid.uuid4().hex[:16]
        self._run: Any = None

    def start(self) -> str:
        """Begin or continue the run; return its id."""
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        mode = os.environ.get("WANDB_MODE")
        if mode is None:
            mode = "online" if wandb.api.api_key else "offline"  # never a question at the terminal
        local = None if "://" in self._config.out else str(beside(self._config.out))
        self._run = wandb.init(
            project=self._config.tracking.experiment,
            name=posixpath.basename(self._config.out.rstrip("/")),
            job_type=self._command,
            config=self._config.model_dump(mode="json", exclude={"tracking"}),
            id=self._run_id,
            resume="allow",
            mode=mode,
            dir=local,
            settings=wandb.Settings(init_timeout=30, console="off"),
        )
        return self._run_id

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Log metrics; the curves of a run that is continued go on after the steps that it has."""
        values = {name: value for name, value in metrics.items() if value is not None}
        # wandb drops values of a step that is behind; scores come with step 0, at the end.
        if step >= self._run.step:
            self._run.log(values, step=step)
        else:
            self._run.summary.update(values)

    def artefacts(self, folder: str, names: Iterable[str]) -> None:
        """Copy files into the run."""
        for name in names:
            copy = Path(self._run.dir, name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(storage.read_bytes(storage.join(folder, name)))
            self._run.save(str(copy), base_path=self._run.dir, policy="end")

    def finish(self, status: Status) -> bool:
        """Close the run."""
        self._run.finish(exit_code=0 if status == "FINISHED" else 1)
        return True
