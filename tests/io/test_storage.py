"""Storage: whole files or none, one way to name them, and a scheme nobody knows is the user's mistake."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from covray.errors import ConfigError
from covray.io import storage


def test_what_is_written_is_read_and_folders_are_made(tmp_path: Path) -> None:
    path = str(tmp_path / "a" / "b" / "file.bin")
    data = bytes(range(256)) * 300
    storage.write_bytes(path, data)
    assert storage.read_bytes(path) == data
    assert storage.read_bytes(Path(path).as_uri()) == data
    storage.write_bytes(path, b"")
    assert storage.read_bytes(path) == b""


def test_json_comes_back(tmp_path: Path) -> None:
    value = {"ä": [1, 2.5, None, "x\n"], "nested": {"z": True, "a": False}}
    path = str(tmp_path / "value.json")
    storage.write_json(path, value)
    assert storage.read_json(path) == value
    assert list(storage.read_json(path)["nested"]) == ["z", "a"]  # written to be read by people: order is kept
    Path(path).write_text("{")
    with pytest.raises(ValueError):
        storage.read_json(path)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = str(tmp_path / "audit.json")
    storage.write_bytes(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, step, fail)
        with pytest.raises(OSError, match="No space"):
            storage.write_bytes(path, b"new and longer")
    assert storage.read_bytes(path) == b"old"
    assert storage.list_files(str(tmp_path)) == ["audit.json"]


def test_a_reader_during_a_write_sees_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "audit.json")
    storage.write_bytes(path, b"old")
    seen: list[bytes] = []
    replace = os.replace

    def look_first(source: str, target: str) -> None:
        seen.append(Path(path).read_bytes())
        replace(source, target)

    monkeypatch.setattr(os, "replace", look_first)
    storage.write_bytes(path, b"new")
    assert seen == [b"old"]
    assert storage.read_bytes(path) == b"new"


def test_files_are_listed_below_a_folder_in_order(tmp_path: Path) -> None:
    for name in ("b/2.parquet", "b/10.parquet", "a.parquet", "c/d/e.json"):
        storage.write_bytes(str(tmp_path / name), b"x")
    (tmp_path / "empty").mkdir()
    expected = ["a.parquet", "b/10.parquet", "b/2.parquet", "c/d/e.json"]
    assert storage.list_files(str(tmp_path)) == expected
    assert storage.list_files(f"{tmp_path}/") == expected
    assert storage.list_files(tmp_path.as_uri()) == expected
    assert storage.list_files(str(tmp_path), ".json") == ["c/d/e.json"]
    assert storage.list_files(str(tmp_path / "absent")) == []


def test_existence_is_of_files_and_folders(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "a" / "file"), b"")
    assert storage.exists(str(tmp_path / "a"))
    assert storage.exists(str(tmp_path / "a" / "file"))
    assert not storage.exists(str(tmp_path / "b"))


def test_an_absent_file_is_a_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(str(tmp_path / "absent"))


def test_local_paths_become_absolute_and_home_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.resolve("x/../y")[1] == str(tmp_path / "y")
    assert storage.resolve("~/y")[1] == str(tmp_path / "y")
    assert storage.join("s3://bucket/a", "b", "c") == "s3://bucket/a/b/c"
    assert storage.join("/a/", "b") == "/a/b"
    assert storage.join("/what?", "b") == "/what?/b"
    with pytest.raises(ConfigError, match=r"ends before the \?.*AWS_REGION"):
        storage.join("s3://bucket/a?region=x", "b")


@pytest.mark.parametrize("path", ["gopher://host/x", "://", "file:// x", "a b://c"])
def test_storage_that_nobody_knows_is_one_line(path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        storage.resolve(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
