"""End a command by a signal, but not before it has saved its work."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NoReturn

_LOG = logging.getLogger("covray")


class GracefulStop:
    """Turns the first SIGINT or SIGTERM of a block into a request to stop; a second one ends the block at once.

    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self, request_stop: Callable[[], Any], message: str):
        """Prepare the handlers.

        Args:
            request_stop: Called at the first signal.
            message: Logged at the first signal.
        """
        self._request_stop, self._message = request_stop, message
        self._number: int | None = None  # the first signal
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> GracefulStop:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def end(self) -> NoReturn:
        """End the command as the first signal would have ended it. Raises KeyboardInterrupt."""
        number = self._number
        if number is None:
            number = signal.SIGINT
        handler = self._previous.get(number)
        if number == signal.SIGTERM and callable(handler):
            handler(number, None)  # the command line's: it knows the exit code of this signal
        raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._number is not None:
            self.end()
        self._number = number
        self._request_stop()
        _LOG.info(self._message)
