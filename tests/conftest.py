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
    "tests.support.browser",
    "tests.support.commands",
    "tests.support.chaos",
    "tests.support.datasets",
    "tests.support.trainings",
    "tests.support.evaluations",
    "tests.support.hub",
    "tests.support.photographs",
    "tests.support.priors",
    "tests.support.vlm_trainings",
    "tests.support.thinking",
]


_LANES = {
    "tests/chaos/": "ray",
    "tests/end_to_end/test_sweep.py": "ray",
    "tests/end_to_end/test_evaluate.py": "ray of end to end",
    "tests/end_to_end/test_job.py": "ray of end to end",
    "tests/end_to_end/test_notebooks.py": "ray of end to end",
    "tests/serve/": "ray of end to end",
    "tests/end_to_end/": "shared ray",
}
"""The lane of files that start Ray, by the first beginning that fits. Those of a lane follow one another on one worker:
more than two Rays at once on two cores were late in starting. The lane ``ray`` takes as long as all the rest."""


class _Lanes(LoadScopeScheduling):
    """Files are shared out among the workers, but all of a lane go to one of them."""

    def _split_scope(self, nodeid: str) -> str:
        for beginning, lane in _LANES.items():
            if nodeid.startswith(beginning):
                return lane
        return nodeid.split("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    config.option.loadscopereorder = False  # the tests that start Ray, the longest lane, come first
    return _Lanes(config, log)
