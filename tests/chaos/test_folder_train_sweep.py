"""Two trainings, or two sweeps, in one folder: one works, the other is refused in one line, and nothing is done twice.

``tests/chaos/test_folder.py`` tries builds, ``tests/distributed/test_folder_race.py`` the lock by itself. To try
more than one seed of each:

    COVRAY_TEST_SEEDS=10 pytest tests/chaos/test_folder_train_sweep.py
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from covray.config import TrainConfig
from covray.training.metrics_log import read_metrics
from covray.training.run import train as train_in_process
from tests.support.commands import COVRAY, environment, error_line, kill_all, wait_for
from tests.support.trainings import curve

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end]
SEEDS = range(int(os.environ.get("COVRAY_TEST_SEEDS", "1")))
TRAINING_STEPS = 60


@dataclass
class Competition:
    """Runs of one command that start together in one folder."""

    command: list[str]
    rng: random.Random
    processes: list[subprocess.Popen[str]]

    def start_two(self) -> subprocess.Popen[str]:
        """Start two of the command; return the one that works, after the other was refused in one line."""
        pair = []
        for delay_s in (0, self.rng.choice([0, self.rng.uniform(0, 3)])):
            time.sleep(delay_s)
            process = subprocess.Popen(
                self.command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            pair.append(process)
            self.processes.append(process)
        wait_for(lambda: any(process.poll() is not None for process in pair), "one of two ends")
        refused, working = sorted(pair, key=lambda process: process.poll() is None)
        message = error_line(refused.communicate()[1])
        assert refused.returncode == 2, message
        assert f"(process {working.pid} on " in message
        assert "is at work in this folder" in message
        return working


@pytest.fixture
def compete(request: pytest.FixtureRequest) -> Iterator[Callable[[list[str], random.Random], Competition]]:
    """Gives competitions; nothing of their commands outlives the test."""
    processes: list[subprocess.Popen[str]] = []
    yield lambda arguments, rng: Competition([COVRAY, *arguments], rng, processes)
    kill_all(processes)


def kill_when(
    condition: Callable[[], bool], what: str, driver: subprocess.Popen[str], started: list[psutil.Process]
) -> None:
    """Kill a driver once ``condition`` holds; its Ray and its workers end by themselves, a little later."""
    wait_for(condition, what, driver)
    with contextlib.suppress(psutil.NoSuchProcess):
        started += psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.communicate()


@pytest.mark.parametrize("seed", SEEDS)
def test_trainings_that_start_together_and_die_make_every_step_once(
    started: list[psutil.Process],
    compete: Callable[[list[str], random.Random], Competition],
    tiny_config: Callable[..., TrainConfig],
    tmp_path: Path,
    seed: int,
) -> None:
    rng = random.Random(seed)
    steps = {"optimizer__steps": TRAINING_STEPS, "validate_every_steps": 20, "checkpoints__every_steps": 5}
    whole, config = tiny_config("whole", **steps), tiny_config("shared", **steps)
    train_in_process(whole)
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    competition = compete(["train", "--config", str(file)], rng)
    moment = rng.randrange(TRAINING_STEPS - 20)

    def last_step() -> int:
        return max((int(record["step"]) for record in read_metrics(f"{config.out}/metrics.jsonl")), default=0)

    kill_when(lambda: last_step() >= moment, f"step {moment}", competition.start_two(), started)
    last = competition.start_two()
    _, message = last.communicate(timeout=600)
    assert last.returncode == 0, message
    assert "was at work here" not in message, "a killed training of this machine is followed at once"
    assert curve(config) == curve(whole), "every step once, as of an undisturbed training, to the bit"
    adapters = [Path(run.out, "adapter", "adapter_model.safetensors").read_bytes() for run in (config, whole)]
    assert adapters[0] == adapters[1]
    assert not list(Path(config.out).glob("_lock.*"))


@pytest.mark.parametrize("seed", SEEDS)
def test_sweeps_that_start_together_and_die_do_every_trial_once(
    started: list[psutil.Process],
    compete: Callable[[list[str], random.Random], Competition],
    tmp_path: Path,
    write_dataset: Callable[..., Any],
    write_manifest: Callable[..., str],
    llama_folder: Path,
    seed: int,
) -> None:
    rng = random.Random(seed)
    data, pairs = write_dataset({"depth": 24}, lengths=(3,))
    out, file = tmp_path / "sweep", tmp_path / "sweep.yaml"
    config = {
        "data": data,
        "out": str(out),
        "grid": {"methods": ["diffusion"], "lengths": [3], "pairs": [1], "seeds": [0, 1]},
        "train": {
            "backbone": {"scale": "custom", "path": str(llama_folder)},
            "optimizer": {"steps": 6, "batch_tokens": 512},
            "compute": {"threads": 1, "dtype": "float32", "deepspeed": "none"},
            "validate_every_steps": 3,
        },
        "evaluate": {
            "split": "val", "manifest": write_manifest(pairs), "episodes": 2, "untuned": False,
            "baselines": ["copy"], "batch": 4, "actors": {"max": 1},
        },
        "concurrency": 2,
        "tracking": {"uri": "none"},
    }  # fmt: skip
    file.write_text(yaml.safe_dump(config))
    competition = compete(["sweep", "--config", str(file), "--json"], rng)
    trials = out / "trials"
    moments: list[tuple[str, Callable[[], bool]]] = [
        ("the sweep's description", (out / "_sweep.json").exists),
        ("a trial's training", lambda: any(out.rglob("metrics.jsonl"))),
        ("a trial that is done", lambda: any(trials.glob("*.json"))),
    ]
    what, condition = moments[seed % len(moments)]
    kill_when(condition, what, competition.start_two(), started)
    done = {path.name: path.read_text() for path in trials.glob("*.json")}

    last = competition.start_two()
    stdout, message = last.communicate(timeout=600)
    assert last.returncode == 0, message
    results = json.loads(stdout)  # one document, and nothing else on stdout
    assert results == json.loads((out / "results.json").read_text())
    assert Counter(trial["status"] for trial in results["trials"]) == {"finished": 2}
    assert {trial["name"] for trial in results["trials"]} == {path.stem for path in trials.iterdir()}
    assert {name: (trials / name).read_text() for name in done} == done, "a trial that was done is not done again"
    for log in out.rglob("metrics.jsonl"):
        losses = [record["step"] for record in read_metrics(str(log)) if "loss" in record]
        assert losses == sorted(set(losses)), f"{log}: a step is there twice"
    assert not list(out.rglob("_lock.*"))
