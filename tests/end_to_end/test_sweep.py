"""Start a sweep twice in one folder and kill it twice: no trial is repeated or lost; MLflow has one run a trial."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient

from covray.distributed.evaluate import RESULTS
from covray.distributed.sweep import PAGE, TABLE
from covray.training.metrics_log import read_metrics
from tests.distributed.test_tracking import folder, server  # noqa: F401 (fixtures)
from tests.support.chaos import start_two
from tests.support.commands import COVRAY, environment, error_line, kill_all, run, wait_for

# ruff: noqa: F811 (fixtures are arguments)

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end]


@pytest.fixture
def start() -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    """Starts a sweep as a process of its own; nothing of it outlives the test."""
    processes: list[subprocess.Popen[str]] = []

    def begin(command: list[str]) -> subprocess.Popen[str]:
        processes.append(subprocess.Popen([COVRAY, *command], env=environment(), stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield begin
    kill_all(processes)


def trials_in(out: Path) -> dict[str, str]:
    """The content of the files of the trials that have ended, by name; a trial that is tried again loses its file."""
    texts = {}
    for path in (out / "trials").glob("*.json"):
        with contextlib.suppress(FileNotFoundError):
            texts[path.name] = path.read_text()
    return texts


def of_status(trials: dict[str, str], status: str) -> dict[str, str]:
    """Those of ``trials`` that ended so."""
    return {name: text for name, text in trials.items() if json.loads(text)["status"] == status}


def kill_when(
    condition: Callable[[], bool], what: str, sweep: subprocess.Popen[str], started: list[psutil.Process]
) -> str:
    """Kill a sweep once ``condition`` holds; return what it said. Its Ray and its workers end by themselves.

    Args:
        condition: When.
        what: The moment in words.
        sweep: The driver.
        started: Takes the processes that must be gone at the end of the test.
    """
    wait_for(condition, what, sweep)
    with contextlib.suppress(psutil.NoSuchProcess):
        started += psutil.Process(sweep.pid).children(recursive=True)
    sweep.kill()
    return sweep.communicate()[1]


def test_sweeps_that_start_together_and_are_killed_repeat_nothing_and_lose_nothing(
    started: list[psutil.Process],  # first: what is still running after a failure ends before it looks
    tmp_path: Path, write_dataset: Callable[..., Any], write_manifest: Callable[..., str], llama_folder: Path,
    server: Callable[[], Any], start: Callable[[list[str]], subprocess.Popen[str]],
    run_here: Callable[..., subprocess.CompletedProcess[str]], rng: random.Random,
) -> None:  # fmt: skip
    data, pairs = write_dataset({"depth": 24, "edges": 24}, lengths=(3,))
    uri, _ = server()
    # A backbone that was lost: its trial fails, and the others go on.
    copied, lost = tmp_path / "copied", tmp_path / "lost"
    shutil.copytree(llama_folder, copied)
    shutil.copytree(llama_folder, lost, ignore=shutil.ignore_patterns("*.safetensors"))
    config = {
        "data": data,
        "out": str(tmp_path / "sweep"),
        "grid": {
            "methods": ["diffusion"], "lengths": [3], "pairs": [1],
            "fields": {"backbone.path": [str(lost), str(llama_folder), str(copied)]},
        },
        "train": {
            "backbone": {"scale": "custom"}, "optimizer": {"steps": 6, "batch_tokens": 512},
            "compute": {"threads": 1, "dtype": "float32"}, "validate_every_steps": 3,
        },
        "evaluate": {
            "split": "val", "manifest": write_manifest(pairs), "episodes": 3, "untuned": False,
            "baselines": ["copy"], "batch": 4, "actors": {"max": 1},
        },
        "concurrency": 2,
        "retries": 0,
        "tracking": {"uri": uri, "experiment": "sweeps"},
    }  # fmt: skip
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(config))
    out, command = tmp_path / "sweep", ["sweep", "--config", str(file)]

    early: list[tuple[str, Callable[[], bool]]] = [
        ("the sweep's description", (out / "_sweep.json").exists),
        ("a trial's training", lambda: any(out.rglob("metrics.jsonl"))),
        ("a trial that has ended", lambda: any((out / "trials").glob("*.json"))),
    ]
    what, condition = rng.choice(early)
    kill_when(condition, what, start_two(lambda: start(command), rng), started)
    finished = of_status(trials_in(out), "finished")

    def one_of_each() -> bool:
        done = trials_in(out)
        return bool(of_status(done, "failed") and of_status(done, "finished"))

    said = kill_when(one_of_each, "a failed trial and a finished one", start_two(lambda: start(command), rng), started)
    done = trials_in(out)
    finished |= of_status(done, "finished")
    # Without its weights one of the three failed, with its one line.
    (failed,) = (json.loads(text) for text in of_status(done, "failed").values())
    assert str(lost) in failed["error"]
    assert "\n" not in failed["error"]
    assert "Traceback" not in said
    for weights in llama_folder.glob("*.safetensors"):
        shutil.copy(weights, lost)

    results = json.loads(run("sweep", "--resume", "--out", str(out), "--json").stdout)  # one document, nothing else
    assert results == json.loads((out / RESULTS).read_text())
    assert {path.name for path in out.iterdir()} >= {RESULTS, TABLE, PAGE}
    assert {name: text for name, text in trials_in(out).items() if name in finished} == finished
    assert [trial["status"] for trial in results["trials"]] == ["finished"] * 3
    assert {trial["name"] for trial in results["trials"]} == {path.stem for path in (out / "trials").iterdir()}
    for log in out.rglob("metrics.jsonl"):
        losses = [record["step"] for record in read_metrics(str(log)) if "loss" in record]
        assert losses == sorted(set(losses)), f"{log}: a step is there twice"
    assert not list(out.rglob("_lock.*"))
    # The same weights in three folders: trials that shared nothing came to the same, killed or not.
    assert len({json.dumps(trial["scores"]) for trial in results["trials"]}) == 1

    client = MlflowClient(uri)
    tracked = client.search_runs([client.get_experiment_by_name("sweeps").experiment_id])
    (parent,) = [one for one in tracked if "mlflow.parentRunId" not in one.data.tags]
    children = [one for one in tracked if one.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(one.info.run_name for one in children) == sorted(trial["name"] for trial in results["trials"])
    assert {one.info.status for one in tracked} == {"FINISHED"}
    assert {entry.path for entry in client.list_artifacts(parent.info.run_id)} == {RESULTS, TABLE, PAGE}
    for child in children:
        assert len(client.get_metric_history(child.info.run_id, "loss")) == 6
        (trial,) = [trial for trial in results["trials"] if trial["name"] == child.info.run_name]
        means = {f"{entry['task']}/{entry['metric']}": entry["mean"] for entry in trial["scores"]}
        for name, mean in means.items():
            assert child.data.metrics.get(name) == (None if mean is None else pytest.approx(mean))

    refused = run_here(*command, "--set", "train.optimizer.steps=7", code=2)
    assert "train.optimizer.steps was 6, is 7" in error_line(refused.stderr)
