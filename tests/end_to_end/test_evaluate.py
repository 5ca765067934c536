"""Kill an evaluation: the continued one has the table of an undisturbed one, every episode once, one MLflow run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from covray.config import EvaluateConfig
from covray.distributed.evaluate import PAGE, RESULTS, TABLE, evaluate, read_rows
from tests.support.commands import COVRAY, actors_of, committed, environment, error_line, run

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end]
EPISODES = 2 * 10 * 9
"""Two tasks, ten queries each; four baselines, Chain-of-Focus, two adapters and an untuned backbone for each."""


def results_of(out: Path) -> dict[str, Any]:
    """``results.json`` without what depends on the machine, and on where it lies."""
    results: dict[str, Any] = json.loads((out / RESULTS).read_text())
    assert results.pop("seconds") > 0
    for key in ("out", "rows_per_block", "actors", "tracking"):
        results["config"].pop(key)
    return results


def wait_for_rows(evaluation: subprocess.Popen[bytes], out: Path, rows: int) -> None:
    deadline = time.monotonic() + 300
    while committed(out) < rows:
        assert evaluation.poll() is None, f"ended with {evaluation.returncode} before {rows} rows"
        assert time.monotonic() < deadline, f"{committed(out)} rows, and no more for five minutes"
        time.sleep(0.02)


def test_a_killed_evaluation_gives_the_table_of_an_undisturbed_one(
    tmp_path: Path, write_dataset: Callable[..., Any], write_manifest: Callable[..., str],
    write_run: Callable[..., str], run_here: Callable[..., subprocess.CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    data, pairs = write_dataset({"depth": 40, "edges": 40})
    manifest = write_manifest(pairs)
    adapters = [write_run(data, "plain", method="none"), f"chains={write_run(data, 'other', method='diffusion')}"]
    options = {"data": data, "split": "val", "manifest": manifest}
    command = [
        "evaluate", "--data", data, "--split", "val", "--manifest", manifest, "--adapter", adapters[0], "--adapter",
        adapters[1], "--set", "batch=4",
    ]  # fmt: skip

    killed = tmp_path / "killed"
    again = [*command, "--out", str(killed), "--set", "rows_per_block=4", "--set", "actors.max=2"]
    started: list[psutil.Process] = []

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [COVRAY, *again], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    evaluation = start()
    wait_for_rows(evaluation, killed, 12)
    os.kill(actors_of(evaluation, "EpisodeActor")[0].pid, signal.SIGKILL)  # Ray starts another
    wait_for_rows(evaluation, killed, 60)
    started += psutil.Process(evaluation.pid).children(recursive=True)
    evaluation.kill()
    evaluation.wait()
    assert 60 <= committed(killed) < EPISODES
    assert not (killed / RESULTS).exists()

    refused = run_here(*again, "--seed", "1", code=2)
    assert "was begun with another configuration: seed was 0, is 1" in error_line(refused.stderr)
    run(*again)

    whole = tmp_path / "whole"
    said = run(
        *command, "--out", str(whole), "--set", "rows_per_block=25", "--set", "actors.max=1", "--tracking-uri", "none",
        "--json",
    )  # fmt: skip
    assert json.loads(said.stdout.splitlines()[-1]) == json.loads((whole / RESULTS).read_text())

    for out in (killed, whole):
        rows = read_rows(str(out))
        assert len(rows) == EPISODES
        assert set(Counter(row["episode"] for row in rows).values()) == {1}, "every episode once"
        assert {path.name for path in out.iterdir()} >= {RESULTS, TABLE, PAGE, "rows", "_evaluation.json"}
        assert not (out / "_checkpoint").exists()
    everything = [row["pair_id"] for row in pairs]
    assert read_rows(str(killed), everything) == read_rows(str(whole), everything), "tokens and all"
    assert results_of(killed) == results_of(whole)
    assert (killed / TABLE).read_bytes() == (whole / TABLE).read_bytes()

    store = f"sqlite:///{tmp_path}/mlflow.db"
    results = json.loads((killed / RESULTS).read_text())

    def require_tracked() -> None:
        """One run, closed, with every figure once and the three files."""
        client = MlflowClient(store)
        (experiment,) = [found for found in client.search_experiments() if found.name != "Default"]
        (tracked,) = client.search_runs([experiment.experiment_id])
        assert tracked.info.status == "FINISHED"
        means = [entry["mean"] for entry in results["scores"] if entry["mean"] is not None]
        assert len(tracked.data.metrics) == len(means) > 0
        for name in tracked.data.metrics:
            assert len(client.get_metric_history(tracked.info.run_id, name)) == 1
        assert sorted(tracked.data.metrics.values()) == pytest.approx(sorted(means))
        assert {file.path for file in client.list_artifacts(tracked.info.run_id)} == {RESULTS, TABLE, PAGE}

    require_tracked()

    def no_ray() -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("covray.distributed.evaluate.ray_session", no_ray)
    config = EvaluateConfig(out=str(killed), adapters=tuple(adapters), batch=4, **options)
    assert evaluate(config).to_json() == results, "a finished evaluation returns at once"
    # As one killed after the results, before MLflow had heard of them: it is told, and no more than once.
    run_id = json.loads((killed / "_evaluation.json").read_text())["mlflow_run_id"]
    MlflowClient(store).update_run(run_id, status="RUNNING")
    (killed / "_checkpoint").mkdir()
    assert evaluate(config).to_json() == results
    assert not (killed / "_checkpoint").exists()
    require_tracked()

    # Ray's agents try for a while to report that their raylet is gone before they go too.
    _, alive = psutil.wait_procs(started, timeout=120)
    assert not alive, f"left running: {alive}"
