"""The trackers of a command as one: MLflow as it always was, and others that may come and go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape

from covray.distributed.trackers.base import MLFLOW, Status, Tracked, Tracker, tracker_registry, trackers_of
from covray.errors import one_line


class RunTrackers:
    """The runs of a command in all of its trackers.

    MLflow has refused what it cannot use by the time ``start`` returns. Another tracker that raises is left alone from
    then on, with one line: nothing ends because of it.
    """

    def __init__(self, config: Tracked, run_ids: Mapping[str, str | None], command: str):
        """Prepare the runs.

        Args:
            config: The configuration of the command.
            run_ids: The run to continue, by tracker; one without an entry begins one.
            command: The command, as a user knows it.

        Raises:
            ConfigError: A tracker cannot be used here.
        """
        self._every_steps = config.tracking.log_every_steps
        self._trackers: dict[str, Tracker] = {}
        for name in trackers_of(config):
            self._trackers[name] = tracker_registry().find(name)(config, run_ids.get(name), command)

    def start(self) -> dict[str, str]:
        """Begin or continue the runs; return their ids by tracker.

        Raises:
            ConfigError: MLflow does not answer.
        """
        run_ids = {}
        for name, run_id in self._each(lambda tracker: tracker.start()).items():
            if run_id is not None:
                run_ids[name] = run_id
        return run_ids

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Log metrics of a step.

        Args:
            step: The step. Steps between the multiples of ``tracking.log_every_steps`` are left out, unless they are of
                a validation.
            metrics: Values by name; None is left out.
        """
        if step % self._every_steps and "validation_loss" not in metrics:
            return
        self._each(lambda tracker: tracker.log(step, metrics))

    def artefacts(self, folder: str, names: Iterable[str]) -> None:
        """Copy the files ``names`` of ``folder``, local or remote, into the runs, under the same names."""
        listed = list(names)
        self._each(lambda tracker: tracker.artefacts(folder, listed))

    def finish(self, status: Status) -> bool:
        """Log what is left, and close the runs; return whether all trackers have all."""
        everything = all(self._each(lambda tracker: tracker.finish(status)).values())
        self._trackers.clear()
        return everything

    def _each(self, call: Callable[[Tracker], Any]) -> dict[str, Any]:
        """Return what ``call`` returns for each tracker; one that raises is dropped."""
        results = {}
        for name, tracker in list(self._trackers.items()):
            if name == MLFLOW:  # its errors of the network are its own business; others are ours, and refusals
                results[name] = call(tracker)
                continue
            try:
                results[name] = call(tracker)
            except Exception as error:  # noqa: BLE001 - whatever a tracker raises, the command goes on
                del self._trackers[name]
                results[name] = None
                message = f"covray: {name} failed ({one_line(error)}); the command goes on without it"
                Console(stderr=True, emoji=False).print(escape(message), highlight=False, soft_wrap=True)
        return results
