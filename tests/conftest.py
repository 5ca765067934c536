"""What holds for all tests: one thread, the fixtures of tests/support, and how tests are shared out among workers."""

from __future__ import annotations

import os

# One thread, as an actor computes by default, and before anything loads torch: identity to the bit is promised for it.
os.environ["OMP_NUM_THREADS"] = "1"

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

pytest_plugins = [
    "tests.support.backbones",
    "tests.support.chaos",
    "tests.support.commands",
    "tests.support.datasets",
    "tests.support.evaluations",
    "tests.support.photographs",
    "tests.support.priors",
    "tests.support.trainings",
]


class _OneRayAtATime(LoadScopeScheduling):
    """Files are shared out among the workers, but tests that start Ray, a dozen processes each, go to one of them: two
    Rays on two cores were late in starting, and hardly faster."""

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if nodeid.startswith(("tests/chaos/", "tests/end_to_end/")) else nodeid.split("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    config.option.loadscopereorder = False  # the tests that start Ray, the longest lane, come first
    return _OneRayAtATime(config, log)
