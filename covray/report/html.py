"""Render a page: one HTML document that holds all it needs, loads nothing and runs only its own script.

Texts and figures reach a page through the templates only, where Jinja escapes every value. Style sheets and scripts are
files of this package and are copied into the document as they are.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from covray.report import charts, formatting

TILE_MIN_PX, TILE_MAX_PX = 48, 256
"""The range of the slider that sets the size of a page's pictures."""
_LOSSLESS_PX = 128
"""Pictures up to this height are stored to the pixel, larger ones as photographs are."""
_STATIC = Path(__file__).parent / "static"


@dataclass(frozen=True)
class Link:
    """A link of the bar at the top to a section of the page."""

    target: str
    """The id of the section."""
    text: str


def render(
    template: str, title: str, *, styles: Sequence[str], scripts: Sequence[str] = (), tile_px: int | None = None,
    served: bool = False, **values: Any,
) -> bytes:  # fmt: skip
    """Return the file of a page.

    The document's policy lets it show what it holds and run exactly this script, whatever else may get into the body.

    Args:
        template: The name of a file of ``templates`` that extends ``page.html``.
        title: The title of the document.
        styles: Names of files of ``static`` to add to ``page.css``.
        scripts: Names of files of ``static`` to add to ``page.js``.
        tile_px: The size of the page's pictures at first; None for a page without pictures.
        served: Whether a server shows the page, which may then ask that server for more; a file asks nobody.
        values: What the template shows.
    """
    # One script in one element, because the policy allows exactly one digest.
    script = "".join(map(_static, ("page.js", *scripts)))
    style = "".join(map(_static, ("page.css", *styles)))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Nothing is loaded, and a script that gets into the body through a text does not run: its digest is another.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    if served:
        policy += "; connect-src 'self'"
    text = (
        _environment()
        .get_template(template)
        .render(
            title=title,
            # Markup: these texts are files of the package, and must not be escaped.
            style=Markup(style),
            script=Markup(script),
            policy=policy,
            tile_px=tile_px,
            tile_min_px=TILE_MIN_PX,
            tile_max_px=TILE_MAX_PX,
            **values,
        )
    )
    return text.encode()


def render_part(template: str, macro: str, *values: Any) -> bytes:
    """Return what ``macro`` of ``template`` makes of ``values``: a part of a page, for its server."""
    part = getattr(_environment().get_template(template).module, macro)
    return str(part(*values)).encode()


def data_uri(picture: np.ndarray) -> str:
    """Return ``picture``, uint8 [h, w, 3], as the address of an image inside the page."""
    buffer = io.BytesIO()
    # Small tiles keep every pixel, because readers compare them; photographs need not.
    Image.fromarray(picture).save(buffer, "WEBP", lossless=len(picture) <= _LOSSLESS_PX, quality=90)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def pretty_json(value: object) -> str:
    """Return ``value`` as indented JSON text."""
    return json.dumps(value, indent=2, ensure_ascii=False)


@functools.cache
def _environment() -> jinja2.Environment:
    """Return the environment that loads the templates of this package and escapes every value."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("covray.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (data_uri, pretty_json, formatting.readable):
        environment.filters[function.__name__] = function
    environment.filters["thousands"] = "{:,}".format
    environment.globals.update(plural=formatting.plural, swatch=charts.swatch, method_class=charts.method_class)
    return environment


def _static(name: str) -> str:
    return (_STATIC / name).read_text(encoding="utf-8")
