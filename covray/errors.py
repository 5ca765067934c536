"""The errors that a user can meet. Each is one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import errno
import re

_SHOWN = 200
"""Characters of another program's message that are quoted in ours."""


class CovrayError(Exception):
    """A mistake that the user can correct; commands print it as one line and end with exit code 2."""


class ConfigError(CovrayError):
    """A configuration that cannot be used: an unknown key, a value out of bounds, a contradiction."""


class ManifestError(CovrayError):
    """A manifest or a user's list that cannot be read as pairs."""


class WeightsError(CovrayError):
    """A model folder that is missing, incomplete, or not what its configuration says."""


class DatasetError(CovrayError):
    """A dataset folder that is unfinished, damaged, or belongs to another configuration."""


class PairError(Exception):
    """One bad pair. It never ends a job: its text becomes the row's ``error``.

    The text is ``reason: detail``; ``reason`` is one snake_case word, so that rejected pairs can be counted by it.
    """

    def __init__(self, reason: str, detail: str):
        """Describe one pair: the ``reason`` to count it by, and the ``detail`` for people."""
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def one_line(error: BaseException) -> str:
    """Return what an exception says on one line of at most 200 characters, or its class name where it says nothing.

    Of an OSError of the operating system that is what went wrong; the caller names the file.
    """
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(str(message).split()) or type(error).__name__
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def last_line(error: BaseException) -> str:
    """Return the last line of what an exception says: Ray and others put whole tracebacks into a message.

    Of an OSError of the operating system, also one that Arrow has wrapped, that is what went wrong.
    """
    of_system = isinstance(error, OSError) and error.errno in errno.errorcode and error.strerror
    lines = [line.strip() for line in (of_system or str(error)).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    wrapped = re.search(r"\[errno \d+\] (.+)", lines[-1])
    return wrapped[1] if wrapped else lines[-1]
