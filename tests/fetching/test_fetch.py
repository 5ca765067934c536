"""``covray fetch`` against a server that plays the hub and plain addresses: real requests, hashes and archives."""

from __future__ import annotations

import hashlib
import io
import json
import os
import ssl
import subprocess
import sys
import tarfile
import threading
import urllib.parse
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

from covray.cli import app as cli
from covray.errors import ConfigError, WeightsError
from covray.fetching import archives, downloads
from covray.fetching import catalogue as manifest
from covray.fetching.catalogue import ARTEFACTS_FILE, RECORD_FILE, FetchError, read_artefacts
from covray.fetching.fetch import fetch, list_artefacts
from covray.io.model_folders import NANO_FOLDER
from tests.support.commands import error_line

COMMITS = ("a" * 40, "b" * 40)
BIG = bytes(range(256)) * 2000
DOCS = Path(__file__).parents[2] / "docs"


class Hub(ThreadingHTTPServer):
    """A hub with one repository ``owner/model``, and files at plain addresses below ``/files/``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.commits: list[dict[str, bytes]] = [{}]
        """Files of each commit; main is the last."""
        self.lies: dict[str, bytes] = {}
        """What is sent instead of a file."""
        self.private = False
        self.files: dict[str, bytes] = {}
        self.cuts: dict[str, list[int]] = defaultdict(list)
        """After so many bytes the connection breaks, by name, once each; -1: the answer is 403, -429: it is 429."""
        self.requests: list[tuple[str, str, str | None]] = []
        """Method, path and range of each."""
        self.tokens: set[str | None] = set()

    def ranges(self, name: str) -> list[str | None]:
        """Ranges of the downloads of a file."""
        return [wanted for method, path, wanted in self.requests if method == "GET" and path.endswith(f"/{name}")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        self.server.tokens.add(self.headers.get("Authorization"))
        if path.startswith("/files/"):
            name = path.removeprefix("/files/")
            self._send_file(name, self.server.files.get(name))
        elif path.startswith("/cdn/"):
            _, _, commit, name = path.split("/", 3)
            self._send_file(name, self.server.lies.get(name, self.server.commits[COMMITS.index(commit)][name]))
        elif self.server.private or "owner/model" not in path:
            self._answer(401 if self.server.private else 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/models/owner/model"):
            self._api(path.removeprefix("/api/models/owner/model").strip("/").split("/"))
        else:
            commit, name = path.removeprefix("/owner/model/resolve/").split("/", 1)
            self._resolve(commit, name)

    def _api(self, parts: list[str]) -> None:
        commit = parts[1] if len(parts) > 1 else "main"
        if commit == "main":
            commit = COMMITS[len(self.server.commits) - 1]
        if commit not in COMMITS:
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        files = self.server.commits[COMMITS.index(commit)]
        if parts[0] == "tree":
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": _git(data)}
                | ({"lfs": {"oid": _sha(data), "size": len(data), "pointerSize": 100}} if _is_lfs(name) else {})
                for name, data in files.items()
            ]
            self._answer(200, json.dumps(listed).encode())
            return
        siblings = [
            {"rfilename": name, "size": len(data), "blobId": _git(data)}
            | ({"lfs": {"sha256": _sha(data), "size": len(data), "pointerSize": 100}} if _is_lfs(name) else {})
            for name, data in files.items()
        ]
        self._answer(200, json.dumps({"id": "owner/model", "sha": commit, "siblings": siblings}).encode())

    def _resolve(self, commit: str, name: str) -> None:
        data = self.server.commits[COMMITS.index(commit)][name]
        headers = {"X-Repo-Commit": commit}
        if _is_lfs(name):  # elsewhere, as a CDN is
            headers |= {"X-Linked-Etag": f'"{_sha(data)}"', "X-Linked-Size": str(len(data))}
            headers["Location"] = f"http://localhost:{self.server.server_port}/cdn/{commit}/{name}"
            self._answer(302, b"", headers)
        elif self.command == "HEAD":
            self._answer(200, data, headers | {"ETag": f'"{_git(data)}"'})
        else:
            self._send_file(name, data)

    def _send_file(self, name: str, data: bytes | None) -> None:
        cut = self.server.cuts[name].pop(0) if self.server.cuts[name] else None
        if data is None or cut == -1:
            self._answer(404 if data is None else 403, b"")
            return
        if cut == -429:
            self._answer(429, b"")
            return
        headers, status, start = {"ETag": f'"{_sha(data)}"'}, 200, 0
        wanted = self.headers.get("Range")
        if wanted and self.headers.get("If-Range", headers["ETag"]) == headers["ETag"]:
            status, start = 206, int(wanted.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            if start >= len(data):
                self._answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
        self._answer(status, data[start:], headers, cut)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True


def _is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub as the client in this process sees it, with a home of its own; the working folder is empty."""
    server = Hub()
    server.commits[0] = {
        "config.json": b'{"a": 1}',
        "unet/config.json": b'{"b": 2}',
        "unet/model.safetensors": BIG,
        "unet/model.fp16.safetensors": b"another variant",
        "pytorch_model.bin": b"a pickle that nobody asked for",
    }
    home = tmp_path / "home"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_XET_CACHE", "HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH"):
        monkeypatch.setattr(constants, name, str(home / name))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(home / "agents.json"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
    assert server.tokens <= {None}
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == ["artefacts.yaml", "work"]


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writes the manifest: one artefact ``it`` with these fields."""

    def write(**fields: Any) -> None:
        about = {"kind": "tokenizer", "licence": "none", "size": "small", "next": "covray read {folder}"}
        (tmp_path / "artefacts.yaml").write_text(yaml.safe_dump({"it": about | fields}))
        monkeypatch.setattr(manifest, "ARTEFACTS_FILE", tmp_path / "artefacts.yaml")

    return write


@pytest.fixture
def model(hub: Hub, known: Callable[..., None]) -> Hub:
    """A hub of which the manifest knows the model."""
    files = ["config.json", "unet/config.json", ["unet/model.safetensors", "unet/model*.safetensors*", "*.bin"]]
    known(id="owner/model", files=files)
    return hub


def read(folder: str) -> dict[str, bytes]:
    """The files of a folder, without what the hub's client keeps there."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


WANTED = ("config.json", "unet/config.json", "unet/model.safetensors")


# --- the manifest --------------------------------------------------------------------------------------------------


def test_pages_and_manifest_name_the_same_artefacts() -> None:
    models = (DOCS / "weights.md").read_text().split("\n\n")
    datasets = (DOCS / "datasets.md").read_text().split("## Downloads")[1].split("\n\n")
    rows = [
        line
        for blocks in (models, datasets)
        for line in next(block for block in blocks if "| `covray fetch` |" in block).splitlines()[2:]
    ]
    artefacts = read_artefacts()
    assert sum(any(f"| `{name}` |" in row for name in artefacts) for row in rows) == len(artefacts)
    for name, artefact in artefacts.items():
        row = next(row for row in rows if f"| `{name}` |" in row)
        for said in (artefact.id or artefact.page or artefact.archives[0].name, artefact.licence, artefact.size):
            assert said in row


def test_what_is_fetched_of_a_prior_is_all_that_a_prior_needs(tmp_path: Path) -> None:
    from covray.models.diffusion.prior import require_prior_files

    for artefact in read_artefacts().values():
        if artefact.kind == "prior":
            for pattern in artefact.files:
                assert isinstance(pattern, str)
                file = tmp_path / pattern.replace("*", "any")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
            require_prior_files(tmp_path)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"id": "owner/model", "files": ["a"], "urls": []}, "urls"),
        ({"files": ["a"]}, "one of id, archives and page"),
        ({"id": "owner/model", "page": "https://example.org", "files": ["a"]}, "one of id, archives and page"),
        ({"id": "owner/model"}, "files are those of"),
        ({"id": "owner/model", "files": ["a"], "sha256": {"a": "b1946ac9"}}, "sha256"),
        ({"archives": [{"url": "file:///etc/passwd", "members": ["*"]}]}, "url"),
        ({"archives": [{"url": "https://example.org/a.zip", "members": ["*"], "into": "../b"}]}, "leads out"),
        ({"page": "https://example.org", "files": ["/etc/*"]}, "leads out"),
        ({"page": "https://example.org", "files": [["../a", "b"]]}, r"files\.0"),
    ],
)
def test_a_manifest_with_a_mistake_is_refused(
    known: Callable[..., None], fields: dict[str, Any], complaint: str
) -> None:
    known(**fields)
    with pytest.raises(ConfigError, match=complaint):
        read_artefacts()


def test_what_is_no_artefact_or_no_option_of_it_is_one_line(model: Hub, known: Callable[..., None]) -> None:
    with pytest.raises(ConfigError, match="other: no such artefact; give one of it"):
        fetch("other")
    known(page="https://example.org", files=["a"])
    with pytest.raises(ConfigError, match="--revision: it is not on the hub"):
        fetch("it", revision="main")
    assert model.requests == []


# --- repositories --------------------------------------------------------------------------------------------------


def test_a_repository_comes_whole_with_what_is_wanted_only_and_then_needs_no_network(model: Hub) -> None:
    result = fetch("it")
    there = read("models/it")
    record = json.loads(there.pop(RECORD_FILE))
    assert there == {name: model.commits[0][name] for name in WANTED}
    assert record["it"][0]["origin"] == "owner/model"
    assert record["it"][0]["revision"] == result.revision == COMMITS[0]
    assert record["it"][0]["files"] == {
        name: {"bytes": len(data), "sha256": _sha(data)} for name, data in there.items()
    }
    assert (result.files, result.bytes) == (3, sum(map(len, there.values())))
    assert fetch("tokenizer").name == "it", "a kind is its first entry"
    assert sorted(result.fetched) == sorted(WANTED)
    assert result.next == "covray read models/it"
    assert [entry.state for entry in list_artefacts()] == ["here"]

    model.requests.clear()
    again = fetch("it")
    assert again.fetched == again.damaged == ()
    assert model.requests == []


def test_a_pickle_is_fetched_only_where_there_is_no_safetensors(model: Hub) -> None:
    del model.commits[0]["unet/model.safetensors"]
    del model.commits[0]["unet/model.fp16.safetensors"]
    assert sorted(fetch("it").fetched) == ["config.json", "pytorch_model.bin", "unet/config.json"]


def test_a_connection_cut_in_the_middle_is_continued_there(model: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # it continues after whole chunks, of 10 MB
    model.cuts["unet/model.safetensors"] = [100_000]
    fetch("it")
    assert read("models/it")["unet/model.safetensors"] == BIG
    assert model.ranges("unet/model.safetensors") == [None, "bytes=100000-"]


def test_what_is_missing_or_damaged_comes_again_at_the_commit_of_the_first_time(model: Hub) -> None:
    fetch("it")
    before = read("models/it")
    model.commits.append({name: data + b"new" for name, data in model.commits[0].items()})
    Path("models/it/config.json").unlink()
    damaged = Path("models/it/unet/model.safetensors")
    times = damaged.stat()
    damaged.write_bytes(BIG[:-1] + b"\0")
    os.utime(damaged, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert [entry.state for entry in list_artefacts()] == ["in part"]
    model.requests.clear()
    result = fetch("it")
    assert sorted(result.fetched) == ["config.json", "unet/model.safetensors"]
    assert result.damaged == ("unet/model.safetensors",)
    assert read("models/it") == before
    assert not any("unet/config.json" in path for _, path, _ in model.requests)


def test_a_revision_and_a_mirror_are_held_to(model: Hub) -> None:
    model.commits.append({name: data + b"new" for name, data in model.commits[0].items()})
    assert fetch("it", out="old", revision=COMMITS[0]).revision == COMMITS[0]
    assert read("old")["config.json"] == model.commits[0]["config.json"]
    assert fetch("it", out="new", hub_id="owner/model", revision="main").revision == COMMITS[1]
    assert fetch("it", out="new", revision=COMMITS[1]).fetched == ()
    for changed in ({"revision": COMMITS[0]}, {"hub_id": "owner/other"}):
        with pytest.raises(ConfigError, match=f"new: holds owner/model at {COMMITS[1]}; give another --out"):
            fetch("it", out="new", **changed)


def test_bytes_that_are_not_the_hubs_are_removed_and_named(model: Hub) -> None:
    model.lies["unet/model.safetensors"] = BIG[::-1]
    with pytest.raises(FetchError, match=r"models/it/unet/model.safetensors: what owner/model gave has SHA-256"):
        fetch("it")
    assert "unet/model.safetensors" not in read("models/it")
    model.lies.clear()
    assert fetch("it").fetched == ("unet/model.safetensors",)


def test_a_repository_with_other_hashes_than_the_manifests_is_refused_before_it_is_fetched(
    model: Hub, known: Callable[..., None]
) -> None:
    known(id="owner/model", files=["unet/model.safetensors"], sha256={"unet/model.safetensors": "0" * 64})
    with pytest.raises(FetchError, match=r"it is not that artefact; give another --id"):
        fetch("it")
    assert read(".") == {}
    # The hub has no hash of small files: they are compared when they are there.
    known(id="owner/model", files=["config.json"], sha256={"config.json": "0" * 64})
    with pytest.raises(FetchError, match=r"models/it/config.json: what owner/model gave has SHA-256"):
        fetch("it")
    assert list(read("models/it")) == [RECORD_FILE]


def test_what_the_hub_does_not_have_is_one_line(model: Hub) -> None:
    with pytest.raises(FetchError, match=r"owner/model: has no revision v9; give another --revision"):
        fetch("it", revision="v9")
    with pytest.raises(FetchError, match=r"owner/none: no such repository, or a private one; give --id"):
        fetch("it", hub_id="owner/none")
    with pytest.raises(FetchError, match=r"not a repository: no such repository"):
        fetch("it", hub_id="not a repository")
    model.private = True
    with pytest.raises(FetchError, match=r"owner/model: no such repository, or a private one; .* hf auth login"):
        fetch("it")
    model.private = False
    del model.commits[0]["unet/config.json"]
    with pytest.raises(FetchError, match=r"owner/model: has no unet/config.json"):
        fetch("it")
    assert read(".") == {}


def test_a_path_that_leads_out_is_not_fetched(model: Hub, known: Callable[..., None], tmp_path: Path) -> None:
    model.commits[0] = {"../../../escaped.json": b"{}"}
    known(id="owner/model", files=["*.json"])
    with pytest.raises(FetchError, match=r"leads out of its folder"):
        fetch("it")
    record = {"it": [{"origin": "owner/model", "files": {"../../x": {"bytes": 1, "sha256": None}}}]}
    Path("other").mkdir()
    Path("other", RECORD_FILE).write_text(json.dumps(record))
    with pytest.raises(FetchError, match=f"other/{RECORD_FILE}: is not a record"):
        fetch("it", out="other")


# --- no network ----------------------------------------------------------------------------------------------------


def test_offline_a_whole_folder_passes_and_what_is_missing_is_named_with_its_place(
    model: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch("it")
    model.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("it").fetched == ()
    Path("models/it/unet/model.safetensors").unlink()
    Path("models/it/config.json").write_text("{}")
    with pytest.raises(FetchError) as caught:
        fetch("it")
    assert str(caught.value) == (
        "missing: models/it/config.json (has 2 bytes, not 8), models/it/unet/model.safetensors; HF_HUB_OFFLINE is set: "
        "put these of owner/model there, or run the same command again where there is a network"
    )
    assert Path("models/it/config.json").exists()  # nothing is lost before there is another
    Path("models/it/unet/model.safetensors").write_bytes(BIG)
    Path("models/it/config.json").write_bytes(model.commits[0]["config.json"])
    assert fetch("it").fetched == ()
    assert model.requests == []


def test_offline_a_folder_filled_by_hand_is_taken_when_it_is_complete(
    model: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        FetchError, match=r"missing: models/it/config.json, models/it/unet/config.json, models/it/unet/"
    ):
        fetch("it")
    for name in WANTED:
        Path("models/it", name).parent.mkdir(parents=True, exist_ok=True)
        Path("models/it", name).write_bytes(model.commits[0][name])
    assert fetch("it").files == 3
    Path("models/it/config.json").write_bytes(b'{"a": 2}')
    with pytest.raises(FetchError, match=r"missing: models/it/config.json .has SHA-256"):
        fetch("it")


def test_no_connection_is_as_offline(model: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FetchError, match=r"missing: models/it/config.json, .*; the hub cannot be reached"):
        fetch("it")


def test_the_command_lists_fetches_and_mends(
    model: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["covray", "fetch", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0
        return capsys.readouterr().out

    assert "absent" in run()
    fetched = json.loads(run("it", "--json"))
    assert list(fetched) == ["name", "folder", "next", "origin", "revision", "files", "bytes", "fetched", "damaged"]
    assert fetched["revision"] == COMMITS[0]
    Path("models/it/config.json").write_text("{}")
    shown = run("it")
    for said in ("models/it", "owner/model", COMMITS[0], "covray read models/it", "1 fetched now", "config.json"):
        assert said in shown
    listed = json.loads(run("--json"))
    assert [(entry["name"], entry["state"], entry["licence"]) for entry in listed] == [("it", "here", "none")]


def test_the_command_ends_with_one_line_and_2(model: Hub, tmp_path: Path) -> None:
    env = os.environ | {"HF_ENDPOINT": model.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "covray", "fetch", "sd21-base"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "models/sd21-base/unet/diffusion_pytorch_model.safetensors" in error_line(done.stderr)
    assert done.stdout == ""
    assert model.requests == []


# --- archives ------------------------------------------------------------------------------------------------------


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in members.items():
            packed.writestr(name, data)
    return buffer.getvalue()


def tarred(members: dict[str, bytes], *others: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as packed:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            packed.addfile(info, io.BytesIO(data))
        for info in others:
            packed.addfile(info)
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


MEMBERS = {"set/": b"", "set/a.png": b"A" * 1000, "set/b.png": os.urandom(300_000), "set/run.exe": b"no"}


@pytest.fixture
def dataset(hub: Hub, known: Callable[..., None]) -> Callable[..., None]:
    """Puts an archive at an address that the manifest knows."""

    def put(data: bytes, name: str = "set.zip", **fields: Any) -> None:
        hub.files[name] = data
        archive = {"url": f"{hub.url}/files/{name}", "members": ["set/*.png"]} | fields
        known(kind="dataset", folder="sets", archives=[archive])

    return put


@pytest.mark.parametrize(("name", "pack"), [("set.zip", zipped), ("set.tgz", tarred)])
def test_an_archive_is_unpacked_with_what_is_wanted_only_and_then_needs_no_network(
    hub: Hub, dataset: Callable[..., None], name: str, pack: Callable[..., bytes]
) -> None:
    data = pack({name: data for name, data in MEMBERS.items() if not name.endswith("/")})
    dataset(data, name, sha256=_sha(data), bytes=len(data))
    result = fetch("it")
    there = read("data/sets")
    source = json.loads(there.pop(RECORD_FILE))["it"][0]
    assert there == {name: data for name, data in MEMBERS.items() if name.endswith(".png")}
    assert source["sha256"] == _sha(data)
    assert source["files"] == {name: {"bytes": len(data), "sha256": _sha(data)} for name, data in there.items()}
    assert sorted(result.fetched) == sorted(there)
    hub.requests.clear()
    assert fetch("it").fetched == ()
    assert hub.requests == []

    Path("data/sets/set/a.png").write_bytes(b"B" * 1000)
    assert fetch("it").damaged == ("set/a.png",)
    assert Path("data/sets/set/a.png").read_bytes() == b"A" * 1000


def test_archives_in_an_archive_are_unpacked_where_they_lie(dataset: Callable[..., None]) -> None:
    inner = zipped({"labels_a/1.png": b"one", "__MACOSX/1.png": b"junk"})
    data = zipped({"notes/a.json": b"{}", "notes/labels_a.zip": inner})
    members = ["here/notes/*.json", "here/notes/labels_*.png"]
    dataset(data, into="here", members=members, inner=["here/notes/labels_a.zip"])
    fetch("it")
    there = read("data/sets")
    del there[RECORD_FILE]
    assert there == {"here/notes/a.json": b"{}", "here/notes/labels_a/1.png": b"one"}


def test_a_download_continues_after_a_cut_and_by_the_next_command(
    hub: Hub, dataset: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(downloads.time, "sleep", waits.append)
    data = zipped(MEMBERS)
    dataset(data, sha256=_sha(data))
    hub.cuts["set.zip"] = [100_000, 50_000, -1]
    with pytest.raises(FetchError, match=r"set.zip: the server answers 403"):
        fetch("it")
    assert Path("data/sets/set.zip.part").read_bytes() == data[:150_000]
    fetch("it")
    assert hub.ranges("set.zip") == [None, "bytes=100000-", "bytes=150000-", "bytes=150000-"]
    assert read("data/sets")["set/b.png"] == MEMBERS["set/b.png"]
    assert sorted(os.listdir("data/sets")) == [RECORD_FILE, "set"]
    assert waits == []  # only a connection that brings nothing is given time


def test_a_part_of_another_version_is_not_continued(hub: Hub, dataset: Callable[..., None]) -> None:
    dataset(zipped(MEMBERS))
    hub.cuts["set.zip"] = [100_000, -1]
    with pytest.raises(FetchError, match=r"403"):
        fetch("it")
    hub.files["set.zip"] = zipped({"set/c.png": os.urandom(200_000)})
    fetch("it")
    assert sorted(read("data/sets")) == [RECORD_FILE, "set/c.png"]


def test_a_part_that_was_whole_is_taken(hub: Hub, dataset: Callable[..., None]) -> None:
    data = zipped(MEMBERS)
    dataset(data)
    Path("data/sets").mkdir(parents=True)
    Path("data/sets/set.zip.part").write_bytes(data)
    Path("data/sets/set.zip.part.tag").write_text(f'"{_sha(data)}"')
    fetch("it")
    assert hub.ranges("set.zip") == [f"bytes={len(data)}-"]
    assert read("data/sets")["set/a.png"] == MEMBERS["set/a.png"]


def test_a_connection_that_brings_nothing_is_given_up(
    hub: Hub, dataset: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(downloads.time, "sleep", waits.append)
    dataset(zipped(MEMBERS))
    hub.cuts["set.zip"] = [0] * 100
    with pytest.raises(FetchError, match=r"missing: data/sets/set.zip; the connection broke 4 times without a byte"):
        fetch("it")
    assert waits == sorted(waits) != []


def test_a_connection_that_tls_says_is_cut_is_continued(
    hub: Hub, dataset: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    urlopen = downloads.urllib.request.urlopen
    cuts = [ssl.SSLEOFError(8, "EOF occurred in violation of protocol")]

    def cut_once(*arguments: Any, **options: Any) -> Any:
        answer = urlopen(*arguments, **options)
        read = answer.read

        def reading(size: int) -> bytes:
            if cuts and answer.fp is not None and answer.length < answer_bytes:
                raise cuts.pop()
            return bytes(read(100_000))

        answer_bytes = answer.length
        answer.read = reading
        return answer

    monkeypatch.setattr(downloads.urllib.request, "urlopen", cut_once)
    dataset(zipped(MEMBERS))
    fetch("it")
    assert hub.ranges("set.zip") == [None, "bytes=100000-"]
    assert read("data/sets")["set/b.png"] == MEMBERS["set/b.png"]


def test_a_server_that_asks_for_patience_gets_it(
    hub: Hub, dataset: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads.time, "sleep", lambda _: None)
    dataset(zipped(MEMBERS))
    hub.cuts["set.zip"] = [-429]
    fetch("it")
    assert hub.ranges("set.zip") == [None, None]


def test_an_address_may_hold_any_character(hub: Hub, known: Callable[..., None]) -> None:
    hub.files["gr\u00fcn 1.zip"] = zipped(MEMBERS)
    archive = {"url": f"{hub.url}/files/gr\u00fcn 1.zip", "members": ["set/*.png"]}
    known(kind="dataset", folder="sets", archives=[archive])
    fetch("it")
    assert read("data/sets")["set/b.png"] == MEMBERS["set/b.png"]


@pytest.mark.parametrize("host", ["127.0.0.1:port", "a..b"])
def test_what_is_no_address_is_one_line(known: Callable[..., None], host: str) -> None:
    known(kind="dataset", folder="sets", archives=[{"url": f"http://{host}/set.zip", "members": ["set/*.png"]}])
    with pytest.raises(FetchError, match=rf"http://{host}/set.zip: is not a valid address \(.*\); correct it") as error:
        fetch("it")
    assert "\n" not in str(error.value)


def test_another_archive_than_the_manifests_or_the_first_is_refused(hub: Hub, dataset: Callable[..., None]) -> None:
    data = zipped(MEMBERS)
    for wrong in ({"sha256": "0" * 64}, {"bytes": len(data) + 1}):
        dataset(data, **wrong)
        with pytest.raises(FetchError, match=f"set.zip: has {len(data)} bytes and SHA-256 {_sha(data)}, not"):
            fetch("it")
        assert read("data/sets") == {}
    dataset(data)
    fetch("it")
    Path("data/sets/set/a.png").unlink()
    hub.files["set.zip"] = zipped(MEMBERS | {"set/a.png": b"new"})
    with pytest.raises(FetchError, match=f"not SHA-256 {_sha(data)}"):
        fetch("it")


def test_offline_an_archive_is_named_with_its_place_and_taken_from_there(
    hub: Hub, dataset: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset(zipped(MEMBERS))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    expected = f"missing: data/sets/set.zip; HF_HUB_OFFLINE is set: put {hub.url}/files/set.zip there"
    with pytest.raises(FetchError, match=expected):
        fetch("it")
    Path("data/sets/set.zip").write_bytes(hub.files["set.zip"])
    assert fetch("it").files == 2
    assert hub.requests == []


LINK_OUT = special("set/a.png", tarfile.SYMTYPE, "../../../../escaped")


BACKWARDS = special("set/a.png", tarfile.REGTYPE)
BACKWARDS.size = -512


LONG_NAME = special("././@LongLink", tarfile.GNUTYPE_LONGNAME)
LONG_NAME.size = 2**33 - 1  # as many bytes as a header can claim


def zip_with_link() -> bytes:
    info = zipfile.ZipInfo("set/a.png")
    info.external_attr = 0o120777 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr("set/b.png", b"good")
        packed.writestr(info, "/etc")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (zipped({"set/a.png": b"good", "set/../../../../escaped.png": b"bad"}), "leads out of its folder"),
        (zipped({"set/a.png": b"good", "/escaped.png": b"bad"}), "leads out of its folder"),
        (zipped({"set/a.png": b"good", "C:\\escaped.png": b"bad"}), "leads out of its folder"),
        (zip_with_link(), "is a link or a device"),
        (zipped({"set/a.png": bytes(2_000_000)}), "unpacks to more than 1000000 bytes"),
        (zipped(MEMBERS)[:-30], "cannot be unpacked"),
        (zipped(MEMBERS).replace(b"A" * 3, b"B" * 3, 1)[::-1], "cannot be unpacked"),
        (zipped({"other/a.png": b"good"}), "has no set/"),
        (tarred({"set/a.png": b"good", "../../../escaped.png": b"bad"}), "outside the destination|leads out"),
        (tarred({"set/a.png": b"good", "/escaped.png": b"bad"}), "leads out of its folder"),
        (tarred({"set/b.png": b"good"}, LINK_OUT), "link to|outside"),
        (tarred({"set/b.png": b"good"}, special("set/a.png", tarfile.SYMTYPE, "/etc/passwd")), "absolute|outside"),
        (tarred({"set/b.png": b"good"}, special("set/a.png", tarfile.LNKTYPE, "../../../x")), "outside"),
        (tarred({"set/b.png": b"good"}, special("set/a.png", tarfile.CHRTYPE)), "special file"),
        (tarred({"set/b.png": b"good"}, special("set/a.png", tarfile.SYMTYPE, "b.png")), "set/a.png is a link"),
        (tarred({"set/a.png": bytes(2_000_000)}), "unpacks to more than 1000000 bytes"),
        (tarred({"set/b.png": b"good"}, BACKWARDS), "set/a.png has a size below 0"),
        (tarred({"set/b.png": b"good"}, LONG_NAME), "has 8589934591 bytes"),
        (tarred({"set/b.png": b"good"}, special("a" * 2_000_000, tarfile.REGTYPE)), "has 200001. bytes"),
        (tarred(MEMBERS)[:-2000], "cannot be unpacked"),
        (b"<html>try again</html>", "cannot be unpacked"),
    ],
)
def test_a_hostile_or_damaged_archive_is_one_line_and_nothing_is_written(
    dataset: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: bytes, complaint: str
) -> None:
    monkeypatch.setattr("covray.fetching.fetch.UNPACKED_LEAST", 1_000_000)
    dataset(data)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(FetchError, match=complaint) as caught:
        fetch("it")
    assert "\n" not in str(caught.value)
    assert {path.name for path in set(tmp_path.rglob("*")) - before} == {"data", "sets", "set.zip"}


def test_a_link_in_the_folder_is_not_written_through(dataset: Callable[..., None], tmp_path: Path) -> None:
    dataset(zipped(MEMBERS))
    outside = Path("outside")
    outside.mkdir()
    Path("data/sets").mkdir(parents=True)
    Path("data/sets/set").symlink_to(outside.absolute())
    with pytest.raises(FetchError, match=r"leads out of data/sets by a link"):
        fetch("it")
    assert list(outside.iterdir()) == []


def test_the_ratio_of_an_archive_leaves_room_for_what_there_is() -> None:
    text = json.dumps([{"id": number, "bbox": [number * 7 % 640, 3, 5, 9]} for number in range(20_000)]).encode()
    assert len(text) < archives.UNPACKED_RATIO * len(zipped({"a.json": text}))


# --- by hand, and the self-test ------------------------------------------------------------------------------------


def test_what_must_be_got_by_hand_is_said_and_recognised(hub: Hub, known: Callable[..., None]) -> None:
    known(kind="dataset", page="https://example.org/lol", files=["our485/low/*.png", "eval15/low/*.png"])
    with pytest.raises(
        FetchError, match=r"data/it/our485/low/.*.png is missing; get it by hand from https://example.or"
    ):
        fetch("it")
    for part in ("our485", "eval15"):
        assert [entry.state for entry in list_artefacts()] == ["absent"]
        Path(f"data/it/{part}/low").mkdir(parents=True)
        Path(f"data/it/{part}/low/1.png").touch()
    assert [entry.state for entry in list_artefacts()] == ["here"]
    assert fetch("it").folder == "data/it"
    assert hub.requests == []


def test_a_prior_is_tested_once_it_is_there(
    hub: Hub, known: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from covray.models.diffusion import selftest

    folder = NANO_FOLDER / "prior"
    hub.commits[0] = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    known(kind="prior", id="owner/model", files=["*.json", "*.safetensors"])
    result = fetch("it").self_test
    assert result is not None
    assert result.difference <= selftest.TOLERANCE
    assert "self_test" not in fetch("it").to_json()

    tested = selftest.golden(result.fingerprint)
    assert tested is not None
    golden = tmp_path / "home" / "golden.json"
    golden.parent.mkdir(exist_ok=True)
    monkeypatch.setattr(selftest, "GOLDEN_FILE", golden)
    golden.write_text("{}")
    Path("models/it/unet/config.json").unlink()
    again = fetch("it").self_test
    assert again is not None
    assert again.difference is None
    other = replace(tested, digest=[9.0] * len(tested.digest))
    golden.write_text(json.dumps({result.fingerprint: asdict(other)}))
    Path("models/it/unet/config.json").unlink()
    with pytest.raises(WeightsError, match="models/it: holds the recorded files, but its self-test differs by"):
        fetch("it")


def test_the_manifest_that_ships_is_in_the_package() -> None:
    assert ARTEFACTS_FILE.parts[-3:-1] == ("covray", "fetching")
    assert {"sd21-base", "lvm-vqvae", "lvm-7b", "coco-train", "lol"} <= set(read_artefacts())


def test_a_catalogue_of_ones_own_is_read_beside_covrays(hub: Hub, known: Callable[..., None]) -> None:
    known(id="owner/model", files=["config.json"])
    hub.files["mine.zip"] = zipped({"mine/a.txt": b"a"})
    entry = {
        "kind": "dataset", "licence": "mine", "size": "1 file", "next": "covray pairs manifest {folder} {x}",
        "archives": [{"url": f"{hub.url}/files/mine.zip", "members": ["mine/*"]}],
    }  # fmt: skip
    catalogue = Path("catalogue.yaml")
    catalogue.write_text(yaml.safe_dump({"mine": entry}))
    result = fetch("mine", "out", catalogue=catalogue)
    assert Path("out", "mine", "a.txt").read_bytes() == b"a"
    assert result.next.endswith(" out {x}")  # only the folder's name is filled in
    names = [artefact.name for artefact in list_artefacts(catalogue)]
    assert names == [*read_artefacts(), "mine"]
    for text, message in (
        ("mine: 3", "--catalogue"),
        ("mine: [", "not valid|--catalogue"),
        ("x: {kind: what}", "kind"),
    ):
        catalogue.write_text(text)
        with pytest.raises(ConfigError, match=message) as error:
            fetch("mine", catalogue=catalogue)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"--catalogue .*absent"):
        list_artefacts(Path("absent.yaml"))
