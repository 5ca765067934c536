"""A server on loopback that takes uploads as the Hugging Face hub does, and gives them back."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from huggingface_hub import constants


@dataclass
class Repository:
    """What is committed."""

    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b""})
    commits: int = 1

    @property
    def sha(self) -> str:
        return f"{self.commits:040x}"


class WritableHub(ThreadingHTTPServer):
    """A hub of any repositories, by ``(kind, name)``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        """Large files that were uploaded, whether or not a commit names them, by SHA-256."""
        self.faults: dict[str, int] = {}
        """The answer to requests whose path has this in it; 0: none ever comes."""
        self.silence = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WritableHub

    def log_message(self, *_: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self._fails():
            return
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if path.count("/") < 4:  # what the client asks of the hub itself
            self._answer(404, {})
            return
        if path.startswith("/api/"):
            kind, name, rest = self._named(path.removeprefix("/api/"))
            repository = self.server.repositories.get((kind, name))
            if repository is None:
                self._answer(404, {}, {"X-Error-Code": "RepoNotFound"})
                return
            files = [self._listed(path, data) for path, data in repository.files.items()]
            if rest.startswith("tree"):
                self._answer(200, files)
            else:
                siblings = [{"rfilename": name} for name in repository.files]
                self._answer(200, {"id": name, "sha": repository.sha, "siblings": siblings, "private": True})
            return
        kind = "dataset" if path.startswith("/datasets/") else "model"
        name, _, rest = path.removeprefix("/datasets").strip("/").partition("/resolve/")
        commit, _, file = rest.partition("/")
        data = self.server.repositories[kind, name].files[file]
        self._answer(200, data, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

    def do_PUT(self) -> None:
        data = self._body()
        if not self._fails():
            self.server.blobs[hashlib.sha256(data).hexdigest()] = data
            self._answer(200, {})

    def do_POST(self) -> None:
        body = self._body()
        if self._fails():
            return
        path = urllib.parse.urlsplit(self.path).path
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer(200, {"warnings": [], "errors": []})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = []
            for entry in json.loads(body)["objects"]:
                upload = {"href": f"{self.server.url}/upload/{entry['oid']}"}
                objects.append(entry | {"actions": {"upload": upload}})
            self._answer(200, {"transfer": "basic", "objects": objects})
        else:
            kind, name, rest = self._named(path.removeprefix("/api/"))
            if rest.startswith("preupload"):
                files = json.loads(body)["files"]
                modes = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith((".parquet", ".safetensors")) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in files
                ]
                self._answer(200, {"files": modes})
            else:
                prefix = "datasets/" if kind == "dataset" else ""
                self._commit(self.server.repositories[kind, name], f"{prefix}{name}", body)

    def _create(self, asked: dict[str, Any]) -> None:
        kind, name = asked.get("type", "model"), f"{asked['organization']}/{asked['name']}"
        prefix = "datasets/" if kind == "dataset" else ""
        known = (kind, name) in self.server.repositories
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server.repositories.setdefault((kind, name), Repository(private))
        self._answer(409 if known else 200, {"url": f"{self.server.url}/{prefix}{name}"})

    def _commit(self, repository: Repository, address: str, body: bytes) -> None:
        files = dict(repository.files)
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        repository.files, repository.commits = files, repository.commits + 1
        url = f"{self.server.url}/{address}/commit/{repository.sha}"
        self._answer(200, {"commitUrl": url, "commitOid": repository.sha})

    def _named(self, path: str) -> tuple[str, str, str]:
        kinds, owner, name, *rest = path.split("/")
        return kinds.removesuffix("s"), f"{owner}/{name}", "/".join(rest)

    def _listed(self, path: str, data: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _fails(self) -> bool:
        for part, status in self.server.faults.items():
            if part in self.path:
                if not status:
                    self.server.silence.wait()
                    self.close_connection = True
                else:
                    self._answer(status, {"error": "no"})
                return True
        return False

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def writable_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[WritableHub]:
    """The hub that huggingface_hub talks to in this test; waits between its attempts are left out."""
    hub = WritableHub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub cache"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield hub
    hub.silence.set()
    hub.shutdown()
    hub.server_close()
