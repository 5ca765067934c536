"""The list of all pairs in a real browser: filters, orders, 100,000 rows, what a row opens to, a build that goes on."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from covray.chains.dataset import ChainDataset
from covray.chains.shard_rows import shard_schema
from covray.report.dataset import render_page, view
from covray.report.dataset_server import DatasetServer
from covray.report.pair_rows import COLUMNS
from tests.support.browser import watched_tab

pytestmark = pytest.mark.end_to_end
Writer = Callable[..., tuple[str, list[dict[str, Any]]]]
TASKS, SPLITS = ("depth", "edges", "pose"), ("train", "val", None)
REASONS = (None, None, None, "missing: <b>gone</b>", "no_person")
FIGURES = ("diffusion_path", "end_psnr", "label_noise_rms")


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A tab from which no request may leave the machine, and whose script may not fail."""
    with watched_tab(browser, "file:", "http://127.0.0.1:", viewport={"width": 1200, "height": 900}) as tab:
        yield tab


def random_rows(count: int) -> list[dict[str, Any]]:
    """Rows of a list, with figures that are often equal or unknown."""
    dice = random.Random(0)
    rows = []
    for _ in range(count):
        psnr = dice.choice([None, 20.0, 25.0])
        figures = {
            "diffusion_path": dice.choice([None, 1.0, 1.5, 2.25]),
            "source_psnr": psnr,
            "label_psnr": dice.choice([None, 15.0, 30.0]),
            "label_noise_rms": dice.random(),
        }
        rows.append(
            {
                "pair_id": dice.getrandbits(63) - 2**62,
                "task": dice.choice(TASKS),
                "split": dice.choice(SPLITS),
                "quality": figures,
                "error": dice.choice(REASONS),
            }
        )
    return rows


def write_list(dataset: ChainDataset, rows: list[dict[str, Any]], path: Path) -> str:
    """Write a page that lists ``rows``, and return its address."""
    schema = shard_schema(keep_noise=False)
    table = pa.Table.from_pylist(rows, pa.schema([schema.field(name) for name in COLUMNS]))
    path.write_bytes(render_page(dataset, [], table))
    return path.as_uri()


def figure_of(row: dict[str, Any], name: str) -> float:
    names = ("source_psnr", "label_psnr") if name == "end_psnr" else (name,)
    known = [row["quality"][each] for each in names if row["quality"][each] is not None]
    return min(known, default=math.nan)


def expected(rows: list[dict[str, Any]], asked: dict[str, str]) -> list[str]:
    """The ids that the list must show for a filter, in its order: the property, written again without the page."""
    kept = []
    for row in rows:
        reason = (row["error"] or "").partition(":")[0]
        if asked["task"] not in ("", row["task"]) or asked["split"] not in ("", row["split"]):
            continue
        if asked["state"] and not (
            asked["state"] == {"": "good"}.get(reason, "rejected") or asked["state"] == f"={reason}"
        ):
            continue
        bounds = [(asked["from"], 1), (asked["to"], -1)]
        figure = figure_of(row, asked["figure"])
        if all(not text or sign * (np.float32(figure) - float(text)) >= 0 for text, sign in bounds):
            kept.append(row)
    down = asked["order"] == "down"
    if not asked["sort"]:
        kept.reverse() if down else None
    elif asked["sort"] == "id":
        kept.sort(key=lambda row: row["pair_id"], reverse=down)
    else:
        known = [row for row in kept if not math.isnan(figure_of(row, asked["sort"]))]
        unknown = [row for row in kept if math.isnan(figure_of(row, asked["sort"]))]
        sign = -1 if down else 1
        kept = sorted(known, key=lambda row: sign * np.float32(figure_of(row, asked["sort"]))) + unknown
    return [str(row["pair_id"]) for row in kept]


def test_filters_and_orders_are_those_of_the_rows(page: Page, write_dataset: Writer, tmp_path: Path) -> None:
    dataset = ChainDataset(write_dataset({"depth": 1})[0])
    rows = random_rows(300)
    page.goto(write_list(dataset, rows, tmp_path / "list.html"))
    dice = random.Random(1)
    cases = []
    for _ in range(300):
        cases.append(
            {
                "task": dice.choice(["", *TASKS]),
                "split": dice.choice(["", "train", "val"]),
                "state": dice.choice(["", "good", "rejected", "=missing", "=no_person"]),
                "id": "",
                "figure": dice.choice(FIGURES),
                "from": dice.choice(["", "1.5", "20"]),
                "to": dice.choice(["", "2", "25"]),
                "sort": dice.choice(["", "id", *FIGURES]),
                "order": dice.choice(["", "down"]),
            }
        )
    shown = page.evaluate(
        "(cases) => cases.map((asked) => pairList.select(asked).map((row) => pairList.id[row]))", cases
    )
    assert shown == [expected(rows, asked) for asked in cases]
    assert len({len(ids) for ids in shown}) > 20, "the cases differ"


def ids(page: Page) -> list[str]:
    return page.locator("#rows .pair").all_inner_texts()


def test_the_controls_do_what_they_say(page: Page, write_dataset: Writer, tmp_path: Path) -> None:
    dataset = ChainDataset(write_dataset({"depth": 1})[0])
    rows = random_rows(300)
    address = write_list(dataset, rows, tmp_path / "list.html")
    page.goto(address)
    asked = dict.fromkeys(("task", "split", "state", "id", "from", "to", "sort", "order"), "") | {
        "figure": "diffusion_path"
    }
    assert ids(page) == expected(rows, asked)[:10]
    page.locator("#filters [name=task]").select_option("edges")
    page.locator("#filters [name=state]").select_option("good")
    page.get_by_role("button", name="end PSNR, dB").click()
    page.get_by_role("button", name="end PSNR, dB").press("Enter")
    asked |= {"task": "edges", "state": "good", "sort": "end_psnr", "order": "down"}
    wanted = expected(rows, asked)
    assert ids(page) == wanted[:10]
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    expect(page.get_by_role("status")).to_have_text(f"{len(wanted)} of 300 pairs")
    page.get_by_role("button", name="Next").click()
    assert ids(page) == wanted[10:20]
    page.goto("about:blank")
    page.goto(address + "#" + "task=edges&state=good&sort=end_psnr&order=down&page=2")
    assert ids(page) == wanted[10:20], "the address keeps the view"
    page.get_by_role("button", name="Clear").click()
    page.locator("#filters [name=id]").fill(str(rows[17]["pair_id"]))
    assert ids(page) == [str(rows[17]["pair_id"])]
    page.locator("#filters [name=id]").fill("99999999999999999999")
    expect(page.get_by_role("status")).to_have_text("None of 300 pairs fits the filters.")


def test_a_hundred_thousand_rows_keep_the_page_small(page: Page, write_dataset: Writer, tmp_path: Path) -> None:
    dataset = ChainDataset(write_dataset({"depth": 1})[0])
    rows = random_rows(1000) * 100
    for number, row in enumerate(rows):
        rows[number] = row | {"pair_id": number}
    path = tmp_path / "list.html"
    page.goto(write_list(dataset, rows, path))
    assert path.stat().st_size < 8e6
    expect(page.locator("#shown")).to_have_text("100,000 pairs")
    page.get_by_label("rows").select_option("100")
    assert page.evaluate("document.querySelectorAll('*').length") < 3000
    page.locator("#filters [name=sort]").select_option("id")
    page.locator("#filters [name=order]").select_option("down")
    assert ids(page)[0] == "99999"
    page.locator("#filters [name=id]").fill("4242")
    expect(page.locator("#shown")).to_have_text("11 of 100,000 pairs")


def test_pairs_without_frames_are_listed_and_fade(page: Page, write_dataset: Writer, tmp_path: Path) -> None:
    out, written = write_dataset({"depth": 2}, methods=())
    page.goto(Path(view(out, str(tmp_path / "view"))[-1]).as_uri())
    assert ids(page) == [str(row["pair_id"]) for row in written]
    fade = page.locator(".chain .fade").first
    shown = [picture.get_attribute("src") for picture in fade.locator("img").all()]
    ends = [page.locator(f".chain img[data-at='{end}']").first for end in ("0.0", "1.0")]
    assert shown == [picture.get_attribute("src") for picture in ends]


def test_a_row_opens_to_its_pictures_or_its_reason(page: Page, write_dataset: Writer, tmp_path: Path) -> None:
    out, written = write_dataset({"depth": 12, "edges": 2}, rejects={1: "missing: <script>document.title='x'</script>"})
    page.goto(Path(view(out, str(tmp_path / "view"), limit_per_task=4)[-1]).as_uri())

    def opened(number: int) -> str:
        pair = page.get_by_role("button", name=str(written[number]["pair_id"]), exact=True)
        pair.focus()
        pair.press("Enter")
        assert pair.get_attribute("aria-expanded") == "true"
        assert pair.evaluate("(button) => button === document.activeElement"), "the keyboard stays where it was"
        text = page.locator("#rows .detail").inner_text()
        pair.press("Enter")
        assert page.locator("#rows .detail").count() == 0
        return text

    assert "round trip" not in opened(0)
    assert opened(1) == "missing: <script>document.title='x'</script>"
    assert f"covray view {out} --pair {written[9]['pair_id']}" in opened(9)
    page.get_by_label("pictures of this page").check()
    assert page.locator("#rows .detail .fade input").count() == 4
    for scheme in ("light", "dark"):
        for width in (1200, 400):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is cut off"
            page.screenshot(path=tmp_path / f"{scheme}-{width}.png")
            assert np.array(Image.open(tmp_path / f"{scheme}-{width}.png").convert("L")).std() > 5


def test_rows_appear_while_a_dataset_is_built(page: Page, write_dataset: Writer) -> None:
    out, written = write_dataset({"depth": 4, "edges": 2}, finished=False)
    later = Path(out, "shards", "task=edges", "part-1.parquet")
    later.rename(later.with_suffix(".later"))
    server = DatasetServer(out)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        page.goto(server.address)
        expect(page.locator("#live")).to_have_text("live: 5 written, 0 rejected so far")
        expect(page.locator("#rows .detail img").first).to_be_visible()
        pair = page.get_by_role("button", name=str(written[0]["pair_id"]), exact=True)
        pair.focus()
        later.with_suffix(".later").rename(later)
        expect(page.locator("#live")).to_have_text("live: 6 written, 0 rejected so far", timeout=20_000)
        assert str(written[-1]["pair_id"]) in ids(page)
        assert pair.evaluate("(button) => button === document.activeElement"), "new rows do not take the focus"
        expect(page.locator(".badge")).to_have_text("unfinished")
    finally:
        server.close()
        thread.join(20)
