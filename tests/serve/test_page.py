"""The server's page in a real browser: pictures in, frames one after another, and the answer as data."""

from __future__ import annotations

import base64
import io
import threading
import zipfile
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
from covray.serve.schemas import AdapterInfo, Adapters, AnswerResponse, Candidate, Frame, GalleryPair, Refusal
from covray.tasks import TASKS, depth
from tests.support.browser import require_fits_every_screen, served, watched_tab
from tests.support.commands import free_port

pytestmark = pytest.mark.end_to_end
METRES = np.tile(np.linspace(1, 5, 64, dtype=np.float32), (64, 1))
"""The depth that is answered: it grows from left to right."""


def png(grey: int) -> str:
    return base64.b64encode(encode_png(np.full((64, 64, 3), grey, np.uint8))).decode()


def gallery_pair(number: int) -> GalleryPair:
    """A room, and its depth."""
    columns, rows = np.meshgrid(np.arange(64), np.arange(64))
    floor = rows > 38 + number
    wall = np.where(floor[..., None], (150 - 8 * number, 120, 90), (200, 190 - 12 * number, 170 + 10 * number))
    metres = np.where(floor, 6 - (rows - 38) / 6, 5.5 - np.abs(columns - 10 * number) / 32)
    drawn = depth.render(metres.astype(np.float32))
    return GalleryPair.of(str(number), encode_png(wall.astype(np.uint8)), encode_png(drawn))


class Painter:
    """Writes one frame, waits until it was seen, and writes the rest."""

    def __init__(self) -> None:
        self.seen = threading.Event()
        self.asked: list[Query] = []

    def _answer(self, query: Query, frames: tuple[str, ...], spread: str | None) -> AnswerResponse:
        drawn = depth.render(METRES)
        data = {name: base64.b64encode(content).decode() for name, content in depth.export(drawn).items()}
        picture = base64.b64encode(encode_png(drawn)).decode()
        candidates = []
        if query.sampling.candidates > 1:
            for number in range(query.sampling.candidates):
                candidates.append(Candidate(picture=png(60 + 20 * number), log_likelihood=-9.0 - number))
        return AnswerResponse(
            adapter=query.adapter, task="depth", seed=0, query=png(90), frames=frames, picture=picture, spread=spread,
            data=data, samples=query.sampling.candidates, candidate=0, log_likelihood=(-1.0,),
            candidates=tuple(candidates),
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
    info = AdapterInfo(name="run", task="depth", pictures=4, classes=None, examples=3, gallery=("depth",))
    gallery = {"depth": tuple(gallery_pair(number) for number in range(6))}
    adapters = Adapters(adapters=(info,), tasks=tuple(TASKS))
    app = make_app(config, adapters, painter, None, galleries={"run": gallery})
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
    page.get_by_role("button", name="Add a pair of your own").click()
    page.get_by_label("Example 1: picture").set_input_files(picture)
    page.get_by_label("Example 1: its label").set_input_files(picture)
    page.get_by_role("button", name="Answer", exact=True).click()
    expect(page.get_by_alt_text("frame 1")).to_be_visible()
    assert page.get_by_alt_text("answer", exact=True).count() == 0, "the answer is not written yet"
    painter.seen.set()
    expect(page.get_by_alt_text("answer", exact=True)).to_be_visible()
    (query,) = painter.asked
    assert (query.adapter, query.task, len(query.examples), query.seed) == ("run", None, 3, 0)
    assert query.examples[2].image == picture.read_bytes()

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
    with page.expect_download() as download:
        page.get_by_role("link", name="all.zip").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert archive.testzip() is None
        names = ["query.png", "frame-1.png", "frame-2.png", "answer.png", "depth_m.npy"]
        assert sorted(archive.namelist()) == sorted(names)
        assert np.allclose(np.load(io.BytesIO(archive.read("depth_m.npy"))), METRES, atol=0.05)


def test_training_pairs_are_chosen_by_mouse_and_keyboard(page: Page, painter: Painter, tmp_path: Path) -> None:
    picture = tmp_path / "room.png"
    Image.new("RGB", (64, 64), (90, 120, 90)).save(picture)
    pairs = page.get_by_role("button", name="Training pair")
    expect(pairs).to_have_count(6)
    expect(page.get_by_role("button", name="Training pair", pressed=True)).to_have_count(2)
    pairs.nth(4).click()
    assert pairs.nth(4).get_attribute("aria-label") == "Training pair 5, shown as example 3"
    expect(pairs.nth(5)).to_be_disabled()  # three fit the model's context
    pairs.nth(0).focus()
    page.keyboard.press("Space")  # no longer an example
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    chosen = [number for number in range(6) if pairs.nth(number).get_attribute("aria-pressed") == "true"]
    assert chosen == [1, 2, 4]
    page.get_by_label("Drop a picture").set_input_files(picture)
    painter.seen.set()
    page.get_by_role("button", name="Answer", exact=True).click()
    expect(page.get_by_alt_text("answer", exact=True)).to_be_visible()
    expected = [base64.b64decode(gallery_pair(number).image) for number in (1, 4, 2)]
    assert [example.image for example in painter.asked[-1].examples] == expected, "in the chosen order"
    page.get_by_label("Task").select_option("pose")
    expect(pairs).to_have_count(0)
    expect(page.get_by_label("Example 1: picture")).to_be_attached()


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
    page.get_by_label("Answer is").select_option("best_of")
    answer.click()
    expect(page.get_by_role("status")).to_contain_text("Answered")
    assert painter.asked[-1].sampling.best_of == 4
    captions = page.locator("#written-strip figcaption").all_inner_texts()
    assert captions == ["log p -9.0, chosen", "log p -10.0", "log p -11.0", "log p -12.0"]
    require_fits_every_screen(page, tmp_path)
    page.get_by_label("Seed").fill("13")
    answer.click()
    expect(page.get_by_role("status")).to_have_text("<b>not</b> with this seed")
