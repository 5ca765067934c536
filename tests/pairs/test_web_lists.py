"""Lists with columns of other names, pictures of the web, and datasets of the hub: rows of values or of reasons."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from covray.errors import ConfigError, ManifestError
from covray.io import web
from covray.io.images import decode, encode_png
from covray.pairs import hub
from covray.pairs.manifest_reading import read_manifest
from covray.pairs.parquet_rows import RowSource, row_pairs
from covray.pairs.user_labels import LabelRules
from covray.pairs.user_lists import read_user_list
from covray.tasks import depth, segmentation
from tests.support.photographs import command, photo, save
from tests.support.web_server import WebServer, web_server

__all__ = ["command", "web_server"]

PHOTO = encode_png(photo(1))
METRES = np.linspace(0.5, 9.5, 16 * 24).reshape(16, 24)
DEPTH = encode_png(depth.render(METRES))


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_FIRST_PAUSE_S", 0.01)


def rows_of(manifest: Path) -> list[dict[str, Any]]:
    columns = ["pair_id", "task", "split", "image", "label", "meta"]
    rows = []
    for batch in read_manifest(str(manifest), columns):
        rows += batch.to_pylist()
    return [row | {"meta": json.loads(row["meta"])} for row in rows]


# --- columns of other names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_columns_have_the_names_that_are_given(tmp_path: Path, ending: str) -> None:
    save(tmp_path / "a.png", photo(1))
    rows = [{"Image": "7", "file": "a.png", "Mask": "m.png", "label": "road"}]
    file = tmp_path / f"list{ending}"
    if ending in (".csv", ".tsv"):
        separator = "," if ending == ".csv" else "\t"
        file.write_text(separator.join(rows[0]) + "\n" + separator.join(rows[0].values()) + "\n")
    elif ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text(json.dumps(rows if ending == ".json" else rows[0]))
    columns = {"image": "file", "label": "Mask"}
    (pair,) = read_user_list(file, "depth", columns=columns)
    assert (pair.image.uri, pair.label.uri) == ("a.png", "m.png")
    assert pair.meta["list_label"] == "road"
    with pytest.raises(ManifestError, match=r"has no column mask; (it has|its columns are) .*Mask"):
        list(read_user_list(file, "depth", columns=columns | {"label": "mask"}))


# --- pictures of the web ---------------------------------------------------------------------------------------------


def test_rows_of_the_web_are_values_or_reasons_and_those_alone_are_made_again(
    tmp_path: Path, web_server: WebServer, command: Callable[..., tuple[Any, str]]
) -> None:
    web_server.pictures |= {"a.png": PHOTO, "b.png": encode_png(photo(2)), "d.png": DEPTH}
    images = ["a.png", "twice/b.png", "down/", "lie/", "huge/", "stall/"]
    urls = [web_server.url(path) for path in images] + ["https://10.0.0.1/a.png", "http://plain.org/a.png"]
    file = tmp_path / "list.csv"
    file.write_text("photo,metres\n" + "".join(f"{url},{web_server.url('d.png')}\n" for url in urls))
    out = tmp_path / "pairs.parquet"
    options = [
        "manifest", file, "--task", "depth", "--image-column", "photo", "--label-column", "metres", "--out", out,
        "--allow-host", web_server.host, "--timeout", "1", "--max-mb", "1", "--attempts",
    ]  # fmt: skip
    answer, said = command(*options, 2)
    assert answer["pairs"] == 8
    reasons = [row["meta"].get("error", "good").partition(":")[0] for row in rows_of(out)]
    assert reasons == [
        "good", "unreachable", "unreachable", "not_an_image", "too_large", "unreachable", *["host_not_allowed"] * 2,
    ]  # fmt: skip
    assert "unreachable 3" in said
    good = rows_of(out)[0]
    assert good["image"]["bytes"] == PHOTO
    assert good["meta"]["image_url"] == web_server.url("a.png")
    read = depth.read(decode(good["label"]["bytes"]))
    assert np.abs(read - METRES).max() < 0.02 + 1e-6
    asked = Counter(web_server.requests)
    before = rows_of(out)
    command(*options, 2, "--retry", "unreachable")
    after = rows_of(out)
    assert set(web_server.requests - asked) == {"twice/b.png", "down/", "stall/", "d.png"}, (
        "no other picture is asked for"
    )
    assert after[1]["image"]["bytes"] == web_server.pictures["b.png"]
    assert "error" not in after[1]["meta"]
    unchanged = [0, 3, 4, 6, 7]
    assert [after[row] for row in unchanged] == [before[row] for row in unchanged]
    whole = tmp_path / "whole.parquet"
    command(*options[:9], whole, *options[10:], 3)
    assert rows_of(whole)[1] == after[1], "as if it had been there at once"


def test_without_an_allowed_host_nothing_is_asked_of_the_web(
    tmp_path: Path, web_server: WebServer, command: Callable[..., tuple[Any, str]]
) -> None:
    save(tmp_path / "a.png", photo(1))
    file = tmp_path / "list.csv"
    file.write_text(f"image,label\na.png,{web_server.url('d.png')}\n")
    command("manifest", file, "--task", "depth", "--out", tmp_path / "p.parquet")
    (row,) = rows_of(tmp_path / "p.parquet")
    assert row["meta"]["error"].startswith("outside_root")
    assert not web_server.requests


# --- Parquet files and the hub ---------------------------------------------------------------------------------------


def write_rows(path: Path, first: int, rows: int) -> Path:
    """Rows in Hugging Face's way: structs of bytes and a name; groups of two rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = []
    for number in range(first, first + rows):
        mask = np.full((16, 24), number % 3, np.uint8)
        values.append(
            {
                "picture": {"bytes": encode_png(photo(number)), "path": None},
                "annotation": {"bytes": encode_png(segmentation.render(mask)), "path": None},
                "other": "x" * 100,
            }
        )
    pq.write_table(pa.Table.from_pylist(values), path, row_group_size=2)
    return path


SOURCE = RowSource("segmentation", "train", "picture", "annotation", {"source": "test"})


def test_rows_of_parquet_files_become_pairs_in_order_and_a_sample_is_part_of_them(tmp_path: Path) -> None:
    files = [str(write_rows(tmp_path / f"{name}.parquet", first, 5)) for name, first in (("a", 0), ("b", 5))]
    pairs = list(row_pairs(files, SOURCE, LabelRules()))
    assert [pair.image.bytes for pair in pairs] == [encode_png(photo(number)) for number in range(10)]
    classes = [int(segmentation.read(decode(pair.label.bytes or b""))[0, 0]) for pair in pairs]
    assert classes == [number % 3 for number in range(10)]
    assert pairs[7].meta["row"] == f"{files[1]}#2"
    sample = list(row_pairs(files, SOURCE, LabelRules(), count=4, seed=1))
    assert len(sample) == 4
    assert [pair for pair in pairs if pair in sample] == sample
    assert all(pair in list(row_pairs(files, SOURCE, LabelRules(), count=6, seed=1)) for pair in sample)


def test_a_text_that_is_no_utf8_is_one_line(tmp_path: Path) -> None:
    file = str(tmp_path / "a.parquet")
    broken = pa.array([b"\xff.png"]).view(pa.string())
    pq.write_table(pa.table({"picture": broken, "annotation": pa.array(["a.png"])}), file)
    with pytest.raises(ManifestError, match=r"a\.parquet: cannot be read: 'utf-8' codec can't decode"):
        list(row_pairs([file], SOURCE, LabelRules()))


def test_a_file_without_the_column_is_one_line(tmp_path: Path) -> None:
    file = str(write_rows(tmp_path / "a.parquet", 0, 1))
    with pytest.raises(ManifestError, match=r"has no column image; its columns are picture, annotation, other: give"):
        row_pairs([file], RowSource("depth", "train", "image", "annotation", {}), LabelRules())
    with pytest.raises(ConfigError, match="count: must be at least 1"):
        row_pairs([file], SOURCE, LabelRules(), count=0)


class Hub(ThreadingHTTPServer):
    """A hub that says which files a dataset has, or why not."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.files: dict[str | None, list[str]] = {}
        """By revision; None is the main branch."""
        self.status = 200


class _HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        revision = self.path.partition("?")[0].partition("/revision/")[2].replace("%2F", "/") or None
        status, headers = self.server.status, {}
        if status == 401:
            headers = {"X-Error-Code": "GatedRepo"}
        elif revision not in self.server.files:
            status, headers = 404, {"X-Error-Code": "RevisionNotFound"}
        siblings = [{"rfilename": name} for name in self.server.files.get(revision, [])]
        body = {"id": "owner/set", "sha": "c" * 40, "siblings": siblings, "cardData": {"license": "mit"}}
        data = json.dumps(body if status == 200 else {"error": "no"}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def local_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants, hf_api

    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(hf_api.constants, "ENDPOINT", url)
    yield server
    server.shutdown()
    server.server_close()


def test_the_files_of_a_split_are_found_and_pinned(local_hub: Hub) -> None:
    local_hub.files[None] = ["README.md", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
                             "data/validation-00000-of-00001.parquet"]  # fmt: skip
    found = hub.find_dataset("owner/set", "train")
    assert [file.rpartition("/")[2] for file in found.files] == [
        "train-00000-of-00002.parquet", "train-00001-of-00002.parquet",
    ]  # fmt: skip
    assert found.files[0].startswith(f"hf://datasets/owner/set@{'c' * 40}/data/")
    assert (found.commit, found.licence) == ("c" * 40, "mit")
    with pytest.raises(ManifestError, match="no Parquet file is of split test; it has 3 files, such as data/train"):
        hub.find_dataset("owner/set", "test")


def test_the_hubs_own_conversion_is_taken_and_subsets_are_told_apart(local_hub: Hub) -> None:
    local_hub.files[None] = ["images.zip"]
    local_hub.files[hub.CONVERTED] = ["small/train/0000.parquet", "large/train/0000.parquet", "large/test/0000.parquet"]
    with pytest.raises(ManifestError, match="has the subsets large, small; choose one by --subset"):
        hub.find_dataset("owner/set", "train")
    found = hub.find_dataset("owner/set", "train", "large")
    assert [file.partition("@")[2].partition("/")[2] for file in found.files] == ["large/train/0000.parquet"]


def test_what_the_hub_refuses_is_one_line(local_hub: Hub) -> None:
    with pytest.raises(ManifestError, match="is no dataset of the hub; give OWNER/NAME"):
        hub.find_dataset("set", "train")
    with pytest.raises(ManifestError, match="has no revision v9"):
        hub.find_dataset("owner/set", "train", revision="v9")
    local_hub.files[None] = ["images.zip"]
    with pytest.raises(ManifestError, match="holds no Parquet files"):
        hub.find_dataset("owner/set", "train")
    local_hub.status = 401
    with pytest.raises(ManifestError, match="accept its terms and set HF_TOKEN"):
        hub.find_dataset("owner/set", "train")


def test_a_dataset_of_the_hub_becomes_a_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., tuple[Any, str]]
) -> None:
    file = str(write_rows(tmp_path / "train.parquet", 0, 3))
    dataset = hub.HubDataset("owner/set", "c" * 40, "mit", (file,))
    monkeypatch.setattr(hub, "find_dataset", lambda *_: dataset)
    out = tmp_path / "pairs.parquet"
    columns = ("--image-column", "picture", "--label-column", "annotation")
    answer, _ = command("hub", "owner/set", "--task", "segmentation", *columns, "--out", out)
    assert answer["per_task"] == {"segmentation": 3}
    first = rows_of(out)[0]
    assert first["image"]["bytes"] == encode_png(photo(0))
    assert {key: first["meta"][key] for key in ("source", "revision", "licence", "row")} == {
        "source": "hub owner/set", "revision": "c" * 40, "licence": "mit", "row": f"{file}#0",
    }  # fmt: skip
