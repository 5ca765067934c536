"""The HTTP side of ``covray serve``: limits, reasons, token, slots; answered by a generator that is not there."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.requests import ClientDisconnect

from covray.config import ServeConfig
from covray.serve.answering import Query, group
from covray.serve.gallery import Gallery
from covray.serve.http_api import Event, make_app
from covray.serve.schemas import AdapterInfo, Adapters, AnswerResponse, Frame, Refusal

TOKEN = "0123456789abcdef"
LOCAL = "http://127.0.0.1:8000"
ADAPTERS = Adapters(
    adapters=(
        AdapterInfo(name="depth", task="depth", pictures=4, classes=None),
        AdapterInfo(name="other", task=None, pictures=2, classes=None),
    ),
    tasks=("depth",),
)


def picture(width: int = 6, height: int = 4, format: str = "PNG", level: int = 0) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), level, np.uint8)).save(content, format)
    return content.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


class Echo:
    """Answers at once, unless it is told to wait; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Query] = []
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.closed = 0
        self.refusal: Refusal | None = None

    async def answer(self, query: Query) -> AnswerResponse | Refusal:
        self.asked.append(query)
        await self.go_on.wait()
        return self.refusal or self._response(query)

    async def stream(self, query: Query) -> AsyncIterator[Event]:
        self.asked.append(query)
        try:
            if self.refusal is not None:
                yield self.refusal
                return
            yield Frame(number=0, is_answer=False, picture="")
            await self.go_on.wait()
            yield Frame(number=1, is_answer=True, picture="")
            yield self._response(query)
        finally:
            self.closed += 1

    def _response(self, query: Query) -> AnswerResponse:
        return AnswerResponse(
            adapter=query.adapter, task=query.task, seed=query.seed, query="", frames=(), picture="", spread=None,
            data={}, samples=1, candidate=0, log_likelihood=(),
        )  # fmt: skip


def served(
    echo: Echo, token: str | None = None, galleries: Mapping[str, Gallery] | None = None, **options: Any
) -> FastAPI:
    config = ServeConfig.model_validate({"adapters": ["run"]} | options)
    return make_app(config, ADAPTERS, echo, token, galleries=galleries)


def client(app: FastAPI, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=LOCAL, **options)


def post(app: FastAPI, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with client(app) as http:
            return await http.post("/v1/answers", **options)

    return asyncio.run(send())


def get(app: FastAPI, path: str, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with client(app) as http:
            return await http.get(path, **options)

    return asyncio.run(send())


def refused(response: httpx.Response, status: int, reason: str) -> str:
    """Check the one line of a refusal; returns its message."""
    assert response.status_code == status, response.text
    assert response.text.count("\n") == 1
    body = response.json()
    assert body["reason"] == reason
    return str(body["message"])


def asked(**headers: bytes) -> dict[str, Any]:
    """The scope of a request of an answer."""
    sent = {"host": b"127.0.0.1", "content-type": b"application/json"} | headers
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/answers", "raw_path": b"/v1/answers", "query_string": b"",
        "headers": [(name.encode(), value) for name, value in sent.items()],
    }  # fmt: skip


def test_json_and_multipart_ask_the_same() -> None:
    echo = Echo()
    app = served(echo)
    query, image, label = picture(7), picture(level=1), picture(level=2)
    settings = {"adapter": "other", "task": "depth", "seed": 3, "sampling": {"temperature": 1.0}}
    examples = [{"image": text(image), "label": text(label)}]
    first = post(app, json=settings | {"query": text(query), "examples": examples})
    parts = [("query", ("q.png", query)), ("example_image", ("i.png", image)), ("example_label", ("l.png", label))]
    second = post(app, files=parts, data={"settings": json.dumps(settings)})
    assert first.status_code == second.status_code == 200, (first.text, second.text)
    assert first.json() == second.json()
    one, other = echo.asked
    assert one.shared() == other.shared()
    np.testing.assert_array_equal(one.picture, other.picture)
    assert one.picture.shape == (4, 7, 3)


def test_a_request_that_names_no_adapter_gets_the_first() -> None:
    assert post(served(Echo()), json={"query": text(picture())}).json()["adapter"] == "depth"


def test_queries_share_a_batch_only_if_all_but_the_picture_is_equal() -> None:
    echo = Echo()
    app = served(echo)
    base: dict[str, Any] = {"query": text(picture())}
    example = {"image": text(picture(level=1)), "label": text(picture(level=2))}
    others: list[dict[str, Any]] = [
        {}, {"seed": 1}, {"adapter": "other"}, {"task": "depth"}, {"classes": 5},
        {"sampling": {"temperature": 0.5}}, {"examples": [example]}, {"query": text(picture(9))},
    ]  # fmt: skip
    for other in others:
        assert post(app, json=base | other).status_code == 200
    # A different picture alone does not part two queries.
    assert group(echo.asked) == [[0, 7], [1], [2], [3], [4], [5], [6]]


# --- what is refused ------------------------------------------------------------------------------------------------

SMALL = {"limits": {"bytes": 4096, "pixels": 100, "examples": 1, "candidates": 2}}
ONE = text(picture())


@pytest.mark.parametrize(
    ("body", "status", "reason", "message"),
    [
        ({"query": text(b"hello, I am text")}, 415, "not_an_image", "query: "),
        ({"query": text(picture()[:40])}, 422, "truncated", "query: "),
        ({"query": text(picture(40, 40))}, 413, "too_large", "query: "),
        ({"query": ""}, 422, "empty", "query: "),
        ({"query": "abc"}, 422, "invalid", "query: "),
        ({"query": "%" + ONE}, 422, "invalid", "is not base64"),
        ({}, 422, "invalid", "query: "),
        ({"query": ONE, "examples": [{"image": ONE, "label": text(b"GIF89a")}]}, 422, "", "examples.0.label: "),
        ({"query": ONE, "examples": 2 * [{"image": ONE, "label": ONE}]}, 422, "too_many_examples", "2 pairs"),
        ({"query": ONE, "sampling": {"temperature": 1, "vote": 3}}, 422, "too_many_candidates", "3 candidates"),
        ({"query": ONE, "task": "alchemy"}, 422, "invalid", "task: "),
        ({"query": ONE, "adapter": "alchemy"}, 404, "unknown_adapter", "no alchemy"),
        ({"query": ONE, "colour": "red"}, 422, "invalid", "colour: "),
        ({"query": text(bytes(9000))}, 413, "too_large", "4096 bytes"),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_by_its_reason(body: dict[str, Any], status: int, reason: str, message: str) -> None:
    echo = Echo()
    response = post(served(echo, **SMALL), json=body)
    if not reason:  # whichever reason the reader of pictures has
        assert response.status_code in (415, 422)
        assert response.json()["message"].startswith(message)
    else:
        assert message in refused(response, status, reason)
    assert echo.asked == []


def test_a_bomb_is_refused_by_its_header() -> None:
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    assert "query: " in refused(post(served(Echo()), json={"query": text(bomb.getvalue())}), 413, "too_large")


@pytest.mark.parametrize("kind", ["text/plain", "", "image/png"])
def test_another_content_type_is_refused(kind: str) -> None:
    message = refused(post(served(Echo()), content=b"{}", headers={"content-type": kind}), 415, "content_type")
    assert "multipart/form-data" in message


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([("example_image", ("i", picture()))], "query: 0 files"),
        ([("query", ("q", picture())), ("example_image", ("i", picture()))], "1 images and 0 labels"),
        ([("query", ("q", picture())), ("more", ("m", picture()))], "more: "),
        ([("query", (None, b"text"))], "query: is text"),
        ([("query", ("q", picture())), ("settings", (None, b"{"))], "Invalid JSON"),
    ],
)
def test_a_form_that_is_none_is_refused(parts: list[Any], message: str) -> None:
    assert message in refused(post(served(Echo()), files=parts), 422, "invalid")


def test_a_body_that_does_not_say_its_length_ends_at_the_limit() -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1000
            yield bytes(1000)

    headers = {"content-type": "application/json"}
    refused(post(served(Echo(), **SMALL), content=endless(), headers=headers), 413, "too_large")
    assert sent < 10_000


def test_a_slow_client_is_given_up() -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    app = served(Echo(), limits={"upload_s": 0.05})
    refused(post(app, content=slow(), headers={"content-type": "application/json"}), 408, "slow_upload")


@pytest.mark.parametrize("path", ["/v1/answers", "/nothing"])
def test_what_is_no_route_is_answered_in_the_same_form(path: str) -> None:
    refused(get(served(Echo()), path), 404 if path == "/nothing" else 405, "not_found" if "no" in path else "method")


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_what_the_generator_refuses_is_no_answer(accept: str) -> None:
    echo = Echo()
    echo.refusal = Refusal(reason="refused", message="the sentence is too long")
    response = post(served(echo), json={"query": ONE}, headers={"accept": accept})
    assert refused(response, 422, "refused") == "the sentence is too long"


# --- queue, time, token ---------------------------------------------------------------------------------------------


def test_requests_beyond_the_queue_are_refused_at_once_and_the_others_answered() -> None:
    async def crowd() -> list[httpx.Response]:
        echo = Echo()
        echo.go_on.clear()
        app = served(echo, limits={"queue": 3})
        async with client(app) as http:
            waiting = [asyncio.create_task(http.post("/v1/answers", json={"query": ONE})) for _ in range(3)]
            while len(echo.asked) < 3:
                await asyncio.sleep(0.01)
            beyond = await asyncio.gather(*(http.post("/v1/answers", json={"query": ONE}) for _ in range(1000)))
            echo.go_on.set()
            first = await asyncio.gather(*waiting)
            after = await http.post("/v1/answers", json={"query": ONE})
            metrics = (await http.get("/metrics")).text
        assert 'covray_requests_total{status="503"} 1000.0' in metrics
        assert 'covray_requests_total{status="200"} 4.0' in metrics
        assert 'covray_answers_total{adapter="depth"} 4.0' in metrics
        assert "covray_requests_in_flight 0.0" in metrics
        for response in beyond:
            refused(response, 503, "queue_full")
        return [*first, after]

    assert [response.status_code for response in asyncio.run(crowd())] == [200] * 4


def test_an_answer_that_takes_too_long_is_given_up_and_its_slot_freed() -> None:
    async def late() -> None:
        echo = Echo()
        echo.go_on.clear()
        app = served(echo, limits={"queue": 1, "time_s": 0.05})
        async with client(app) as http:
            for _ in range(2):
                refused(await http.post("/v1/answers", json={"query": ONE}), 504, "too_late")
            stream = await http.post("/v1/answers", json={"query": ONE}, headers={"accept": "text/event-stream"})
            assert [line for line in stream.text.splitlines() if line.startswith("event: ")] == [
                "event: frame",
                "event: error",
            ]
            echo.go_on.set()
            assert (await http.post("/v1/answers", json={"query": ONE})).status_code == 200
        assert echo.closed == 1

    asyncio.run(late())


def test_a_client_that_leaves_in_the_middle_of_a_stream_frees_its_slot() -> None:
    async def leave() -> None:
        echo = Echo()
        echo.go_on.clear()
        app = served(echo, limits={"queue": 1})
        body = json.dumps({"query": ONE}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        first_event = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await first_event.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if b"event: frame" in message.get("body", b""):
                first_event.set()

        await asyncio.wait_for(app(asked(accept=b"text/event-stream"), receive, send), 10)  # type: ignore[arg-type]
        async with client(app) as http:
            assert 'covray_requests_total{status="499"} 1.0' in (await http.get("/metrics")).text
            echo.go_on.set()
            assert (await http.post("/v1/answers", json={"query": ONE})).status_code == 200
        assert echo.closed == 1

    asyncio.run(leave())


@pytest.mark.parametrize("error", [RuntimeError("no such request in the proxy"), None])
def test_a_client_that_leaves_in_the_midst_of_its_body_is_no_failure_of_the_server(error: Exception | None) -> None:
    app = served(Echo(), limits={"queue": 1})
    messages = [{"type": "http.request", "body": b"{", "more_body": True}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        if error is not None:  # what a proxy makes of it
            raise error
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        """Nobody is there."""

    with pytest.raises(ClientDisconnect):
        asyncio.run(app(asked(), receive, send))  # type: ignore[arg-type]
    counted = get(app, "/metrics").text
    assert 'covray_requests_total{status="499"} 1.0' in counted
    assert "covray_requests_in_flight 0.0" in counted


def test_the_token_is_asked_of_all_that_says_something_of_the_models() -> None:
    app = served(Echo(), TOKEN, host="0.0.0.0")
    for path in ("/v1/adapters", "/metrics", "/docs", "/openapi.json"):
        refused(get(app, path), 401, "token")
        refused(get(app, path, headers={"authorization": f"Bearer {TOKEN[:-1]}"}), 401, "token")
        assert get(app, path, headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    refused(post(app, json={"query": ONE}), 401, "token")
    assert get(app, "/healthz").text == "ok\n"
    assert get(app, "/").status_code == 200


def test_another_hosts_page_does_not_reach_a_loopback_server() -> None:
    assert get(served(Echo()), "/v1/adapters", headers={"host": "evil.example"}).status_code == 400
    assert get(served(Echo()), "/v1/adapters", headers={"host": "localhost:8000"}).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.2", "::1"])
def test_every_address_of_this_machine_is_kept_from_other_hosts_pages(host: str) -> None:
    app = served(Echo(), host=host)
    assert get(app, "/v1/adapters", headers={"host": "evil.example"}).status_code == 400
    own = f"[{host}]" if ":" in host else host
    assert get(app, "/v1/adapters", headers={"host": f"{own}:8000"}).status_code == 200


def test_a_failure_of_the_server_is_not_counted_as_a_client_that_left() -> None:
    class Failing(Echo):
        async def answer(self, query: Query) -> AnswerResponse | Refusal:
            raise RuntimeError("a replica died")

    app = served(Failing(), limits={"queue": 1})
    with pytest.raises(RuntimeError, match="a replica died"):
        post(app, json={"query": ONE})
    counted = get(app, "/metrics").text
    assert 'covray_requests_total{status="500"} 1.0' in counted
    assert "covray_requests_in_flight 0.0" in counted


def test_the_pages_load_nothing_from_elsewhere_and_name_every_route() -> None:
    app = served(Echo())
    for path in ("/", "/docs"):
        response = get(app, path)
        assert response.status_code == 200
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert "http://" not in response.text.replace("http://www.w3.org/", "")
        assert "https://" not in response.text
    for route in ("POST /v1/answers", "GET /v1/adapters", "GET /healthz", "GET /metrics"):
        assert route in get(app, "/docs").text
    assert get(app, "/v1/adapters").json()["adapters"][0]["name"] == "depth"
