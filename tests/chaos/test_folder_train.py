"""Two trainings in one folder: one works, the other is refused in one line, and no step is done twice.

``tests/chaos/test_build.py`` tries builds, ``tests/end_to_end/test_sweep.py`` sweeps and
``tests/distributed/test_folder_race.py`` the lock by itself. To try more than one seed:

    COVRAY_TEST_SEEDS=10 pytest tests/chaos/test_folder_train.py
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from covray.config import TrainConfig
from covray.training.metrics_log import read_metrics
from covray.training.run import train as train_in_process
from tests.support.chaos import start_two
from tests.support.commands import COVRAY, environment, kill_all, wait_for
from tests.support.trainings import curve

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end]
SEEDS = range(int(os.environ.get("COVRAY_TEST_SEEDS", "1")))
TRAINING_STEPS = 60


@pytest.fixture
def start() -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    """Starts commands; nothing of them outlives the test."""
    processes: list[subprocess.Popen[str]] = []

    def begin(arguments: list[str]) -> subprocess.Popen[str]:
        command = [COVRAY, *arguments]
        processes.append(
            subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        )
        return processes[-1]

    yield begin
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
    start: Callable[[list[str]], subprocess.Popen[str]],
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
    command = ["train", "--config", str(file)]
    moment = rng.randrange(TRAINING_STEPS - 20)

    def last_step() -> int:
        return max((int(record["step"]) for record in read_metrics(f"{config.out}/metrics.jsonl")), default=0)

    kill_when(lambda: last_step() >= moment, f"step {moment}", start_two(lambda: start(command), rng), started)
    last = start_two(lambda: start(command), rng)
    _, message = last.communicate(timeout=600)
    assert last.returncode == 0, message
    assert "was at work here" not in message, "a killed training of this machine is followed at once"
    assert curve(config) == curve(whole), "every step once, as of an undisturbed training, to the bit"
    adapters = [Path(run.out, "adapter", "adapter_model.safetensors").read_bytes() for run in (config, whole)]
    assert adapters[0] == adapters[1]
    assert not list(Path(config.out).glob("_lock.*"))
