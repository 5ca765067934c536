"""Lists of pairs: read however people write them where they have one meaning, else one line that names the place."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from covray.pairs.manifest import Pair, Picture
from covray.pairs.manifest_reading import check_manifest
from covray.pairs.user_lists import PAINTER_TASKS, list_root, read_user_list
from tests.support.manifests import refused, write


def put(path: Path, text: str | bytes | list[Any]) -> Path:
    if isinstance(text, list):
        text = json.dumps(text)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


CSV = 'image,label,task,split,scene\na.png,"b,1.png",depth,val,kitchen\nc.png,d.png,edges,,\n'
ROWS = [
    {"image": "a.png", "label": "b,1.png", "task": "depth", "split": "val", "scene": "kitchen"},
    {"image": "c.png", "label": "d.png", "task": "edges", "split": "", "scene": ""},
]


def test_every_kind_of_list_gives_the_same_pairs(tmp_path: Path) -> None:
    files = [
        put(tmp_path / "a.csv", CSV),
        put(tmp_path / "bom.CSV", b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode()),
        put(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in ROWS) + "\n\n"),
        put(tmp_path / "a.json", ROWS),
    ]
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    expected = [
        Pair("depth", "val", Picture(uri="a.png"), Picture(uri="b,1.png"), {"scene": "kitchen"}),
        Pair("edges", "test", Picture(uri="c.png"), Picture(uri="d.png"), {"scene": ""}),
    ]
    for file in [*files, tmp_path / "a.parquet"]:
        assert list(read_user_list(file, split="test")) == expected, file


def test_parquet_lists_may_hold_the_pictures(tmp_path: Path) -> None:
    image = {"bytes": b"xx", "path": "a.png"}
    rows = [{"image": image, "label": b"yy", "when": None}, {"image": {"bytes": None, "path": None}, "label": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = read_user_list(tmp_path / "a.parquet", task="pose")
    assert (first.image, first.label) == (Picture("a.png", b"xx"), Picture(bytes=b"yy"))
    assert (second.image, second.label) == (Picture(), Picture())


def test_missing_and_hostile_pictures_are_pairs_all_the_same(tmp_path: Path) -> None:
    rows = [
        {"image": None, "label": ""},
        {"image": "../../etc/passwd", "label": "x\0\n"},
        {"image": "\ud800", "label": "b"},
    ]
    pairs = list(read_user_list(put(tmp_path / "a.json", rows), task="depth"))
    assert [each.image for each in pairs] == [Picture(), Picture(uri="../../etc/passwd"), Picture(uri="?")]
    assert [each.label for each in pairs] == [Picture(), Picture(uri="x\0\n"), Picture(uri="b")]
    write(tmp_path / "pairs.parquet", pairs)
    assert check_manifest(tmp_path / "pairs.parquet").rows == 3


def test_painters_types_are_our_tasks(tmp_path: Path) -> None:
    rows = [{"image_path": "a/i.png", "target_path": "a/l.png", "type": kind} for kind in PAINTER_TASKS]
    pairs = list(read_user_list(put(tmp_path / "a.json", rows)))
    assert [each.task for each in pairs] == ["segmentation", "segmentation", "depth", "low_light"]
    assert pairs[0].image == Picture(uri="a/i.png")
    assert pairs[0].label == Picture(uri="a/l.png")
    assert pairs[0].meta == {"type": "ade20k_image2semantic"}
    for kind in ("derain_image2derain", "ssid_image2denoise", "coco_image2panoptic_inst", "coco_image2pose", 7, ["x"]):
        bad = [*rows, {"image_path": "i", "target_path": "l", "type": kind}]
        text = refused(read_user_list, put(tmp_path / "b.json", bad), task="depth")
        assert "item 5" in text
        assert repr(kind) in text


def test_the_root_is_the_lists_folder_and_identity_moves_with_it(tmp_path: Path) -> None:
    ids = []
    for place in ("here", "there"):
        folder = tmp_path / place
        folder.mkdir()
        assert list_root(folder / "a.csv") == str(folder)
        file = put(folder / "a.csv", f"image,label\n{folder}/i.png,sub/l.png\n")
        ids += [each.pair_id for each in read_user_list(file, task="depth")]
        (outside,) = read_user_list(file, task="depth", root=tmp_path / "elsewhere")
        assert outside.image.uri == f"{folder}/i.png"
    assert ids[0] == ids[1]
    assert list_root("s3://bucket/lists/a.csv") == "s3://bucket/lists"
    assert list_root("a.csv", "s3://bucket/data") == "s3://bucket/data"


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("a.csv", "image,target\na,b\n", "line 1: no column label"),
        ("a.csv", "image,label,image\na,b,c\n", "line 1: a column name twice"),
        ("a.csv", "image,label\na,b\nc\n", "line 3: 1 cells for 2 columns"),
        ("a.csv", "image,label\na,b\nc,d,e\n", "line 3: 3 cells for 2 columns"),
        ("a.csv", 'image,label\na,"b\nc,d\n', "line 3: unexpected end"),
        ("a.csv", "image,label\na," + "b" * 20_000_000 + "\n", "line 2: field larger"),
        ("a.csv", b"image,label\na,b\n\xff,b\n", "line 3: is not UTF-8"),
        ("a.csv", "image,label,task\na,b,depth\na,b,dpeth\n", "line 3: unknown task 'dpeth'"),
        ("a.jsonl", '{"image": "a", "label": "b"}\n{"image": \n', "line 2: not valid JSON"),
        ("a.jsonl", '{"image": "a", "label": "b"}\n\n[1]\n', "line 3: is no object"),
        ("a.jsonl", '{"image": "a"}\n', "line 1: has no label"),
        ("a.jsonl", '{"image": 7, "label": "b"}\n', "line 1: image is int"),
        ("a.jsonl", '{"image": "a", "label": {"x": 1}}\n', "line 1: label is dict"),
        ("a.jsonl", '{"image": "a", "label": "b", "task": ["x"]}\n', "line 1: unknown task"),
        ("a.jsonl", '{"image": "a", "label": "b", "split": 3}\n', "line 1: split is 3"),
        ("a.jsonl", '{"image": "a", "label": "b", "label": "c"}\n', "line 1: not valid JSON: 'label' has two values"),
        ("a.json", '[{"image": "a", "label": "b", "image": "c"}]', "not valid JSON: 'image' has two values"),
        ("a.jsonl", "[" * 100_000 + "\n", "line 1: not valid JSON"),
        ("a.json", '[{"image": "a", "label": "b"}, 3]', "item 2: is no object"),
        ("a.json", '{"image": "a", "label": "b"}', "holds dict, not a list"),
        ("a.json", '[\n{"image": "a",\n}]', "line 3 column 1"),
        ("a.json", b"\xff\xfe\xff", "not valid JSON"),
        ("a.parquet", b"PAR1", "not a Parquet file"),
        ("a.txt", "a b\n", "ends in .csv"),
    ],
)
def test_a_malformed_list_is_named_with_its_place(tmp_path: Path, name: str, text: str | bytes, place: str) -> None:
    file = put(tmp_path / name, text)
    told = refused(read_user_list, file, task="depth")
    assert told.startswith(str(file))
    assert place in told


def test_a_list_needs_a_task_we_know(tmp_path: Path) -> None:
    file = put(tmp_path / "a.csv", "image,label\na,b\n")
    assert "line 2: has no task" in refused(read_user_list, file)
    assert "--task dpeth" in refused(read_user_list, file, task="dpeth")
    assert "no such file" in refused(read_user_list, tmp_path / "no.csv", task="depth")
    assert "cannot be read" in refused(
        read_user_list, (tmp_path / "folder.csv").mkdir() or tmp_path / "folder.csv", "depth"
    )


def test_a_list_with_what_python_has_not_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"
    for strange in (pa.array([b"\xff"]).view(pa.string()), pa.array([2**31 - 1], pa.date32())):
        pq.write_table(pa.table({"image": ["i"], "label": ["l"], "when": strange}), path)
        assert "cannot be read" in refused(read_user_list, path, "depth")


PLAIN = [Pair("depth", "train", Picture(uri="img/a.png"), Picture(uri="img/b.png"), {"note": "x"})]


@pytest.mark.parametrize(
    "text",
    [
        "image,label,note\nimg/a.png,img/b.png,x\n",
        "image, label, note\nimg/a.png, img/b.png, x\n",
        'image, label, note\n"img/a.png", "img/b.png", "x"\n',
        "image,label,note\rimg/a.png,img/b.png,x\r",
        "image,label,note\r\nimg/a.png,img/b.png,x\r\n",
        "image;label;note\nimg/a.png;img/b.png;x\n",
        "image\tlabel\tnote\nimg/a.png\timg/b.png\tx\n",
        "image|label|note\nimg/a.png|img/b.png|x\n",
        "sep=;\nimage;label;note\nimg/a.png;img/b.png;x\n",
        "sep=,\r\nimage,label,note\r\nimg/a.png,img/b.png,x\r\n",
        "Image,LABEL,note\nimg/a.png,img/b.png,x\n",
        " image , label ,note\nimg/a.png,img/b.png,x\n",
        "\n\nimage,label,note\n\nimg/a.png,img/b.png,x\n,,\n",
        "image,label,note,\nimg/a.png,img/b.png,x,\n",  # the empty last column of a spreadsheet
        "image,label,note\nimg/a.png,img/b.png,x,,\n",
        "image,label,note,task\nimg/a.png,img/b.png,x, depth \n",
        "image_path,target_path,note\nimg/a.png,img/b.png,x\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_csv_is_read_as_people_and_programs_write_it(tmp_path: Path, text: str, encoding: str) -> None:
    file = put(tmp_path / "a.csv", text.encode(encoding))
    assert list(read_user_list(file, task="depth")) == PLAIN


def test_keys_of_other_lists_may_have_capitals_too(tmp_path: Path) -> None:
    row = {"Image": "img/a.png", "LABEL": "img/b.png", "note": "x"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    for file in (tmp_path / "a.parquet", put(tmp_path / "a.json", [row]), put(tmp_path / "a.jsonl", json.dumps(row))):
        assert list(read_user_list(file, task="depth")) == PLAIN
    both = {"image": "img/a.png", "Image": "other", "label": "img/b.png"}
    (pair,) = read_user_list(put(tmp_path / "b.json", [both]), task="depth")
    assert (pair.image.uri, pair.meta) == ("img/a.png", {"Image": "other"})


def test_long_cells_are_read(tmp_path: Path) -> None:
    code = "1 2 " * 100_000
    (pair,) = read_user_list(put(tmp_path / "a.csv", f"image,label,rle\na.png,b.png,{code}\n"), task="depth")
    assert pair.meta == {"rle": code}


def test_names_keep_what_belongs_to_them(tmp_path: Path) -> None:
    """Blanks and backslashes may be part of a name; whether they are, its folder tells (``user_labels``)."""
    name = unicodedata.normalize("NFD", "é") + "\\x.png "
    (pair,) = read_user_list(put(tmp_path / "a.csv", f'image,label\n{name},"a;b,c.png"\n'), task="depth")
    assert (pair.image.uri, pair.label.uri) == (name, "a;b,c.png")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("image,label\nC:\\d\\a.png,b.png\n", "line 2: image is 'C:\\\\d\\\\a.png', a path of Windows; give paths"),
        ("image,label\na.png,D:/b.png\n", "line 2: label is 'D:/b.png', a path of Windows"),
        ("image,label\n\\\\server\\a.png,b.png\n", "a path of Windows"),
        ("image,label\na,b.png,c.png\n", "line 2: 3 cells for 2 columns; put cells that contain , between quotes"),
        ("image;label\na.png;b.png;c.png\n", "line 2: 3 cells for 2 columns; put cells that contain ; between quotes"),
        ("sep=;\nimage;label\na.png\n", "line 3: 1 cells for 2 columns"),
        ("a.png,b.png\n", "line 1: no column image or label; the first line names the columns"),
        ("Image,image,label\na,b,c\n", "a column name twice"),
        ("image,label,,\na.png,b.png,,x\n", "line 2: 'x' stands in a column without a name"),
        ("image,label\né.png,b.png\n".encode("latin-1"), "line 2: is not UTF-8; save the list as UTF-8"),
    ],
)
def test_what_cannot_be_understood_is_named(tmp_path: Path, text: str | bytes, place: str) -> None:
    message = refused(read_user_list, put(tmp_path / "a.csv", text), task="depth")
    assert place in message
    assert message.startswith(str(tmp_path / "a.csv"))
