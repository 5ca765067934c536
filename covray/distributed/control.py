"""The actor between the driver and the workers of a training: signals to the workers, messages and errors back.

A module of its own: the process of the actor imports it, and nothing here needs torch.
"""

from __future__ import annotations

import ray

from covray.errors import CovrayError


class _Control:
    """What passes between driver and workers beside the run folder."""

    def __init__(self) -> None:
        self._failure: CovrayError | None = None
        self._stop_requested = False
        self._messages: list[str] = []

    def report_failure(self, error: CovrayError) -> None:
        """Keep the first mistake that a restart of the workers cannot correct."""
        self._failure = self._failure or error

    def failure(self) -> CovrayError | None:
        """Return the first such mistake."""
        return self._failure

    def request_stop(self) -> None:
        """Ask the workers to write a checkpoint and end."""
        self._stop_requested = True

    def stop_requested(self) -> bool:
        """Return whether the workers were asked to end."""
        return self._stop_requested

    def log(self, message: str) -> None:
        """Keep a line for the user."""
        self._messages.append(message)

    def take_messages(self) -> list[str]:
        """Return the lines since the last call."""
        messages, self._messages = self._messages, []
        return messages


ControlActor = ray.remote(num_cpus=0)(_Control)
"""The control as an actor, which driver and workers reach."""
