"""What the pages share: one HTML document with everything inside, that loads nothing and runs only its own script."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from PIL import Image

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

_SCRIPT = """
document.documentElement.classList.add('js');
document.querySelector('nav input').oninput = function () {
  document.documentElement.style.setProperty('--tile', this.value + 'px');
};
"""


def document(title: str, body: Iterable[str], *, tile_px: int, style: str = "", script: str = "") -> bytes:
    """The file of a page: ``title`` is text, ``body`` HTML with one ``navigation``, ``style`` and ``script`` its own.

    Its policy lets it show what it holds and run this very script, whatever else got into the body.
    """
    script = _SCRIPT + script
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    parts = [
        f'<!doctype html>\n<html lang="en" style="--tile: {tile_px}px"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head><body><main>",
        *body,
        f"</main><script>{script}</script></body></html>\n",
    ]
    return "".join(parts).encode()


def navigation(links: Iterable[tuple[str, str]], tile_px: int) -> str:
    """The bar that stays in sight: links as (id, text), and how large pictures are."""
    anchors = " ".join(f'<a href="#{escape(target)}">{escape(text)}</a>' for target, text in links)
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
