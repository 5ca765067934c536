"""Downloads by HTTP that resume after an interruption, and the errors of the hub's client as one line."""

from __future__ import annotations

import contextlib
import http.client
import os
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from covray.errors import one_line
from covray.fetching.catalogue import FetchError

_TRIES = 4
"""Attempts in a row without a single byte, after which a download ends."""
TIMEOUT_S = 30.0
_CHUNK = 2**20
_TEMPORARY = (408, 429)
"""Status codes below 500 that another attempt may change."""


class Unreachable(Exception):
    """There is no network, or the server does not answer."""


@contextlib.contextmanager
def hub_errors(hub_id: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub's client raises in the block into a FetchError, or Unreachable where no server answered."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise Unreachable("HF_HUB_OFFLINE is set") from error
    except GatedRepoError as error:
        raise FetchError(
            f"{hub_id}: asks for its terms to be accepted; do so on its page, then hf auth login, or give --id of a "
            "mirror"
        ) from error
    except RevisionNotFoundError as error:
        raise FetchError(f"{hub_id}: has no revision {revision}; give another --revision") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FetchError(
            f"{hub_id}: no such repository, or a private one; give --id of a mirror, or hf auth login"
        ) from error
    except HfHubHTTPError as error:
        raise FetchError(f"{hub_id}: the hub answers {error.response.status_code}; try again later") from error
    except (HTTPError, LocalEntryNotFoundError) as error:
        raise Unreachable(f"the hub cannot be reached ({one_line(error)})") from error
    except RuntimeError as error:  # the client of Xet, where the hub stores large files, raises nothing else
        raise FetchError(
            f"{hub_id}: the download broke ({one_line(error)}); run the same command again to continue, with "
            "HF_HUB_DISABLE_XET=1 by plain HTTP"
        ) from error


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE forbids downloads."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def download(url: str, file: Path) -> None:
    """Download ``url`` to ``file`` by way of ``.part``, which the next attempt continues. Raises FetchError."""
    part = file.with_name(f"{file.name}.part")
    try:
        if is_offline():
            raise Unreachable("HF_HUB_OFFLINE is set")
        with _progress(file.name) as show:
            most, idle = 0, 0
            while not _pull(url, part, show):
                # More than ever before: a server that starts anew each time also brings nothing.
                size = part.stat().st_size if part.is_file() else 0
                idle = 0 if size > most else idle + 1
                most = max(most, size)
                if idle == _TRIES:
                    raise Unreachable(f"the connection broke {_TRIES} times without a byte")
                if idle:
                    time.sleep(2.0**idle)
    except Unreachable as error:
        raise FetchError(
            f"missing: {file}; {error}: put {url} there, or run the same command again where there is a network"
        ) from error
    _tag(part).unlink(missing_ok=True)
    os.replace(part, file)


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show a download on a terminal. Yields a function of the bytes so far and the bytes in all, if known."""
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = ("{task.description}", DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    shown = Progress(*columns, console=Console(stderr=True, emoji=False), disable=not sys.stderr.isatty())
    with shown:
        task = shown.add_task(name, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def _pull(url: str, part: Path, show: Callable[[int, int | None], None]) -> bool:
    """Request what ``part`` lacks, and return whether it is complete then.

    A part is continued only if the server confirms that it belongs to the same file (If-Range); otherwise the download
    starts again.
    """
    tag = _tag(part).read_text(encoding="utf-8") if _tag(part).is_file() else ""
    have = part.stat().st_size if tag and part.is_file() else 0
    address = urllib.parse.quote(url, safe="/%:@+,;=&$!~*()'?[]#")  # urllib takes no spaces, and ASCII only
    request = urllib.request.Request(address, headers={"User-Agent": "covray", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", tag)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            continued = answer.status == 206
            if continued and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                raise FetchError(f"{url}: the server sent another part than requested; delete {part}, and try again")
            have = have if continued else 0
            length = answer.headers.get("Content-Length", "")
            total = have + int(length) if length.isdecimal() else None
            etag = answer.headers.get("ETag", "")
            # A weak ETag (W/) does not promise equal bytes.
            version = etag if etag.startswith('"') else answer.headers.get("Last-Modified", "")
            # Before the bytes: a kill must not leave those of this version under the tag of another.
            _tag(part).write_text(version, encoding="utf-8")
            with part.open("ab" if continued else "wb") as out:
                while chunk := answer.read(_CHUNK):
                    out.write(chunk)
                    have += len(chunk)
                    show(have, total)
            return total is None or have == total
    except urllib.error.HTTPError as error:
        if error.code == 416:
            complete = error.headers.get("Content-Range") == f"bytes */{have}"  # the last attempt ended at its end
            if not complete:
                part.unlink()
            return complete
        if error.code >= 500 or error.code in _TEMPORARY:
            return False
        raise FetchError(f"{url}: the server answers {error.code} ({error.reason}); get it by hand") from error
    except urllib.error.URLError as error:
        raise Unreachable(f"the server cannot be reached ({one_line(error)})") from error
    except (http.client.InvalidURL, UnicodeError) as error:  # before HTTPException, which it is one of
        raise FetchError(f"{url}: is not a valid address ({one_line(error)}); correct it in the catalogue") from error
    except (http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError):
        return False  # TLS tells of a cut connection by an error of its own


def _tag(part: Path) -> Path:
    """Return the file with what identifies the version of the download that ``part`` belongs to."""
    return part.with_name(f"{part.name}.tag")
