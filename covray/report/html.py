"""What the pages share: one HTML document with everything inside, that loads nothing and runs only its own script."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any, TypeGuard

import numpy as np
from PIL import Image

from covray.evaluation.metrics import find_metric
from covray.tasks.base import Metric

TILE_MIN_PX, TILE_MAX_PX = 48, 256
_LOSSLESS_PX = 128  # small pictures are stored to the pixel, larger ones as a photograph is

_STYLE = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #fff; --ink: #1c1f24; --faint: #667085;
  --rule: #e4e7ec; --accent: #3f6fd8; --warn: #b54708; --warn-paper: #fff4e5; --good: #067647; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --card: #1c1f25; --ink: #e8eaee; --faint: #98a2b3;
  --rule: #2d323b; --accent: #8fb0ff; --warn: #fdb022; --warn-paper: #33260f; --good: #47cd89; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 14px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 12px; display: flex; gap: 12px; align-items: baseline; }
h2 small { font-size: 13px; font-weight: 400; color: var(--faint); }
code { font: 12px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.faint { color: var(--faint); }
.badge { display: inline-block; padding: 1px 9px; border-radius: 99px; font-size: 12px; vertical-align: 4px;
  margin-left: 8px; color: var(--warn); background: var(--warn-paper); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; }
.figures { display: flex; flex-wrap: wrap; margin: 20px 0 12px; }
.figures div { padding: 14px 28px 14px 20px; }
.figures b { display: block; font-size: 24px; line-height: 1.2; font-weight: 600; font-variant-numeric: tabular-nums; }
.figures span { color: var(--faint); font-size: 12px; }
.facts { display: grid; grid-template-columns: fit-content(40%) minmax(0, 1fr); gap: 4px 20px; margin: 0;
  padding: 16px 20px; overflow-wrap: anywhere; }
.facts dt { color: var(--faint); } .facts dd { margin: 0; }
nav { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: 4px 16px; align-items: center;
  padding: 10px 0; margin-top: 12px; background: var(--paper); border-bottom: 1px solid var(--rule); }
nav a { color: var(--accent); text-decoration: none; }
nav label { margin-left: auto; color: var(--faint); display: none; align-items: center; gap: 8px; }
nav input { width: 110px; } .js nav label { display: flex; }
section { scroll-margin-top: 48px; }
img { display: block; border-radius: 6px; background: var(--rule); }
input[type=range] { accent-color: var(--accent); margin: 4px 0 0; }
table { width: 100%; border-collapse: collapse; }
th { text-align: left; font-weight: 500; color: var(--faint); font-size: 12px; }
th, td { padding: 8px 20px; border-bottom: 1px solid var(--rule); vertical-align: top; }
tr:last-child td { border-bottom: 0; } td.count { font-variant-numeric: tabular-nums; }
summary { cursor: pointer; }
"""

TABLES_STYLE = """
.scroll { overflow-x: auto; border-radius: 12px; }
.scroll + .scroll, .scroll + .card, .card + .card, .facts + .card { margin-top: 12px; }
.card > p { margin: 0; padding: 10px 20px; color: var(--faint); font-size: 12px; } .card > p + p { padding-top: 0; }
summary, pre { padding: 10px 20px; color: var(--faint); font-size: 12px; } h3 + details summary { padding-top: 0; }
.scores th, .scores td { padding: 8px 14px; white-space: nowrap; }
.scores th { vertical-align: bottom; }
.scores thead th { white-space: normal; border-bottom-color: var(--faint); }
.scores tbody th { position: sticky; left: 0; z-index: 1; padding-left: 20px; background: var(--card);
  color: var(--ink); font-size: 14px; vertical-align: top; white-space: normal; min-width: 210px; max-width: 280px;
  overflow-wrap: anywhere; }
.scores thead th:first-child { position: sticky; left: 0; z-index: 1; padding-left: 20px; background: var(--card); }
.scores thead th:not(:first-child), .scores td { text-align: right; font-variant-numeric: tabular-nums; }
.scores small { display: block; color: var(--faint); font-size: 11px; font-weight: 400; }
.scores a { color: inherit; } .scores thead a { color: var(--accent); text-decoration: none; font-size: 14px; }
.scores b { font-weight: 700; }
.scores tbody tr:last-child > * { border-bottom: 0; }
.scores tbody + tbody tr:first-child > * { border-top: 2px solid var(--faint); }
.scores .ceiling td, .scores .ceiling th { color: var(--faint); }
.about { text-decoration: underline dotted; text-underline-offset: 3px; cursor: help; }
.differences th, .differences td { padding: 6px 14px; }
.differences th:first-child, .differences td:first-child { padding-left: 20px; }
.differences .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.text { min-width: 140px; overflow-wrap: anywhere; }
.better, .worse, .open { white-space: nowrap; } .better { color: var(--good); } .worse { color: var(--warn); }
h3 { margin: 0; padding: 16px 20px 8px; font-size: 14px; font-weight: 600; }
h3 small { color: var(--faint); font-size: 12px; font-weight: 400; margin-left: 8px; }
pre { margin: 0; white-space: pre-wrap; }
@media (max-width: 800px) {
  .scores tbody th, .scores thead th:first-child { min-width: 110px; max-width: 150px; }
}
"""
"""Of the pages of scores."""

_SCRIPT = """
document.documentElement.classList.add('js');
const size = document.querySelector('nav input');
if (size) size.oninput = () => document.documentElement.style.setProperty('--tile', size.value + 'px');
"""


def document(
    title: str, body: Iterable[str], *, tile_px: int | None = None, style: str = "", script: str = ""
) -> bytes:
    """The file of a page: ``title`` is text, ``body`` HTML with one ``navigation``, ``style`` and ``script`` its own,
    ``tile_px`` how large its pictures are, where it has any.

    Its policy lets it show what it holds and run this very script, whatever else got into the body.
    """
    script = _SCRIPT + script
    tile = "" if tile_px is None else f' style="--tile: {tile_px}px"'
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    parts = [
        f'<!doctype html>\n<html lang="en"{tile}><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head><body><main>",
        *body,
        f"</main><script>{script}</script></body></html>\n",
    ]
    return "".join(parts).encode()


def navigation(links: Iterable[tuple[str, str]], tile_px: int | None = None) -> str:
    """The bar that stays in sight: links as (id, text), and how large pictures are, where there are any."""
    anchors = " ".join(f'<a href="#{escape(target)}">{escape(text)}</a>' for target, text in links)
    if tile_px is None:
        return f"<nav>{anchors}</nav>"
    return (
        f"<nav>{anchors}<label>picture size <input type='range' aria-label='picture size' "
        f"min='{TILE_MIN_PX}' max='{TILE_MAX_PX}' value='{tile_px}'></label></nav>"
    )


def figures(tiles: Iterable[tuple[str, str]]) -> str:
    """The large figures of a page's head, as (value, what it counts)."""
    boxes = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in tiles)
    return f'<div class="figures card">{boxes}</div>'


def facts(lines: Iterable[tuple[str, str]], codes: Sequence[str] = ()) -> str:
    """A list of (name, value); the values of ``codes`` are for comparing, not for reading."""
    return '<dl class="facts card">{}</dl>'.format(
        "".join(
            f"<dt>{escape(name)}</dt><dd>"
            + (f'<code class="faint">{escape(value)}</code>' if name in codes else escape(value))
            + "</dd>"
            for name, value in lines
        )
    )


def configuration(config: dict[str, Any]) -> str:
    """All of a run's configuration, folded away."""
    text = escape(json.dumps(config, indent=2, ensure_ascii=False))
    return f'<div class="card"><details><summary>Configuration</summary><pre><code>{text}</code></pre></details></div>'


def img(picture: np.ndarray, alt: str, attributes: str = "") -> str:
    """The picture, uint8 [h, w, 3], inside the page; ``attributes`` are HTML."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", lossless=len(picture) <= _LOSSLESS_PX, quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(alt)}" title="{escape(alt)}" {attributes} src="data:image/webp;base64,{data}">'


def human(name: str) -> str:
    """A task's name for people."""
    return name.replace("_", " ").capitalize()


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def glossary(results: dict[str, Any]) -> Iterator[str]:
    """What every metric of the page means: the tooltips again, for paper and for fingers."""
    names = dict.fromkeys(metric for about in results["tasks"].values() for metric in about["metrics"])
    if names:
        lines = [(metric_of(name).with_unit, metric_of(name).about) for name in names]
        yield f'<section id="metrics"><h2>Metrics</h2>{facts(lines)}</section>'


def metric_of(name: str) -> Metric:
    """Return the metric of that name in ``results.json``; of one that no installed task has, a metric without text."""
    return find_metric(name) or Metric(name, human(name), "", "higher")


def metric_name(name: str, lower: set[str]) -> str:
    """As HTML: the metric with its unit, an arrow to where it is better, and its definition as a tooltip."""
    metric = metric_of(name)
    arrow = "" if metric.better is None else "\u00a0↓" if name in lower else "\u00a0↑"
    return f'<span class="about" title="{escape(metric.about)}">{escape(metric.with_unit)}</span>{arrow}'


def axis_title(name: str, lower: set[str]) -> str:
    """The metric with its unit, and in words which way is better."""
    metric = metric_of(name)
    better = "" if metric.better is None else " (less is better)" if name in lower else " (more is better)"
    return metric.with_unit + better


def best_mean(metric: str, rows: Iterable[dict[str, Any] | None], lower: set[str]) -> float | None:
    """The best mean of ``rows``; None where there is none, or no better and worse."""
    means = [row["mean"] for row in rows if row is not None and known(row["mean"])]
    if not means or metric_of(metric).better is None:
        return None
    return min(means) if metric in lower else max(means)


def score_cell(row: dict[str, Any] | None, best: float | None, note: str = "") -> str:
    """A mean, bold where it is the ``best``, its interval, and a ``note``."""
    if row is None or row["mean"] is None:
        return '<td class="faint">–</td>'
    mean, low, high = numbers(row["mean"], row["low"], row["high"])
    text = f"<b>{mean}</b>" if row["mean"] == best else mean
    if row["low"] is not None and row["high"] is not None:
        text += f"<small>[{low}, {high}]</small>"
    if note:
        text += f"<small>{escape(note)}</small>"
    return f"<td>{text}</td>"


def numbers(value: float | None, *bounds: float | None) -> list[str]:
    """``value`` with three significant digits, or what matters of it beside its ``bounds``; all with its decimals."""
    size = max([abs(value) if known(value) else 0.0, *(abs(bound) / 10 for bound in bounds if known(bound))])
    if size and not 1e-4 <= size < 1e7:
        return ["–" if number is None else f"{number:.2e}" for number in (value, *bounds)]
    # Rounding may carry (0.9996 is 1.00), so the digits are counted after it.
    decimals = max(0, 2 - math.floor(math.log10(float(f"{size:.2e}")))) if size else 0
    texts = ["–" if number is None else f"{number:,.{decimals}f}" for number in (value, *bounds)]
    return [text.replace("-", "−") for text in texts]


def known(value: float | None) -> TypeGuard[float]:
    """Whether it is a number that can be compared and drawn."""
    return value is not None and math.isfinite(value)


def round_ticks(low: float, high: float) -> tuple[list[float], int]:
    """About five round numbers from at most ``low`` to at least ``high``, and the decimals to write them with."""
    if low == high:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    power = math.floor(math.log10((high - low) / 5))
    step = next(step * 10.0**power for step in (1, 2, 5, 10) if 5 * step * 10.0**power >= high - low)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [index * step for index in range(first, last + 1)], max(0, -math.floor(math.log10(step) + 1e-9))


def plural(count: int, noun: str) -> str:
    """``noun`` for ``count`` of them."""
    return noun if count == 1 else f"{noun}s"
