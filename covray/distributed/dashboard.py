"""Whether commands show Ray's dashboard. Knows no ray, so that the command line can ask for it before Ray is loaded."""

from __future__ import annotations

import os

VARIABLE = "COVRAY_DASHBOARD"
"""Set to 1, a Ray that covray starts shows its dashboard; ``--dashboard`` sets it for one command."""


def ask_for_dashboard() -> None:
    """Let the commands of this process show it."""
    os.environ[VARIABLE] = "1"


def is_dashboard_asked() -> bool:
    """Return whether to show it."""
    return os.environ.get(VARIABLE) == "1"
