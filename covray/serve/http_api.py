"""The HTTP side: routes, limits and counters, over anything that answers queries. Knows no ray.

A request is read, counted and timed here. Every refusal is one JSON object with its reason.
"""

from __future__ import annotations

import asyncio
import hmac
import html
import ipaddress
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from importlib.resources import files
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

import covray
from covray.config import ServeConfig
from covray.serve.answering import Query
from covray.serve.gallery import Gallery
from covray.serve.reading import RefusedError, read_query
from covray.serve.schemas import Adapters, AnswerRequest, AnswerResponse, Frame, GalleryPairs, Refusal
from covray.serve.slots import CLIENT_LEFT, Counters, InTime, Observe, Slots
from covray.serve.think_api import ThoughtAnswerer, add_thoughts

Event = Frame | AnswerResponse | Refusal
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_OPEN = frozenset(("/", "/healthz"))
"""Paths that need no token: they say nothing of the models."""
_REASONS = {404: "not_found", 405: "method"}
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page may reach its own server, and nothing else."""


class Answerer(Protocol):
    """What answers queries: replicas of Ray Serve, or in a test a generator of this process."""

    async def answer(self, query: Query) -> AnswerResponse | Refusal:
        """Return the answer, or why there is none."""

    def stream(self, query: Query) -> AsyncIterator[Event]:
        """Yield the pictures as they are written, then the answer."""


class _EventStream(StreamingResponse):
    """Server-Sent Events; frees the request's slot however it ends, also where the client leaves at once."""

    def __init__(self, events: AsyncGenerator[str, None], free: Callable[[int], None]):
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._events = events
        self._free = free
        self._status = CLIENT_LEFT

    async def stream_response(self, send: Send) -> None:
        """Send the events. Only the end of this counts as an answer: a call also returns when the client has left."""
        await super().stream_response(send)
        self._status = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, or stop where the client leaves."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._free(self._status)
            await self._events.aclose()  # so that nothing is computed for a client that left


class _RequireToken:
    """Refuses requests without the token."""

    def __init__(self, app: ASGIApp, token: str):
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                error = RefusedError(401, "token", "send the server's token as authorization: Bearer TOKEN")
                response = _refusal(error)
                response.headers["www-authenticate"] = "Bearer"
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach ``host``: all of 127.0.0.0/8 is this machine."""
    if host in LOOPBACK:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def make_app(
    config: ServeConfig, adapters: Adapters, answerer: Answerer, token: str | None, observe: Observe | None = None,
    thinker: ThoughtAnswerer | None = None, galleries: Mapping[str, Gallery] | None = None,
) -> FastAPI:  # fmt: skip
    """Return the HTTP application.

    Args:
        config: Limits and address.
        adapters: What ``/v1/adapters`` says.
        answerer: Answers the queries.
        token: That every request must bring; None: none is needed.
        observe: Called at the end of each request of answers.
        thinker: Answers by ThinkDiff; None: neither its route nor its tab is there.
        galleries: Example pairs to choose from, by adapter; None: there are none.
    """
    app = FastAPI(
        title="covray",
        version=covray.__version__,
        description="Example chains and a query picture in; frames, then the answer, out.",
        docs_url=None,  # FastAPI's own pages load their scripts from another host
        redoc_url=None,
    )
    if token is not None:
        # Before any route: a path that is not there is refused alike, and tells nothing of what is.
        app.add_middleware(_RequireToken, token=token)
    elif is_loopback(config.host):
        # A page of another host, whose name leads to this machine, must not reach the server through a browser.
        own = f"[{config.host}]" if ":" in config.host else config.host
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", own])
    app.add_exception_handler(RefusedError, _on_refused)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    counters = Counters()
    slots = Slots(config.limits.queue, counters, observe)
    _add_pages(app, read_page("think.html") if thinker else "")
    _add_answers(app, config, adapters, answerer, counters, slots)
    _add_gallery(app, adapters, galleries or {})
    if thinker is not None:
        add_thoughts(app, config.limits, thinker, slots)
    return app


def _add_answers(
    app: FastAPI, config: ServeConfig, adapters: Adapters, answerer: Answerer, counters: Counters, slots: Slots
) -> None:
    """Add the routes that answer."""
    seconds = config.limits.time_s
    names = [adapter.name for adapter in adapters.adapters]

    @app.get("/v1/adapters")
    async def list_adapters() -> Adapters:
        """Return the adapters that answer, and the tasks."""
        return adapters

    @app.get("/healthz", response_class=PlainTextResponse)
    async def health() -> str:
        """Return 200 while the server takes requests."""
        return "ok\n"

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> bytes:
        """Return the counters in Prometheus' text format."""
        return generate_latest(counters.registry)

    @app.post("/v1/answers", response_model=AnswerResponse, openapi_extra={"requestBody": _request_body()})
    async def answer(request: Request) -> Response:
        """Answer a query. With ``accept: text/event-stream`` each picture is sent as soon as it is written."""
        with slots.take() as slot:
            # Read with the slot taken: a body that arrives slowly is memory, too.
            query = await read_query(request, config, names)
            # From here on: the body had a limit of its own.
            deadline = asyncio.get_running_loop().time() + seconds
            if "text/event-stream" in request.headers.get("accept", ""):
                events = await _started(answerer.stream(query), deadline, seconds)
                counters.answers.labels(query.adapter).inc()
                return _EventStream(events, slot.keep())
            async with InTime(deadline, seconds):
                result = await answerer.answer(query)
            if isinstance(result, Refusal):
                raise RefusedError(422, result.reason, result.message)
            counters.answers.labels(query.adapter).inc()
            return _json(result)


def _add_gallery(app: FastAPI, adapters: Adapters, galleries: Mapping[str, Gallery]) -> None:
    """Add the route of example pairs. Names are looked up in what was read at the start; no file is opened."""
    names = [adapter.name for adapter in adapters.adapters]

    @app.get("/v1/gallery")
    async def show_gallery(adapter: str, task: str) -> GalleryPairs:
        """Return training pairs of an adapter's task, which a request may send as its examples."""
        if adapter not in names:
            raise RefusedError(404, "unknown_adapter", f"adapter: there is no {adapter[:80]}; give one of /v1/adapters")
        return GalleryPairs(pairs=galleries.get(adapter, {}).get(task, ()))


async def _started(events: AsyncIterator[Event], deadline: float, seconds: float) -> AsyncGenerator[str, None]:
    """Return the rest of a stream whose first event is no refusal. Raises RefusedError."""
    async with InTime(deadline, seconds):
        first = await anext(events)
    if isinstance(first, Refusal):
        raise RefusedError(422, first.reason, first.message)
    return _as_text(first, events, deadline, seconds)


async def _as_text(
    first: Event, events: AsyncIterator[Event], deadline: float, seconds: float
) -> AsyncGenerator[str, None]:
    """Yield each event as Server-Sent Events write it."""
    async with aclosing(events):  # type: ignore[type-var]
        event: Event | None = first
        while event is not None:
            yield _event_text(event)
            try:
                async with InTime(deadline, seconds):
                    event = await anext(events, None)
            except RefusedError as error:
                yield _event_text(error.refusal)
                return


def _event_text(event: Event) -> str:
    names = {Frame: "frame", AnswerResponse: "answer", Refusal: "error"}
    return f"event: {names[type(event)]}\ndata: {event.model_dump_json()}\n\n"


def _request_body() -> dict[str, Any]:
    """Return what OpenAPI says of the body, which is read by hand because of its limits."""
    schema = AnswerRequest.model_json_schema()
    picture = {"type": "string", "format": "binary"}
    parts = {
        "query": picture,
        "example_image": {"type": "array", "items": picture},
        "example_label": {"type": "array", "items": picture},
        "settings": {"type": "string", "description": "JSON: the other fields of the JSON request."},
    }
    form = {"type": "object", "properties": parts, "required": ["query"]}
    return {
        "required": True,
        "content": {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}},
    }


def read_page(name: str) -> str:
    """Return a file of ``web/``."""
    return files("covray.serve").joinpath("web", name).read_text(encoding="utf-8")


def _add_pages(app: FastAPI, tabs: str) -> None:
    """Add the pages for people, which load nothing from elsewhere; ``tabs`` is HTML at the end of the first."""
    page = read_page("index.html") + read_page("downloads.html") + tabs

    @app.get("/", include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": _PAGE_POLICY})

    @app.get("/docs", include_in_schema=False)
    async def show_reference() -> HTMLResponse:
        return HTMLResponse(_reference_page(app.openapi()), headers={"content-security-policy": _PAGE_POLICY})


def _reference_page(document: dict[str, Any]) -> str:
    """Return the OpenAPI document as a page: each route with what it takes."""
    sections = []
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            text = html.escape(route.get("description", route.get("summary", "")))
            sections.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{text}</p>")
            for kind, content in route.get("requestBody", {}).get("content", {}).items():
                sections.append(f"<h3>{html.escape(kind)}</h3>{_fields_table(content['schema'])}")
    for name, schema in document.get("components", {}).get("schemas", {}).items():
        sections.append(f"<h2>{html.escape(name)}</h2>{_fields_table(schema)}")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        "<title>covray: HTTP</title><style>:root{color-scheme:light dark}body{font:1rem/1.5 system-ui,sans-serif;"
        "max-width:56rem;margin:2rem auto;padding:0 1rem}td{padding:.2rem 1rem .2rem 0;vertical-align:top}</style>"
        f"<h1>covray: HTTP</h1><p>The document itself: <a href=openapi.json>openapi.json</a>.</p>{''.join(sections)}"
    )


def _fields_table(schema: dict[str, Any]) -> str:
    """Return the fields of an object as a table."""
    rows = []
    for name, field in schema.get("properties", {}).items():
        kind = field.get("type", field.get("$ref", "").rpartition("/")[2])
        cells = (name, kind, field.get("description", ""))
        rows.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
    return f"<table>{''.join(rows)}</table>"


def _json(body: BaseModel, status: int = 200) -> Response:
    return Response(body.model_dump_json() + "\n", status, media_type="application/json")


def _refusal(error: RefusedError) -> Response:
    return _json(error.refusal, error.status)


async def _on_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return _refusal(error)


async def _on_invalid(request: Request, error: Exception) -> Response:
    """Return what FastAPI finds wrong with an address, as every refusal is."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return _json(Refusal(reason="invalid", message=f"{first['loc'][-1]}: {first['msg']}; see /docs"), 422)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Return what Starlette refuses, as every refusal is."""
    assert isinstance(error, HTTPException)
    reason = _REASONS.get(error.status_code, "invalid")
    return _json(Refusal(reason=reason, message=str(error.detail)), error.status_code)
