"""The list of all pairs: what the page gets of them, and its server while a dataset is built."""

from __future__ import annotations

import base64
import json
import math
import shutil
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covray.chains.dataset import ChainDataset
from covray.chains.quality import chain_quality
from covray.errors import ConfigError, DatasetError
from covray.report.contact_sheets import decode_rows
from covray.report.dataset import view
from covray.report.dataset_server import DatasetServer
from covray.report.pair_rows import COLUMNS, packed_rows
from tests.support.pages import Page

Writer = Callable[..., tuple[str, list[dict[str, Any]]]]


def column(packed: dict[str, Any], name: str, kind: str) -> list[Any]:
    """A packed column as its texts or numbers."""
    values = np.frombuffer(base64.b64decode(packed[name]), kind).tolist()
    names = packed.get(f"{name}s")
    return values if names is None else [names[value] for value in values]


@contextmanager
def serving(path: str) -> Iterator[DatasetServer]:
    server = DatasetServer(path)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join(10)


def ask(server: DatasetServer, path: str, host: str | None = None) -> bytes:
    headers = {} if host is None else {"Host": host}
    with urllib.request.urlopen(urllib.request.Request(server.address + path, headers=headers), timeout=30) as response:
        content: bytes = response.read()
        return content


def refusal(server: DatasetServer, path: str, host: str | None = None) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(server, path, host)
    return caught.value.code, caught.value.read().decode()


def test_packed_rows_hold_what_the_shards_do(write_dataset: Writer) -> None:
    out, written = write_dataset({"depth": 5, "edges": 4}, rejects={1: "missing: a: <b>", 6: "no_person"})
    packed = json.loads(json.dumps(packed_rows(ChainDataset(out).table(COLUMNS, errors=True)).to_json()))
    assert packed["count"] == 9
    assert column(packed, "pair_id", "<i8") == [row["pair_id"] for row in written]
    assert column(packed, "task", "<u2") == [row["task"] for row in written]
    assert column(packed, "split", "<u2") == [row["split"] for row in written]
    errors = [row.get("error") or "" for row in written]
    assert column(packed, "reason", "<u2") == [error.partition(":")[0] for error in errors]
    assert packed["details"] == {"1": "a: <b>"}
    for number, row in enumerate(written):
        figures = row.get("quality") or {}
        expected = {
            "quality": chain_quality(figures),
            "diffusion_path": figures.get("diffusion_path"),
            "end_psnr": figures.get("source_psnr"),  # the label's was not measured
            "label_noise_rms": figures.get("label_noise_rms"),
        }
        for name, value in expected.items():
            stored = column(packed["figures"], name, "<f4")[number]
            assert math.isnan(stored) if value is None else stored == pytest.approx(value, rel=1e-6)


def test_a_pair_is_shown_by_its_id(write_dataset: Writer, tmp_path: Path) -> None:
    out, written = write_dataset({"depth": 4, "edges": 3}, rejects={1: "missing: gone"})
    ids = [written[5]["pair_id"], written[3]["pair_id"]]  # edges, depth
    page = Page(Path(view(out, str(tmp_path / "view"), pair_ids=ids)[-1]).read_text())
    shown = [attributes["data-pair"] for _, attributes in page.elements if "data-pair" in attributes]
    assert shown == list(map(str, ids)), "those two, by task"
    page.require_self_contained()


@pytest.mark.parametrize("pair_id", [12, 2**70])
def test_an_unknown_id_is_refused_before_anything_is_loaded(
    write_dataset: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair_id: int
) -> None:
    out, written = write_dataset({"depth": 2}, rejects={1: "missing: gone"})
    monkeypatch.setattr("covray.report.dataset.load_tokenizer", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(DatasetError, match=f"^{out}: has no pair {pair_id}; covray view {out} lists"):
        view(out, str(tmp_path / "view"), pair_ids=[pair_id])
    with pytest.raises(DatasetError, match=r"was rejected \(missing: gone\); it has no chain to show"):
        view(out, str(tmp_path / "view"), pair_ids=[written[1]["pair_id"]])
    assert not (tmp_path / "view").exists()


def test_the_server_gives_the_rows_that_a_page_lacks(write_dataset: Writer) -> None:
    out, written = write_dataset({"depth": 4, "edges": 2}, finished=False)
    shard = Path(out, "shards", "task=edges", "part-1.parquet")
    later = shard.read_bytes()
    shard.write_bytes(later[: len(later) // 2])  # being written
    with serving(out) as server:
        first = json.loads(ask(server, "rows?generation=-1&shards=0"))
        assert (first["again"], first["finished"], first["rows"]["count"]) == (True, False, 5)
        asked = f"rows?generation={first['generation']}&shards={first['shards']}"
        nothing = json.loads(ask(server, asked))
        assert (nothing["again"], nothing["rows"]) == (False, {"count": 0})
        shard.write_bytes(later)
        more = json.loads(ask(server, asked))
        assert not more["again"]
        assert column(more["rows"], "pair_id", "<i8") == [written[-1]["pair_id"]]
        shard.unlink()  # as a build that continues does with what it had not committed
        fewer = json.loads(ask(server, f"rows?generation={more['generation']}&shards={more['shards']}"))
        assert (fewer["again"], fewer["rows"]["count"]) == (True, 5)


def test_the_server_shows_any_pair_and_refuses_in_one_line(write_dataset: Writer) -> None:
    out, written = write_dataset({"depth": 3}, rejects={1: "missing: <i>gone</i>"})
    with serving(out) as server:
        page = Page(ask(server, "").decode())
        assert "img" not in [tag for tag, _ in page.elements]
        assert len(Page(ask(server, f"pair?id={written[2]['pair_id']}").decode()).pictures()) == 6
        assert refusal(server, f"pair?id={written[1]['pair_id']}")[1].endswith("was rejected: missing: <i>gone</i>")
        for path, status in (
            ("pair?id=12", 409),
            (f"pair?id={2**70}", 409),
            ("pair?id=x", 400),
            ("rows", 400),
            ("x", 404),
        ):
            code, text = refusal(server, path)
            assert code == status
            assert len(text.splitlines()) == 1
        assert refusal(server, "", host="evil.example")[0] == 403, "another site's name may not resolve to it"
        with pytest.raises(ConfigError, match=rf"^--port {server.port}: another program listens there"):
            DatasetServer(out, server.port)


def test_a_dataset_that_goes_away_is_one_line_and_the_server_lives(write_dataset: Writer, tmp_path: Path) -> None:
    out, _ = write_dataset({"depth": 2})
    with serving(out) as server:
        shutil.move(out, tmp_path / "moved")
        assert "no _dataset.json there" in refusal(server, "rows?generation=0&shards=0")[1]
        shutil.move(tmp_path / "moved", out)
        assert json.loads(ask(server, "rows?generation=0&shards=0"))["rows"]["count"] == 2


def test_a_reader_that_leaves_in_the_middle_of_an_answer_is_no_error(
    write_dataset: Writer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = write_dataset({"depth": 2})
    monkeypatch.setattr(DatasetServer, "page", lambda self: bytes(50_000_000))  # more than the system takes at once
    with serving(out) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as reader:
            reader.sendall(f"GET / HTTP/1.0\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode())
            assert reader.recv(12) == b"HTTP/1.0 200"
        for path, status in (("http://[", 400), ("/x", 404)):
            with socket.create_connection(("127.0.0.1", server.port)) as reader:
                reader.sendall(f"GET {path} HTTP/1.0\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode())
                assert int(reader.recv(100).split()[1]) == status
    assert capsys.readouterr().err == ""


def test_the_port_of_http_may_be_left_out(write_dataset: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = write_dataset({"depth": 2})
    with serving(out) as server:
        address = ("127.0.0.1", server.port)
        monkeypatch.setattr(DatasetServer, "port", 80)
        for host, status in (("127.0.0.1", 200), ("localhost:80", 200), ("evil.example", 403)):
            with socket.create_connection(address) as reader:
                reader.sendall(f"GET / HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
                assert int(reader.recv(100).split()[1]) == status


def test_the_pair_that_was_shown_longest_ago_is_decoded_again(
    write_dataset: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, written = write_dataset({"depth": 3})
    first, second, third = (int(row["pair_id"]) for row in written)
    decoded = []

    def decode(dataset: Any, tokenizer: Any, rows: Any) -> Any:
        decoded.append(rows[0]["pair_id"])
        return decode_rows(dataset, tokenizer, rows)

    monkeypatch.setattr("covray.report.dataset_server.decode_rows", decode)
    monkeypatch.setattr("covray.report.dataset_server._KEPT_PAIRS", 2)
    with serving(out) as server:
        for pair_id in (first, second, first, third, first, second):
            ask(server, f"pair?id={pair_id}")
    assert decoded == [first, second, third, second]
