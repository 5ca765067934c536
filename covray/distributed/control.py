"""What a training's driver and workers tell each other beside the run folder.

A module of its own: the actor's process imports it, and nothing here needs torch.
"""

from __future__ import annotations

import ray

from covray.errors import CovrayError


class _Board:
    """What driver and workers tell each other beside the run folder."""

    def __init__(self) -> None:
        self._failure: CovrayError | None = None
        self._stop = False
        self._notices: list[str] = []

    def fail(self, error: CovrayError) -> None:
        """A mistake that a restart does not mend."""
        self._failure = self._failure or error

    def failure(self) -> CovrayError | None:
        """The first such mistake."""
        return self._failure

    def stop(self) -> None:
        """Ask the workers to write a checkpoint and leave."""
        self._stop = True

    def stopping(self) -> bool:
        """Whether they were asked to."""
        return self._stop

    def notice(self, text: str) -> None:
        """A line for the user."""
        self._notices.append(text)

    def notices(self) -> list[str]:
        """The lines since the last call."""
        taken, self._notices = self._notices, []
        return taken


Board = ray.remote(num_cpus=0)(_Board)
"""The board as an actor, for all to reach."""
