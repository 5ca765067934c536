"""Manifests: what is written is read, whole or not at all; a user's mistake is one line that names its place."""

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from covray.io import storage
from covray.pairs import manifest
from covray.pairs.manifest import MANIFEST_SCHEMA, ManifestWriter, Pair, Picture
from covray.pairs.manifest_reading import check_manifest, read_classes, read_manifest, row_dicts
from tests.support.manifests import refused, write


def pair(number: int = 0, task: str = "depth", split: str = "train", **meta: Any) -> Pair:
    return Pair(task, split, Picture(bytes=b"image %d" % number), Picture(uri=f"label{number}.png"), meta)


def test_pair_id_is_the_documented_hash() -> None:
    """Golden: ids are in everyone's shards, so they must never change."""
    known = Pair("depth", "train", Picture(bytes=b"image"), Picture(uri="label.png"))
    assert known.pair_id == 606214217412105744


def test_pair_id_depends_on_task_and_pictures_only() -> None:
    base = pair()
    assert pair(split="test", note="other").pair_id == base.pair_id
    assert Pair("depth", "train", Picture(uri="elsewhere", bytes=b"image 0"), base.label).pair_id == base.pair_id
    assert pair(task="normals").pair_id != base.pair_id
    assert Pair("depth", "train", base.label, base.image).pair_id != base.pair_id
    assert pair(1).pair_id != base.pair_id


@settings(max_examples=50, deadline=None)
@given(st.tuples(st.text(), st.text()), st.tuples(st.text(), st.text()))
def test_different_pictures_never_spell_the_same_id(one: tuple[str, str], other: tuple[str, str]) -> None:
    ids = [Pair("depth", "train", Picture(uri=a), Picture(uri=b)).pair_id for a, b in (one, other)]
    assert (ids[0] == ids[1]) == (one == other)
    assert all(-(2**63) <= pair_id < 2**63 for pair_id in ids)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "pairs.parquet"
    pairs = [pair(n, ("depth", "edges")[n % 2], ("train", "val")[n % 3 == 0], place=n) for n in range(20)]
    writer = write(path, pairs, str(tmp_path))
    assert (writer.rows, writer.duplicates) == (20, 0)
    table = pq.read_table(path)
    assert table.schema.equals(MANIFEST_SCHEMA)
    for row, expected in zip(table.to_pylist(), pairs, strict=True):
        assert (row["pair_id"], row["task"], row["split"]) == (expected.pair_id, expected.task, expected.split)
        assert Picture(**row["image"]) == expected.image
        assert Picture(**row["label"]) == expected.label
        assert json.loads(row["meta"]) == expected.meta
    info = check_manifest(path)
    assert (info.rows, info.per_task, info.splits) == (20, {"depth": 10, "edges": 10}, {"train": 13, "val": 7})
    assert info.root == str(tmp_path)
    assert info.pair_ids.tolist() == [each.pair_id for each in pairs]
    assert [file.name for file in path.parent.iterdir()] == ["pairs.parquet"]


def test_a_pair_is_written_once(tmp_path: Path) -> None:
    with ManifestWriter(tmp_path / "pairs.parquet") as writer:
        assert writer.add(pair(1))
        assert not writer.add(pair(1, split="test"))
        assert writer.add(pair(2))
    assert (writer.rows, writer.duplicates) == (2, 1)
    assert check_manifest(tmp_path / "pairs.parquet").rows == 2


def test_row_groups_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "ROW_GROUP_BYTES", 10_000)
    monkeypatch.setattr(manifest, "ROW_GROUP_ROWS", 7)
    heavy = [Pair("depth", "train", Picture(bytes=bytes([n]) * 4_000), Picture()) for n in range(9)]
    write(tmp_path / "heavy.parquet", heavy)
    write(tmp_path / "many.parquet", [pair(n) for n in range(16)])
    groups = pq.ParquetFile(tmp_path / "heavy.parquet").metadata
    assert [groups.row_group(n).num_rows for n in range(groups.num_row_groups)] == [3, 3, 3]
    groups = pq.ParquetFile(tmp_path / "many.parquet").metadata
    assert [groups.row_group(n).num_rows for n in range(groups.num_row_groups)] == [7, 7, 2]


def test_a_stop_while_the_file_is_opened_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = pq.ParquetWriter

    def open_and_stop(*arguments: Any, **options: Any) -> None:
        opened(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(pq, "ParquetWriter", open_and_stop)
    with pytest.raises(KeyboardInterrupt), ManifestWriter(tmp_path / "pairs.parquet"):
        pytest.fail("it was opened")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_file_and_no_parts(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    write(path, [pair(1)])
    before = path.read_bytes()

    def interrupted() -> Iterator[Pair]:
        yield pair(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, interrupted())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    noise = np.random.default_rng(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        text = refused(
            write, path, [Pair("depth", "train", Picture(bytes=noise.bytes(50_000)), Picture()) for _ in range(9)]
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert text.startswith(f"{path}: cannot be written")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(write, tmp_path / "file" / "pairs.parquet", [pair()])
    assert "is a folder" in refused(write, tmp_path, [pair()])
    assert "cannot be written" in refused(write, "nowhere://bucket/pairs.parquet", [pair()])
    assert "unknown task 'dpeth'" in refused(write, tmp_path / "pairs.parquet", [pair(task="dpeth")])


def test_another_storage_gets_the_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(storage, "resolve", lambda path: (bucket, path.removeprefix("s3://bucket/")))
    with ManifestWriter("s3://bucket/inner/pairs.parquet", "s3://bucket/data") as writer:
        writer.add(pair(1))
        assert not (tmp_path / "inner").exists()
    info = check_manifest("s3://bucket/inner/pairs.parquet")
    assert (info.rows, info.root) == (1, "s3://bucket/data")


def test_hostile_text_and_odd_meta_survive(tmp_path: Path) -> None:
    strange = Pair(
        "depth",
        "tra\udcffin",
        Picture(uri="a\udcff\n\0.png"),
        Picture(uri="../../etc/passwd"),
        {"nan": float("nan"), "array": np.arange(2), "bytes": b"xx", "text": "\ud800", "path": Path("p")},
    )
    write(tmp_path / "pairs.parquet", [strange])
    (row,) = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert row["image"]["uri"] == "a?\n\0.png"
    assert row["label"]["uri"] == "../../etc/passwd"
    assert json.loads(row["meta"], parse_constant=pytest.fail) == {
        "nan": None,
        "array": [0, 1],
        "bytes": "2 bytes",
        "text": "\ud800",
        "path": "p",
    }


def test_a_folder_of_files_is_one_manifest(tmp_path: Path) -> None:
    for name, numbers in (("b", range(3)), ("a", range(3, 5))):
        write(tmp_path / f"{name}.parquet", [pair(n) for n in numbers])
    info = check_manifest(tmp_path)
    assert info.pair_ids.tolist() == [pair(n).pair_id for n in (3, 4, 0, 1, 2)]
    write(tmp_path / "c.parquet", [pair(4), pair(1), pair(9)])
    text = refused(check_manifest, tmp_path)
    assert "2 rows repeat a pair_id" in text
    assert str(pair(1).pair_id) in text


def test_private_files_are_none_of_a_manifest(tmp_path: Path) -> None:
    write(tmp_path / "split=old" / "a.parquet", [pair(1)])
    write(tmp_path / "B.PARQUET", [pair(2)])
    for private in ("_b.parquet", ".c.parquet", "_old/d.parquet", ".trash/e.parquet"):
        write(tmp_path / private, [pair(1)])
    (tmp_path / "list.csv").write_text("image,label")
    info = check_manifest(tmp_path)
    assert {Path(file).name for file in info.files} == {"a.parquet", "B.PARQUET"}
    assert sorted(info.pair_ids) == sorted([pair(1).pair_id, pair(2).pair_id])
    assert info.splits == {pair(1).split: 2}


def test_no_pairs_leave_what_stood_there(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    write(path, [pair(1)])
    assert "no pairs to write" in refused(write, path, [])
    assert check_manifest(path).rows == 1


def broken(column: str) -> pa.Table:
    """A manifest's table as another writer may leave it: of its second row the text in ``column`` is no UTF-8."""
    rows = table()
    text = pa.array([b"i", b"\xff", b"i", b"i", b"i"]).view(pa.string())
    if column in ("image", "label"):
        text = pa.StructArray.from_arrays([text, pa.nulls(5, pa.binary())], ["uri", "bytes"])
    return rows.set_column(rows.schema.get_field_index(column), column, text)


@pytest.mark.parametrize("column", ["image", "label", "meta", "split", "task"])
def test_text_that_is_no_utf8_is_a_row_or_a_line(tmp_path: Path, column: str) -> None:
    path = tmp_path / "pairs.parquet"
    (tmp_path / "i").touch()  # the first picture: without metadata a manifest's root is its folder
    pq.write_table(broken(column), path)
    if column in ("split", "task"):
        assert "cannot be read" in refused(check_manifest, path)
        return
    assert check_manifest(path).rows == 5
    rows, whole = row_dicts(pq.read_table(path)), table().to_pylist()
    found = rows[1].pop(column)
    whole[1].pop(column)
    assert found in ("\ufffd", {"uri": "\ufffd", "bytes": None})
    assert [{**row, column: None} for row in rows] == [{**row, column: None} for row in whole]


def test_files_of_different_roots_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [pair(1)], "/data/a")
    write(tmp_path / "b.parquet", [pair(2)], "/data/b")
    assert "different roots" in refused(check_manifest, tmp_path)


def table(count: int = 5) -> pa.Table:
    rows = [
        {
            "pair_id": n,
            "task": "depth",
            "split": "train",
            "image": {"uri": "i", "bytes": None},
            "label": {"uri": "l", "bytes": None},
            "meta": "{}",
        }
        for n in range(count)
    ]
    return pa.Table.from_pylist(rows, MANIFEST_SCHEMA)


def test_other_writers_and_large_arrow_types_are_accepted(tmp_path: Path) -> None:
    large = pa.struct([("bytes", pa.large_binary()), ("uri", pa.large_string())])
    schema = pa.schema(
        [(f.name, {"image": large, "task": pa.large_string()}.get(f.name, f.type)) for f in table().schema]
    )
    rows = table().to_pylist()
    (tmp_path / "i").touch()
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "pairs.parquet")
    info = check_manifest(tmp_path / "pairs.parquet")
    assert (info.rows, info.root, info.per_task) == (5, str(tmp_path), {"depth": 5})


def test_a_bad_manifest_is_named_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    assert "no such file" in refused(check_manifest, path)
    path.write_bytes(b"")
    assert "not a Parquet file" in refused(check_manifest, path)
    path.write_text("image,label\n" * 100)
    assert "not a Parquet file" in refused(check_manifest, path)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no Parquet files" in refused(check_manifest, empty)
    assert "no such storage" in refused(check_manifest, "nowhere://bucket/pairs.parquet")

    def told(changed: pa.Table) -> str:
        pq.write_table(changed, path)
        text = refused(check_manifest, path)
        assert text.startswith(str(path))
        return text

    for name in MANIFEST_SCHEMA.names:
        assert f"has no column {name}" in told(table().drop_columns([name]))
    assert "column pair_id is string, not int64" in told(table().set_column(0, "pair_id", pa.array(["1"] * 5)))
    assert "column image is string, not struct" in told(table().set_column(3, "image", pa.array(["i"] * 5)))
    assert "holds no pairs" in told(table(0))
    assert "3 rows repeat a pair_id (1, 2)" in told(table().set_column(0, "pair_id", pa.array([1, 1, 1, 2, 2])))
    assert "pair_id has nulls" in told(table().set_column(0, "pair_id", pa.array([1, None, 3, 4, 5])))
    text = told(table().set_column(1, "task", pa.array(["depth", "dpeth", "x", "edges", "x"])))
    assert "unknown task 'dpeth', 'x'" in text
    assert "segmentation, pose" in text
    newer = {manifest.METADATA_KEY: b'{"version": 2, "root": null}'}
    assert "upgrade covray" in told(table().replace_schema_metadata(newer))
    damaged = {manifest.METADATA_KEY: b"{"}
    assert "not valid JSON" in told(table().replace_schema_metadata(damaged))


def test_a_manifest_cut_short_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    write(path, [pair(n) for n in range(500)])
    data = path.read_bytes()
    for size in (len(data) // 2, len(data) - 1, len(data) - 100):
        path.write_bytes(data[:size])
        assert refused(check_manifest, path).startswith(f"{path}: ")


def test_a_manifest_from_pandas_is_read(tmp_path: Path) -> None:
    """pandas writes a field that has no value in any row as of type null, and drops the root."""
    pandas = pytest.importorskip("pandas")
    for name in ("i.png", "l.png"):
        (tmp_path / name).touch()
    pairs = [Pair("depth", "train", Picture(uri="i.png"), Picture(uri="l.png")), pair(1), pair(2)]
    write(tmp_path / "ours.parquet", pairs[:1], str(tmp_path))
    pandas.read_parquet(tmp_path / "ours.parquet").query("split == 'train'").to_parquet(tmp_path / "theirs.parquet")
    info = check_manifest(tmp_path / "theirs.parquet")
    assert (info.rows, info.root, info.pair_ids.tolist()) == (1, str(tmp_path), [pairs[0].pair_id])
    (batch,) = read_manifest(tmp_path / "theirs.parquet", MANIFEST_SCHEMA.names)
    assert batch.schema.equals(MANIFEST_SCHEMA)
    (row,) = batch.to_pylist()
    assert (row["image"], row["label"]) == ({"uri": "i.png", "bytes": None}, {"uri": "l.png", "bytes": None})


def test_dictionaries_and_views_of_other_writers_are_read(tmp_path: Path) -> None:
    rows = table()
    (tmp_path / "i").touch()
    for name in ("task", "split", "meta"):
        rows = rows.set_column(rows.schema.get_field_index(name), name, rows[name].dictionary_encode())
    pq.write_table(rows, tmp_path / "pairs.parquet")
    assert check_manifest(tmp_path / "pairs.parquet").per_task == {"depth": 5}
    assert sum(len(batch) for batch in read_manifest(tmp_path / "pairs.parquet", MANIFEST_SCHEMA.names)) == 5


def test_a_manifest_that_lost_its_root_is_read_beside_its_pictures(tmp_path: Path) -> None:
    """As DuckDB and others write: no metadata."""
    pictures, elsewhere = tmp_path / "pictures", tmp_path / "elsewhere"
    write(pictures / "ours.parquet", [pair(1)], str(pictures))
    (pictures / "label1.png").touch()
    rows = pq.read_table(pictures / "ours.parquet").replace_schema_metadata(None)
    pq.write_table(rows, pictures / "theirs.parquet", store_schema=False)
    assert check_manifest(pictures / "theirs.parquet").root == str(pictures)
    elsewhere.mkdir()
    pq.write_table(rows, elsewhere / "theirs.parquet", store_schema=False)
    message = refused(check_manifest, elsewhere / "theirs.parquet")
    assert (
        f"names no root (another program may have dropped it), and 'label1.png' is not in {elsewhere}; move" in message
    )
    (elsewhere / "label1.png").touch()
    assert check_manifest(elsewhere).root == str(elsewhere)  # a folder of manifests is a root by itself
    held = rows.set_column(4, "label", rows["image"])
    pq.write_table(held, elsewhere / "theirs.parquet", store_schema=False)
    assert check_manifest(elsewhere / "theirs.parquet").root is None  # bytes need none


@pytest.mark.parametrize("name", ["pairs", "pairs.pq", "pairs.csv", "pairs.parquet.bak"])
def test_a_name_that_ray_would_not_read_is_refused_by_who_writes_it(tmp_path: Path, name: str) -> None:
    assert "a manifest's name ends in .parquet" in refused(write, tmp_path / name, [pair()])
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "Pairs.PARQUET", [pair()])
    (tmp_path / "Pairs.PARQUET").rename(tmp_path / name)
    assert f"{tmp_path / name}: a manifest's name ends in .parquet; rename it" == refused(
        check_manifest, tmp_path / name
    )


@pytest.mark.parametrize("name", ["b.pq", "b"])
def test_no_manifest_of_a_folder_is_passed_over(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a.parquet", [pair(1)])
    write(tmp_path / "b.parquet", [pair(2)])
    (tmp_path / "b.parquet").rename(tmp_path / name)
    (tmp_path / "README").write_text("no Parquet")
    assert refused(check_manifest, tmp_path) == f"{tmp_path / name}: a manifest's name ends in .parquet; rename it"
    (tmp_path / name).unlink()
    assert check_manifest(tmp_path).rows == 1


def test_classes_are_those_of_usable_segmentation(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"

    def segmented(number: int, **meta: Any) -> Pair:
        return Pair("segmentation", "train", Picture(bytes=b"image %d" % number), Picture(bytes=b"label"), meta)

    write(path, [pair(1, classes=["x"])])
    assert read_classes(path) is None
    unusable = Pair("segmentation", "train", Picture(bytes=b"i"), Picture(), {"error": "missing: it", "classes": ["z"]})
    own = {"classes": ["a", "b"], "void": 255}
    write(path, [segmented(1, **own, scene=1), segmented(2, **own, scene=2), unusable, pair(3)])
    assert read_classes(path) == own
    write(path, [segmented(1, **own), segmented(2, classes=["a", "b"])])
    assert "two sets of classes, 2 from 'a' to 'b' (a list) and 2 from 'a' to 'b' (a list)" in refused(
        read_classes, path
    )
    write(path, [segmented(1, **own, source="scenes"), segmented(2)])
    assert "2 from 'a' to 'b' (scenes) and unnamed ones (a list)" in refused(read_classes, path)
