"""Pictures with a prompt and an answer: from a manifest's captions and questions, or from a list of one's own.

| list | a row |
|---|---|
| CSV, JSON lines, JSON, Parquet | ``image`` and ``caption``, or ``image``, ``question`` and ``answer``; ``split`` |
| LLaVA's JSON | ``image`` and ``conversations``; each turn is an exchange of its own, without the turns before it |
| COCO's captions | ``images`` and ``annotations`` with ``caption`` |

LLaVA's ``image`` may be a list of pictures, which stand where a turn has ``<image>``. No picture is opened here.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq

from covray.errors import ManifestError
from covray.io import storage
from covray.io.images import Picture, picture_identity, picture_of
from covray.pairs.user_lists import list_picture, list_root, numbered_lines, rows_of, stripped
from covray.pairs.values import parsed_json, reading
from covray.pairs.words import Words, read_captioned

CAPTION = "caption"
"""Kind of an exchange whose answer is a caption."""
_PLACEHOLDER = "<image>"
"""Where LLaVA's prompts name the picture; covray puts it before the text."""


@dataclass(frozen=True)
class Exchange:
    """A picture, what is asked of it, and the answer."""

    picture: Picture
    """The picture; missing where an exchange is of text only."""
    prompt: str | None
    """None: the answer is a caption, and the reader chooses the instruction."""
    answer: str
    kind: str = CAPTION
    """``caption``, or the kind of a question; accuracies are counted by it."""
    split: str = "train"
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """What a manifest's ``attributes`` say of the picture."""
    turn: tuple[str | Picture, ...] = ()
    """A prompt of several pictures: they and the texts between them, in order. ``picture`` is missing then."""


@dataclass(frozen=True)
class Exchanges:
    """A whole list."""

    items: tuple[Exchange, ...]
    root: str | None
    """Folder that the pictures' URIs are below."""

    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) of texts, splits and pictures: of bytes where the list holds them, else of URIs."""
        whole = hashlib.sha256()
        for item in self.items:
            # Whatever decides what a model reads and should say; the order of the items counts, too.
            identity: list[Any] = [picture_identity(item.picture), item.prompt, item.answer, item.kind, item.split]
            if item.turn:
                identity.append(list(map(_identity_of_part, item.turn)))
            whole.update(json.dumps(identity).encode())
        return whole.hexdigest()

    def of_split(self, split: str) -> tuple[Exchange, ...]:
        """Return the exchanges of ``split``.

        Raises:
            ManifestError: There are none.
        """
        chosen = tuple(item for item in self.items if item.split == split)
        if not chosen:
            present = sorted({item.split for item in self.items})
            raise ManifestError(f"split {split}: has nothing to use; the data has {', '.join(present) or 'nothing'}")
        return chosen


def read_exchanges(path: str, root: str | None = None, *, captions: bool = True, questions: bool = True) -> Exchanges:
    """Read a manifest with words, or a list of one's own; see the module.

    Args:
        path: The manifest (a Parquet file or a folder of them), or the list.
        root: Folder that the pictures of a list are below; None: that of the list.
        captions: Keep captions.
        questions: Keep questions.

    Raises:
        ManifestError: It cannot be read, or holds nothing of what is kept.
    """
    path = os.fspath(path)
    if _is_manifest(path):
        items = tuple(_manifest_exchanges(path))
        used_root = _manifest_root(path)
    else:
        used_root = list_root(path, root)
        items = tuple(_list_exchanges(path, used_root.rstrip("/") + "/"))
    wanted = []
    for item in items:
        is_caption = item.prompt is None
        if (is_caption and captions) or (not is_caption and questions):
            wanted.append(item)
    if not wanted:
        raise ManifestError(f"{path}: has no captions or questions to use; see texts.captions and texts.questions")
    return Exchanges(tuple(wanted), used_root)


def _identity_of_part(part: str | Picture) -> Any:
    if isinstance(part, str):
        return part
    return picture_identity(part)


def _is_manifest(path: str) -> bool:
    if posixpath.splitext(path)[1].lower() not in ("", ".parquet"):
        return False
    if not path.lower().endswith(".parquet"):
        return True  # a folder
    # A list of words may be Parquet as well; only a manifest has ids of pairs.
    with reading(path):
        filesystem, inner = storage.resolve(path)
        return "pair_id" in pq.read_schema(inner, filesystem=filesystem).names


def _manifest_root(path: str) -> str | None:
    from covray.pairs.manifest_reading import check_manifest

    return check_manifest(path, captions=True).root


def _manifest_exchanges(path: str) -> Iterator[Exchange]:
    for row, words in read_captioned(path):
        picture = picture_of(row["image"])
        yield from _exchanges_of_words(picture, words, str(row["split"]))


def _exchanges_of_words(picture: Picture, words: Words, split: str) -> Iterator[Exchange]:
    yield Exchange(picture, None, words.caption, CAPTION, split, words.attributes)
    for question in words.questions:
        yield Exchange(picture, question.question, question.answer, question.kind, split)


def _list_exchanges(file: str, base: str) -> Iterator[Exchange]:
    for where, row in rows_of(file, "pictures with words", _csv_rows, _json_rows):
        if not isinstance(row, Mapping):
            raise ManifestError(f"{file}, {where}: is not an object with image and caption")
        yield from _exchanges_of_row(file, where, row, base)


def _exchanges_of_row(file: str, where: str, row: Mapping[Any, Any], base: str) -> Iterator[Exchange]:
    """Yield the exchanges of one row; see the module for its keys."""
    # Keys of any case are taken, as in lists of pairs.
    values = {}
    for key, value in row.items():
        if isinstance(key, str):
            key = key.strip().lower()
        values[key] = stripped(value)
    split = values.get("split")
    if split is None or split == "":
        split = "train"
    if not isinstance(split, str):
        raise ManifestError(f"{file}, {where}: split is {split!r}, not a name")
    if "conversations" in values:
        yield from _turns(file, where, values, base, split)
        return
    picture = list_picture(file, where, "image", values.get("image"), base)
    if picture == Picture():
        raise ManifestError(f"{file}, {where}: has no image; name one in the column image")
    caption, question, answer = values.get("caption"), values.get("question"), values.get("answer")
    for key in ("caption", "question", "answer", "kind"):
        if not isinstance(values.get(key), str | None):
            raise ManifestError(f"{file}, {where}: {key} is {type(values[key]).__name__}, not a text")
    if not (caption or (question and answer)):
        raise ManifestError(f"{file}, {where}: has neither caption nor question and answer; give one of them")
    if caption:
        yield Exchange(picture, None, caption, CAPTION, split)
    if question and answer:
        yield Exchange(picture, question, answer, values.get("kind") or "question", split)


def _turns(file: str, where: str, values: Mapping[Any, Any], base: str, split: str) -> Iterator[Exchange]:
    """Yield the turns of a conversation of LLaVA's."""
    turns, image = values["conversations"], values.get("image")
    if not isinstance(turns, list) or len(turns) % 2:
        raise ManifestError(f"{file}, {where}: conversations is not a list of questions, each with its answer")
    images = image if isinstance(image, list) else [image]
    pictures = [list_picture(file, where, "image", value, base) for value in images or [None]]
    # Turns alternate: what a person says, and what the model should answer.
    for human, model in zip(turns[::2], turns[1::2], strict=True):
        try:
            speakers = (human["from"], model["from"])
            prompt, answer = human["value"], model["value"]
        except (KeyError, TypeError) as error:
            raise ManifestError(f"{file}, {where}: a turn has no {error}; it needs from and value") from error
        if speakers != ("human", "gpt") or not (isinstance(prompt, str) and isinstance(answer, str)):
            raise ManifestError(f"{file}, {where}: the turns are not of human and gpt by turns")
        # Several pictures stand at their placeholders; a single one comes first.
        if len(pictures) > 1:
            turn = _interleaved(f"{file}, {where}", prompt, pictures)
            text = prompt.replace(_PLACEHOLDER, "").strip()
            yield Exchange(Picture(), text, answer.strip(), "turn", split, turn=turn)
            continue
        yield Exchange(pictures[0], prompt.replace(_PLACEHOLDER, "").strip(), answer.strip(), "turn", split)


def _interleaved(where: str, prompt: str, pictures: Sequence[Picture]) -> tuple[str | Picture, ...]:
    """Return the texts of a prompt with the pictures in the places of their placeholders."""
    texts = prompt.split(_PLACEHOLDER)
    if len(texts) != len(pictures) + 1:
        raise ManifestError(
            f"{where}: a prompt has {len(texts) - 1} times {_PLACEHOLDER} for {len(pictures)} pictures; give as many"
        )
    turn: list[str | Picture] = []
    for text, picture in zip(texts, [*pictures, None], strict=True):
        for part in (text, picture):
            if part:  # no empty text, and no picture behind the last one
                turn.append(part)
    return tuple(turn)


def _json_rows(file: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a JSON file: a list, or COCO's captions."""
    with reading(file):
        data = storage.read_bytes(file)
    content = parsed_json(file, data, unique_keys=True)
    if isinstance(content, list):
        for number, item in enumerate(content, 1):
            yield f"item {number}", item
        return
    try:
        # COCO's captions name pictures by number; an annotation each has the words.
        names = {image["id"]: image["file_name"] for image in content["images"]}
        for number, note in enumerate(content["annotations"], 1):
            yield f"annotation {number}", {"image": names[note["image_id"]], "caption": note["caption"]}
    except (KeyError, TypeError) as error:
        raise ManifestError(f"{file}: is neither a list nor COCO's captions ({error} is missing)") from error


def _csv_rows(file: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a CSV file by the names in its first line."""
    lines = (text for _, text in numbered_lines(file))
    header = next(lines, "")
    separator = next((mark for mark in (",", ";", "\t", "|") if mark in header), ",")
    reader = csv.reader(lines, strict=True, delimiter=separator, skipinitialspace=True)
    names: list[str] = []
    # The header is not of ``reader``: its line decides the separator, so that the others are one line further down.
    try:
        if header:
            cells_of_header = next(csv.reader([header], delimiter=separator))
            names = [name.strip() for name in cells_of_header]
        # Keys of any case are one key: of two such columns the last would win.
        named = [name.lower() for name in names if name]
        if len(set(named)) < len(named):
            raise ManifestError(f"{file}, line 1: a column name twice; give each column a name of its own")
        for cells in reader:
            where = f"line {reader.line_num + 1}"
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(names):
                raise ManifestError(
                    f"{file}, {where}: {len(cells)} cells for {len(names)} columns; put cells that contain "
                    f"{separator!r} between quotes"
                )
            yield where, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise ManifestError(f"{file}, line {reader.line_num + 1}: {error}") from error
