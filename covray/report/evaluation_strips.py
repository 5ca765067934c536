"""What the subjects of an evaluation answered, as one picture a task: for its card on the hub, and for slides."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import groupby

import numpy as np
from PIL import Image, ImageDraw

from covray.evaluation.records import EvaluationResults
from covray.io.drawing import FAINT, GAP_PX, PAPER, TILE_PX, load_font
from covray.report.evaluation import RANKS, Strip
from covray.report.formatting import numbers, readable
from covray.report.metrics import metric_of

_MODELS = ("adapter", "focus", "untuned")
_MAX_SUBJECTS = 3
"""Rows of one query: with more, the page of the evaluation is the place to compare."""
_TEXT_PX, _HEAD_PX, _MARGIN_PX = 190, 44, 14
_INK = "#111827"
_LINE_PX = 18


def draw_answers(results: EvaluationResults, strips: Sequence[Strip]) -> dict[str, bytes]:
    """Draw the best, the median and the worst episode of each task: query, frames, answer and label.

    Args:
        results: The table of the evaluation.
        strips: Its episodes as pictures, in any order.

    Returns:
        PNG by task. A task without pictures is left out.
    """
    shown = _shown_subjects(results)
    drawn = {}
    for task, about in results.tasks.items():
        rows = [strip for strip in strips if strip.task == task and strip.subject in shown]
        if rows:
            # In the order of the sheet: groupby, which draws a query once for all its rows, joins neighbours only.
            rows.sort(key=lambda strip: (RANKS.index(strip.rank), strip.pair_id, shown.index(strip.subject)))
            drawn[task] = _draw_task(rows, about.primary)
    return drawn


def _shown_subjects(results: EvaluationResults) -> list[str]:
    """Return the subjects to show: adapters, then other models; without any, the first rows of the table."""
    names = []
    for kind in _MODELS:
        names += [subject.name for subject in results.subjects if subject.kind == kind]
    if not names:
        names = [subject.name for subject in results.subjects]
    return names[:_MAX_SUBJECTS]


def _draw_task(rows: Sequence[Strip], metric: str) -> bytes:
    """Draw the rows of one task, those of one query below each other; return PNG."""
    frames = max(len(row.frames) for row in rows)
    heads = ["query", *(f"frame {number}" for number in range(1, frames + 1)), "answer", "label"]
    step = TILE_PX + GAP_PX
    groups = [list(group) for _, group in groupby(rows, key=lambda row: (row.rank, row.pair_id))]
    height = _HEAD_PX + len(rows) * step + len(groups) * _MARGIN_PX
    sheet = Image.new("RGB", (_TEXT_PX + len(heads) * step + _MARGIN_PX, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN_PX, 24), readable(rows[0].task), _INK, load_font(16, bold=True), anchor="ls")
    for column, head in enumerate(heads):
        draw.text((_TEXT_PX + column * step + TILE_PX // 2, 34), head, FAINT, load_font(12), anchor="ms")
    y = _HEAD_PX
    for group in groups:
        _paste(sheet, group[0].query, 0, y)
        _paste(sheet, group[0].label, len(heads) - 1, y)
        draw.text((_MARGIN_PX, y + _LINE_PX), f"{group[0].rank} episode", _INK, load_font(13, bold=True), anchor="ls")
        for row in group:
            _write_about(draw, row, metric, y)
            for column, picture in enumerate(row.frames, 1):
                _paste(sheet, picture, column, y)
            _paste(sheet, row.answer, len(heads) - 2, y)
            y += step
        y += _MARGIN_PX
    buffer = io.BytesIO()
    # Smaller by a slower search: the picture goes into a repository, which keeps every version.
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _write_about(draw: ImageDraw.ImageDraw, row: Strip, metric: str, y: int) -> None:
    """Write beside a row whose answer it is, and its score."""
    score, *_ = numbers(row.score)
    lines = [*_wrapped(row.subject), f"{metric_of(metric).with_unit} {score}"]
    for number, line in enumerate(lines, 2):
        draw.text((_MARGIN_PX, y + number * _LINE_PX), line, FAINT, load_font(12), anchor="ls")


def _wrapped(name: str) -> list[str]:
    """Return a subject's name as at most three lines that fit beside its pictures."""
    font, most = load_font(12), _TEXT_PX - 2 * _MARGIN_PX
    lines = [""]
    for word in name.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= most or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    # A single word can be wider than the column: it is cut, a character at a time.
    for number, line in enumerate(lines):
        while font.getlength(line) > most:
            line = f"{line.rstrip('…')[:-1]}…"
        lines[number] = line
    return lines[:3]


def _paste(sheet: Image.Image, picture: np.ndarray, column: int, y: int) -> None:
    """Put a picture into the middle of its tile, as large as it fits."""
    height, width = picture.shape[:2]
    scale = TILE_PX / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    tile = Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS)
    x = _TEXT_PX + column * (TILE_PX + GAP_PX)
    sheet.paste(tile, (x + (TILE_PX - size[0]) // 2, y + (TILE_PX - size[1]) // 2))
