"""What a tracker is, and which trackers a command has.

A package adds one by an entry point of the group ``covray.trackers``; its name is what ``--track`` takes.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Mapping
from typing import Literal, Protocol

from covray.config import BuildConfig, EvaluateConfig, SweepConfig, TrainConfig
from covray.config.think import ThinkEvaluateConfig, ThinkTrainConfig
from covray.config.vlm import VlmEvaluateConfig, VlmTrainConfig
from covray.errors import ConfigError
from covray.plugins import TRACKERS_GROUP, Registry, own_entry, require_attributes

Tracked = (
    BuildConfig
    | TrainConfig
    | EvaluateConfig
    | SweepConfig
    | VlmTrainConfig
    | VlmEvaluateConfig
    | ThinkTrainConfig
    | ThinkEvaluateConfig
)
Status = Literal["FINISHED", "FAILED", "KILLED"]

MLFLOW = "mlflow"
_OWN = {
    MLFLOW: "covray.distributed.tracking:MlflowTracker",
    "tensorboard": "covray.distributed.trackers.tensorboard:TensorBoardTracker",
    "wandb": "covray.distributed.trackers.wandb:WandbTracker",
    "trackio": "covray.distributed.trackers.trackio:TrackioTracker",
}


class Tracker(Protocol):
    """The run of a command in one tracker. A class with these methods is what an entry point names.

    All but the first raise what they like where the tracker is away: the command goes on, and says so once.
    """

    def __init__(self, config: Tracked, run_id: str | None, command: str):
        """Prepare the run; nothing is sent or written yet.

        Args:
            config: The configuration of the command.
            run_id: The run to continue; None begins one.
            command: The command, as a user knows it.

        Raises:
            ConfigError: The tracker cannot be used here, such as for lack of a package.
        """

    def start(self) -> str | None:
        """Begin or continue the run; return its id."""

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Log metrics of a step; None is left out. A command that continues hands over those of earlier steps again."""

    def artefacts(self, folder: str, names: Iterable[str]) -> None:
        """Copy the files ``names`` of ``folder``, local or remote, into the run."""

    def finish(self, status: Status) -> bool:
        """Close the run; return whether all was logged."""


@functools.cache
def tracker_registry() -> Registry[type[Tracker]]:
    """Return the trackers, which are loaded when they are asked for."""
    own = [own_entry(name, target) for name, target in _OWN.items()]
    return Registry(
        TRACKERS_GROUP, "tracker", own, require_attributes("tracker", ("start", "log", "artefacts", "finish"))
    )


def trackers_of(config: Tracked) -> tuple[str, ...]:
    """Return the names of the trackers of a command; by default MLflow, and for a build none."""
    tracking = config.tracking
    names = tracking.to
    if names is None:
        names = () if isinstance(config, BuildConfig) and tracking.uri is None else (MLFLOW,)
    return tuple(name for name in names if name != MLFLOW or tracking.uri != "none")


def require_trackers(config: Tracked) -> None:
    """Refuse trackers that cannot be used, before anything expensive.

    Raises:
        ConfigError: In one line that names the tracker.
    """
    for name in trackers_of(config):
        tracker_registry().find(name)(config, None, "")


def require_package(tracker: str, package: str, install: str) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        ConfigError: The message says how to install it.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"tracking.to: {tracker} is not installed; {install}, or leave {tracker} out of --track")
