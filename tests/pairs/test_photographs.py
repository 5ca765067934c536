"""Photographs of folders and patterns: each once, all below one root."""

from pathlib import Path

import pytest

from covray.errors import ConfigError, ManifestError
from covray.pairs.manifest_reading import check_manifest
from covray.pairs.photographs import common_root, find_photographs
from covray.pairs.photos import photo_pairs
from tests.support.photographs import command, photo, save

__all__ = ["command"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    names = ["2023/a.png", "2023/x/b.png", "2024/a.png", "2024/a.webp", "2024/ab.png", "other/z.png", "odd[1]/c.png"]
    for number, name in enumerate(names):
        save(tmp_path / name, photo(number))
    return tmp_path


@pytest.mark.parametrize(
    ("places", "names"),
    [
        (["2024"], ["a.png", "a.webp", "ab.png"]),
        (["2023", "2024/*.webp"], ["2023/a.png", "2023/x/b.png", "2024/a.webp"]),
        (["*/a.png"], ["2023/a.png", "2024/a.png"]),
        (["20*/**/*.png"], ["2023/a.png", "2023/x/b.png", "2024/a.png", "2024/ab.png"]),
        (["2023/**"], ["a.png", "x/b.png"]),
        (["2024/a?.png", "2024/[!b]*.png"], ["a.png", "ab.png"]),
        (["odd[1]"], ["c.png"]),
        (["20[0-9]4/ab*"], ["2024/ab.png"]),
    ],
)
def test_places_give_their_photographs_once_below_one_root(root: Path, places: list[str], names: list[str]) -> None:
    found_root, found = find_photographs([f"{root}/{place}" for place in places])
    assert found == names
    assert all((Path(found_root) / name).is_file() for name in found)


def test_a_place_without_photographs_and_places_without_a_root_are_one_line(root: Path) -> None:
    with pytest.raises(ManifestError, match=r"2024/\*\.jpg: holds no photographs"):
        find_photographs([f"{root}/2023", f"{root}/2024/*.jpg"])
    with pytest.raises(ConfigError, match="lie on several storages"):
        common_root(["s3://a/photos", "/photos"])
    assert common_root(["s3://a/b/c", "s3://a/b/d"]) == "s3://a/b"


def test_a_pattern_that_is_none_is_one_line(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"^\[z-a\]\.png: is no pattern \(bad character range z-a\); write"):
        find_photographs([f"{root}/2024/[z-a].png"])


def test_hidden_photographs_are_not_those_of_all_names(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root / "2024")
    assert find_photographs(["*.png"])[1] == find_photographs(["./*.png"])[1] == ["a.png", "ab.png"]
    with pytest.raises(ManifestError, match="holds no photographs"):
        find_photographs([".*.png"])


@pytest.mark.parametrize("place", ["s3://bucket/photos", "s3://bucket/photos/*.jpg"])
def test_a_storage_that_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def refuse(path: str) -> None:
        raise OSError("AWS Error ACCESS_DENIED")

    monkeypatch.setattr("covray.io.storage.exists", refuse)
    monkeypatch.setattr("covray.io.storage.list_files", refuse)
    with pytest.raises(ManifestError, match=r"^s3://bucket/photos.*: cannot be read: AWS Error ACCESS_DENIED$"):
        find_photographs([place])


def test_many_folders_become_one_manifest(root: Path, command) -> None:
    (root / "2024" / "broken.png").write_text("no picture")
    out = root / "pairs.parquet"
    answer, said = command("photos", root / "2023", root / "2024", "--task", "edges", "--out", out)
    assert answer["pairs"] == 6
    assert check_manifest(str(out)).root == str(root)
    assert "not_an_image 1" in said
    photographs = [pair.meta["photo"] for pair in photo_pairs([f"{root}/2023", f"{root}/2024"], ["edges"])]
    assert photographs == ["2023/a.png", "2023/x/b.png", "2024/a.png", "2024/a.webp", "2024/ab.png", "2024/broken.png"]
