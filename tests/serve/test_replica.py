"""A replica computes for the clients that wait, and for nobody else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve

from covray.config import EngineConfig, GeneratorConfig, SamplingConfig, ServeConfig
from covray.io.images import decode
from covray.models.lvm.decoding.reader import Reader
from covray.serve.answering import Query
from covray.serve.app import Replica, ReplicaHandle, ThinkHandle
from covray.serve.schemas import AnswerResponse, Frame
from tests.support.datasets import TOKENS

LENGTH = 8
"""Pictures of a chain."""
PASSES = (LENGTH - 1) * TOKENS - 1
"""Of one batch."""
LONG = SamplingConfig(temperature=1.0, vote=64)
"""Many passes: nobody waits for the end of such an answer."""
PATIENCE_S = 60.0


class Passes:
    """Counts the passes of all models, and lets a test wait for one."""

    def __init__(self) -> None:
        self.count = 0

    async def reach(self, count: int) -> None:
        """Wait until so many passes have begun."""
        async with asyncio.timeout(PATIENCE_S):
            while self.count < count:
                await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Serve's batches ask their replica for one number."""
    context = SimpleNamespace(_deployment_config=SimpleNamespace(max_ongoing_requests=64))
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    counted = Passes()
    read_token: Callable[..., Any] = Reader.read_token

    def count(self: Reader, *arguments: Any) -> Any:
        result = read_token(self, *arguments)
        counted.count += 1
        return result

    monkeypatch.setattr(Reader, "read_token", count)
    return counted


@pytest.fixture
def queries(pictures: Callable[..., list[str]]) -> Callable[..., list[Query]]:
    def make(count: int, sampling: SamplingConfig) -> list[Query]:
        made = []
        for path in pictures(count):
            made.append(Query("run", decode(Path(path).read_bytes()), (), None, 21, sampling, 5))
        return made

    return make


@pytest.fixture
def config(write_run: Callable[..., str]) -> ServeConfig:
    engine = EngineConfig(device="cpu", batch=4, image_batch=4)
    generator = GeneratorConfig(engine=engine, batch=4)
    return ServeConfig(adapters=(write_run(method="linear", lengths=[LENGTH]),), generator=generator, batch_wait_s=0.5)


async def left(task: asyncio.Task[Any]) -> None:
    """Cancel a task, as Ray Serve does with the task of a request."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def computing_ends(replica: Replica, passes: Passes) -> None:
    """Check that the thread of a replica is soon free, and has not written what was asked for."""
    async with asyncio.timeout(PATIENCE_S):
        await replica._compute(lambda: None)
    assert passes.count < 2 * PASSES, "it was computed to its end"


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """Ray Serve has one queue of batches in a process, which stays with its event loop."""
    with asyncio.Runner() as of_module:
        yield of_module


@pytest.fixture
def replica_test(config: ServeConfig, runner: asyncio.Runner) -> Callable[[Callable[[Replica], Awaitable[None]]], None]:
    def run_test(test: Callable[[Replica], Awaitable[None]]) -> None:
        async def main() -> None:
            await test(Replica(config))

        runner.run(main())

    return run_test


def test_an_answer_that_nobody_waits_for_ends_at_its_next_pass(
    replica_test: Any, queries: Callable[..., list[Query]], passes: Passes
) -> None:
    async def leave(replica: Replica) -> None:
        expected = await replica.answer(*queries(1, SamplingConfig()))
        passes.count = 0
        task = asyncio.create_task(replica.answer(*queries(1, LONG)))
        await passes.reach(5)
        await left(task)
        await computing_ends(replica, passes)
        assert await replica.answer(*queries(1, SamplingConfig())) == expected

    replica_test(leave)


def test_a_batch_is_computed_for_those_who_stay(
    replica_test: Any, queries: Callable[..., list[Query]], passes: Passes
) -> None:
    sampling = SamplingConfig(temperature=1.0)

    async def some_leave(replica: Replica) -> None:
        alone = [await replica.answer(query) for query in queries(4, sampling)]
        passes.count = 0
        first, *others = (asyncio.create_task(replica.answer(query)) for query in queries(4, sampling))
        await passes.reach(3)
        await left(first)
        assert [await other for other in others] == alone[1:]
        assert passes.count == PASSES, "they did not share a batch"

    replica_test(some_leave)


def test_a_query_that_is_left_before_its_turn_is_never_begun(
    replica_test: Any, queries: Callable[..., list[Query]], passes: Passes
) -> None:
    async def leave(replica: Replica) -> None:
        stream = replica.stream(*queries(1, SamplingConfig()))
        assert isinstance(await anext(stream), Frame)  # it holds the decoder
        begun = passes.count
        task = asyncio.create_task(replica.answer(*queries(1, LONG)))
        await asyncio.sleep(1.0)
        await left(task)
        events = [event async for event in stream]
        assert isinstance(events[-1], AnswerResponse)
        rest = passes.count - begun
        await computing_ends(replica, passes)
        assert passes.count - begun == rest

    replica_test(leave)


def test_a_stream_that_is_left_ends_at_its_next_pass(
    replica_test: Any, queries: Callable[..., list[Query]], passes: Passes
) -> None:
    async def leave(replica: Replica) -> None:
        expected = await replica.answer(*queries(1, SamplingConfig()))
        passes.count = 0
        stream = replica.stream(*queries(1, LONG))
        task = asyncio.ensure_future(anext(stream))
        await passes.reach(5)
        await left(task)
        await computing_ends(replica, passes)
        assert await replica.answer(*queries(1, SamplingConfig())) == expected

    replica_test(leave)


EVENTS = 2
"""Events of a stream before it stalls."""


class Call:
    """What a handle of Ray Serve gives for a call: it can be awaited or iterated, and cancelled."""

    def __init__(self) -> None:
        self.is_cancelled = False

    def __await__(self) -> Any:
        return asyncio.sleep(PATIENCE_S).__await__()

    async def __aiter__(self) -> AsyncIterator[int]:
        for number in range(EVENTS):
            yield number
        await self

    def cancel(self) -> None:
        self.is_cancelled = True


class Handle:
    """A deployment whose answers never come; remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.answer = self.stream = self.think = self

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self, query: Any) -> Call:
        self.calls.append(Call())
        return self.calls[-1]


QUERY: Any = SimpleNamespace(adapter="run")


async def ends_alone(waiting: Awaitable[Any]) -> None:
    """Wait for something that does not come, and leave."""
    task = asyncio.ensure_future(waiting)
    await asyncio.sleep(0.05)
    assert not task.done()
    await left(task)


async def leave_an_answer(handle: Any) -> None:
    await ends_alone(ReplicaHandle(handle).answer(QUERY))


async def leave_a_thought(handle: Any) -> None:
    await ends_alone(ThinkHandle(handle, "clip").think(QUERY))


async def leave_a_stream(handle: Any) -> None:
    events: Any = ReplicaHandle(handle).stream(QUERY)
    for _ in range(EVENTS):
        await anext(events)
    await ends_alone(anext(events))


async def read_no_further(handle: Any) -> None:
    events: Any = ReplicaHandle(handle).stream(QUERY)
    await anext(events)
    await events.aclose()


@pytest.mark.parametrize("leave", [leave_an_answer, leave_a_thought, leave_a_stream, read_no_further])
def test_a_replica_is_told_that_nobody_waits(leave: Callable[[Any], Awaitable[None]], runner: asyncio.Runner) -> None:
    handle = Handle()

    async def main() -> None:
        await leave(handle)

    runner.run(main())
    assert [call.is_cancelled for call in handle.calls] == [True]
