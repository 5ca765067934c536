"""Trackers beside MLflow: each has every value once, and one that is away ends nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from covray import plugins
from covray.chains.records import DatasetRecord
from covray.config import BuildConfig, EvaluateConfig, TrainConfig, load_config
from covray.distributed.resumable import Output
from covray.distributed.trackers.base import require_trackers, tracker_registry, trackers_of
from covray.distributed.trackers.together import RunTrackers
from covray.distributed.trackers.wandb import WandbTracker
from covray.errors import ConfigError
from covray.training.records import RunRecord


def config_of(out: object, **options: Any) -> TrainConfig:
    return load_config(TrainConfig, None, {"data": "chains", "out": str(out)} | options)


class Memory:
    """A tracker that keeps what it is given; ``fails`` names the methods that raise."""

    calls: list[tuple[Any, ...]]
    fails: tuple[str, ...] = ()

    def __init__(self, config: Any, run_id: str | None, command: str):
        self._run_id = run_id
        self._note("init", run_id, command)

    def start(self) -> str:
        self._note("start")
        return self._run_id or "new"

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        self._note("log", step, dict(metrics))

    def artefacts(self, folder: str, names: Iterable[str]) -> None:
        self._note("artefacts", folder, list(names))

    def finish(self, status: str) -> bool:
        self._note("finish", status)
        return True

    def _note(self, name: str, *arguments: Any) -> None:
        if name in self.fails:
            raise OSError(f"no\nanswer to {name}")
        self.calls.append((name, *arguments))


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Memory]]:
    """A tracker that a package brings as ``memory``."""
    kind = type("Fresh", (Memory,), {"calls": []})
    point = SimpleNamespace(name="memory", value="m:M", dist=SimpleNamespace(name="m", version="1"), load=lambda: kind)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == "covray.trackers" else [])
    tracker_registry.cache_clear()
    yield kind
    tracker_registry.cache_clear()


def test_the_default_is_mlflow_and_for_a_build_none() -> None:
    assert trackers_of(config_of("run")) == ("mlflow",)
    assert trackers_of(config_of("run", **{"tracking.uri": "none"})) == ()
    assert trackers_of(config_of("run", **{"tracking.to": ["wandb", "mlflow"]})) == ("wandb", "mlflow")
    assert trackers_of(config_of("run", **{"tracking.to": ["wandb", "mlflow"], "tracking.uri": "none"})) == ("wandb",)
    build = BuildConfig(pairs="p", out="o")
    assert trackers_of(build) == ()
    assert trackers_of(load_config(BuildConfig, None, {"pairs": "p", "out": "o", "tracking.uri": "sqlite:///x"})) == (
        "mlflow",
    )
    assert "tracking" not in build.model_dump(mode="json")


def test_trackers_change_no_identity() -> None:
    for kind, given in (
        (BuildConfig, {"pairs": "p"}), (TrainConfig, {"data": "d"}), (EvaluateConfig, {"data": "d"}),
    ):  # fmt: skip
        plain = load_config(kind, None, {"out": "o"} | given)
        tracked = load_config(kind, None, {"out": "o", "tracking.to": ["wandb"]} | given)
        assert tracked.identity() == plain.identity()


def test_a_tracker_of_a_package_gets_all_of_a_run(memory: type[Memory], tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", **{"tracking.to": ["memory"], "tracking.log_every_steps": 2})
    trackers = RunTrackers(config, {}, "covray train")
    assert trackers.start() == {"memory": "new"}
    for step in (1, 2, 3):
        trackers.log(step, {"loss": 1 / step} | ({"validation_loss": 1.0} if step == 3 else {}))
    trackers.artefacts("run", iter(["a", "b"]))
    assert trackers.finish("FINISHED")
    assert memory.calls == [
        ("init", None, "covray train"), ("start",), ("log", 2, {"loss": 0.5}),
        ("log", 3, {"loss": 1 / 3, "validation_loss": 1.0}), ("artefacts", "run", ["a", "b"]), ("finish", "FINISHED"),
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["start", "log", "artefacts", "finish"])
def test_one_that_is_away_ends_nothing(
    method: str, memory: type[Memory], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory.fails = (method,)
    trackers = RunTrackers(config_of(tmp_path / "run", **{"tracking.to": ["memory"]}), {}, "covray train")
    trackers.start()
    trackers.log(1, {"loss": 1.0})
    trackers.artefacts("run", ["a"])
    trackers.finish("FINISHED")
    assert capsys.readouterr().err == (
        f"covray: memory failed (no answer to {method}); the command goes on without it\n"
    )
    names = [call[0] for call in memory.calls]
    assert names == ["init", "start", "log", "artefacts", "finish"][: names.index(names[-1]) + 1]
    assert method not in names


def test_the_folder_keeps_the_runs_of_all_trackers(memory: type[Memory], tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", **{"tracking.to": ["memory"]})
    record = RunRecord(config={}, identity={}, fingerprints={}, mlflow_run_id=None)
    for expected in (None, "new"):
        with Output(config.out, RunRecord, "covray train") as output, output.tracked(config, record) as (_, written):
            assert written.tracker_runs == {"memory": "new"}
        assert [call[1] for call in memory.calls if call[0] == "init"][-1] == expected
        assert RunRecord.read(config.out).tracker_runs == {"memory": "new"}
        assert RunRecord.read(config.out).mlflow_run_id is None


def test_a_description_without_trackers_has_no_new_key(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", **{"tracking.uri": "none"})
    record = RunRecord(config={}, identity={}, fingerprints={}, mlflow_run_id=None)
    with Output(config.out, RunRecord, "covray train") as output, output.tracked(config, record):
        pass
    written = json.loads((tmp_path / "run" / "_run.json").read_text())
    assert written.keys() == {"version", "config", "identity", "fingerprints", "mlflow_run_id"}
    assert "mlflow_run_id" not in DatasetRecord.model_fields


@pytest.mark.parametrize(
    ("tracker", "install"),
    [
        ("tensorboard", "pip install 'covray[tensorboard]'"), ("wandb", "pip install 'covray[wandb]'"),
        ("trackio", "pip install trackio as docs/training.md says"),
    ],
)  # fmt: skip
def test_a_tracker_that_is_not_installed_is_refused_in_one_line(
    tracker: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == tracker else find(name))
    with pytest.raises(ConfigError) as caught:
        require_trackers(config_of("run", **{"tracking.to": [tracker]}))
    assert str(caught.value).startswith(f"tracking.to: {tracker} is not installed; {install}")
    assert "\n" not in str(caught.value)


def test_an_unknown_tracker_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"^comet: no such tracker; the known ones are mlflow, tensor"):
        require_trackers(config_of("run", **{"tracking.to": ["comet"]}))


def test_tensorboard_refuses_a_remote_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("covray.distributed.trackers.tensorboard.require_package", lambda *arguments: None)
    with pytest.raises(ConfigError, match=r"tensorboard writes files beside s3://bucket/run, which is remote"):
        require_trackers(config_of("s3://bucket/run", **{"tracking.to": ["tensorboard"]}))


# --- the real ones, where they are installed ---

_SCRIPT = """
import sys
from covray.config import TrainConfig, load_config
from covray.distributed.trackers.together import RunTrackers
from pathlib import Path

config = load_config(TrainConfig, None, {"data": "chains", "out": sys.argv[1], "tracking.to": [sys.argv[2]]})
Path(sys.argv[1]).mkdir()
Path(sys.argv[1], "a.txt").write_text("hello")
run_ids = {}
for steps, status in ((2, "KILLED"), (4, "FINISHED")):  # the second hands over the first two again
    trackers = RunTrackers(config, run_ids, "covray train")
    run_ids = trackers.start()
    for step in range(1, steps + 1):
        trackers.log(step, {"loss": 1 / step, "absent": None})
    trackers.artefacts(sys.argv[1], ["a.txt"])
    assert trackers.finish(status)
"""
CURVE = [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]


def run_twice(tracker: str, folder: Path) -> None:
    """Log four steps in a process of its own: trackers leave threads and open files."""
    environment = os.environ | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _SCRIPT, str(folder / "first"), tracker]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, "covray:" in done.stderr) == ("", False)


def test_tensorboard_has_each_point_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_twice("tensorboard", tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "first")).Reload()
    points = [(event.step, event.value) for event in events.Scalars("loss")]
    assert points == [(step, pytest.approx(value)) for step, value in CURVE]
    assert events.Tags()["scalars"] == ["loss"]


def test_trackio_has_each_point_once(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    run_twice("trackio", tmp_path)
    with sqlite3.connect(tmp_path / "trackio" / "covray.db") as database:
        rows = database.execute("SELECT DISTINCT run_name FROM metrics").fetchall()
        points = database.execute("SELECT step, metrics FROM metrics ORDER BY step").fetchall()
    assert len(rows) == 1
    assert [(step, json.loads(values)["loss"]) for step, values in points] == CURVE


def test_wandb_writes_a_run_to_be_sent_later(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run_twice("wandb", tmp_path)
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert len({run.name.rpartition("-")[2] for run in runs}) == 1, "the second continues the first"
    for run in runs:
        (file,) = run.glob("*.wandb")
        assert b"loss" in file.read_bytes()
        assert (run / "files" / "a.txt").read_text() == "hello"


def test_the_curves_of_a_continued_run_go_on_after_its_steps() -> None:
    logged: list[Any] = []
    tracker = object.__new__(WandbTracker)
    tracker._run = SimpleNamespace(
        step=3, log=lambda values, step: logged.append((step, values)), summary=SimpleNamespace(update=logged.append)
    )
    for step in (2, 3):
        tracker.log(step, {"loss": float(step), "absent": None})
    assert logged == [{"loss": 2.0}, (3, {"loss": 3.0})]
