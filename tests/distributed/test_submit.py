"""A job goes to the cluster that was asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from rich.console import Console

from covray.distributed.submit import submit
from covray.errors import ConfigError


class Listener(HTTPServer):
    """Refuses everything, and knows what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

        class Refuse(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:
                self.asked.append(handler.path)
                handler.send_error(404)

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Refuse)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def listeners() -> Iterator[tuple[Listener, Listener]]:
    pair = Listener(), Listener()
    for each in pair:
        threading.Thread(target=each.serve_forever, daemon=True).start()
    yield pair
    for each in pair:
        each.shutdown()
        each.server_close()


@pytest.mark.parametrize("variable", ["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"])
def test_the_option_wins_over_the_environment(
    listeners: tuple[Listener, Listener], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    wanted, other = listeners
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, other.address)
    with pytest.raises(ConfigError, match=wanted.address):
        submit("build", None, [], address=wanted.address, submission_id=None, wait=False, console=Console(quiet=True))
    assert wanted.asked
    assert not other.asked
