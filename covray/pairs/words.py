"""What a manifest says of a picture in words: a caption, attributes, and questions with their answers.

They are three optional columns. A manifest without them is what it was before they existed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from covray.errors import ManifestError
from covray.pairs.rows import PairRow, QuestionColumn, WordColumns

CAPTION_TASK = "caption"
"""Task of a row that has an image and words, but no label picture. No chains are built for it."""

WORD_FIELDS = (
    pa.field("caption", pa.string()),
    pa.field("attributes", pa.string()),
    pa.field(
        "questions", pa.list_(pa.struct([("kind", pa.string()), ("question", pa.string()), ("answer", pa.string())]))
    ),
)
"""The optional columns: a text, a JSON object, and a list of questions."""


@dataclass(frozen=True)
class Question:
    """A question about a picture whose answer is short."""

    kind: str
    """What is asked for, such as colour or count; accuracies are counted by it."""
    question: str
    answer: str


@dataclass(frozen=True)
class Words:
    """What is said of a picture."""

    caption: str
    attributes: dict[str, Any] = field(default_factory=dict)
    questions: tuple[Question, ...] = ()

    def columns(self) -> WordColumns:
        """Return the values of the optional columns."""
        questions: list[QuestionColumn] = []
        for item in self.questions:
            questions.append({"kind": item.kind, "question": item.question, "answer": item.answer})
        return {
            "caption": self.caption,
            "attributes": json.dumps(self.attributes, sort_keys=True),
            "questions": questions,
        }


NO_WORDS: WordColumns = {"caption": None, "attributes": None, "questions": None}
"""The values of a row without words in a manifest that has the columns."""


def words_of(row: PairRow) -> Words | None:
    """Return the words of a manifest's ``row``, a dict by column; None where it has no caption.

    Raises:
        ManifestError: ``attributes`` is no JSON object, or a question is not whole.
    """
    caption = row.get("caption")
    if caption is None:
        return None
    try:
        attributes = json.loads(row.get("attributes") or "{}")
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"pair {row.get('pair_id')}: attributes is not JSON ({error})") from error
    if not isinstance(attributes, dict):
        raise ManifestError(f"pair {row.get('pair_id')}: attributes is not a JSON object")
    questions = []
    for item in row.get("questions") or []:
        # Parquet columns may hold nulls, which would fail only where the texts are tokenized.
        if not item or None in item.values():
            raise ManifestError(f"pair {row.get('pair_id')}: a question lacks its kind, its text or its answer")
        questions.append(Question(item["kind"], item["question"], item["answer"]))
    return Words(caption, attributes, tuple(questions))


def read_captioned(path: str | os.PathLike[str]) -> Iterator[tuple[PairRow, Words]]:
    """Yield the rows of a manifest that have a caption, with their words; ``image`` is a dict of ``uri`` and ``bytes``.

    Raises:
        ManifestError: The manifest has no column ``caption``, or cannot be read.
    """
    # Imported here: manifest_reading imports this module.
    from covray.pairs.manifest_reading import check_manifest, read_manifest, row_dicts

    info = check_manifest(path, captions=True)
    if not info.has_captions:
        raise ManifestError(f"{os.fspath(path)}: has no captions; write some with covray pairs portraits")
    columns = ["pair_id", "task", "split", "image", "meta", *(column.name for column in WORD_FIELDS)]
    for batch in read_manifest(path, columns):
        for row in row_dicts(pa.Table.from_batches([batch])):
            words = words_of(row)
            if words is not None:
                yield row, words
