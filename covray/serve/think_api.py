"""The route of ThinkDiff: pictures and words in, a text and a drawn answer out. Knows no ray."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import Response

from covray.config.serve import LimitsConfig
from covray.serve.reading import RefusedError, read_asked, read_parts, read_picture
from covray.serve.schemas import Refusal, ThinkInfo, ThoughtRequest, ThoughtResponse, ThoughtSettings
from covray.serve.slots import InTime, Slots
from covray.serve.thinking import ThoughtQuery


class ThoughtAnswerer(Protocol):
    """What thinks: a replica of Ray Serve, or in a test models of this process."""

    variant: str
    """``lvlm`` or ``clip``."""

    async def think(self, query: ThoughtQuery) -> ThoughtResponse | Refusal:
        """Return what is thought and drawn, or why nothing is."""


def add_thoughts(app: FastAPI, limits: LimitsConfig, thinker: ThoughtAnswerer, slots: Slots) -> None:
    """Add the routes.

    Args:
        app: The application.
        limits: Of a request.
        thinker: Answers.
        slots: Those of all requests.
    """

    @app.get("/v1/thinker")
    async def describe() -> ThinkInfo:
        """Return whose thoughts are drawn."""
        return ThinkInfo(variant=thinker.variant, pictures=limits.examples)

    @app.post("/v1/thoughts", response_model=ThoughtResponse, openapi_extra={"requestBody": _request_body()})
    async def think(request: Request) -> Response:
        """Let a vision-language model think about pictures and words, and draw what it thought."""
        with slots.take():
            query = await read_thought(request, limits, thinker.variant)
            deadline = asyncio.get_running_loop().time() + limits.time_s
            async with InTime(deadline, limits.time_s, "send fewer pictures"):
                result = await thinker.think(query)
            if isinstance(result, Refusal):
                raise RefusedError(422, result.reason, result.message)
            return Response(result.model_dump_json() + "\n", media_type="application/json")


async def read_thought(request: Request, limits: LimitsConfig, variant: str) -> ThoughtQuery:
    """Return what a request asks, with its pictures decoded.

    Args:
        request: JSON or multipart.
        limits: Of it.
        variant: Whose thoughts are drawn.

    Raises:
        RefusedError: The request exceeds a limit, cannot be read, or asks what the models cannot do.
    """
    asked = await read_asked(request, limits, ThoughtRequest, _read_form)
    count = len(asked.pictures)
    if count > limits.examples:
        raise RefusedError(
            422, "too_many_pictures", f"pictures: {count} pictures, at most {limits.examples} are accepted"
        )
    problem = _problem(asked, variant)
    if problem is not None:
        raise RefusedError(422, "invalid", problem)
    return await asyncio.to_thread(_decoded, asked, limits.pixels)


def _problem(asked: ThoughtRequest, variant: str) -> str | None:
    """Return what these models cannot do of what is asked."""
    count = len(asked.pictures)
    if variant == "clip":
        if not count:
            return "pictures: there is none; send at least one"
        if asked.words or asked.route == "text":
            return "words: this is a vision tower, which writes no text; send pictures, and a prompt to obey"
        return None
    if asked.words and asked.prompt:
        return "prompt: does not go with words; send one of them"
    if asked.words and len(asked.words) != count + 1:
        return f"words: {len(asked.words)} words for {count} pictures; send one for each, and one to ask for"
    if not any(text.strip() for text in (*asked.words, asked.prompt)):
        return "prompt: nothing is asked; send a prompt, or a word for each picture and one to ask for"
    return None


async def _read_form(request: Request, body: bytes, limits: LimitsConfig) -> ThoughtRequest:
    """Read a multipart body: files ``picture``, and ``settings`` as JSON."""
    contents, text = await read_parts(request, body, ("picture",), limits.examples + 1, limits.bytes)
    settings = ThoughtSettings.model_validate_json(text)
    chosen = {name: getattr(settings, name) for name in ThoughtSettings.model_fields}
    # The pictures are bytes already: validation would read them as base64.
    return ThoughtRequest.model_construct(**chosen, pictures=tuple(contents["picture"]))


def _decoded(asked: ThoughtRequest, max_pixels: int) -> ThoughtQuery:
    pictures = [read_picture(f"pictures.{number}", data, max_pixels) for number, data in enumerate(asked.pictures)]
    return ThoughtQuery(tuple(pictures), asked.words, asked.prompt, asked.route == "text")


def _request_body() -> dict[str, Any]:
    """Return what OpenAPI says of the body, which is read by hand because of its limits."""
    parts = {
        "picture": {"type": "array", "items": {"type": "string", "format": "binary"}},
        "settings": {"type": "string", "description": "JSON: the other fields of the JSON request."},
    }
    content = {
        "application/json": {"schema": ThoughtRequest.model_json_schema()},
        "multipart/form-data": {"schema": {"type": "object", "properties": parts}},
    }
    return {"required": True, "content": content}
