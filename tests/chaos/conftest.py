"""What the chaos tests share: a seed for the moments and the victims, and builds to be disturbed."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.conftest import scenes_manifest  # noqa: F401 (a fixture)


@pytest.fixture
def rng() -> random.Random:
    """Moments and victims; COVRAY_TEST_SEED repeats those of a run that failed."""
    seed = int(os.environ.get("COVRAY_TEST_SEED", random.SystemRandom().randrange(10**6)))
    print(f"COVRAY_TEST_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def started() -> Iterator[list[psutil.Process]]:
    """Processes that a test saw start: at its end all of them must be gone."""
    processes: list[psutil.Process] = []
    yield processes
    # Ray's agents try for a while to report that their raylet is gone before they go too.
    _, alive = psutil.wait_procs(processes, timeout=120)
    for process in alive:
        process.kill()
    assert not alive, f"left running: {alive}"


def folders_left(out: Path) -> list[str]:
    """Names below ``out`` that only an unfinished build has."""
    return [path.name for path in out.rglob("*") if path.name == "_checkpoint" or path.name.endswith(".part")]
