"""The first picture of the demo: what the small model answers in all tasks, before anything is trained."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from covray.config import BackboneConfig, EngineConfig, GeneratorConfig, SamplingConfig, TokenizerConfig
from covray.generation.generator import Generator
from covray.generation.request import Example, Request
from covray.io.drawing import draw_table
from covray.io.images import decode, encode_png
from covray.pairs.manifest import Pair

SHEET = "answers.png"
SAMPLING = SamplingConfig(expected=0.5)
"""Of continuous labels the code nearest to the expected one is written: better answers at no cost."""


@dataclass(frozen=True)
class Question:
    """A query with its example."""

    example: Pair
    query: Pair
    """Its label is what a right answer looks like."""


def write_first_answers(questions: Mapping[str, Question], out: Path, family: str) -> Path:
    """Answer a query of every task after one example, without frames and without an adapter.

    Args:
        questions: By task; their pictures are in the pairs.
        out: Folder to write: all pictures, as ``depth_query.png``, and the sheet of them.
        family: Tokenizer and backbone, such as ``nano-2``.

    Returns:
        The sheet.
    """
    out.mkdir(exist_ok=True)
    cores = os.cpu_count() or 1
    generator = Generator.load(
        GeneratorConfig(
            backbone=BackboneConfig(path=family), tokenizer=TokenizerConfig(path=family), length=2, method="none",
            engine=EngineConfig(batch=1, image_batch=1, threads=cores), batch=1,
        )
    )  # fmt: skip
    columns = {}
    for task, question in questions.items():
        files = _pictures(question)
        example = Example(files["example"], files["example_label"])
        request = Request((decode(files["query"]),), (example,), task, sampling=SAMPLING)
        (answer,) = generator.answer(request)
        files["answer"] = encode_png(answer.picture)
        for name, content in files.items():
            (out / f"{task}_{name}.png").write_bytes(content)
        columns[task.replace("_", " ")] = [
            decode(files[name]) for name in ("example", "example_label", "query", "answer", "label")
        ]
    sheet = out / SHEET
    # Whole or not at all: a demo that goes on takes the sheet for finished.
    aside = sheet.with_suffix(".part")
    aside.write_bytes(draw_table(columns, ("example", "its label", "query", "answer", "true label")))
    return aside.replace(sheet)


def _pictures(question: Question) -> dict[str, bytes]:
    """Return the files of a question by name."""
    pictures = {
        "example": question.example.image, "example_label": question.example.label, "query": question.query.image,
        "label": question.query.label,
    }  # fmt: skip
    # Pairs of scenes have their pictures with them.
    return {name: picture.bytes or b"" for name, picture in pictures.items()}
