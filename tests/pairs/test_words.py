"""The optional columns of words: they come back as written, and manifests without them are as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from covray.errors import ManifestError
from covray.io.images import encode_png
from covray.pairs.manifest import MANIFEST_SCHEMA, ManifestWriter, Pair, Picture
from covray.pairs.manifest_reading import check_manifest
from covray.pairs.words import CAPTION_TASK, Question, Words, read_captioned

PICTURE = Picture(bytes=encode_png(np.zeros((4, 4, 3), np.uint8)))
WORDS = Words("A ball.", {"object": "ball"}, (Question("object", "What is it?", "ball"),))
CAPTIONED = Pair(CAPTION_TASK, "train", PICTURE, Picture(), {}, WORDS)
DEPTH = Pair("depth", "train", PICTURE, PICTURE)


def _written(path: Path, *pairs: Pair, captions: bool) -> str:
    with ManifestWriter(path, captions=captions) as writer:
        for pair in pairs:
            writer.add(pair)
    return str(path)


def test_words_come_back_as_written(tmp_path: Path) -> None:
    path = _written(tmp_path / "a.parquet", CAPTIONED, DEPTH, captions=True)
    ((row, words),) = read_captioned(path)
    assert words == WORDS
    assert row["pair_id"] == CAPTIONED.pair_id
    assert row["image"]["bytes"] == PICTURE.bytes
    assert check_manifest(path, captions=True).has_captions


def test_an_image_may_have_several_captions(tmp_path: Path) -> None:
    other = Pair(CAPTION_TASK, "train", PICTURE, Picture(), {}, Words("A sphere."))
    path = _written(tmp_path / "a.parquet", CAPTIONED, other, CAPTIONED, captions=True)
    assert [words.caption for _, words in read_captioned(path)] == ["A ball.", "A sphere."]


def test_a_manifest_without_words_has_its_old_columns_and_ids(tmp_path: Path) -> None:
    path = _written(tmp_path / "a.parquet", DEPTH, captions=False)
    assert pq.read_schema(path).names == MANIFEST_SCHEMA.names
    assert DEPTH.pair_id == Pair("depth", "train", PICTURE, PICTURE, {}, WORDS).pair_id
    assert not check_manifest(path).has_captions
    with pytest.raises(ManifestError, match="has no captions"):
        next(read_captioned(path))


def test_words_beside_labels_do_not_disturb_a_build(tmp_path: Path) -> None:
    worded = Pair("depth", "train", PICTURE, PICTURE, {}, WORDS)
    info = check_manifest(_written(tmp_path / "a.parquet", worded, captions=True))
    assert info.per_task == {"depth": 1}
    assert info.pair_ids.tolist() == [DEPTH.pair_id]


def test_rows_of_captions_cannot_be_built(tmp_path: Path) -> None:
    path = _written(tmp_path / "a.parquet", CAPTIONED, captions=True)
    with pytest.raises(ManifestError, match="no label picture to build"):
        check_manifest(path)
    with pytest.raises(ManifestError, match="unknown task 'caption'"):
        _written(tmp_path / "b.parquet", CAPTIONED, captions=False)


@pytest.mark.parametrize("attributes", ["[1]", "{"])
def test_attributes_of_another_program_are_checked(tmp_path: Path, attributes: str) -> None:
    path = _written(tmp_path / "a.parquet", CAPTIONED, captions=True)
    table = pq.read_table(path)
    place = table.column_names.index("attributes")
    pq.write_table(table.set_column(place, "attributes", pa.array([attributes])), path)
    with pytest.raises(ManifestError, match="attributes is not"):
        list(read_captioned(path))


@pytest.mark.parametrize("question", [None, {"kind": "object", "question": "What is it?", "answer": None}])
def test_questions_of_another_program_are_checked(tmp_path: Path, question: object) -> None:
    path = _written(tmp_path / "a.parquet", CAPTIONED, captions=True)
    table = pq.read_table(path)
    place = table.schema.get_field_index("questions")
    changed = pa.array([[question]], table.schema.field(place).type)
    pq.write_table(table.set_column(place, table.schema.field(place), changed), path)
    with pytest.raises(ManifestError, match="a question lacks its kind, its text or its answer"):
        list(read_captioned(path))


def test_questions_that_are_no_utf8_are_read_all_the_same(tmp_path: Path) -> None:
    path = _written(tmp_path / "a.parquet", CAPTIONED, captions=True)
    table = pq.read_table(path)
    place = table.schema.get_field_index("questions")
    broken = pa.array([b"a \xff?"]).view(pa.string())
    items = pa.StructArray.from_arrays([broken] * 3, fields=list(table.schema.field(place).type.value_type))
    changed = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), items)
    pq.write_table(table.set_column(place, table.schema.field(place), changed), path)
    ((_, words),) = read_captioned(path)
    assert words.questions == (Question("a \ufffd?", "a \ufffd?", "a \ufffd?"),)
