"""Pictures of the web: whatever a server does, an answer or a reason within the time; never a private address."""

from __future__ import annotations

import time

import pytest

from covray.errors import ConfigError, PairError
from covray.io import web
from covray.io.web import WebRules, fetch, is_web, web_rules
from tests.support.web_server import WebServer, web_server

__all__ = ["web_server"]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_FIRST_PAUSE_S", 0.01)


def rules(server: WebServer, **values: float) -> WebRules:
    limits = {"timeout_s": 10.0, "max_bytes": 2**20, "attempts": 1} | values
    return web_rules([server.host], **limits)  # type: ignore[arg-type, return-value]


def test_a_picture_of_an_allowed_host_is_its_bytes(web_server: WebServer) -> None:
    web_server.pictures |= {"a.png": b"picture", "a%20b.png?size=1": b"other", "empty.png": b""}
    assert fetch(web_server.url("a.png"), rules(web_server)) == b"picture"
    assert fetch(web_server.url("a b.png?size=1#part"), rules(web_server)) == b"other"
    assert fetch(web_server.url("empty.png"), rules(web_server)) == b""
    assert fetch(web_server.url("to//a.png"), rules(web_server)) == b"picture", "a redirect that stays within"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("stall/", "unreachable: .* no whole answer in 0.8 s"),
        ("drip/", "unreachable: .* no whole answer in 0.8 s"),
        ("drip/headers", "unreachable: .* no whole answer in 0.8 s"),
        ("cut/", "unreachable: "),
        ("down/", "unreachable: .* answers 503"),
        ("huge/", "too_large: .* has 1073741824 bytes, more than 1048576"),
        ("endless/", "too_large: .* more than 1048576 bytes|unreachable: .* no whole answer"),
        ("absent.png", "not_found: .* answers 404"),
        ("to/https://10.0.0.1/a.png", "host_not_allowed: .*10.0.0.1:443 is no --allow-host"),
        ("to/http://169.254.169.254/latest", "host_not_allowed: .* is no plain https address"),
        ("to/file:///etc/passwd", "host_not_allowed: "),
        ("to/https://127.0.0.1/a.png", "host_not_allowed: "),
        ("loop/", "redirects: .* more than 5 redirects"),
    ],
)
def test_whatever_a_server_does_there_is_a_reason_in_time(web_server: WebServer, path: str, reason: str) -> None:
    began = time.monotonic()
    with pytest.raises(PairError, match=f"^({reason})"):
        fetch(web_server.url(path), rules(web_server, timeout_s=0.8))
    assert time.monotonic() - began < 5


def test_what_fails_twice_is_tried_a_third_time(web_server: WebServer) -> None:
    web_server.pictures["a.png"] = b"picture"
    assert fetch(web_server.url("twice/a.png"), rules(web_server, attempts=3)) == b"picture"
    assert web_server.requests["twice/a.png"] == 3
    with pytest.raises(PairError, match=r"^unreachable: .* answers 503 \(attempt 2\)"):
        fetch(web_server.url("down/"), rules(web_server, attempts=2))
    with pytest.raises(PairError, match=r"^not_found"):
        fetch(web_server.url("gone.png"), rules(web_server, attempts=3))
    assert web_server.requests["gone.png"] == 1, "a lasting refusal is not tried again"


@pytest.mark.parametrize(
    ("host", "addresses"),
    [
        ("inside.example.org", ["10.1.2.3"]),
        ("inside.example.org", ["8.8.8.8", "::ffff:192.168.0.1"]),
        ("x", ["::1"]),
        ("x", ["64:ff9b::10.1.2.3"]),  # by a gateway from IPv6 (NAT64)
        ("x", ["2002:7f00:1::1"]),  # 6to4
    ],
)
def test_a_name_of_a_private_address_is_never_contacted(
    monkeypatch: pytest.MonkeyPatch, host: str, addresses: list[str]
) -> None:
    entries = [(2, 1, 6, "", (address, 443)) for address in addresses]
    monkeypatch.setattr(web.socket, "getaddrinfo", lambda *_, **__: entries)
    monkeypatch.setattr(web.socket, "create_connection", lambda *_, **__: pytest.fail("was contacted"))
    with pytest.raises(PairError, match=r"^host_not_allowed: .* is not an address of the internet"):
        fetch(f"https://{host}/a.png", WebRules((host,), attempts=1))


def test_hosts_are_matched_as_they_are_written() -> None:
    allowed = ("images.org", "*.example.org", "other.org:8443")
    for url, good in {
        "https://images.org/a": True,
        "https://IMAGES.org:443/a": True,
        "https://images.org:444/a": False,
        "https://evil-images.org/a": False,
        "https://a.b.example.org/a": True,
        "https://example.org/a": False,
        "https://other.org:8443/a": True,
        "https://other.org/a": False,
        "https://user:word@images.org/a": False,
        "https://images.org.evil.net/a": False,
        "https://[::1/a": False,
        "http://images.org/a": False,
    }.items():
        if good:
            web._require_allowed(url, WebRules(allowed))
        else:
            with pytest.raises(PairError, match=r"^host_not_allowed"):
                web._require_allowed(url, WebRules(allowed))
    assert is_web("HTTPS://a/b")
    assert not is_web("a/b.png")


@pytest.mark.parametrize("host", ["https://a.org", "a.org/b", "*", "a b", ""])
def test_a_host_that_is_none_is_one_line(host: str) -> None:
    with pytest.raises(ConfigError, match=r"--allow-host .*write a host's name"):
        web_rules([host], 1, 1, 1)
    assert web_rules([], 1, 1, 1) is None
