"""An HTTPS server on loopback that gives pictures badly: late, in drips, cut, too much, elsewhere, another type."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from covray.io import web


class WebServer(ThreadingHTTPServer):
    """Gives ``pictures`` by path, and what the first part of another path says."""

    daemon_threads = True

    def __init__(self, certificate: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        # The handshake is the handler's: a client that does not finish it must not hold up the others.
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.pictures: dict[str, bytes] = {}
        self.requests: Counter[str] = Counter()
        self.stopped = threading.Event()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def url(self, path: str) -> str:
        return f"https://{self.host}/{path}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients go away on purpose."""


class _Handler(BaseHTTPRequestHandler):
    server: WebServer

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        path = self.path.removeprefix("/")
        self.server.requests[path] += 1
        kind, _, rest = path.partition("/")
        answer = getattr(self, f"_{kind}", None)
        if answer is not None:
            answer(rest)
        elif path in self.server.pictures:
            self._give(self.server.pictures[path])
        else:
            self.send_error(404)

    def _give(self, data: bytes, announced: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", str(len(data) if announced is None else announced))
        self.end_headers()
        self.wfile.write(data)

    def _stall(self, rest: str) -> None:
        self.server.stopped.wait(60)

    def _drip(self, rest: str) -> None:
        """A byte a tenth of a second; with ``headers`` already before the body."""
        if rest != "headers":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
        else:
            self.wfile.write(b"HTTP/1.1 200 ")
        while not self.server.stopped.is_set():
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.1)

    def _to(self, target: str) -> None:
        """Redirect."""
        self.send_response(302)
        self.send_header("Location", target)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _loop(self, rest: str) -> None:
        self._to("/loop/")

    def _huge(self, rest: str) -> None:
        self._give(b"x", announced=2**30)

    def _endless(self, rest: str) -> None:
        """As much as the client takes, without saying how much."""
        self.send_response(200)
        self.end_headers()
        while not self.server.stopped.is_set():
            self.wfile.write(bytes(2**16))

    def _cut(self, rest: str) -> None:
        self._give(b"x" * 10, announced=1000)

    def _lie(self, rest: str) -> None:
        self._give(b"<!doctype html><title>Log in</title>")

    def _twice(self, rest: str) -> None:
        """Fail twice, then give the picture ``rest``."""
        if self.server.requests[f"twice/{rest}"] <= 2:
            self.send_error(503)
        else:
            self._give(self.server.pictures[rest])

    def _down(self, rest: str) -> None:
        self.send_error(503)


def write_certificate(path: Path) -> Path:
    """A certificate of 127.0.0.1 that signs itself, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def web_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    certificate = write_certificate(tmp_path / "certificate.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    web._tls.cache_clear()
    server = WebServer(certificate)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.stopped.set()
    server.shutdown()
    server.server_close()
    web._tls.cache_clear()
