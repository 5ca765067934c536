"""Kill a build anywhere: nothing is lost, doubled, or changed by a bit."""

from __future__ import annotations

import contextlib
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.chaos import folders_left
from tests.support.commands import (
    COVRAY,
    FAST,
    actors_of,
    committed,
    computed,
    environment,
    run,
    tokens_of,
    wait_for,
)

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end]
SCENES = 13  # 91 pairs
VICTIMS = ["actor"] * 2 + ["ray"]


def test_a_build_killed_four_times_equals_an_undisturbed_one(
    tmp_path: Path, scenes_manifest: Callable[..., Path], rng: random.Random, started: list[psutil.Process]
) -> None:
    manifest, out = scenes_manifest(SCENES), tmp_path / "killed"
    command = [COVRAY, "build", "--pairs", str(manifest), "--out", str(out), "--actors", "2", *FAST]
    command += ["--set", "rows_per_block=8"]
    victims = [*rng.sample(VICTIMS, len(VICTIMS)), "driver"]
    moments = sorted(rng.sample(range(8, SCENES * 7 - 48, 8), len(victims)))
    # A driver whose Ray is gone gives up after these seconds (a minute by default).
    variables = environment(RAY_gcs_rpc_server_reconnect_timeout_s="5")

    build: subprocess.Popen[bytes] | None = None
    for victim, moment in zip(victims, moments, strict=True):
        if build is None:
            build = subprocess.Popen(command, env=variables)
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
        build = None
    assert build is None
    assert committed(out) < SCENES * 7, "every kill came before the end"
    run(*command[1:])

    assert len(tokens_of(out)) == SCENES * 7
    assert tokens_of(out) == computed(scenes_manifest(SCENES, "reversed.parquet", reverse=True))
    assert not folders_left(out)
