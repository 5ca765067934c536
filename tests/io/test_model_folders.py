from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest

from covray.config import BackboneConfig, EngineConfig, TokenizerConfig
from covray.errors import WeightsError
from covray.io import model_folders as weights
from covray.io.model_folders import fingerprint_folder, require_files, resolve_folder
from covray.models.lvm.backbone import backbone_facts
from covray.models.tokenizer.vqgan import load_tokenizer


def test_an_existing_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_folder(str(tmp_path), None, "prior", ["*.json"]) == tmp_path


def test_nano_is_the_folder_that_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "NANO_FOLDER", tmp_path)
    with pytest.raises(WeightsError, match="nano prior is not installed"):
        resolve_folder("nano", None, "prior", ["*.json"])
    (tmp_path / "prior").mkdir()
    assert resolve_folder("nano", None, "prior", ["*.json"]) == tmp_path / "prior"


@pytest.mark.parametrize(
    ("path", "name", "folder"),
    [
        ("nano-1", "vqgan", "nano/vqgan"),
        ("nano-1", "prior", "nano/prior"),
        ("nano-2", "vqgan", "nano-2/vqgan"),
        ("nano-2", "prior", "nano/prior"),
        ("nano", "vlm", "nano/vlm"),
        ("nano-2", "vlm", "nano/vlm"),
    ],
)
def test_an_edition_of_nano_is_found_by_its_name(path: str, name: str, folder: str) -> None:
    assert resolve_folder(path, None, name, ["*.json"]) == weights.NANO_FOLDER.parent / folder


@pytest.mark.parametrize("path", ["/no/such/folder", "./none", "~/no-such", "~nobody-here/no-such", "a/b/c", "plain"])
def test_a_path_that_is_no_hub_id_never_asks_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(WeightsError, match="no such folder"):
        resolve_folder(path, None, "prior", ["*.json"])


def test_a_hub_id_is_fetched_at_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(hub_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((hub_id, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_folder("owner/name", "abc", "prior", ("unet/*.json",)) == tmp_path
    assert asked == [("owner/name", "abc", ["unet/*.json"])]


def test_an_unreachable_hub_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nand no cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(WeightsError, match=r"owner/name@v1: .*no network.*give its folder") as raised:
        resolve_folder("owner/name", "v1", "prior", ["*.json"])
    assert "\n" not in str(raised.value)


def test_the_first_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "b.json").touch()
    require_files(tmp_path, ["b.json", ("a.json", "b.json")])
    with pytest.raises(WeightsError, match=r"c.json or d.json is missing"):
        require_files(tmp_path, ["b.json", ("c.json", "d.json"), "e.json"])


def test_a_fingerprint_is_of_names_and_bytes_of_the_matching_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.bin").write_bytes(b"1")
    first = fingerprint_folder(tmp_path, ["a/*.bin", "a/x.*"])
    (tmp_path / "a" / "note.txt").write_bytes(b"not matched")
    assert fingerprint_folder(tmp_path, ["a/*.bin"]) == first
    (tmp_path / "a" / "x.bin").rename(tmp_path / "a" / "y.bin")
    renamed = fingerprint_folder(tmp_path, ["a/*.bin"])
    (tmp_path / "a" / "y.bin").write_bytes(b"2")
    assert len({first, renamed, fingerprint_folder(tmp_path, ["a/*.bin"])}) == 3
    with pytest.raises(WeightsError, match="no model files"):
        fingerprint_folder(tmp_path, ["*.safetensors"])


def write_index(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {f"tensor{number}": name for number, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


PATTERNS = ("config.json", "unet/model-*-of-*.safetensors", "unet/model.safetensors.index.json")


@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "consolidated-00001-of-00001.safetensors"])
def test_the_shards_of_an_index_count_whatever_they_are_called(tmp_path: Path, name: str) -> None:
    write_index(tmp_path / "unet", name)
    (tmp_path / "unet" / name).write_bytes(b"weights")
    (tmp_path / "unet" / "other.safetensors").write_bytes(b"not loaded")
    before = fingerprint_folder(tmp_path, PATTERNS)
    lines = ""
    for file in sorted((name, "model.safetensors.index.json")):  # each once, in the order of the names
        digest = hashlib.sha256((tmp_path / "unet" / file).read_bytes()).hexdigest()
        lines += f"unet/{file}\0{digest}\n"
    assert before == hashlib.sha256(lines.encode()).hexdigest()
    (tmp_path / "unet" / name).write_bytes(b"WEIGHTS")
    assert fingerprint_folder(tmp_path, PATTERNS) != before
    (tmp_path / "unet" / "other.safetensors").write_bytes(b"still not loaded")
    (tmp_path / "unet" / name).write_bytes(b"weights")
    assert fingerprint_folder(tmp_path, PATTERNS) == before


def test_an_index_that_nothing_is_loaded_by_does_no_harm(tmp_path: Path) -> None:
    """A whole file may stand beside the index of shards that were never downloaded."""
    write_index(tmp_path / "unet", "absent.safetensors")
    assert fingerprint_folder(tmp_path, PATTERNS) == fingerprint_folder(tmp_path, ["unet/*.index.json"])


def test_an_index_that_leads_out_of_its_folder_has_no_fingerprint(tmp_path: Path) -> None:
    write_index(tmp_path / "unet", "../outside.safetensors")
    (tmp_path / "outside.safetensors").touch()
    with pytest.raises(WeightsError, match=r"lists \.\./outside\.safetensors, which is not a file of its folder"):
        fingerprint_folder(tmp_path, PATTERNS)


def test_the_hub_is_asked_for_what_an_index_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = tmp_path / "snapshots" / "c0ffee"
    asked = []

    def download(hub_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((revision, allow_patterns))
        write_index(commit / "unet", "model-1-of-2.safetensors", "odd[1].safetensors")
        (commit / "unet" / "model-1-of-2.safetensors").touch()
        return str(commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_folder("owner/name", "main", "prior", PATTERNS) == commit
    assert asked == [("main", list(PATTERNS)), ("c0ffee", ["unet/odd[[]1].safetensors"])]


@pytest.mark.parametrize(
    "load",
    [
        lambda path: backbone_facts(BackboneConfig(scale="custom", path=path)),
        lambda path: load_tokenizer(TokenizerConfig(path=path), EngineConfig(device="cpu")),
    ],
)
def test_a_model_below_a_home_that_nobody_has_is_one_line(load: Callable[[str], object]) -> None:
    with pytest.raises(WeightsError, match="~nobody-here/model: no such folder") as refused:
        load("~nobody-here/model")
    assert "\n" not in str(refused.value)
