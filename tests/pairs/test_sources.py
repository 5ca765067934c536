"""A draw is a function of seed and names; nothing is looked for outside the root."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from covray.errors import ConfigError, ManifestError
from covray.io.images import Picture
from covray.pairs.manifest import Pair
from covray.pairs.sources import draw, list_below, list_pictures, read_file, rebased
from tests.support.photographs import photo, save

NAMES = [f"train2017/{number:012d}.jpg" for number in range(300)]


def test_a_draw_depends_on_seed_and_names_alone() -> None:
    shuffled = list(np.random.default_rng(0).permutation(NAMES))
    assert draw(NAMES, 40, 0) == draw(shuffled, 40, 0) == sorted(draw(NAMES, 40, 0))
    assert draw(NAMES, 40, 0) != draw(NAMES, 40, 1)
    assert len(set(draw(NAMES, 40, 0))) == 40


def test_a_smaller_draw_is_a_part_of_a_larger_one() -> None:
    draws = [set(draw(NAMES, count, 7)) for count in (1, 10, 100, 299)]
    assert all(small < large for small, large in pairwise(draws))


def test_what_lies_beside_changes_a_draw_only_by_being_drawn() -> None:
    more = [f"other/{number}.jpg" for number in range(300)]
    before, after = set(draw(NAMES, 50, 0)), set(draw(NAMES + more, 50, 0))
    assert after - before <= set(more)
    assert after & set(NAMES) <= before


def test_every_name_has_the_same_chance() -> None:
    times = sum(NAMES[0] in draw(NAMES, 30, seed) for seed in range(300))
    assert abs(times - 30) < 4 * np.sqrt(300 * 0.1 * 0.9)


def test_all_are_taken_where_there_are_fewer() -> None:
    assert draw(reversed(NAMES), None, 0) == draw(NAMES, 1000, 3) == NAMES
    with pytest.raises(ConfigError, match="count"):
        draw(NAMES, 0, 0)


def test_what_is_missing_is_named_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError, match=f"^{tmp_path}: train is missing; get it$"):
        list_below(str(tmp_path), "train", "get it")
    with pytest.raises(ManifestError, match=r"empty holds no pictures; get it$"):
        list_below(str(tmp_path), "empty", "get it")
    with pytest.raises(ManifestError, match=r"list\.txt is missing; get it$"):
        read_file(str(tmp_path), "list.txt", "get it")


def test_files_beside_the_root_are_not_read(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.json").write_text("{}")
    (root / "link.json").symlink_to(tmp_path / "secret.json")
    for path in ("../secret.json", "link.json", str(tmp_path / "secret.json")):
        with pytest.raises(ManifestError, match="outside_root"):
            read_file(str(root), path, "")


def test_pictures_are_listed_whatever_their_folder_and_ending(tmp_path: Path) -> None:
    for name in ("b/1.JPG", "a/deep/2.png", ".hidden/3.png", "b/.4.png"):
        save(tmp_path / name, photo(0))
    (tmp_path / "notes.txt").write_text("none")
    (tmp_path / "b" / "circle").symlink_to(tmp_path)
    assert list_pictures(str(tmp_path)) == ["a/deep/2.png", "b/1.JPG"]


def test_paths_below_a_dataset_are_paths_below_what_holds_it(tmp_path: Path) -> None:
    held = Pair("depth", "train", Picture(uri="a/1.png"), Picture(bytes=b"x"), {"k": 1})
    named = Pair("low_light", "test", Picture(uri="low/1.png"), Picture(uri="high/1.png"))
    bad = Pair("depth", "train", Picture(uri="a/2.png"), Picture(), {"error": "missing: it"})
    root = tmp_path / "sets" / "nyu"
    moved = list(rebased([held, named, bad], root, f"{tmp_path}/"))
    assert [pair.image.uri for pair in moved] == ["sets/nyu/a/1.png", "sets/nyu/low/1.png", "sets/nyu/a/2.png"]
    assert [pair.label for pair in moved] == [held.label, Picture(uri="sets/nyu/high/1.png"), Picture()]
    assert [(pair.task, pair.split, pair.meta) for pair in moved] == [
        (pair.task, pair.split, pair.meta) for pair in (held, named, bad)
    ]
    assert list(rebased([held, named], root, root)) == [held, named]
    assert next(rebased([held], f"file://{root}", f"file://{tmp_path}")).image.uri == "sets/nyu/a/1.png"
    for base in (tmp_path / "sets" / "ny", root / "a"):
        with pytest.raises(ConfigError, match="does not hold"):
            rebased([held], root, base)
