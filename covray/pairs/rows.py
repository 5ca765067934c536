"""The row of a manifest as pyarrow takes it and gives it back: a dict by column."""

from __future__ import annotations

from typing import TypedDict

from covray.io.images import PictureColumn


class QuestionColumn(TypedDict):
    """An item of the column ``questions``."""

    kind: str
    question: str
    answer: str


class WordColumns(TypedDict, total=False):
    """The optional columns of a manifest with words, all null in a row without."""

    caption: str | None
    attributes: str | None
    """A JSON object."""
    questions: list[QuestionColumn] | None


class PairRow(WordColumns):
    """A row of a manifest. One of another program may have null in place of a picture or of ``meta``."""

    pair_id: int
    task: str
    split: str
    image: PictureColumn | None
    label: PictureColumn | None
    meta: str | None
    """A JSON object."""
