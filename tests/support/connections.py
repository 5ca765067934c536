"""Connections on which a test writes HTTP by hand: slowly, in parts, or not to the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator

PATIENCE_S = 120.0
"""What is a matter of milliseconds may take so long on a machine that does other things as well."""


class Connection:
    """A connection on which requests are written by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self._writer = reader, writer
        self._trickle: asyncio.Task[None] | None = None

    async def send(self, text: bytes) -> None:
        self._writer.write(text)
        await self._writer.drain()

    def trickle(self) -> None:
        """Send a byte now and then from now on."""

        async def forever() -> None:
            with contextlib.suppress(ConnectionError):
                while True:
                    await self.send(b"a")
                    await asyncio.sleep(0.2)

        self._trickle = asyncio.create_task(forever())

    async def read_until(self, text: bytes) -> bytes:
        return await asyncio.wait_for(self._reader.readuntil(text), PATIENCE_S)

    async def refusal(self) -> tuple[int, str]:
        """Read the response; return its status and its reason."""
        head = (await self.read_until(b"\r\n\r\n")).decode()
        length = int(re.search(r"content-length: (\d+)", head)[1])  # type: ignore[index]
        body = await asyncio.wait_for(self._reader.readexactly(length), PATIENCE_S)
        return int(head.split()[1]), json.loads(body)["reason"]

    async def rest(self) -> bytes:
        """Wait until the server closes the connection; return what it still sent."""
        try:
            return await asyncio.wait_for(self._reader.read(), PATIENCE_S)
        except ConnectionError:  # it closed with some of our bytes unread
            return b""

    async def leave(self) -> None:
        if self._trickle is not None:
            self._trickle.cancel()
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


@contextlib.asynccontextmanager
async def connections(port: int, count: int) -> AsyncIterator[list[Connection]]:
    """Open ``count`` connections, which are all closed at the end."""
    opened: list[Connection] = []
    try:
        for _ in range(count):
            opened.append(Connection(*await asyncio.open_connection("127.0.0.1", port)))
        yield opened
    finally:
        for connection in opened:
            await connection.leave()


def head(length: int, *headers: str) -> bytes:
    """The head of a request for an answer, whose body has ``length`` bytes."""
    fixed = ["POST /v1/answers HTTP/1.1", "host: 127.0.0.1", "content-type: application/json"]
    return "\r\n".join([*fixed, f"content-length: {length}", *headers, "", ""]).encode()
