"""A deadline for clients that are slow to send the head of a request, in Ray Serve's HTTP proxy. Knows no ray.

The proxy is uvicorn, which waits for a head without end, so that silent clients could hold all of its connections. Ray
Serve calls ``install`` in the proxy's process, before it starts uvicorn, because the environment variable ``CALLBACK``
names it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any

import uvicorn.config
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from covray.serve.schemas import Refusal

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Ray Serve's variable with the function that a proxy calls at its start."""
SECONDS = "COVRAY_SERVE_UPLOAD_S"
"""The variable that tells the proxy ``limits.upload_s``."""
_DEFAULT_S = 30.0


def proxy_variables(upload_s: float) -> Mapping[str, str]:
    """Return the environment variables of a proxy that closes connections whose head takes longer than ``upload_s``."""
    return {CALLBACK: f"{__name__}.{install.__name__}", SECONDS: repr(upload_s)}


def install() -> list[Any]:
    """Make uvicorn of this process use ``DeadlineProtocol``; return the middlewares that Ray Serve asks for: none."""
    # By its name, which uvicorn imports: Ray Serve gives no way to pass a class.
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{DeadlineProtocol.__name__}"
    return []


class DeadlineProtocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """uvicorn's protocol; a connection on which no request is at work is closed ``SECONDS`` after its last one began.

    So long may a head take, and also the rest of a body whose request was answered before it was read. A connection
    that is idle between two requests is closed by uvicorn itself.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._seconds = float(os.environ.get(SECONDS, _DEFAULT_S))
        self._has_sent = False
        self._deadline: asyncio.TimerHandle | None = None
        self._await_request()

    def data_received(self, data: bytes) -> None:
        """Read data; unless a request is at work then, the next one's head has to be complete in time."""
        self._has_sent = True
        super().data_received(data)
        if self._is_at_work():
            self._stop_waiting()
        else:
            self._await_request()

    def connection_lost(self, error: Exception | None) -> None:
        """End."""
        self._stop_waiting()
        super().connection_lost(error)

    def _is_at_work(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_request(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self._seconds, self._give_up)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        """Close the connection, unless a request is at work; say why where nothing else was ever answered on it."""
        self._deadline = None
        if self._is_at_work() or self.transport.is_closing():
            return
        # A connection that never sent a byte is a spare one, as browsers open them: it is closed without an answer.
        if self._has_sent and self.cycle is None:
            message = f"the head of the request did not arrive in {self._seconds:g} s; send it again, faster"
            body = Refusal(reason="slow_upload", message=message).model_dump_json().encode() + b"\n"
            head = (
                "HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()
