"""An HTTP request read as a query, within the limits. What clients send is untrusted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.requests import ClientDisconnect
from starlette.types import Message

from covray.config import ServeConfig
from covray.config.serve import LimitsConfig
from covray.errors import PairError
from covray.generation.request import Example
from covray.io.images import decode
from covray.io.pixels import Picture
from covray.serve.answering import Query
from covray.serve.schemas import AnswerRequest, ExampleFiles, Refusal, Settings

_STATUS = {"too_large": 413, "not_an_image": 415, "unsupported": 415, "animated": 415}
"""Status of a picture's reason; 422 of the others."""
S = TypeVar("S", bound=BaseModel)


class RefusedError(Exception):
    """A request that is not answered."""

    def __init__(self, status: int, reason: str, message: str):
        """Say why, for a program (``reason``, one word) and for people (``message``)."""
        super().__init__(message)
        self.status = status
        self.refusal = Refusal(reason=reason, message=message)


async def read_query(request: Request, config: ServeConfig, adapters: Collection[str]) -> Query:
    """Return the query of a request, with its pictures decoded.

    Args:
        request: JSON or multipart.
        config: The limits, and the adapter of a request that names none.
        adapters: Names of those that answer.

    Raises:
        RefusedError: The request exceeds a limit or cannot be read.
    """
    limits = config.limits
    asked = await read_asked(request, limits, AnswerRequest, _read_form)
    name = asked.adapter or next(iter(adapters))
    if name not in adapters:
        raise RefusedError(404, "unknown_adapter", f"adapter: there is no {name[:80]}; give one of /v1/adapters")
    if len(asked.examples) > limits.examples:
        raise RefusedError(
            422, "too_many_examples", f"examples: {len(asked.examples)} pairs, at most {limits.examples} are accepted"
        )
    if asked.sampling.candidates > limits.candidates:
        raise RefusedError(
            422,
            "too_many_candidates",
            f"sampling: {asked.sampling.candidates} candidates, at most {limits.candidates} are accepted",
        )
    # On a thread: decoding large pictures would hold up every other request.
    return await asyncio.to_thread(_decoded, asked, name, limits.pixels)


async def read_asked(
    request: Request, limits: LimitsConfig, model: type[S],
    read_form: Callable[[Request, bytes, LimitsConfig], Awaitable[S]],
) -> S:  # fmt: skip
    """Return what a request asks, of which no more than the limit is read.

    Args:
        request: JSON or multipart.
        limits: The limits.
        model: Of the JSON.
        read_form: Reads a multipart body.

    Raises:
        RefusedError: The request exceeds a limit or cannot be read.
    """
    body = await _read_body(request, limits)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == "application/json":
            return await asyncio.to_thread(model.model_validate_json, body)
        if kind == "multipart/form-data":
            return await read_form(request, body, limits)
    except ValidationError as error:
        entry = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in entry["loc"]) or "body"
        raise RefusedError(422, "invalid", f"{where}: {entry['msg']}; see /docs") from error
    raise RefusedError(
        415, "content_type", f"content-type {kind or '(none)'}: send application/json or multipart/form-data"
    )


async def _read_body(request: Request, limits: LimitsConfig) -> bytes:
    """Return the body, of which no more than the limit is ever kept. Raises RefusedError or ClientDisconnect."""
    too_large = RefusedError(413, "too_large", f"the body is larger than {limits.bytes} bytes; send smaller pictures")
    # An announced length is refused at once; without one, or with a lie, the limit ends the reading.
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.upload_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.bytes:
                    raise too_large
    except TimeoutError as error:
        raise RefusedError(
            408, "slow_upload", f"the body did not arrive in {limits.upload_s:g} s; send it again, faster or smaller"
        ) from error
    except (RefusedError, ClientDisconnect):
        raise
    except Exception as error:
        # Behind Ray Serve's proxy a client that leaves is any error of the call that fetches its body.
        raise ClientDisconnect from error
    return bytes(body)


async def _read_form(request: Request, body: bytes, limits: LimitsConfig) -> AnswerRequest:
    """Read a multipart body: files ``query``, ``example_image`` and ``example_label``, and ``settings`` as JSON."""
    pictures = 2 * limits.examples + 3  # one pair beyond the limit, so that it is refused as such
    names = ("query", "example_image", "example_label")
    contents, text = await read_parts(request, body, names, pictures, limits.bytes)
    queries, images, labels = (contents[name] for name in names)
    if len(queries) != 1:
        raise RefusedError(422, "invalid", f"query: {len(queries)} files; send one")
    if len(images) != len(labels):
        raise RefusedError(
            422, "invalid", f"examples: {len(images)} images and {len(labels)} labels; send one label for each image"
        )
    settings = Settings.model_validate_json(text)
    # The pictures are bytes already: validation would read them as base64.
    examples = []
    for image, label in zip(images, labels, strict=True):
        examples.append(ExampleFiles.model_construct(image=image, label=label))
    chosen = {name: getattr(settings, name) for name in Settings.model_fields}
    return AnswerRequest.model_construct(**chosen, query=queries[0], examples=tuple(examples))


async def read_parts(
    request: Request, body: bytes, names: Collection[str], most: int, size: int
) -> tuple[dict[str, list[bytes]], str]:
    """Return the picture files of a multipart body by the names of their parts, and its field ``settings``.

    Args:
        request: The request, whose body has been read.
        body: Its body.
        names: Parts that are files.
        most: Files, at most.
        size: Bytes of a field, at most.

    Raises:
        RefusedError: A part has an unknown name or is not a file, or there are too many.
    """

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async with Request(request.scope, receive).form(max_files=most, max_fields=1, max_part_size=size) as form:
        unknown = set(form) - {*names, "settings"}
        if unknown:
            raise RefusedError(422, "invalid", f"{min(unknown)[:80]}: is not a part of a request; see /docs")
        contents = {name: await _files(form, name) for name in names}
        text = form.get("settings", "{}")
    if not isinstance(text, str):
        raise RefusedError(422, "invalid", "settings: is a file; send JSON as a field")
    return contents, text


async def _files(form: FormData, name: str) -> list[bytes]:
    """Return the files of one part. Raises RefusedError for text."""
    contents = []
    for part in form.getlist(name):
        if not isinstance(part, UploadFile):
            raise RefusedError(422, "invalid", f"{name}: is text; send a picture file")
        contents.append(await part.read())
    return contents


def _decoded(asked: AnswerRequest, adapter: str, max_pixels: int) -> Query:
    """Return the query of a request, once all of its pictures are known to be pictures. Raises RefusedError."""
    picture = read_picture("query", asked.query, max_pixels)
    examples = []
    for number, example in enumerate(asked.examples):
        read_picture(f"examples.{number}.image", example.image, max_pixels)
        read_picture(f"examples.{number}.label", example.label, max_pixels)
        # Without a number in the name, so that equal examples of two requests are equal.
        examples.append(Example(example.image, example.label, "examples"))
    return Query(adapter, picture, tuple(examples), asked.task, asked.classes, asked.sampling, asked.seed)


def read_picture(where: str, data: bytes, max_pixels: int) -> Picture:
    """Return the pixels of a picture file. Raises RefusedError, which says ``where`` it stood."""
    try:
        return decode(data, max_pixels)
    except PairError as error:
        raise RefusedError(_STATUS.get(error.reason, 422), error.reason, f"{where}: {error}") from error
