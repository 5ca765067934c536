"""Pictures of pictures: tiles side by side with their captions, for people to look at."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE_PX = 128
"""Side of a tile: a 64 px picture at twice its size."""
GAP_PX = 6
PAPER, INK, FAINT = "#ffffff", "#1c1f24", "#6b7280"
_FONTS = Path(__file__).parents[1] / "assets" / "fonts"


def load_font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which covray ships: drawings look the same on a machine without fonts."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(_FONTS / name), size)


def draw_strip(pictures: Sequence[np.ndarray], captions: Sequence[str]) -> bytes:
    """Draw pictures uint8 [s, s, 3] side by side as PNG, each with its caption below; small ones are enlarged."""
    tile_px = max(TILE_PX, pictures[0].shape[0])
    step = tile_px + GAP_PX
    strip = Image.new("RGB", (len(pictures) * step + GAP_PX, tile_px + 30), PAPER)
    draw = ImageDraw.Draw(strip)
    for column, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x = GAP_PX + column * step
        strip.paste(Image.fromarray(picture).resize((tile_px, tile_px), Image.Resampling.LANCZOS), (x, GAP_PX))
        draw.text((x + tile_px // 2, tile_px + 22), caption, FAINT, load_font(12), anchor="ms")
    buffer = io.BytesIO()
    strip.save(buffer, "PNG")
    return buffer.getvalue()


def draw_table(columns: Mapping[str, Sequence[np.ndarray]], rows: Sequence[str]) -> bytes:
    """Draw a table of pictures as PNG.

    Args:
        columns: By name, which stands above, the pictures uint8 [s, s, 3] from top to bottom; small ones are enlarged.
        rows: The names of the rows, which stand at the left.
    """
    left, top, step = 96, 34, TILE_PX + GAP_PX
    table = Image.new("RGB", (left + len(columns) * step, top + len(rows) * step), PAPER)
    draw = ImageDraw.Draw(table)
    for row, name in enumerate(rows):
        draw.text((left - 12, top + row * step + TILE_PX // 2), name, FAINT, load_font(12), anchor="rm")
    for column, (name, pictures) in enumerate(columns.items()):
        x = left + column * step
        draw.text((x + TILE_PX // 2, top - 12), name, INK, load_font(13, bold=True), anchor="ms")
        for row, picture in enumerate(pictures):
            tile = Image.fromarray(picture).resize((TILE_PX, TILE_PX), Image.Resampling.LANCZOS)
            table.paste(tile, (x, top + row * step))
    buffer = io.BytesIO()
    table.save(buffer, "PNG")
    return buffer.getvalue()


def html_picture(png: bytes, alt: str) -> str:
    """Return a PNG as an HTML element that needs no file, as notebooks show it; ``alt`` says what it shows."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(alt)}" style="max-width:100%" src="data:image/png;base64,{data}">'
