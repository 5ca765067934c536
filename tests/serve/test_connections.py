"""The deadline of heads in uvicorn's protocol, with requests and clients that are slow in each possible place."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
import uvicorn.config
from fastapi import FastAPI, Request
from ray.serve._private.utils import call_function_from_import_path

from covray.serve.connections import CALLBACK, SECONDS, DeadlineProtocol, install, proxy_variables
from tests.support.browser import served
from tests.support.commands import free_port
from tests.support.connections import connections, head

DEADLINE_S = 0.5


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of an application that refuses at once without a body, or answers what it was sent, three times late."""
    app = FastAPI()

    @app.post("/v1/answers")
    async def answer(request: Request) -> int:
        if "early" in request.headers:
            return 0
        body = await request.body()
        await asyncio.sleep(3 * DEADLINE_S)
        return len(body)

    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", uvicorn.config.HTTP_PROTOCOLS["auto"])
    monkeypatch.setenv(SECONDS, str(DEADLINE_S))
    assert install() == []
    with served(app, free_port()) as address:
        yield urlsplit(address).port or 0


def test_ray_serve_finds_what_its_proxy_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", "")
    assert call_function_from_import_path(proxy_variables(1.0)[CALLBACK]) == []
    config = uvicorn.Config(FastAPI())  # as the proxy makes it
    config.load()
    assert config.http_protocol_class is DeadlineProtocol


def test_a_head_that_is_late_ends_its_connection_with_the_reason(port: int) -> None:
    async def wait() -> None:
        async with connections(port, 3) as (silent, slow, halted):
            slow.send(head(2)[:-2] + b"x-slow: ")
            slow.trickle()
            halted.send(b"POST ")
            assert await slow.refusal() == (408, "slow_upload")
            assert await halted.refusal() == (408, "slow_upload")
            for connection in (slow, halted):
                assert await connection.rest() == b""
            assert await silent.rest() == b""  # nothing was asked, nothing is answered

    asyncio.run(wait())


def test_a_request_at_work_and_an_idle_connection_have_no_deadline(port: int) -> None:
    async def wait() -> None:
        async with connections(port, 1) as (connection,):
            for _ in range(2):
                connection.send(head(2)[:20])
                await asyncio.sleep(DEADLINE_S / 4)
                connection.send(head(2)[20:])
                await asyncio.sleep(2 * DEADLINE_S)  # a slow body is for the application to refuse
                connection.send(b"ab")
                assert (await connection.read_until(b"\r\n\r\n2")).startswith(b"HTTP/1.1 200 ")
                await asyncio.sleep(2 * DEADLINE_S)  # idle, as clients keep connections

    asyncio.run(wait())


def test_what_follows_an_answer_has_the_deadline_of_a_head(port: int) -> None:
    async def wait() -> None:
        async with connections(port, 2) as (next_head, body):
            for connection in (next_head, body):
                connection.send(head(0 if connection is next_head else 1000, "early: yes"))
                await connection.read_until(b"\r\n\r\n0")
            next_head.send(b"POST ")
            for connection in (next_head, body):
                connection.trickle()
            assert await next_head.rest() == b""
            assert await body.rest() == b""

    asyncio.run(wait())
