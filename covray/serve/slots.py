"""Slots, counters and deadlines of requests: what all routes that answer share. Knows no ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from covray.serve.reading import RefusedError

CLIENT_LEFT = 499
"""Status of a request whose client left before its answer: HTTP has none, and this is nginx's."""
Observe = Callable[[int, float], None]
"""Takes the HTTP status of a request of answers, and its seconds."""


class Counters:
    """The counters of ``/metrics``."""

    def __init__(self) -> None:
        # Of its own: the default registry of the process would refuse the same names a second time, as in tests.
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("covray_requests", "Requests of answers, by status.", ["status"], registry=registry)
        self.answers = Counter("covray_answers", "Answers, by adapter.", ["adapter"], registry=registry)
        self.in_flight = Gauge("covray_requests_in_flight", "Requests that wait or are answered.", registry=registry)
        seconds = "Seconds from a request to its answer's end."
        self.seconds = Histogram("covray_request_seconds", seconds, registry=registry)


class Slots:
    """Counts the requests that are waiting or being answered, and refuses those beyond the limit."""

    def __init__(self, most: int, counters: Counters, observe: Observe | None):
        self._most, self._observe = most, observe
        self._taken = 0
        self._counters = counters

    def take(self) -> Slot:
        """Take a slot; the end of its block frees it. Raises RefusedError."""
        if self._taken >= self._most:
            self._counters.requests.labels("503").inc()
            if self._observe is not None:
                self._observe(503, 0.0)
            raise RefusedError(503, "queue_full", f"{self._most} requests are waiting already; try again later")
        self._taken += 1
        self._counters.in_flight.inc()
        started = time.monotonic()

        def free(status: int) -> None:
            self._taken -= 1
            self._counters.in_flight.dec()
            self._counters.requests.labels(str(status)).inc()
            seconds = time.monotonic() - started
            self._counters.seconds.observe(seconds)
            if self._observe is not None:
                self._observe(status, seconds)

        return Slot(free)


class Slot:
    """The slot of one request. The end of its block frees it with the status that the request ended with."""

    def __init__(self, free: Callable[[int], None]):
        self._free = free
        self._kept = False

    def keep(self) -> Callable[[int], None]:
        """Return what frees the slot, given the status; the end of the block then leaves it taken."""
        self._kept = True
        return self._free

    def __enter__(self) -> Slot:
        """Begin."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """End with the status that the client gets; one that has left gets none."""
        if self._kept:
            return
        status = CLIENT_LEFT
        if error is None:
            status = 200
        elif isinstance(error, RefusedError):
            status = error.status
        elif isinstance(error, HTTPException):
            status = error.status_code
        elif isinstance(error, Exception) and not isinstance(error, ClientDisconnect):
            # When the client leaves, its task is cancelled, or reading its body fails; all else is the server's fault.
            status = 500
        self._free(status)


class InTime:
    """``asyncio.timeout_at`` that refuses a request which is late."""

    def __init__(self, deadline: float, seconds: float, advice: str = "ask for fewer candidates"):
        """Give up at ``deadline`` of the loop's clock, ``seconds`` after the beginning.

        Args:
            deadline: When.
            seconds: The time limit that the refusal names.
            advice: What the client may do besides trying again.
        """
        self._timeout = asyncio.timeout_at(deadline)
        self._seconds, self._advice = seconds, advice

    async def __aenter__(self) -> None:
        """Begin."""
        await self._timeout.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        """End. Raises RefusedError where it was too late."""
        # By hand in place of an inner ``async with``: what is refused must leave this block as RefusedError.
        try:
            await self._timeout.__aexit__(*error)
        except TimeoutError as late:
            message = f"no answer in {self._seconds:g} s; try again later, or {self._advice}"
            raise RefusedError(504, "too_late", message) from late
