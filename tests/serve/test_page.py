"""The server's page in a real browser: pictures in, frames one after another, and the answer as data."""

from __future__ import annotations

import base64
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from covray.config import ServeConfig
from covray.io.images import encode_png
from covray.serve.answering import Query
from covray.serve.http_api import Event, make_app
from covray.serve.schemas import AdapterInfo, Adapters, AnswerResponse, Frame, Refusal
from covray.tasks import TASKS, depth
from tests.support.browser import served, watched_tab
from tests.support.commands import free_port

pytestmark = pytest.mark.end_to_end
METRES = np.tile(np.linspace(1, 5, 64, dtype=np.float32), (64, 1))
"""The depth that is answered: it grows from left to right."""


def png(grey: int) -> str:
    return base64.b64encode(encode_png(np.full((64, 64, 3), grey, np.uint8))).decode()


class Painter:
    """Writes one frame, waits until it was seen, and writes the rest."""

    def __init__(self) -> None:
        self.seen = threading.Event()
        self.asked: list[Query] = []

    def _answer(self, query: Query, frames: tuple[str, ...], spread: str | None) -> AnswerResponse:
        drawn = depth.render(METRES)
        data = {name: base64.b64encode(content).decode() for name, content in depth.export(drawn).items()}
        picture = base64.b64encode(encode_png(drawn)).decode()
        return AnswerResponse(
            adapter=query.adapter, task="depth", seed=0, query=png(90), frames=frames, picture=picture, spread=spread,
            data=data, samples=query.sampling.candidates, candidate=0, log_likelihood=(-1.0,),
        )  # fmt: skip

    async def answer(self, query: Query) -> AnswerResponse | Refusal:
        self.asked.append(query)
        if query.seed == 13:
            return Refusal(reason="refused", message="<b>not</b> with this seed")
        return self._answer(query, (png(100), png(140)), png(30))

    async def stream(self, query: Query) -> AsyncIterator[Event]:
        self.asked.append(query)
        if query.seed == 13:
            yield Refusal(reason="refused", message="<b>not</b> with this seed")
            return
        yield Frame(number=0, is_answer=False, picture=png(100))
        await anyio.to_thread.run_sync(self.seen.wait)
        yield Frame(number=1, is_answer=False, picture=png(140))
        yield Frame(number=2, is_answer=True, picture=png(180))
        yield self._answer(query, (), None)


@pytest.fixture
def painter() -> Painter:
    return Painter()


@pytest.fixture
def address(painter: Painter) -> Iterator[str]:
    port = free_port()
    config = ServeConfig.model_validate({"adapters": ["run"], "port": port})
    adapters = Adapters(
        adapters=(AdapterInfo(name="run", task="depth", pictures=4, classes=None),), tasks=tuple(TASKS)
    )  # fmt: skip
    app = make_app(config, adapters, painter, None)
    with served(app, port) as address:
        yield address
        painter.seen.set()


@pytest.fixture
def page(address: str, browser: Browser) -> Iterator[Page]:
    """The page, from which no request may leave for another host."""
    with watched_tab(browser, address) as tab:
        tab.goto(address)
        yield tab


def test_frames_show_before_the_answer_is_written(page: Page, painter: Painter, tmp_path: Path) -> None:
    picture = tmp_path / "room.png"
    Image.new("RGB", (64, 64), (90, 120, 90)).save(picture)
    page.get_by_label("Drop a picture").set_input_files(picture)
    page.get_by_label("Example 1: picture").set_input_files(picture)
    page.get_by_label("Example 1: its label").set_input_files(picture)
    page.get_by_role("button", name="Answer", exact=True).click()
    expect(page.get_by_alt_text("frame 1")).to_be_visible()
    assert page.get_by_alt_text("answer", exact=True).count() == 0, "the answer is not written yet"
    painter.seen.set()
    expect(page.get_by_alt_text("answer", exact=True)).to_be_visible()
    (query,) = painter.asked
    assert (query.adapter, query.task, len(query.examples), query.seed) == ("run", None, 1, 0)

    compare = page.locator("#compare")
    box = compare.bounding_box()
    assert box is not None
    compare.hover(position={"x": box["width"] * 0.75, "y": box["height"] / 2})
    reading = page.locator("#reading").inner_text()
    assert float(reading.split()[0]) == pytest.approx(METRES[32, 48], abs=0.1)
    page.get_by_label("Answer over picture").fill("25")
    assert "75%" in str(page.locator("#above").get_attribute("style"))
    with page.expect_download() as download:
        page.get_by_role("link", name="depth_m.npy").click()
    assert np.allclose(np.load(download.value.path()), METRES, atol=0.05)


def test_a_vote_shows_where_candidates_disagree_and_a_refusal_is_text(
    page: Page, painter: Painter, tmp_path: Path
) -> None:
    picture = tmp_path / "room.png"
    Image.new("RGB", (64, 64), (90, 120, 90)).save(picture)
    answer = page.get_by_role("button", name="Answer", exact=True)
    answer.click()
    expect(page.get_by_role("status")).to_have_text("Give a picture to answer.")
    page.get_by_label("Drop a picture").set_input_files(picture)
    page.get_by_label("Candidates").fill("4")
    answer.click()
    expect(page.get_by_alt_text("Spread of the candidates")).to_be_visible()
    assert painter.asked[-1].sampling.vote == 4
    for scheme in ("light", "dark"):
        for width in (1100, 400):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is cut off"
            page.screenshot(path=tmp_path / f"{scheme}-{width}.png", full_page=True)
            assert np.array(Image.open(tmp_path / f"{scheme}-{width}.png").convert("L")).std() > 5
    page.get_by_label("Seed").fill("13")
    answer.click()
    expect(page.get_by_role("status")).to_have_text("<b>not</b> with this seed")
