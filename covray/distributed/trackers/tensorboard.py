"""TensorBoard: event files beside the folder of a command."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Mapping
from typing import Any

from covray.config import leaves
from covray.distributed.trackers.base import Status, Tracked, require_package
from covray.distributed.tracking_file import beside
from covray.errors import ConfigError

FOLDER = "tensorboard"
"""The folder beside a command's; it has one for each run, and TensorBoard shows all of them."""


class TensorBoardTracker:
    """Writes metrics as scalars; those that the run already has, by name and step, are not written again."""

    def __init__(self, config: Tracked, run_id: str | None, command: str):
        """Choose the folder of the run; ``Tracker`` explains the arguments.

        Raises:
            ConfigError: TensorBoard is not installed, or the command's folder is remote.
        """
        require_package("tensorboard", "tensorboard", "pip install 'covray[tensorboard]'")
        if "://" in config.out:
            raise ConfigError(
                f"tracking.to: tensorboard writes files beside {config.out}, which is remote; leave it out of --track"
            )
        self._config, self._command = config, command
        self._folder = beside(config.out) / FOLDER / posixpath.basename(config.out.rstrip("/"))
        self._newest: dict[str, int] = {}  # the last step of every metric that the files have
        self._writer: Any = None

    def start(self) -> str:
        """Open the files; return the folder of the run."""
        from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
        from torch.utils.tensorboard import SummaryWriter

        if self._folder.exists():
            # Of each metric the newest point alone, which says where to go on.
            earlier = EventAccumulator(str(self._folder), size_guidance={SCALARS: 1}).Reload()
            for name in earlier.Tags()[SCALARS]:
                self._newest[name] = earlier.Scalars(name)[-1].step
        self._writer = SummaryWriter(str(self._folder))
        settings = dict(leaves(self._config.model_dump(mode="json", exclude={"tracking"})))
        self._writer.add_text("config", f"    {json.dumps(settings, indent=2)}".replace("\n", "\n    "))
        return str(self._folder)

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Write a point for each metric."""
        for name, value in metrics.items():
            if value is not None and step > self._newest.get(name, -1):
                self._newest[name] = step
                self._writer.add_scalar(name, value, step)

    def artefacts(self, folder: str, names: Iterable[str]) -> None:
        """Do nothing: the files lie beside TensorBoard's already."""

    def finish(self, status: Status) -> bool:
        """Close the files."""
        self._writer.add_text("status", status)
        self._writer.close()
        return True
