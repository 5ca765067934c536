"""Rows of an evaluation of reasoning: an episode, and what every row of the table answers to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from covray.thinking.episodes import Verdict

_ANSWER = pa.struct(
    [
        pa.field("row", pa.string(), False),
        pa.field("seen_detail", pa.string()),
        pa.field("seen_object", pa.string()),
        pa.field("detail", pa.bool_(), False),
        pa.field("object", pa.bool_(), False),
        pa.field("named", pa.bool_(), False),
        pa.field("hidden", pa.bool_(), False),
        pa.field("picture", pa.binary()),
    ]
)
RESULT_SCHEMA = pa.schema(
    [
        pa.field("episode", pa.int64(), False),
        pa.field("task", pa.string(), False),
        pa.field("shots", pa.int32(), False),
        pa.field("number", pa.int32(), False),
        pa.field("words", pa.list_(pa.string())),
        pa.field("answer_detail", pa.string()),
        pa.field("answer_object", pa.string()),
        pa.field("demonstrations", pa.list_(pa.binary())),
        pa.field("text", pa.string()),
        pa.field("answers", pa.list_(_ANSWER)),
        pa.field("error", pa.string()),
    ]
)
"""``EpisodeRow`` in a Parquet file; docs/formats.md describes it."""


@dataclass(frozen=True)
class AnswerRow(Verdict):
    """What a row of the table answers to an episode, and what that is worth."""

    row: str
    seen_detail: str | None
    seen_object: str | None
    picture: bytes | None = None
    """A PNG file; None for a text, or where pictures were not read."""


@dataclass(frozen=True)
class EpisodeRow:
    """An episode with the answers of every row of the table, or with the reason why there are none."""

    episode: int
    """Its id."""
    task: str
    shots: int
    number: int
    """Of its order."""
    words: Sequence[str]
    """Of the demonstrations, then the query's."""
    answer_detail: str
    answer_object: str
    demonstrations: Sequence[bytes] | None = None
    """PNG files; None where there are no answers, or where pictures were not read."""
    text: str | None = None
    """What the vision-language model wrote."""
    answers: Sequence[AnswerRow] | None = None
    error: str | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> EpisodeRow:
        """Return a row of a Parquet file; it may lack the columns that have a default."""
        answers = values["answers"]
        if answers is not None:
            answers = [AnswerRow(**answer) for answer in answers]
        return cls(**{**values, "answers": answers})
