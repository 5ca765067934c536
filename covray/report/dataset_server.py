"""The page of a dataset on a server of its own: the list grows while a build writes, and any pair can be looked at."""

from __future__ import annotations

import contextlib
import errno
import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from covray.chains.compatibility import require_same_tokens
from covray.config import EngineConfig, TokenizerConfig
from covray.errors import ConfigError, CovrayError, DatasetError, one_line
from covray.models.tokenizer.vqgan import load_tokenizer
from covray.progress import own_display, stage
from covray.report.contact_sheets import decode_rows
from covray.report.dataset import render_page, view_of
from covray.report.html import render_part
from covray.report.live_rows import LiveRows

HOST = "127.0.0.1"
_KEPT_PAIRS = 500
"""Pairs whose pictures are kept: some 100 kB each."""
_HTML, _JSON = "text/html; charset=utf-8", "application/json"


class DatasetServer:
    """Answers the page of one dataset on this machine's own address, to readers of this machine only."""

    def __init__(self, path: str, port: int = 0):
        """Load what is needed and listen.

        Args:
            path: The dataset folder, finished or not.
            port: The port; 0: a free one.

        Raises:
            DatasetError: The dataset is absent, or its tokenizer has another codebook.
            WeightsError: The tokenizer cannot be loaded.
            ConfigError: The port is taken.
        """
        self._rows = LiveRows(path)
        config = TokenizerConfig.model_validate(self._rows.dataset.config["tokenizer"])
        self._tokenizer = load_tokenizer(config, EngineConfig())
        require_same_tokens(self._rows.dataset, self._tokenizer, config.path)
        # The server answers on threads; the dataset, the tokenizer and the pictures are shared by them.
        self._lock = threading.Lock()
        self._pairs: OrderedDict[int, bytes] = OrderedDict()
        with stage(f"reading the pairs of {path}"):
            self._rows.refresh()
        try:
            self._server = ThreadingHTTPServer((HOST, port), _handler(self))
        except (OSError, OverflowError) as error:
            # OverflowError is a port above 65535; it has no errno.
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                raise ConfigError(f"--port {port}: another program listens there; give another port") from error
            raise ConfigError(f"--port {port}: cannot be listened on ({one_line(error)}); give another port") from error
        self._server.daemon_threads = True

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return int(self._server.server_address[1])

    @property
    def address(self) -> str:
        """The address of the page."""
        return f"http://{HOST}:{self.port}/"

    def run(self) -> None:
        """Answer until ``close``."""
        self._server.serve_forever(poll_interval=0.2)

    def close(self) -> None:
        """End ``run``, from another thread."""
        self._server.shutdown()
        self._server.server_close()

    def page(self) -> bytes:
        """Return the page, without rows: it asks for them."""
        with self._lock:
            return render_page(self._rows.dataset, [], rows=None)

    def rows(self, generation: int, shards: int) -> bytes:
        """Return the rows that a page lacks; see ``LiveRows.since``."""
        with self._lock:
            self._rows.refresh()
            return json.dumps(self._rows.since(generation, shards).to_json(), allow_nan=False).encode()

    def pair(self, pair_id: int) -> bytes:
        """Return the part of the page that shows one pair. Raises DatasetError where there is none to show."""
        with self._lock:
            if pair_id not in self._pairs:
                row = self._rows.row(pair_id)
                # A rejected pair has no tokens to decode.
                if row["error"] is not None:
                    raise DatasetError(f"pair {pair_id} was rejected: {row['error']}")
                (chain,) = decode_rows(self._rows.dataset, self._tokenizer, [row])
                self._pairs[pair_id] = render_part("chain.html", "chain_card", view_of(chain))
                # The pair shown longest ago goes first; it is decoded again when asked for.
                if len(self._pairs) > _KEPT_PAIRS:
                    self._pairs.popitem(last=False)
            self._pairs.move_to_end(pair_id)
            return self._pairs[pair_id]


def serve_dataset(path: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve the page of a dataset until Ctrl-C.

    Args:
        path: The dataset folder, finished or not.
        port: The port; 0: a free one.
        ready: Called with the address as soon as it answers.

    Raises:
        CovrayError: As ``DatasetServer``.
    """
    server = DatasetServer(path, port)
    ready(server.address)
    with own_display(), contextlib.suppress(KeyboardInterrupt):
        server.run()


def _handler(server: DatasetServer) -> type[BaseHTTPRequestHandler]:
    """Return the class that answers the requests to ``server``."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 30  # a reader that says nothing does not keep its thread

        def do_GET(self) -> None:
            """Answer the page, new rows or a pair."""
            # A page of another site that resolves to this machine has that site's name here.
            own = {f"{HOST}:{server.port}", f"localhost:{server.port}"}
            if server.port == 80:  # browsers leave out the port of http
                own |= {HOST, "localhost"}
            if self.headers.get("Host") not in own:
                self._send(HTTPStatus.FORBIDDEN, b"use the address that covray view prints", "text/plain")
                return
            try:
                answer = self._answer()
            except (CovrayError, OSError) as error:
                answer = HTTPStatus.CONFLICT, one_line(error).encode(), "text/plain; charset=utf-8"
            self._send(*answer)

        def _answer(self) -> tuple[HTTPStatus, bytes, str]:
            """Return the status of the answer, its body and what kind of text that is."""
            try:
                url = urlsplit(self.path)
                query = parse_qs(url.query)
                if url.path == "/":
                    return HTTPStatus.OK, server.page(), _HTML
                if url.path == "/rows":
                    # The first of each: a name may be given several times in an address.
                    generation, shards = (int(query[name][0]) for name in ("generation", "shards"))
                    return HTTPStatus.OK, server.rows(generation, max(0, shards)), _JSON
                if url.path == "/pair":
                    return HTTPStatus.OK, server.pair(int(query["id"][0])), _HTML
            # Addresses come from anyone on this machine: a missing or odd number is an answer, not a traceback.
            except (KeyError, ValueError):
                return HTTPStatus.BAD_REQUEST, b"a number is missing in the address", "text/plain"
            return HTTPStatus.NOT_FOUND, b"not found", "text/plain"

        def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            # A page that stays open asks for rows that change while a build writes.
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            # A reader may close the page in the middle of an answer: nobody is there to be told, nor is it an error.
            with contextlib.suppress(ConnectionError, TimeoutError):
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing: the terminal shows the address, and errors are shown on the page."""

    return Handler
