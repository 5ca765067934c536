"""Connections on which a test writes HTTP by hand: slowly, in parts, or not to the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable

PATIENCE_S = 120.0
"""What is a matter of milliseconds may take so long on a machine that does other things as well."""


class Connection(asyncio.Protocol):
    """A connection on which requests are written by hand.

    What arrived can be read after the connection broke as well: a server that closes it while we still send resets it,
    and asyncio's own reader would then raise in place of giving what the server said before.
    """

    def __init__(self) -> None:
        self._received = bytearray()
        self._has_changed = asyncio.Event()
        self._is_open = True
        self._trickle: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        self._has_changed.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._is_open = False
        self._has_changed.set()

    def send(self, text: bytes) -> None:
        self._transport.write(text)

    def trickle(self) -> None:
        """Send a byte now and then from now on."""

        async def forever() -> None:
            while self._is_open:
                self.send(b"a")
                await asyncio.sleep(0.2)

        self._trickle = asyncio.create_task(forever())

    async def read_until(self, text: bytes) -> bytes:
        """Wait for a text; return what came before it, and the text."""
        await self._wait_for(lambda: text in self._received)
        return self._take(self._received.index(text) + len(text))

    async def refusal(self) -> tuple[int, str]:
        """Read the response; return its status and its reason."""
        head = (await self.read_until(b"\r\n\r\n")).decode()
        length = int(re.search(r"content-length: (\d+)", head)[1])  # type: ignore[index]
        await self._wait_for(lambda: len(self._received) >= length)
        return int(head.split()[1]), json.loads(self._take(length))["reason"]

    async def rest(self) -> bytes:
        """Wait until the server closes the connection; return what it still sent."""
        await self._wait_for(lambda: not self._is_open)
        return self._take(len(self._received))

    async def leave(self) -> None:
        if self._trickle is not None:
            self._trickle.cancel()
        self._transport.close()
        await self._wait_for(lambda: not self._is_open)

    async def _wait_for(self, is_true: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not is_true():
                assert self._is_open, f"the server closed the connection after {bytes(self._received)!r}"
                self._has_changed.clear()
                await self._has_changed.wait()

    def _take(self, length: int) -> bytes:
        taken = bytes(self._received[:length])
        del self._received[:length]
        return taken


@contextlib.asynccontextmanager
async def connections(port: int, count: int) -> AsyncIterator[list[Connection]]:
    """Open ``count`` connections, which are all closed at the end."""
    opened: list[Connection] = []
    try:
        for _ in range(count):
            _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
            opened.append(connection)
        yield opened
    finally:
        for connection in opened:
            await connection.leave()


def head(length: int, *headers: str) -> bytes:
    """The head of a request for an answer, whose body has ``length`` bytes."""
    fixed = ["POST /v1/answers HTTP/1.1", "host: 127.0.0.1", "content-type: application/json"]
    return "\r\n".join([*fixed, f"content-length: {length}", *headers, "", ""]).encode()
