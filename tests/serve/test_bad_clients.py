"""Clients that misbehave before a server that is really there: a reason, the slot freed, and the next is answered."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import math
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from covray.serve.app import APPLICATION
from tests.support.backbones import write_llama
from tests.support.commands import COVRAY, environment, free_port, kill_all, wait_for
from tests.support.connections import PATIENCE_S, connections, head

QUEUE = 4
UPLOAD_S = 30.0
CROWD = 1000
LENGTH = 60
"""Pictures of a chain: a stream of so many is at work for a while."""
CANDIDATES = 1024
"""Candidates of a query: so many take longer than ``TIME_S``, and than a test may wait."""
TIME_S = 30.0
IDLE_S = 2.0
"""A replica that had no processor's time in so many seconds computes nothing."""


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone with room for a long chain."""
    return write_llama(tmp_path_factory.mktemp("llama"), max_position_embeddings=16 * (LENGTH + 4))


class Server:
    """What the tests ask a server beside the clients that misbehave."""

    def __init__(self, process: subprocess.Popen[str], port: int, body: dict[str, Any]):
        self.port = port
        self._process = process
        self._body = body
        self.address = f"http://127.0.0.1:{port}"

    def request(self, *headers: str, **fields: Any) -> bytes:
        """A whole request; with ``fields`` of its body besides the query."""
        body = json.dumps(self._body | fields).encode()
        return head(len(body), *headers) + body

    def replica_cpu_s(self) -> float:
        """The processor's time that the replica has had."""
        started = psutil.Process(self._process.pid).children(recursive=True)
        (replica,) = (each for each in started if f"{APPLICATION}:Replica" in each.name())
        times = replica.cpu_times()
        return float(times.user + times.system)

    async def waits_for_idle_replica(self) -> None:
        """Wait until the replica computes nothing."""
        deadline = time.monotonic() + PATIENCE_S
        used = math.inf
        while used > 0.2 * IDLE_S:
            assert time.monotonic() < deadline, f"the replica computes for {used} s in {IDLE_S} s"
            before = await asyncio.to_thread(self.replica_cpu_s)
            await asyncio.sleep(IDLE_S)
            used = await asyncio.to_thread(self.replica_cpu_s) - before

    def answer(self) -> str:
        """The picture that answers the query."""
        response = httpx.post(f"{self.address}/v1/answers", json=self._body, timeout=PATIENCE_S)
        assert response.status_code == 200, response.text
        return str(response.json()["picture"])

    def count(self, name: str) -> float:
        """A counter of /metrics; 0 where there is none yet."""
        text = httpx.get(f"{self.address}/metrics", timeout=PATIENCE_S).text
        values = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(f"{name} ")]
        return float(values[0]) if values else 0.0

    async def waits_for(self, name: str, value: float) -> None:
        """Wait until a counter has a value."""
        deadline = time.monotonic() + PATIENCE_S
        while (found := await asyncio.to_thread(self.count, name)) != value:
            assert time.monotonic() < deadline, f"{name} is {found}, not {value}"
            await asyncio.sleep(0.1)


IN_FLIGHT = "covray_requests_in_flight"
LEFT = 'covray_requests_total{status="499"}'


async def slow_bodies_fill_the_queue(server: Server) -> None:
    """A body that never ends takes a slot for ``UPLOAD_S`` or until its client leaves; 1,000 others are refused."""
    async with connections(server.port, QUEUE) as slow:
        for connection in slow:
            connection.send(head(1000) + b"{")
            connection.trickle()
        await server.waits_for(IN_FLIGHT, QUEUE)
        async with connections(server.port, CROWD) as crowd:
            for connection in crowd:
                connection.send(server.request())
            refused = await asyncio.gather(*(connection.refusal() for connection in crowd))
        assert set(refused) == {(503, "queue_full")}
        for connection in slow[1:]:
            await connection.leave()
        await server.waits_for(IN_FLIGHT, 1)
        await server.waits_for(LEFT, QUEUE - 1)
        await asyncio.to_thread(server.answer)
        assert await slow[0].refusal() == (408, "slow_upload")
        await server.waits_for(IN_FLIGHT, 0)


async def slow_heads_beside_slow_bodies(server: Server) -> None:
    """Connections that never send a whole head take no slot, and are closed, with the reason where they began one."""
    async with connections(server.port, 2) as (silent, slow):
        slow.send(b"POST /v1/answers HTTP/1.1\r\nx-slow: ")
        slow.trickle()
        await slow_bodies_fill_the_queue(server)
        assert await slow.refusal() == (408, "slow_upload")
        assert await slow.rest() == b""
        assert await silent.rest() == b""


async def a_stream_is_left(server: Server) -> None:
    """The slot and the replica of a stream are free as soon as its client is gone."""
    left = await asyncio.to_thread(server.count, LEFT)
    async with connections(server.port, 1) as (connection,):
        connection.send(server.request("accept: text/event-stream"))
        await connection.read_until(b"event: frame")
    await server.waits_for(LEFT, left + 1)
    assert await asyncio.to_thread(server.count, IN_FLIGHT) == 0


async def a_long_answer_ends(server: Server) -> None:
    """Nothing is computed for a client that left, nor beyond ``limits.time_s``."""
    too_long = server.request(sampling={"temperature": 1.0, "vote": CANDIDATES})
    async with connections(server.port, 2) as (leaver, stayer):
        for connection in (leaver, stayer):
            connection.send(too_long)
            await server.waits_for(IN_FLIGHT, 1)
            before = await asyncio.to_thread(server.replica_cpu_s)
            while await asyncio.to_thread(server.replica_cpu_s) - before < 1:
                await asyncio.sleep(0.1)
            if connection is leaver:
                await connection.leave()
            else:
                assert await connection.refusal() == (504, "too_late")
            await server.waits_for_idle_replica()
            assert await asyncio.to_thread(server.count, IN_FLIGHT) == 0


@pytest.mark.ray
@pytest.mark.end_to_end
def test_clients_that_are_slow_many_or_leave_cost_no_slot_and_no_answer(
    write_run: Callable[..., str], pictures: Callable[..., list[str]]
) -> None:
    run_folder = write_run(method="linear", lengths=[LENGTH])
    (query,) = pictures(1)
    port = free_port()
    command = [COVRAY, "serve", "--adapter", run_folder, "--port", str(port), "--set", "generator.engine.device=cpu"]
    command += ["--set", f"limits.queue={QUEUE}", "--set", f"limits.upload_s={UPLOAD_S}"]
    command += ["--set", f"limits.time_s={TIME_S}", "--set", f"limits.candidates={CANDIDATES}"]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    server = Server(process, port, {"query": base64.b64encode(Path(query).read_bytes()).decode()})

    def is_ready() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{server.address}/healthz", timeout=5).status_code == 200
        return False

    async def misbehave() -> None:
        await slow_heads_beside_slow_bodies(server)
        await a_stream_is_left(server)
        await server.waits_for_idle_replica()
        await a_long_answer_ends(server)

    try:
        wait_for(is_ready, "it answers", process)
        before = server.answer()
        asyncio.run(misbehave())
        assert server.answer() == before
        process.send_signal(signal.SIGTERM)
        _, shown = process.communicate(timeout=120)
        assert process.returncode == 143, shown
        assert "Traceback" not in shown
    finally:
        kill_all([process])
