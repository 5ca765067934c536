"""Kill a build anywhere: nothing is lost, doubled, or changed by a bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.conftest import COVRAY, FAST, actors_of, committed, environment, run, tokens_of

SCENES = 44  # 308 pairs
KILLS = ("driver", "actor", "driver", "actor", "driver")


@pytest.mark.ray
@pytest.mark.end_to_end
def test_a_build_killed_five_times_equals_an_undisturbed_one(
    tmp_path: Path, scenes_manifest: Callable[..., Path]
) -> None:
    seed = int(os.environ.get("COVRAY_TEST_SEED", random.SystemRandom().randrange(10**6)))
    print(f"seed {seed}")  # COVRAY_TEST_SEED repeats the moments of the kills
    rng = random.Random(seed)
    manifest, out = scenes_manifest(SCENES), tmp_path / "killed"
    command = [COVRAY, "build", "--pairs", str(manifest), "--out", str(out), "--actors", "2", *FAST]
    command += ["--set", "rows_per_block=8"]
    moments = sorted(rng.sample(range(8, SCENES * 7 - 60, 8), len(KILLS)))

    build: subprocess.Popen[bytes] | None = None
    started: list[psutil.Process] = []
    for victim, moment in zip(KILLS, moments, strict=True):
        if build is None:
            build = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while committed(out) < moment:
            assert build.poll() is None, f"the build ended with {build.returncode} before {moment} rows"
            assert time.monotonic() < deadline, f"{committed(out)} rows, and no more for five minutes"
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 0.5))
        if victim == "driver":
            started += psutil.Process(build.pid).children(recursive=True)
            build.kill()
            build.wait()
            build = None
        else:
            os.kill(rng.choice(actors_of(build, "ChainActor")).pid, signal.SIGKILL)
    assert build is None
    assert committed(out) < SCENES * 7, "every kill came before the end"
    run(*command[1:])

    other = scenes_manifest(SCENES, "reversed.parquet", reverse=True)
    undisturbed = tmp_path / "undisturbed"
    run(
        "build", "--pairs", str(other), "--out", str(undisturbed), "--actors", "1", *FAST,
        "--set", "rows_per_block=50",
    )  # fmt: skip
    assert len(tokens_of(out)) == SCENES * 7
    assert tokens_of(out) == tokens_of(undisturbed)
    assert not (out / "_checkpoint").exists()
    # Ray's agents try for a while to report that their raylet is gone before they go too.
    _, alive = psutil.wait_procs(started, timeout=120)
    assert not alive, f"left running: {alive}"
