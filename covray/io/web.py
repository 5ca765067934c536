"""Pictures of the web: from hosts that the user allows, within limits of time and size, never from a private address.

The URL is untrusted, and so is what answers. Every wait ends: a timer closes the connection when the time of an attempt
is over, whatever the server does.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import ipaddress
import queue
import random
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass

from covray.errors import ConfigError, PairError, one_line

UNREACHABLE = "unreachable"
"""Reason of a picture that its host did not give: tried again by ``--retry unreachable``."""
MAX_REDIRECTS = 5
_CHUNK = 2**16
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""What networks without IPv4 reach it by: the last 32 bits are its address (RFC 6052)."""
_FIRST_PAUSE_S = 0.5
_TEMPORARY = (408, 425, 429, 500, 502, 503, 504)
"""Status codes that another attempt may change."""


@dataclass(frozen=True)
class WebRules:
    """Where pictures may come from, and how much of it."""

    hosts: tuple[str, ...]
    """Allowed hosts, each ``name`` or ``name:port``, or ``*.name`` for all below. An address or a name of a private
    network is allowed only where it is named itself with its port."""
    timeout_s: float = 30.0
    """Of one attempt as a whole: name, connection, redirects and every byte."""
    max_bytes: int = 64 * 2**20
    attempts: int = 3


def web_rules(hosts: list[str], timeout_s: float, max_bytes: int, attempts: int) -> WebRules | None:
    """Return the rules of the options; None where no host is allowed.

    Raises:
        ConfigError: A host is written as no host is.
    """
    if not hosts:
        return None
    for host in hosts:
        if host in ("", "*") or re.search("[/@ ]", host):
            raise ConfigError(f"--allow-host {host}: write a host's name, such as images.example.org or *.example.org")
    return WebRules(tuple(host.lower() for host in hosts), timeout_s, max_bytes, attempts)


def is_web(uri: str | None) -> bool:
    """Return whether a URI is of the web."""
    return uri is not None and uri.lower().startswith(("https://", "http://"))


def fetch(url: str, rules: WebRules) -> bytes:
    """Return what is at ``url``.

    Raises:
        PairError: ``host_not_allowed`` (also after a redirect), ``too_large``, ``not_found`` for a lasting refusal of
            the host, and ``unreachable`` for one that may pass.
    """
    for attempt in range(1, rules.attempts + 1):
        try:
            return _fetch_once(url, rules)
        except _Temporary as error:
            if attempt == rules.attempts:
                raise PairError(UNREACHABLE, f"{_show(url)}: {error} (attempt {attempt})") from error
            # Longer each time, and by chance: workers that failed together do not come back together.
            time.sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1) * (1 + random.random()))
    raise AssertionError("there is at least one attempt")


class _Temporary(Exception):
    """A failure that another attempt may not meet."""


@dataclass(frozen=True)
class _Place:
    """Where a URL points."""

    host: str
    port: int
    target: str


def _fetch_once(url: str, rules: WebRules) -> bytes:
    """Make one attempt, redirects included. Raises PairError or _Temporary."""
    deadline = time.monotonic() + rules.timeout_s
    for _ in range(MAX_REDIRECTS + 1):
        place = _require_allowed(url, rules)  # anew after each redirect, which is as untrusted as the first address
        try:
            with _answer(place, rules, deadline) as answer:
                if answer.status in (301, 302, 303, 307, 308):
                    url = urllib.parse.urljoin(url, answer.getheader("Location") or "")
                    continue
                _require_good(url, answer)
                body = _body(url, answer, rules)
            _left(deadline)  # a connection that the timer has closed can look like the end of the body
            return body
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            # The timer closes the connection under its reader, which then raises any of these.
            late = time.monotonic() >= deadline
            message = f"no whole answer in {rules.timeout_s:g} s" if late else one_line(error)
            raise _Temporary(message) from error
    raise PairError("redirects", f"{_show(url)}: more than {MAX_REDIRECTS} redirects")


def _require_allowed(url: str, rules: WebRules) -> _Place:
    """Return where ``url`` points. Raises PairError where that is not allowed."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port or 443
    except ValueError as error:
        raise PairError("host_not_allowed", f"{_show(url)}: {one_line(error)}") from error
    if parts.scheme != "https" or parts.username is not None:
        raise PairError("host_not_allowed", f"{_show(url)} is no plain https address")
    if not any(_matches(pattern, host, port) for pattern in rules.hosts):
        raise PairError("host_not_allowed", f"{_show(url)}: {host}:{port} is no --allow-host")
    path = urllib.parse.quote(parts.path or "/", safe="/%:@+,;=&$!~*()'")
    query = urllib.parse.quote(parts.query, safe="/%:@+,;=&$!~*()'?[]")
    if query:
        path += f"?{query}"
    return _Place(host, port, path)


def _matches(pattern: str, host: str, port: int) -> bool:
    """Return whether an allowed ``pattern`` names a host and a port; without a port of its own it means 443."""
    if pattern == f"{host}:{port}":
        return True
    if port != 443:
        return False
    if pattern.startswith("*."):
        return host.endswith(pattern[1:])  # with the dot: notexample.org is another domain than example.org
    return host == pattern


@contextlib.contextmanager
def _answer(place: _Place, rules: WebRules, deadline: float) -> Iterator[http.client.HTTPResponse]:
    """Open the answer of a host; the connection is closed when the time is over, and at the end."""
    address = _address(place, rules, deadline)
    plain = socket.create_connection((address, place.port), timeout=_left(deadline))
    # No handshake yet: it waits for the server, and the timer must run by then.
    connection = _tls().wrap_socket(plain, server_hostname=place.host, do_handshake_on_connect=False)
    timer = threading.Timer(_left(deadline), _close, [connection])
    timer.daemon = True
    timer.start()
    try:
        connection.do_handshake()
        request = http.client.HTTPConnection(place.host, place.port)
        request.sock = connection
        # Not compressed: the limit of bytes would not hold for what is unpacked.
        headers = {"User-Agent": "covray", "Accept": "image/*", "Connection": "close", "Accept-Encoding": "identity"}
        request.request("GET", place.target, headers=headers)
        with contextlib.closing(request.getresponse()) as answer:
            yield answer
    finally:
        timer.cancel()
        connection.close()


def _close(connection: ssl.SSLSocket) -> None:
    """End a connection under whoever waits for it."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)  # not TLS's own, which would take its state away, too


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _address(place: _Place, rules: WebRules, deadline: float) -> str:
    """Return an address of the host. Raises PairError for a private one that is not named itself.

    The connection is made to this very address, so that a second look-up cannot give another.
    """
    found: queue.SimpleQueue[list[str] | OSError] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            entries = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
            found.put([str(entry[4][0]) for entry in entries])
        except OSError as error:
            found.put(error)
        except UnicodeError as error:
            found.put(OSError(str(error)))

    threading.Thread(target=look_up, daemon=True).start()  # a resolver takes as long as it likes
    try:
        result = found.get(timeout=_left(deadline))
    except queue.Empty as error:
        raise TimeoutError("the name is not resolved in time") from error
    if isinstance(result, OSError):
        raise result
    named_itself = f"{place.host}:{place.port}" in rules.hosts
    for address in result:
        if not _is_public(address) and not named_itself:
            raise PairError("host_not_allowed", f"{place.host} is {address}, which is not an address of the internet")
    return result[0]


def _is_public(address: str) -> bool:
    """Return whether an address is of the internet; one of IPv4 can be written as one of IPv6."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        # A gateway passes on to the address within, so that one decides, however public the outer one looks.
        within = _ipv4_within(parsed)
        return parsed.is_global if within is None else within.is_global
    return parsed.is_global


def _ipv4_within(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the address of IPv4 that an address of IPv6 leads to; None for one of IPv6 alone."""
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def _left(deadline: float) -> float:
    """Return the seconds until ``deadline`` of the monotonic clock. Raises TimeoutError where it is past."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time is over")
    return left


def _require_good(url: str, answer: http.client.HTTPResponse) -> None:
    if answer.status in _TEMPORARY:
        raise _Temporary(f"the host answers {answer.status}")
    if answer.status != 200:
        raise PairError("not_found", f"{_show(url)}: the host answers {answer.status} {answer.reason}"[:200])


def _body(url: str, answer: http.client.HTTPResponse, rules: WebRules) -> bytes:
    """Return the whole body. Raises PairError where it is too large, announced or not; OSError where it is cut."""
    if answer.length is not None and answer.length > rules.max_bytes:
        raise PairError("too_large", f"{_show(url)} has {answer.length} bytes, more than {rules.max_bytes}")
    announced = answer.length
    data = bytearray()
    while chunk := answer.read1(_CHUNK):
        data += chunk
        if len(data) > rules.max_bytes:
            raise PairError("too_large", f"{_show(url)} has more than {rules.max_bytes} bytes")
    if announced is not None and len(data) != announced:
        raise OSError(f"{len(data)} of {announced} bytes came")
    return bytes(data)


def _show(url: str) -> str:
    text = repr(url)
    return text if len(text) <= 120 else text[:117] + "..."
