"""Two builds in one folder: one of them works, the other is refused in one line, and no row is there twice."""

from __future__ import annotations

import contextlib
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.chaos import folders_left
from tests.support.commands import COVRAY, committed, environment, kill_all, run, tokens_of, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end]
SCENES = 8  # 56 pairs
# Without a prior, rows take milliseconds: what is tried here are moments of starting and ending.
LINEAR = ("--methods", "linear", "--lengths", "3", "--set", "rows_per_block=4", "--actors", "1")


@pytest.fixture
def start_build(tmp_path: Path) -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Starts a build of the manifest as a process of its own; nothing of it outlives the test."""
    processes: list[subprocess.Popen[str]] = []

    def begin(manifest: Path) -> subprocess.Popen[str]:
        command = [COVRAY, "build", "--manifest", str(manifest), "--out", str(tmp_path / "chains"), *LINEAR]
        processes.append(subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield begin
    kill_all(processes)


def test_builds_that_start_and_die_together_write_every_row_once(
    tmp_path: Path,
    start_build: Callable[[Path], subprocess.Popen[str]],
    scenes_manifest: Callable[..., Path],
    rng: random.Random,
    started: list[psutil.Process],
) -> None:
    manifest, out = scenes_manifest(SCENES), tmp_path / "chains"
    for moment in (0, rng.randrange(1, SCENES * 2)):
        builds = [start_build(manifest)]
        time.sleep(rng.choice([0, rng.uniform(0, 4)]))
        builds.append(start_build(manifest))
        wait_for(lambda: any(build.poll() is not None for build in builds), "one of two ends")  # noqa: B023
        (ended, working) = sorted(builds, key=lambda build: build.poll() is None)
        message = ended.communicate()[1].splitlines()[-1]
        assert ended.returncode == 2, message
        assert f"covray build (process {working.pid} on " in message
        assert "is at work in this folder" in message
        with contextlib.suppress(psutil.NoSuchProcess):
            wait_for(lambda: committed(out) >= moment, f"{moment} rows", working)  # noqa: B023
            started += psutil.Process(working.pid).children(recursive=True)
        working.kill()  # the driver alone: its Ray ends by itself
        working.wait()
    before = committed(out)
    assert before < SCENES * 7, "every kill came before the end"

    done = run("build", "--manifest", str(manifest), "--out", str(out), *LINEAR)
    assert "was at work here" not in done.stderr, "a killed build of this machine is followed at once"
    assert len(tokens_of(out)) == SCENES * 7
    assert not folders_left(out)
    assert not list(out.glob("_lock.*"))
