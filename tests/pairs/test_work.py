"""Work in pieces: the pairs of an item come from it alone, whoever makes them, and parts are joined in order."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer

from covray.cli.app import app
from covray.cli.cluster import require_actors
from covray.distributed import pairs as pool
from covray.distributed.lock import FolderLock
from covray.distributed.pairs import CHECKPOINT, PART_SCHEMA, PARTS, ordered_pairs, parts_folder
from covray.errors import ConfigError, DatasetError, ManifestError
from covray.io.images import Picture
from covray.io.storage import Folder
from covray.pairs.lol import lol_pairs
from covray.pairs.manifest import Pair, manifest_row, pair_of_row
from covray.pairs.photos import photo_pairs
from covray.pairs.sources import rebased
from covray.pairs.words import Question, Words
from covray.pairs.work import PairWork
from tests.support.photographs import photo, save


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(6):
        save(tmp_path / "photos" / f"{number}.png", photo(number))
        save(tmp_path / "lol" / "our485" / "low" / f"{number}.png", photo(number))
        save(tmp_path / "lol" / "our485" / "high" / f"{number}.png", photo(number + 9))
    (tmp_path / "photos" / "3.png").write_text("no picture")
    return tmp_path


def works(root: Path) -> list[PairWork]:
    moved = rebased(lol_pairs(root / "lol"), root / "lol", root)
    assert isinstance(moved, PairWork)
    return [photo_pairs(root / "photos"), lol_pairs(root / "lol"), moved]


def test_items_give_the_same_pairs_in_any_process_and_order(root: Path) -> None:
    for work in works(root):
        expected = list(work)
        make = pickle.loads(pickle.dumps(work.load))()  # noqa: S301 - our own
        items = pickle.loads(pickle.dumps(list(work.items)))  # noqa: S301 - our own
        backwards = [next(iter(make([item]))) for item in reversed(items)]
        assert [pair for pairs in reversed(backwards) for pair in pairs] == expected
        assert [pair for pairs in make(items) for pair in pairs] == expected


def test_other_items_or_settings_are_other_work(root: Path) -> None:
    work = photo_pairs(root / "photos")
    assert photo_pairs(root / "photos").names_sha256() == work.names_sha256()
    assert photo_pairs(root / "photos", seed=1).settings != work.settings
    assert works(root)[1].settings != works(root)[2].settings
    save(root / "photos" / "7.png", photo(7))
    assert photo_pairs(root / "photos").names_sha256() != work.names_sha256()


def test_a_row_has_all_of_its_pair() -> None:
    words = Words("a box", {"colour": "red"}, (Question("count", "how many?", "one"),))
    pairs = [
        Pair("edges", "train", Picture(bytes=b"1"), Picture(uri="b.png"), {"n": 1.5, "x": [None]}),
        Pair("caption", "val", Picture(bytes=b"1"), Picture(), {}, words),
    ]
    for pair in pairs:
        row = manifest_row(pair, captions=True)
        again = pair_of_row(row)
        assert again == pair
        assert again.pair_id == row["pair_id"]


def parts_of(folder: Path, *parts: list[int]) -> Folder:
    """Parts with the items of these numbers, of two pairs each."""
    for number, items in enumerate(parts):
        rows = []
        for item in items:
            pairs = [Pair("edges", "train", Picture(uri=f"{item} {n}"), Picture(uri="label")) for n in range(2)]
            rows.append({"item": item, "of": "pairs", "pairs": [manifest_row(pair, True) for pair in pairs]})
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, PART_SCHEMA), folder / PARTS / f"{number}.parquet")
    return Folder(str(folder))


def test_parts_are_joined_in_the_order_of_the_items(tmp_path: Path) -> None:
    folder = parts_of(tmp_path, [4, 1], [0], [3, 2, 5])
    found = [pair.image.uri for pair in ordered_pairs(folder, 6)]
    assert found == [f"{item} {n}" for item in range(6) for n in range(2)]


@pytest.mark.parametrize(("parts", "message"), [([[0, 1], [1, 2]], "made twice"), ([[0, 2]], "1 items were not made")])
def test_parts_that_do_not_add_up_are_refused(tmp_path: Path, parts: list[list[int]], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        list(ordered_pairs(parts_of(tmp_path, *parts), 3))


def test_the_parts_lie_hidden_beside_the_manifest() -> None:
    assert parts_folder("/a/pairs.parquet") == "/a/.pairs.parquet.parts"
    assert parts_folder("s3://bucket/pairs.parquet") == "s3://bucket/.pairs.parquet.parts"


def test_what_actors_cannot_make_is_refused_before_ray(tmp_path: Path) -> None:
    from covray.cli.pairs_writing import made_by

    with pytest.raises(ConfigError, match="--actors: this source"), made_by([], f"{tmp_path}/p.parquet", 2):
        pass
    with (
        pytest.raises(ManifestError, match="is a folder"),
        made_by(PairWork([], lambda: lambda items: [], {}), str(tmp_path), 2),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no such source; give one of photos, "),
        (["absent"], "pairs absent: no such source"),
        (["photos", "folder", "--out", "p.parquet"], "is made in one process; give --actors"),
        (["photos", "folder", "--out", "p.parquet", "--actors", "2"], ""),
        (["label", "a", "b", "--task", "depth", "--model", "m", "--out", "p.parquet", "--actors=2"], ""),
        (["hub", "owner/name", "--task", "depth", "--out", "p.parquet", "--actors", "64"], ""),
        (["scenes", "--out", "p.parquet"], "is made in one process"),
    ],
)
def test_what_is_submitted_is_made_by_actors(arguments: list[str], message: str) -> None:
    root = typer.main.get_command(app).make_context("covray", ["doctor"])
    if not message:
        require_actors(root, arguments)
        return
    with pytest.raises(ConfigError, match=message):
        require_actors(root, arguments)


def test_what_was_begun_is_continued_as_it_was_begun_alone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(work: PairWork, folder: Folder, actors: object, cores: int) -> None:
        """In this process; what a checkpoint has committed stays."""
        if not (folder / CHECKPOINT).list_files():
            rows = []
            for number, pairs in enumerate(work.load()(work.items)):
                rows.append({"item": number, "of": "pairs", "pairs": [manifest_row(pair, True) for pair in pairs]})
            (folder / PARTS).create()
            pq.write_table(pa.Table.from_pylist(rows, PART_SCHEMA), (folder / PARTS).inner_path("0.parquet"))
            (folder / CHECKPOINT).write_bytes("0.parquet", b"committed")
        folder.write_bytes(pool.ITEMS, b"items")

    monkeypatch.setattr(pool, "_make", make)
    monkeypatch.setattr(pool, "ray_session", lambda: contextlib.nullcontext(1))
    work = dataclasses.replace(photo_pairs(root / "photos"), settings={"axes": ("x", "-y")})
    out = str(tmp_path / "pairs.parquet")
    with pytest.raises(OSError, match="no room"), pool.pairs_on_ray(work, out, 2):
        raise OSError("no room")
    folder = Path(parts_folder(out))
    for other in (
        dataclasses.replace(work, settings={"axes": ("x", "y")}),
        dataclasses.replace(work, items=work.items[1:]),
    ):
        with pytest.raises(ManifestError, match="was begun with"), pool.pairs_on_ray(other, out, 2):
            pytest.fail("other work")
    with pool.pairs_on_ray(work, out, 2) as made:
        assert list(made) == list(work)
    assert not folder.exists()

    # What the next command begins, as soon as this one has given up the folder, stays.
    def release(lock: FolderLock) -> None:
        FolderLock.release(lock)
        (folder / "next.txt").parent.mkdir(exist_ok=True)
        (folder / "next.txt").write_text("begun")

    with monkeypatch.context() as raced, pool.pairs_on_ray(work, out, 2) as made:
        raced.setattr(FolderLock, "__exit__", lambda lock, *_: release(lock))
        assert list(made) == list(work)
    assert [path.name for path in folder.iterdir()] == ["next.txt"]
    (folder / "next.txt").unlink()
    (folder / "own.txt").write_text("a stranger's")
    with pytest.raises(DatasetError, match="holds files"), pool.pairs_on_ray(work, out, 2):
        pytest.fail("a stranger's folder")


def test_a_command_killed_while_it_deletes_makes_no_item_twice(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(work: PairWork, folder: Folder, actors: object, cores: int) -> None:
        """In this process, a part for each item that no checkpoint has committed."""
        folder.write_bytes(pool.ITEMS, b"items")
        (folder / PARTS).create()
        present = (folder / CHECKPOINT).list_files()
        for number, pairs in enumerate(work.load()(work.items)):
            if f"{number}.parquet" not in present:
                row = {"item": number, "of": "pairs", "pairs": [manifest_row(pair, True) for pair in pairs]}
                part = f"{number}-{len(present)}.parquet"  # as Ray Data's, another name in another run
                pq.write_table(pa.Table.from_pylist([row], PART_SCHEMA), (folder / PARTS).inner_path(part))
                (folder / CHECKPOINT).write_bytes(f"{number}.parquet", b"committed")

    def delete_one(folder: Folder) -> None:
        folder.delete_file(folder.list_files()[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "_make", make)
    monkeypatch.setattr(pool, "ray_session", lambda: contextlib.nullcontext(1))
    work, out = photo_pairs(root / "photos"), str(tmp_path / "pairs.parquet")
    assert len(work.items) > 1
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt), pool.pairs_on_ray(work, out, 2):
        killed.setattr(pool, "_delete", delete_one)
    with pool.pairs_on_ray(work, out, 2) as made:
        assert list(made) == list(work)
    assert not Path(parts_folder(out)).exists()
