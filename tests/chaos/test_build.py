"""Start a build twice in one folder and kill it anywhere: nothing is lost, doubled, or changed by a bit."""

from __future__ import annotations

import contextlib
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.chaos import folders_left, start_two
from tests.support.commands import (
    COVRAY,
    FAST,
    actors_of,
    committed,
    computed,
    environment,
    kill_all,
    run,
    tokens_of,
    wait_for,
)

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end]
SCENES = 13  # 91 pairs
VICTIMS = ["actor"] * 2 + ["ray"]


@pytest.fixture
def start() -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    """Starts a command as a process of its own; nothing of it outlives the test."""
    processes: list[subprocess.Popen[str]] = []
    # A driver whose Ray is gone gives up after these seconds (a minute by default).
    variables = environment(RAY_gcs_rpc_server_reconnect_timeout_s="5")

    def begin(command: list[str]) -> subprocess.Popen[str]:
        processes.append(subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield begin
    kill_all(processes)


def test_builds_that_start_together_and_are_killed_equal_an_undisturbed_one(
    tmp_path: Path, scenes_manifest: Callable[..., Path], rng: random.Random, started: list[psutil.Process],
    start: Callable[[list[str]], subprocess.Popen[str]],
) -> None:  # fmt: skip
    manifest, out = scenes_manifest(SCENES), tmp_path / "killed"
    command = [COVRAY, "build", "--pairs", str(manifest), "--out", str(out), "--actors", "2", *FAST]
    command += ["--set", "rows_per_block=8"]
    victims = ["driver", *rng.sample(VICTIMS, len(VICTIMS)), "driver"]
    # The first dies as soon as it has the folder, the others further on.
    moments = [0, *sorted(rng.sample(range(8, SCENES * 7 - 48, 8), len(victims) - 1))]

    build: subprocess.Popen[str] | None = None
    for victim, moment in zip(victims, moments, strict=True):
        if build is None:
            build = start_two(lambda: start(command), rng)
        wait_for(lambda: committed(out) >= moment, f"{moment} rows", build)  # noqa: B023 (called here)
        everything = psutil.Process(build.pid).children(recursive=True)
        started += everything
        if victim == "actor":
            wait_for(lambda: bool(actors_of(build, "ChainActor")), "an actor", build)  # noqa: B023
            with contextlib.suppress(psutil.NoSuchProcess):
                rng.choice(actors_of(build, "ChainActor")).kill()
            continue
        for process in [*everything] if victim == "ray" else [build]:
            process.kill()
        assert build.wait(120) != 0
        build.communicate()
        build = None
    assert build is None
    assert committed(out) < SCENES * 7, "every kill came before the end"
    done = run(*command[1:])
    assert "was at work here" not in done.stderr, "a killed build of this machine is followed at once"

    assert len(tokens_of(out)) == SCENES * 7
    assert tokens_of(out) == computed(scenes_manifest(SCENES, "reversed.parquet", reverse=True))
    assert not folders_left(out)
    assert not list(out.glob("_lock.*"))
