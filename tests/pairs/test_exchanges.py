"""Captions and questions come out of every kind of list, and what cannot be read is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from covray.errors import ManifestError
from covray.pairs.exchanges import CAPTION, Exchange, Exchanges, read_exchanges
from covray.pairs.manifest import ManifestWriter, Pair, Picture
from covray.pairs.words import CAPTION_TASK, Question, Words

BALL, BOX = Picture(uri="a.png"), Picture(uri="b.png")


def written(folder: Path, name: str, content: Any) -> str:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_captions_and_questions_of_a_manifest(tmp_path: Path) -> None:
    path = tmp_path / "words.parquet"
    words = Words("A ball.", {"object": "ball"}, (Question("colour", "Which colour?", "red"),))
    with ManifestWriter(path, tmp_path, captions=True) as writer:
        writer.add(Pair(CAPTION_TASK, "val", BALL, Picture(), {}, words))
    expected = (
        Exchange(BALL, None, "A ball.", CAPTION, "val", {"object": "ball"}),
        Exchange(BALL, "Which colour?", "red", "colour", "val"),
    )
    both = read_exchanges(str(path))
    assert both.items == expected
    assert both.root == str(tmp_path)
    assert read_exchanges(str(path), questions=False).items == expected[:1]
    assert read_exchanges(str(path), captions=False).items == expected[1:]


def test_lists_of_captions(tmp_path: Path) -> None:
    rows = [
        {"image": "a.png", "caption": "a ball", "split": None},
        {"image": "b.png", "caption": "a box", "split": "test"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
    coco = {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 9, "file_name": "b.png"}],
        "annotations": [{"image_id": 7, "caption": "a ball"}, {"image_id": 9, "caption": "a box"}],
    }
    lists = [
        written(tmp_path, "list.csv", "Image, Caption,split\na.png,a ball,\nb.png,a box,test\n"),
        written(tmp_path, "list.tsv", "image\tcaption\tsplit\na.png\ta ball\t\nb.png\ta box\ttest\n"),
        written(tmp_path, "list.json", rows),
        written(tmp_path, "list.jsonl", "\n".join(map(json.dumps, rows))),
        str(tmp_path / "list.parquet"),
    ]
    for path in lists:
        result = read_exchanges(path)
        assert result.items == (Exchange(BALL, None, "a ball"), Exchange(BOX, None, "a box", CAPTION, "test")), path
        assert result.root == str(tmp_path)
    of_coco = read_exchanges(written(tmp_path, "coco.json", coco), "/pictures")
    assert [item.answer for item in of_coco.items] == ["a ball", "a box"]
    assert of_coco.root == "/pictures"


def test_lists_of_questions(tmp_path: Path) -> None:
    row = {"image": "a.png", "question": "What?", "answer": "a ball", "kind": "object"}
    (item,) = read_exchanges(written(tmp_path, "list.json", [row])).items
    assert item == Exchange(BALL, "What?", "a ball", "object")


def test_conversations_of_llava(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A ball."},
        {"from": "human", "value": "Which colour?"},
        {"from": "gpt", "value": "Red."},
    ]
    path = written(tmp_path, "llava.json", [{"id": 1, "image": "a.png", "conversations": turns}])
    assert read_exchanges(path).items == (
        Exchange(BALL, "What is it?", "A ball.", "turn"),
        Exchange(BALL, "Which colour?", "Red.", "turn"),
    )
    text_only = read_exchanges(written(tmp_path, "text.json", [{"conversations": turns[2:]}]))
    assert text_only.items == (Exchange(Picture(), "Which colour?", "Red.", "turn"),)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", r"ends in \.csv"),
        ("a.json", [3], "item 1: is not an object"),
        ("a.json", {"images": []}, "neither a list nor COCO's captions"),
        ("a.json", [{"image": "a.png"}], "item 1: has neither caption nor question and answer"),
        ("a.json", [{"caption": "a ball"}], "item 1: has no image"),
        ("a.json", [{"image": "a.png", "caption": 3}], "caption is int, not a text"),
        ("a.json", [{"image": "a.png", "conversations": [{"from": "human"}, {}]}], "a turn has no 'value'|'from'"),
        ("a.json", [{"image": "a.png", "conversations": [{}]}], "each with its answer"),
        ("a.json", [{"image": "a.png", "caption": "a ball", "split": 1}], "item 1: split is 1, not a name"),
        ("a.csv", "image,caption\na.png\n", "line 2: 1 cells for 2 columns"),
        ("a.csv", "image,caption,Caption\na.png,a ball,a box\n", "line 1: a column name twice"),
        (
            "a.csv",
            f"image,{'x' * 2**25}\na.png,a ball\n",
            "line 1: field larger than field limit",
        ),  # more than any reader here allows
        ("a.json", [], "has no captions or questions"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(ManifestError, match=message) as error:
        read_exchanges(path)
    assert "\n" not in str(error.value)


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    first = read_exchanges(written(tmp_path, "a.json", [{"image": "a.png", "caption": "a ball"}]))
    same = read_exchanges(written(tmp_path, "b.csv", "image,caption\na.png,a ball\n"))
    other = read_exchanges(written(tmp_path, "c.csv", "image,caption\na.png,a box\n"))
    assert first.fingerprint() == same.fingerprint() != other.fingerprint()


def test_an_empty_split_is_named(tmp_path: Path) -> None:
    result = read_exchanges(written(tmp_path, "a.json", [{"image": "a.png", "caption": "a ball"}]))
    with pytest.raises(ManifestError, match="split val: has nothing to use; the data has train"):
        result.of_split("val")


def test_several_pictures_of_llava_stand_where_the_prompt_has_them(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "First <image> then <image>\nwhat comes? "},
        {"from": "gpt", "value": " A ball."},
    ]
    path = tmp_path / "list.jsonl"
    path.write_text(json.dumps({"image": ["a.png", "b.png"], "conversations": turns, "split": "val"}))
    read = read_exchanges(str(path))
    (item,) = read.items
    first, second = Picture(uri="a.png"), Picture(uri="b.png")
    assert item.turn == ("First ", first, " then ", second, "\nwhat comes? ")
    assert (item.picture, item.answer, item.split) == (Picture(), "A ball.", "val")
    other = Exchanges((replace(item, turn=item.turn[:-1]),), read.root)
    assert other.fingerprint() != read.fingerprint()
    path.write_text(json.dumps({"image": ["a.png", "b.png", "c.png"], "conversations": turns}))
    with pytest.raises(ManifestError, match="2 times <image> for 3 pictures"):
        read_exchanges(str(path))
