"""The tab "Think" in a real browser: pictures and words in, the model's text and the drawn answer out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from covray.config import ServeConfig
from covray.io.images import decode
from covray.serve.http_api import make_app
from covray.serve.schemas import Refusal, ThoughtResponse
from covray.serve.thinking import ThoughtQuery
from tests.serve.test_http import ADAPTERS, TOKEN, Echo
from tests.serve.test_page import png
from tests.support.browser import require_fits_every_screen, served, watched_tab
from tests.support.commands import free_port

pytestmark = pytest.mark.end_to_end


class Thinker:
    """Thinks aloud of the last word."""

    def __init__(self, variant: str) -> None:
        self.variant = variant
        self.asked: list[ThoughtQuery] = []

    async def think(self, query: ThoughtQuery) -> ThoughtResponse | Refusal:
        self.asked.append(query)
        if query.prompt == "no":
            return Refusal(reason="refused", message="<b>not</b> this")
        if self.variant == "clip":
            return ThoughtResponse(text=None, pictures=(png(120),))
        said = f"Create an image of a {query.words[-1] if query.words else 'thing'} & <i>nothing</i> else."
        return ThoughtResponse(text=said, pictures=(png(120),))


@pytest.fixture(params=["lvlm"])
def thinker(request: pytest.FixtureRequest) -> Thinker:
    return Thinker(request.param)


@pytest.fixture
def page(thinker: Thinker, browser: Browser) -> Iterator[Page]:
    """The page of a server with a token, from which no request may leave for another host."""
    port = free_port()
    config = ServeConfig.model_validate({"adapters": ["run"], "port": port, "limits": {"examples": 3}})
    app = make_app(config, ADAPTERS, Echo(), TOKEN, thinker=thinker)
    with served(app, port) as address, watched_tab(browser, address) as tab:
        tab.goto(address)
        yield tab


def open_tab(page: Page) -> None:
    """Give the token on the first tab, and go to the other by keyboard."""
    page.get_by_label("Token").fill(TOKEN)
    page.get_by_role("tab", name="Answers").press("ArrowRight")
    expect(page.get_by_role("tab", name="Think")).to_be_focused()
    assert page.locator("#form").is_hidden()


def shown(folder: Path, name: str, colour: tuple[int, int, int]) -> Path:
    Image.new("RGB", (64, 64), colour).save(folder / f"{name}.png")
    return folder / f"{name}.png"


def test_words_and_pictures_give_a_text_and_a_picture(page: Page, thinker: Thinker, tmp_path: Path) -> None:
    open_tab(page)
    think = page.get_by_role("button", name="Think", exact=True)
    status = page.locator("#think-message")
    page.get_by_label("Picture 1").set_input_files(shown(tmp_path, "red", (200, 40, 40)))
    think.click()
    expect(status).to_have_text("Picture 1 lacks its word.")
    page.get_by_label("Word 1").fill("red")
    page.get_by_label("Picture 2").set_input_files(shown(tmp_path, "blue", (40, 60, 200)))
    page.get_by_label("Word 2").fill("blue")
    think.click()
    expect(status).to_have_text("Give pictures with their words, and a word to ask for.")
    assert thinker.asked == []
    page.get_by_label("Word to ask for").fill("green")
    think.click()
    expect(page.get_by_alt_text("the drawn answer")).to_be_visible()
    assert page.locator("#think-text").inner_text() == "Create an image of a green & <i>nothing</i> else."
    (query,) = thinker.asked
    assert (query.words, query.prompt, query.is_bridge) == (("red", "blue", "green"), "", False)
    assert [picture[0, 0].tolist() for picture in query.pictures] == [[200, 40, 40], [40, 60, 200]]
    with page.expect_download() as download:
        page.get_by_role("link", name="answer-1.png").click()
    np.testing.assert_array_equal(decode(download.value.path().read_bytes()), np.full((64, 64, 3), 120))

    page.get_by_role("button", name="Add a picture").click()
    assert page.get_by_role("button", name="Add a picture").is_disabled(), "the server takes three"
    require_fits_every_screen(page, tmp_path)

    page.get_by_role("combobox", name="Ask by").select_option("prompt")
    page.get_by_role("combobox", name="Draw").select_option("text")
    page.get_by_role("textbox", name="Question").fill("no")
    think.click()
    expect(status).to_have_text("<b>not</b> this")
    assert (thinker.asked[-1].words, thinker.asked[-1].is_bridge) == ((), True)


@pytest.mark.parametrize("thinker", ["clip"], indirect=True)
def test_a_tower_takes_pictures_and_words_to_obey(page: Page, thinker: Thinker, tmp_path: Path) -> None:
    open_tab(page)
    expect(page.get_by_label("Words to obey")).to_be_visible()
    assert page.get_by_label("Ask by").is_hidden()
    page.get_by_role("button", name="Think", exact=True).click()
    expect(page.locator("#think-message")).to_have_text("Give a picture.")
    page.get_by_label("Picture 1").set_input_files(shown(tmp_path, "red", (200, 40, 40)))
    page.get_by_label("Words to obey").fill("in the desert")
    page.get_by_role("button", name="Think", exact=True).click()
    expect(page.get_by_alt_text("the drawn answer")).to_be_visible()
    assert page.locator("#think-wrote").is_hidden()
    (query,) = thinker.asked
    assert (query.words, query.prompt, len(query.pictures)) == ((), "in the desert", 1)
