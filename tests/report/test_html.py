from __future__ import annotations

import re
from pathlib import Path

import jinja2
import numpy as np
import pytest

from covray import report
from covray.report.charts import round_ticks
from covray.report.formatting import duration, numbers
from covray.report.html import Link, data_uri, render
from tests.support.pages import Page

HOSTILE = "</title><script>alert(1)</script>\"'&"


def page_of(text: str) -> str:
    """A page in which every value is ``text``."""
    page = render(
        "dataset.html",
        text,
        styles=["dataset.css"],
        scripts=["dataset.js"],
        tile_px=64,
        links=[Link(text, text)],
        path=text,
        unfinished=False,
        tiles=[(text, text)],
        lines=[(text, text)],
        fingerprints=[(text, text)],
        groups=[],
        rejects=[],
        served=False,
        rows=text,
        figures_of_pairs={text: (text, text)},
    )
    return page.decode()


def test_a_page_runs_its_own_script_and_no_other() -> None:
    page = Page(page_of(HOSTILE))
    page.require_self_contained()
    assert page.texts_in("title") == [HOSTILE]
    assert "cross-fade" in page.texts_in("script")[0]
    assert page.texts.count(HOSTILE) == 13
    injected = page_of("").replace("</main>", "<script>alert(1)</script></main>")
    with pytest.raises(ValueError):  # two scripts, one hash: the browser runs one of them
        Page(injected).require_self_contained()


def test_every_template_escapes_what_it_shows() -> None:
    environment = jinja2.Environment()
    for template in Path(report.__file__).parent.joinpath("templates").iterdir():
        text = template.read_text()
        environment.parse(text)
        assert not re.search(r"\|\s*safe\b|autoescape|Markup", text), template.name


@pytest.mark.parametrize("size", [8, 128])
def test_small_pictures_are_stored_to_the_pixel(size: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    (shown,) = Page(f'<img src="{data_uri(picture)}">').pictures()
    assert np.array_equal(shown, picture)


def test_durations_are_in_the_unit_one_would_say() -> None:
    assert [duration(seconds) for seconds in (4.4, 61, 600, 7200)] == ["4 s", "61 s", "10 min", "2.0 h"]


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.4631, 0.4633), (-3.0, 17.2), (0.0, 0.0), (5.0, 5.0), (1e-9, 3e-9), (0.3, 8192.0)]
)
def test_ticks_are_round_enclose_the_values_and_read_apart(low: float, high: float) -> None:
    ticks, decimals = round_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 8
    labels = [f"{tick:.{decimals}f}" for tick in ticks]
    assert len(set(labels)) == len(labels)
    assert np.allclose([float(label) for label in labels], ticks, rtol=1e-9, atol=0)


def test_what_is_rounded_to_zero_has_no_sign() -> None:
    assert numbers(0.115, -0.0002, 0.231) == ["0.115", "0.000", "0.231"]
    assert numbers(-0.115, -0.231) == ["−0.115", "−0.231"]


@pytest.mark.parametrize("value", [0.5, 0.9996, 18.974, 99.96, 123.4, 0.00123, -0.0361, 4.2e-7, 8.1e12, 1.0])
def test_numbers_keep_three_digits(value: float) -> None:
    (text,) = numbers(value)
    assert float(text.replace("−", "-")) == pytest.approx(value, rel=5e-3)
    digits = re.sub(r"[^0-9]", "", text.split("e")[0]).lstrip("0")
    assert len(digits) == 3
