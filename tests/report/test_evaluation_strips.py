"""The pictures of an evaluation's card: which episodes and subjects they show, and where."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from covray.evaluation.records import EvaluationResults
from covray.io.drawing import GAP_PX, TILE_PX
from covray.report.evaluation import Strip
from covray.report.evaluation_strips import _TEXT_PX, draw_answers

COLOURS = {"query": (200, 0, 0), "frame": (0, 200, 0), "answer": (0, 0, 200), "label": (200, 200, 0)}
STEP = TILE_PX + GAP_PX


def flat(name: str, height: int = 16, width: int = 16) -> np.ndarray:
    return np.full((height, width, 3), COLOURS[name], np.uint8)


def strip(subject: str, rank: Any, frames: int = 2, task: str = "depth", **size: int) -> Strip:
    shown = [flat("frame")] * frames
    pictures = flat("query", **size), shown, flat("answer", **size), flat("label", **size)
    return Strip(task, subject, rank, 7, 0.5, *pictures)


def results(*subjects: tuple[str, str]) -> EvaluationResults:
    about = {"episodes": 3, "primary": "abs_rel", "metrics": ["abs_rel"]}
    values = {
        "version": 1, "config": {}, "fingerprints": {}, "seconds": 1.0, "scores": [], "differences": [], "failed": [],
        "subjects": [{"name": name, "kind": kind, "about": ""} for name, kind in subjects],
        "tasks": {"depth": about, "edges": about}, "lower_is_better": ["abs_rel"],
    }  # fmt: skip
    return EvaluationResults.model_validate(values)


def columns_of(sheet: Image.Image, y: int) -> list[str | None]:
    """What is in the middle of each tile of a row of pixels."""
    names = {colour: name for name, colour in COLOURS.items()}
    found = []
    for column in range((sheet.width - _TEXT_PX) // STEP):
        colour = sheet.getpixel((_TEXT_PX + column * STEP + TILE_PX // 2, y))
        assert isinstance(colour, tuple)
        found.append(names.get(colour))
    return found


def rows_of(png: bytes) -> list[list[str | None]]:
    """The tiles of every row of a picture: a row is where the answer's column changes."""
    sheet = Image.open(io.BytesIO(png)).convert("RGB")
    rows: list[list[str | None]] = []
    inside = False
    for y in range(sheet.height):
        tiles = columns_of(sheet, y)
        is_row = tiles[-2] == "answer"
        if is_row and not inside:
            rows.append(columns_of(sheet, y + TILE_PX // 4))
        inside = is_row
    return rows


def test_a_query_and_its_label_stand_beside_the_answers_of_the_models() -> None:
    subjects = results(("mean", "baseline"), ("plain", "untuned"), ("tuned", "adapter"), ("vqgan", "ceiling"))
    strips = []
    for rank in ("worst", "best", "median"):
        for name, frames in (("plain", 0), ("tuned", 2), ("mean", 0), ("vqgan", 0)):
            strips.append(strip(name, rank, frames))
    drawn = draw_answers(subjects, strips)
    assert list(drawn) == ["depth"], "of edges there are no pictures"
    tuned = ["query", "frame", "frame", "answer", "label"]
    plain = [None, None, None, "answer", None]
    assert rows_of(drawn["depth"]) == 3 * [tuned, plain]


def test_without_a_model_the_first_rows_of_the_table_are_shown() -> None:
    names = ("copy", "mean", "nearest", "vqgan")
    subjects = results(*((name, "baseline") for name in names))
    drawn = draw_answers(subjects, [strip(name, "median", 0) for name in names])
    assert len(rows_of(drawn["depth"])) == 3


def test_a_wide_photograph_keeps_its_shape() -> None:
    drawn = draw_answers(results(("tuned", "adapter")), [strip("tuned", "best", 0, height=100, width=400)])
    sheet = np.asarray(Image.open(io.BytesIO(drawn["depth"])).convert("RGB"))
    rows, columns = np.nonzero((sheet == COLOURS["answer"]).all(-1))
    assert np.ptp(columns) + 1 == TILE_PX
    assert np.ptp(rows) + 1 == TILE_PX // 4


def test_names_of_any_length_stay_beside_the_pictures() -> None:
    name = "a" * 300
    for subject in (name, " ".join(100 * ["word"])):
        drawn = draw_answers(results((subject, "adapter")), [strip(subject, "best")])
        sheet = np.asarray(Image.open(io.BytesIO(drawn["depth"])).convert("RGB"))
        assert (sheet[44:, _TEXT_PX - GAP_PX : _TEXT_PX] == 255).all()
