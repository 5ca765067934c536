"""What holds for all tests: one thread, the fixtures of tests/support, and how tests are shared out among workers."""

from __future__ import annotations

import os

# One thread, as an actor computes by default, and before anything loads torch: identity to the bit is promised for it.
os.environ["OMP_NUM_THREADS"] = "1"

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# A plugin comes after those that it imports: pytest rewrites the assertions of a module only before its first import.
pytest_plugins = [
    "tests.support.backbones",
    "tests.support.commands",
    "tests.support.chaos",
    "tests.support.datasets",
    "tests.support.evaluations",
    "tests.support.photographs",
    "tests.support.priors",
    "tests.support.trainings",
]


_RAY_LANE = (
    "tests/chaos/",
    "tests/end_to_end/test_evaluate.py",
    "tests/end_to_end/test_job.py",
    "tests/end_to_end/test_sweep.py",
    "tests/end_to_end/test_train.py",
)
"""Tests with a Ray of their own, a dozen processes each."""
_SHARED_RAY = "tests/end_to_end/"
"""The other end-to-end tests: one Ray for all of them."""


class _TwoLanes(LoadScopeScheduling):
    """Files are shared out among the workers, but tests with a Ray of their own go to one of them, and those that share
    a Ray to one of them: more than two Rays at once on two cores were late in starting."""

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(_RAY_LANE):
            return "ray"
        if nodeid.startswith(_SHARED_RAY):
            return "shared ray"
        return nodeid.split("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    config.option.loadscopereorder = False  # the tests that start Ray, the longest lane, come first
    return _TwoLanes(config, log)
