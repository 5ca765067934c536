"""Storage: whole files or none, one way to name them, and a scheme nobody knows is the user's mistake."""

from __future__ import annotations

import os
import pickle
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from covray.errors import ConfigError
from covray.io import storage
from covray.io.storage import Folder


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


@pytest.mark.parametrize("name", ["a b", "a#b", "a?b", "100%", "é", "a[b]", "a+b", "a%2zb", "a&b=c"])
def test_an_address_with_any_character_is_the_folder_of_that_name(tmp_path: Path, name: str) -> None:
    for address in (f"file://{tmp_path}/{name}", f"file://{tmp_path}/{urllib.parse.quote(name)}", str(tmp_path / name)):
        assert storage.resolve(address)[1] == str(tmp_path / name)
        storage.write_bytes(storage.join(address, "file"), address.encode())
        assert (tmp_path / name / "file").read_bytes() == address.encode()
    assert storage.resolve(f"s3://bucket/{name.replace('?', '')}?region=x&endpoint_override=host")[1] == (
        f"bucket/{name.replace('?', '')}"
    )


@pytest.mark.parametrize("address", [str, Path.as_uri])
def test_a_folder_reads_writes_and_lists_below_itself(tmp_path: Path, address: Any) -> None:
    folder = Folder(address(tmp_path / "run"))
    assert not folder.exists()
    assert folder.list_files() == []
    folder.write_bytes("a%41?.bin", b"x")
    (folder / "sub").write_json("b.json", {"z": 1})
    assert folder.exists()
    assert folder.exists("sub/b.json")
    assert not folder.exists("b.json")
    assert folder.list_files() == ["a%41?.bin", "sub/b.json"]
    assert folder.list_files(".json") == ["sub/b.json"]
    assert folder.read_bytes("a%41?.bin") == b"x"
    assert (folder / "sub").read_json("b.json") == folder.read_json("sub/b.json") == {"z": 1}
    assert folder.join("sub", "b.json") == f"{address(tmp_path / 'run')}/sub/b.json" == (folder / "sub").join("b.json")
    assert folder.inner_path("sub") == (folder / "sub").inner == str(tmp_path / "run" / "sub")
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("absent")
    folder.delete_file("a%41?.bin")
    (folder / "sub").delete()
    (folder / "new").create()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["new"]


def test_a_folder_resolves_once_and_can_be_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = pickle.loads(pickle.dumps(Folder("run")))  # noqa: S301 (our own bytes)
    monkeypatch.chdir("/")
    monkeypatch.setattr(storage, "resolve", lambda path: pytest.fail(f"resolved {path} again"))
    (folder / "sub").write_json("value.json", [1])
    assert (tmp_path / "run" / "sub" / "value.json").is_file()
    assert folder.list_files() == ["sub/value.json"]
    assert folder.read_json("sub/value.json") == [1]


def test_a_folder_whose_address_carries_options_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ends before the \?.*AWS_REGION"):
        Folder("s3://bucket/a?region=x")


def test_a_hub_that_cannot_be_reached_is_an_os_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfFileSystem
    from huggingface_hub.errors import HTTPError

    def refuse(*_: object, **__: object) -> None:
        raise HTTPError("Connection refused\nby the other side")

    for name in ("info", "find", "open", "mkdir", "isdir"):
        monkeypatch.setattr(HfFileSystem, name, refuse)
    path = "hf://datasets/owner/name/file"
    for use in (storage.exists, storage.read_bytes, storage.list_files, lambda path: storage.write_bytes(path, b"x")):
        with pytest.raises(OSError, match="the hub cannot be reached: Connection refused by the other side"):
            use(path)
    with pytest.raises(ConfigError, match=r"--out hf://.*the hub cannot be reached"):
        storage.require_writable("hf://datasets/owner/name")
    filesystem, _ = storage.resolve(path)
    assert isinstance(pickle.loads(pickle.dumps(filesystem)), fs.PyFileSystem)  # noqa: S301 (our own bytes)


def test_a_folder_is_tried_without_disturbing_who_works_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    delete_file = Folder.delete_file

    def begin_meanwhile(folder: Folder, name: str) -> None:
        seen.extend(folder.list_files())
        folder.write_bytes("_run.json", b"{}")  # as another command that begins between the look and the end
        delete_file(folder, name)

    monkeypatch.setattr(Folder, "delete_file", begin_meanwhile)
    storage.require_writable(str(tmp_path / "out"))
    assert [storage.is_partial(name) for name in seen] == [True]
    assert storage.list_files(str(tmp_path)) == ["out/_run.json"]


def test_an_absent_folder_that_was_tried_stays_absent(tmp_path: Path) -> None:
    storage.require_writable(str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())
