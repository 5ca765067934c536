"""Progress lines and notes of a command on stderr."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console

from covray.cli.output import escape
from covray.progress import current

FIRST_AFTER_S = 0.7
"""A command that ends before this shows no progress. Two seconds are promised, of which Python and typer take one."""
EVERY_S = 8.0
"""Ten seconds are promised: a library that is being loaded holds this thread up, on a busy machine for seconds."""
_POLL_S = 0.25

_LOGGER = logging.getLogger("covray")


class Notes(logging.Handler):
    """Prints what covray has to say beside its progress, each record as one line on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record; a warning is yellow."""
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        text = escape(record.getMessage())
        Console(stderr=True, emoji=False).print(f"[{style}]covray:[/{style}] {text}", highlight=False, soft_wrap=True)


def show_details() -> None:
    """Show records of level DEBUG too, and the cause of an error: what ``--debug`` asks for."""
    _LOGGER.setLevel(logging.DEBUG)


def details_shown() -> bool:
    """Return whether ``--debug`` was given."""
    return _LOGGER.isEnabledFor(logging.DEBUG)


@contextmanager
def informed() -> Iterator[None]:
    """Show notes, and what the innermost stage says, while the block runs."""
    level, propagate = _LOGGER.level, _LOGGER.propagate
    _LOGGER.setLevel(logging.INFO)
    _LOGGER.propagate = False
    notes = Notes()
    _LOGGER.addHandler(notes)
    try:
        with _progress_lines():
            yield
    finally:
        _LOGGER.removeHandler(notes)
        _LOGGER.setLevel(level)
        _LOGGER.propagate = propagate


@contextmanager
def _progress_lines() -> Iterator[None]:
    """Print what the innermost stage says: within two seconds for the first time, then at least every ten seconds.

    Nothing is printed when stderr is not a file, as in a notebook or under a test.
    """
    try:
        # A second descriptor: while Ray starts, file descriptor 2 leads nowhere for some seconds.
        descriptor = os.dup(sys.stderr.fileno())
    except (OSError, ValueError):
        yield
        return
    ended = threading.Event()
    with open(descriptor, "w", encoding=sys.stderr.encoding, errors="backslashreplace", buffering=1) as stream:
        watcher = threading.Thread(target=_watch, args=(stream, ended), name="covray-progress", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


def _watch(stream: TextIO, ended: threading.Event) -> None:
    console = Console(file=stream, emoji=False)
    started = time.monotonic()
    line_due = started + FIRST_AFTER_S
    while not ended.wait(_POLL_S):
        now, text = time.monotonic(), current()
        if text is None:  # something else shows the progress
            line_due = max(line_due, now + _POLL_S)
        elif now >= line_due:
            line_due = now + EVERY_S
            console.print(f"{escape(text)} [dim]({now - started:.0f} s)[/dim]", highlight=False, soft_wrap=True)
