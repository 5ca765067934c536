"""What a check of the doctor finds, and helpers that several checks share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from covray.errors import CovrayError, one_line

Status = Literal["ok", "note", "problem"]

GIB = 2**30
FULL = 0.95
"""The share in use from which Ray calls a disk full and fails what would spill to it (local_fs_capacity_threshold)."""
EXPECTED_ERRORS = (CovrayError, OSError, RuntimeError, ValueError, LookupError, ImportError)
"""What checks of hardware, storage and libraries may raise. A bug of covray's own is still a traceback."""
_SKEW_NOTE_S, _SKEW_PROBLEM_S = 2.0, 60.0
"""Object stores keep whole seconds; S3 refuses requests from a clock that is 15 minutes wrong."""


@dataclass(frozen=True)
class Finding:
    """The result of a check. The names of the fields are the keys of `covray doctor --json`."""

    name: str
    status: Status
    """``note``: it works, with a limit worth knowing; ``problem``: something will fail."""
    found: str
    """One line, with figures and units."""
    advice: str = ""
    """What to do, one line; empty when all is well."""


def error_finding(name: str, error: BaseException) -> Finding:
    """Return the finding of a check that failed.

    covray's own errors say what to do after their last semicolon; for all others the advice is general.
    """
    if isinstance(error, CovrayError):
        # Whole: of a message that names a long path, one_line would drop the advice.
        message, _, advice = " ".join(str(error).split()).rpartition("; ")
        if message:
            return Finding(name, "problem", message, advice)
    advice = "try it by hand as the same user; the rest of the report stands without it"
    return Finding(name, "problem", f"could not be checked ({one_line(error)})", advice)


def clock_skew(moment_s: float, earliest_s: float, latest_s: float) -> float:
    """Return how far a clock is off: the seconds by which its time lies outside what delays can explain.

    Args:
        moment_s: The time it shows (Unix).
        earliest_s: Our time before it was asked.
        latest_s: Our time when it had answered.
    """
    return moment_s - min(max(moment_s, earliest_s), latest_s)


def skew_status(skew_s: float) -> Status:
    """Return how bad it is that two clocks differ by so many seconds."""
    if abs(skew_s) < _SKEW_NOTE_S:
        return "ok"
    return "note" if abs(skew_s) < _SKEW_PROBLEM_S else "problem"


def first_line(lines: Iterable[str]) -> str:
    """Return the first of ``lines`` that is not blank; empty where all are."""
    return next((line.strip() for line in lines if line.strip()), "")
