"""Kill a sweep twice: no trial that was done is repeated, none is lost, one parent and a child a trial in MLflow."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from covray.distributed.evaluate import RESULTS
from covray.distributed.sweep import PAGE, TABLE
from tests.distributed.test_tracking import folder, server  # noqa: F401 (fixtures)
from tests.support.commands import COVRAY, environment, error_line, kill_all, run

# ruff: noqa: F811 (fixtures are arguments)

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[list[str]], subprocess.Popen[bytes]]]:
    """Starts a sweep as a process of its own; nothing of it outlives the test."""
    processes: list[subprocess.Popen[bytes]] = []

    def begin(command: list[str]) -> subprocess.Popen[bytes]:
        with (tmp_path / "said").open("wb") as said:
            processes.append(subprocess.Popen([COVRAY, *command], env=environment(), stderr=said))
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


def kill_when_ended(sweep: subprocess.Popen[bytes], out: Path, **counts: int) -> dict[str, str]:
    """Kill a sweep when so many trials of each status have ended; gives their files' content."""
    deadline = time.monotonic() + 600
    while True:
        done = trials_in(out)
        if all(len(of_status(done, status)) >= count for status, count in counts.items()):
            break
        assert sweep.poll() is None, (out.parent / "said").read_text()
        assert time.monotonic() < deadline, f"{len(done)} trials, and no more for ten minutes"
        time.sleep(0.05)
    sweep.kill()
    sweep.wait()
    return done


def test_a_sweep_killed_twice_repeats_nothing_and_loses_nothing(
    tmp_path: Path, write_dataset: Callable[..., Any], write_manifest: Callable[..., str], llama_folder: Path,
    server: Callable[[], Any], start: Callable[[list[str]], subprocess.Popen[bytes]],
    run_here: Callable[..., subprocess.CompletedProcess[str]],
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

    done = kill_when_ended(start(command), out, failed=1, finished=1)
    # Without its weights one of the three failed, with its one line.
    (failed,) = (json.loads(text) for text in of_status(done, "failed").values())
    assert str(lost) in failed["error"]
    assert "\n" not in failed["error"]
    assert "Traceback" not in (tmp_path / "said").read_text()
    for weights in llama_folder.glob("*.safetensors"):
        shutil.copy(weights, lost)
    finished = of_status(done, "finished")
    done = kill_when_ended(start(command), out, finished=len(finished) + 1)
    finished |= of_status(done, "finished")

    results = json.loads(run("sweep", "--resume", "--out", str(out), "--json").stdout.splitlines()[-1])
    assert results == json.loads((out / RESULTS).read_text())
    assert {path.name for path in out.iterdir()} >= {RESULTS, TABLE, PAGE}
    assert {name: text for name, text in trials_in(out).items() if name in finished} == finished
    assert [trial["status"] for trial in results["trials"]] == ["finished"] * 3
    assert {trial["name"] for trial in results["trials"]} == {path.stem for path in (out / "trials").iterdir()}
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
