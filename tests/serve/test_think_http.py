"""The route of ThinkDiff: what is asked, what is refused, and nothing at all where no folder is given."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from covray.config import ServeConfig
from covray.serve.http_api import make_app
from covray.serve.schemas import Refusal, ThoughtResponse
from covray.serve.thinking import ThoughtQuery
from tests.serve.test_http import ADAPTERS, LOCAL, TOKEN, Echo, get, picture, refused, text

ONE = text(picture())


class Echoing:
    """Thinks the words that it was asked; remembers what it was asked."""

    def __init__(self, variant: str = "lvlm") -> None:
        self.variant = variant
        self.asked: list[ThoughtQuery] = []
        self.refusal: Refusal | None = None
        self.seconds = 0.0
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def think(self, query: ThoughtQuery) -> ThoughtResponse | Refusal:
        self.asked.append(query)
        await self.go_on.wait()
        await asyncio.sleep(self.seconds)
        return self.refusal or ThoughtResponse(text=" ".join(query.words) or query.prompt, pictures=("",))


def served(thinker: Echoing | None, token: str | None = None, **options: Any) -> FastAPI:
    config = ServeConfig.model_validate({"adapters": ["run"]} | options)
    return make_app(config, ADAPTERS, Echo(), token, thinker=thinker)


def post(app: FastAPI, base: str = LOCAL, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=base) as http:
            return await http.post("/v1/thoughts", **options)

    return asyncio.run(send())


def test_json_and_multipart_ask_the_same() -> None:
    thinker = Echoing()
    app = served(thinker)
    shown = [picture(7), picture(9)]
    settings = {"words": ["red", "blue", "green"], "route": "text"}
    first = post(app, json=settings | {"pictures": [text(one) for one in shown]})
    parts = [("picture", (f"{number}.png", one)) for number, one in enumerate(shown)]
    second = post(app, files=parts, data={"settings": json.dumps(settings)})
    assert first.status_code == second.status_code == 200, (first.text, second.text)
    assert first.json() == second.json() == {"text": "red blue green", "pictures": [""]}
    one, other = thinker.asked
    assert (one.words, one.prompt, one.is_bridge) == (other.words, other.prompt, other.is_bridge)
    for own, its in zip(one.pictures, other.pictures, strict=True):
        np.testing.assert_array_equal(own, its)
    assert [own.shape for own in one.pictures] == [(4, 7, 3), (4, 9, 3)]


SMALL = {"limits": {"bytes": 4096, "pixels": 100, "examples": 1}}


@pytest.mark.parametrize(
    ("variant", "body", "status", "reason", "message"),
    [
        ("lvlm", {"prompt": "what", "pictures": [text(b"hello")]}, 415, "not_an_image", "pictures.0: "),
        ("lvlm", {"prompt": "what", "pictures": [text(picture(40, 40))]}, 413, "too_large", "pictures.0: "),
        ("lvlm", {"prompt": "what", "pictures": [text(bytes(9000))]}, 413, "too_large", "4096 bytes"),
        ("lvlm", {"prompt": "what", "pictures": 2 * [ONE]}, 422, "too_many_pictures", "2 pictures, at most 1"),
        ("lvlm", {"pictures": [ONE]}, 422, "invalid", "nothing is asked"),
        ("lvlm", {"prompt": " "}, 422, "invalid", "nothing is asked"),
        ("lvlm", {"words": ["a", "b", "c"], "pictures": [ONE]}, 422, "invalid", "3 words for 1 pictures"),
        ("lvlm", {"words": ["a", "b"], "prompt": "c", "pictures": [ONE]}, 422, "invalid", "send one of them"),
        ("lvlm", {"prompt": "a" * 2001}, 422, "invalid", "prompt: "),
        ("lvlm", {"words": ["a" * 201]}, 422, "invalid", "words.0: "),
        ("lvlm", {"prompt": "what", "colour": "red"}, 422, "invalid", "colour: "),
        ("clip", {"prompt": "what"}, 422, "invalid", "send at least one"),
        ("clip", {"words": ["a", "b"], "pictures": [ONE]}, 422, "invalid", "writes no text"),
        ("clip", {"route": "text", "pictures": [ONE]}, 422, "invalid", "writes no text"),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_by_its_reason(
    variant: str, body: dict[str, Any], status: int, reason: str, message: str
) -> None:
    thinker = Echoing(variant)
    assert message in refused(post(served(thinker, **SMALL), json=body), status, reason)
    assert thinker.asked == []


def test_a_form_with_another_part_is_refused() -> None:
    parts = [("picture", ("a", picture())), ("more", ("m", picture()))]
    assert "more: " in refused(post(served(Echoing()), files=parts), 422, "invalid")


def test_what_the_models_refuse_and_a_late_answer_are_no_answers() -> None:
    thinker = Echoing()
    thinker.refusal = Refusal(reason="refused", message="the text is too long")
    assert refused(post(served(thinker), json={"prompt": "what"}), 422, "refused") == "the text is too long"
    thinker.seconds = 60
    app = served(thinker, limits={"time_s": 0.05, "queue": 1})
    for _ in range(2):  # the slot of the first is free again
        assert "send fewer pictures" in refused(post(app, json={"prompt": "what"}), 504, "too_late")


def test_thoughts_and_answers_share_the_queue() -> None:
    async def crowd() -> httpx.Response:
        thinker = Echoing()
        thinker.go_on.clear()
        transport = httpx.ASGITransport(served(thinker, limits={"queue": 1}))
        async with httpx.AsyncClient(transport=transport, base_url=LOCAL) as http:
            waiting = asyncio.create_task(http.post("/v1/thoughts", json={"prompt": "what"}))
            while not thinker.asked:
                await asyncio.sleep(0.01)
            beyond = await http.post("/v1/answers", json={"query": ONE})
            thinker.go_on.set()
            assert (await waiting).status_code == 200
        return beyond

    refused(asyncio.run(crowd()), 503, "queue_full")


def test_the_token_and_the_name_of_the_host_are_required() -> None:
    refused(post(served(Echoing(), TOKEN), json={"prompt": "what"}), 401, "token")
    assert post(served(Echoing()), "http://other.example", json={"prompt": "what"}).status_code == 400


def test_without_a_folder_there_is_neither_a_route_nor_a_tab() -> None:
    without, beside = served(None), served(Echoing("clip"), limits={"examples": 3})
    refused(post(without, json={"prompt": "what"}), 404, "not_found")
    assert "think" not in get(without, "/").text
    assert 'id="tab-think"' in get(beside, "/").text
    assert get(beside, "/v1/thinker").json() == {"variant": "clip", "pictures": 3}
    assert "/v1/thoughts" in get(beside, "/docs").text
