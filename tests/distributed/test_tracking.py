"""MLflow, real stores: a file, and a server that comes, goes and comes back."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from covray.config import TrainConfig, load_config
from covray.distributed import tracking
from covray.distributed.tracking import MlflowTracker, store_of
from covray.errors import ConfigError

SHORT = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def config_of(out: object, **options: Any) -> TrainConfig:
    return load_config(TrainConfig, None, {"data": "chains", "out": str(out)} | options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: the tables of its mlflow.db take seconds to make, so all tests share them."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def _send_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "FLUSH_S", 0.0)
    monkeypatch.setattr(tracking, "RETRY_S", 0.0)


def client_of(folder: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")


def curve(client: Any, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, name)]


# --- where ---------------------------------------------------------------------------------------------------------


def test_the_default_store_lies_beside_the_run() -> None:
    assert store_of(config_of("/data/runs/one/")) == "sqlite:////data/runs/mlflow.db"
    assert store_of(config_of("/data/run", **{"tracking.uri": "http://host:5000"})) == "http://host:5000"


def test_a_remote_run_asks_for_a_store() -> None:
    with pytest.raises(ConfigError, match=r"s3://bucket/run: .*--tracking-uri"):
        MlflowTracker(config_of("s3://bucket/run"), None)
    assert store_of(config_of("s3://bucket/run", **{"tracking.uri": "none"})) is None


def test_without_tracking_nothing_is_written(tmp_path: Path) -> None:
    tracker = MlflowTracker(config_of(tmp_path / "run", **{"tracking.uri": "none"}), None)
    assert tracker.start() is None
    tracker.log(1, {"loss": 1.0})
    tracker.artefacts(str(tmp_path), ["absent"])
    tracker.finish("FINISHED")
    assert list(tmp_path.iterdir()) == []


def test_without_mlflow_a_store_is_refused_in_one_line_and_no_tracking_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlflow" else find(name))
    for options in ({}, {"tracking.uri": "http://host:5000"}):
        with pytest.raises(ConfigError, match=r"^tracking\.uri: MLflow is not installed; pip install mlflow"):
            store_of(config_of("/data/run", **options))
    assert MlflowTracker(config_of("/data/run", **{"tracking.uri": "none"}), None).start() is None


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("http://user:secret@127.0.0.1:9", "Connection refused"),
        ("http://user:se@secret@127.0.0.1:9", "Connection refused"),
        ("http://nosuchhost.invalid", "resolve"),
        ("gopher://x", "unsupported URI"),
        ("mlruns", "maintenance"),
        ("sqlite:////proc/nowhere/mlflow.db", "No such file"),
    ],
)
def test_a_store_that_does_not_answer_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uri: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        MlflowTracker(config_of("run", **{"tracking.uri": uri}), None).start()
    line = str(caught.value)
    assert said in line
    assert "--tracking-uri" in line
    assert "\n" not in line
    assert "secret" not in line


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    before = dict(os.environ)
    with tracking._environment():
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7", "what the user set holds"
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"
    assert dict(os.environ) == before


# --- a file --------------------------------------------------------------------------------------------------------


def test_a_run_holds_parameters_metrics_and_artefacts(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = config_of(folder / "whole", **{"lora.rank": 7, "data": "x" * 700})
    tracker = MlflowTracker(config, None)
    run_id = tracker.start()
    assert run_id
    tracker.log(1, {"loss": 2.5, "utilisation": None})
    tracker.log(2, {"loss": 2.0})
    adapter = folder / "whole" / "adapter"
    (adapter / "deep").mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "deep" / "file").write_bytes(b"1")
    tracker.artefacts(str(folder / "whole"), ["adapter/adapter_config.json", "adapter/deep/file"])
    tracker.finish("FINISHED")

    client = client_of(folder)
    run = client.get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "whole")
    assert run.data.params["lora.rank"] == "7"
    assert run.data.params["sentences.lengths"] == "[4]"
    assert run.data.params["data"] == "x" * 500
    assert "tracking.uri" not in run.data.params
    assert curve(client, run_id, "loss") == [(1, 2.5), (2, 2.0)]
    assert "utilisation" not in run.data.metrics
    stored = folder / "mlartifacts" / run_id / "artifacts" / "adapter"
    assert sorted(str(file.relative_to(stored)) for file in stored.rglob("*")) == [
        "adapter_config.json",
        "deep",
        "deep/file",
    ]
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", ""), "MLflow's own reports do not reach the terminal"


def test_a_restart_continues_the_run_and_logs_every_step_once(folder: Path) -> None:
    config = config_of(folder / "restarted")
    first = MlflowTracker(config, None)
    run_id = first.start()
    assert run_id
    for step in (1, 2, 3):
        first.log(step, {"loss": 1.0 / step})
    second = MlflowTracker(config, run_id)  # the driver was killed after step 3, the last checkpoint is of step 1
    assert second.start() == run_id
    for step in (2, 3, 4):
        second.log(step, {"loss": 1.0 / step})
    second.log(3, {"loss": 9.0})  # a worker was lost: its steps come again
    second.log(4, {"validation_loss": 0.5})
    client = client_of(folder)
    assert client.get_run(run_id).info.status == "RUNNING"
    second.finish("KILLED")
    assert client.get_run(run_id).info.status == "KILLED"
    assert curve(client, run_id, "loss") == [(step, 1.0 / step) for step in (1, 2, 3, 4)]
    assert curve(client, run_id, "validation_loss") == [(4, 0.5)]

    client.delete_run(run_id)
    anew = MlflowTracker(config, run_id).start()
    assert anew not in (None, run_id), "a run that was deleted is begun anew"
    assert MlflowTracker(config, "0" * 32).start() != "0" * 32


def test_only_every_nth_step_of_training_is_logged_and_all_validation(folder: Path) -> None:
    tracker = MlflowTracker(config_of(folder / "thin", **{"tracking.log_every_steps": 3}), None)
    run_id = tracker.start()
    assert run_id
    for step in range(1, 8):
        tracker.log(step, {"loss": 1.0})
    tracker.log(7, {"validation_loss": 1.0})
    tracker.finish("FINISHED")
    assert [step for step, _ in curve(client_of(folder), run_id, "loss")] == [3, 6]
    assert curve(client_of(folder), run_id, "validation_loss") == [(7, 1.0)]


def test_more_than_a_request_takes_is_logged_in_several(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "FLUSH_S", 3600.0)
    tracker = MlflowTracker(config_of(folder / "many"), None)
    run_id = tracker.start()
    assert run_id
    for step in range(1, 1203):
        tracker.log(step, {"loss": float(step)})
    client = client_of(folder)
    assert len(curve(client, run_id, "loss")) == 1, "what comes within the pause waits"
    tracker.finish("FINISHED")
    assert curve(client, run_id, "loss") == [(step, float(step)) for step in range(1, 1203)]


def test_a_deleted_experiment_is_named(folder: Path) -> None:
    config = config_of(folder / "run", **{"tracking.experiment": "gone"})
    assert MlflowTracker(config, None).start()
    client = client_of(folder)
    client.delete_experiment(client.get_experiment_by_name("gone").experiment_id)
    with pytest.raises(ConfigError, match=r"tracking\.experiment=gone: was deleted"):
        MlflowTracker(config, None).start()


ODD_NAMES = ["what?now", "per%20cent", "100%", "ha#sh", "two words", "früh 早", "a+b&c=d;e", "it's"]


@pytest.fixture(scope="module")
def empty_store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without runs, to copy: making its tables takes seconds."""
    place = tmp_path_factory.mktemp("store")
    MlflowTracker(config_of(place / "run", **{"tracking.experiment": "tables"}), None).start()
    return place / "mlflow.db"


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_folder_of_any_name_holds_its_store_and_artefacts(tmp_path: Path, empty_store: Path, name: str) -> None:
    place = tmp_path / name
    (place / "run").mkdir(parents=True)
    (place / "run" / "file").write_text("1")
    shutil.copy(empty_store, place)
    config = config_of(place / "run")
    tracker = MlflowTracker(config, None)
    run_id = tracker.start()
    assert run_id
    tracker.log(1, {"loss": 2.5})
    tracker.artefacts(str(place / "run"), ["file"])
    assert tracker.finish("FINISHED")
    assert MlflowTracker(config, run_id).start() == run_id, "the same command finds its run again"
    assert [entry.name for entry in tmp_path.iterdir()] == [name], "nothing lies beside it"
    assert sorted(entry.name for entry in place.iterdir()) == ["mlartifacts", "mlflow.db", "run"]
    assert (place / "mlartifacts" / run_id / "artifacts" / "file").read_text() == "1"


def test_a_store_that_was_moved_with_its_runs_goes_on_at_its_new_place(tmp_path: Path, empty_store: Path) -> None:
    from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

    old, new = tmp_path / "old", tmp_path / "new"
    (old / "run").mkdir(parents=True)
    (old / "run" / "file").write_text("1")
    shutil.copy(empty_store, old)
    first = MlflowTracker(config_of(old / "run"), None)
    run_id = first.start()
    assert run_id
    first.log(1, {"loss": 1.0})
    first.artefacts(str(old / "run"), ["file"])
    old.rename(new)
    _artifact_repos_cache.clear()  # another process would not have it

    (new / "run" / "later").write_text("2")
    continued = MlflowTracker(config_of(new / "run"), run_id)
    assert continued.start() == run_id
    continued.log(2, {"loss": 0.5})
    continued.artefacts(str(new / "run"), ["later"])
    assert continued.finish("FINISHED")
    other = MlflowTracker(config_of(new / "other"), None)
    other_id = other.start()
    other.artefacts(str(new / "run"), ["file"])
    assert not old.exists()
    assert curve(client_of(new), run_id, "loss") == [(1, 1.0), (2, 0.5)]
    artefacts = new / "mlartifacts"
    assert sorted(file.name for file in (artefacts / run_id / "artifacts").iterdir()) == ["file", "later"]
    assert (artefacts / str(other_id) / "artifacts" / "file").exists()


def test_a_run_whose_process_was_killed_early_is_ended_by_the_next_start(folder: Path) -> None:
    config, neighbour = config_of(folder / "early"), config_of(folder / "neighbour")
    lost = MlflowTracker(config, None).start()  # killed before the id was written down
    other = MlflowTracker(neighbour, None).start()
    begun = MlflowTracker(config, None).start()
    client = client_of(folder)
    assert client.get_run(lost).info.status == "KILLED"
    assert client.get_run(begun).info.status == "RUNNING"
    assert client.get_run(other).info.status == "RUNNING", "another folder's run is not touched"


def test_a_child_that_was_not_written_down_is_taken_up_again(folder: Path) -> None:
    parent = MlflowTracker(config_of(folder / "sweep"), None).start()
    options = {"tracking.uri": f"sqlite:///{folder}/mlflow.db", "tracking.parent_run_id": parent}
    config = config_of(folder / "sweep" / "it's a trial", **options)
    child = MlflowTracker(config, None).start()
    assert MlflowTracker(config, None).start() == child
    assert MlflowTracker(config_of(folder / "sweep" / "another", **options), None).start() != child


# --- a server ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Callable[[], Any]]:
    """Starts ``mlflow server`` on the loopback interface, always at one address, where none runs; gives (uri, stop)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    running: list[subprocess.Popen[bytes]] = []
    MlflowTracker(config_of(folder / "tables"), None).start()

    def stop() -> None:
        process = running.pop()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def start() -> tuple[str, Callable[[], None]]:
        if running:  # of another test: a start takes seconds
            return uri, stop
        command = [
            str(Path(sys.executable).parent / "mlflow"), "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
            "--artifacts-destination", str(folder / "served"), "--host", "127.0.0.1", "--port", str(port),
            "--workers", "1",
        ]  # fmt: skip
        process = subprocess.Popen(
            command, env=os.environ | SHORT, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        running.append(process)
        deadline = time.monotonic() + 120
        while not _answers(uri):
            assert process.poll() is None, "mlflow server ended"
            assert time.monotonic() < deadline, "the server did not come up in two minutes"
            time.sleep(0.2)
        return uri, stop

    yield start
    while running:
        stop()


def _answers(uri: str) -> bool:
    try:
        urllib.request.urlopen(f"{uri}/health", timeout=5).close()
    except OSError:
        return False
    return True


def _rest(uri: str, call: str, **query: str) -> Any:
    text = "&".join(f"{key}={value}" for key, value in query.items())
    with urllib.request.urlopen(f"{uri}/api/2.0/mlflow/{call}?{text}", timeout=30) as answer:
        return json.load(answer)


def test_a_server_that_goes_away_stops_nothing_and_misses_nothing(
    server: Callable[[], Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    uri, stop = server()
    options = {"tracking.uri": uri, "tracking.experiment": "served"}
    tracker = MlflowTracker(config_of("s3://bucket/run", **options), None)
    run_id = tracker.start()
    assert run_id
    tracker.log(1, {"loss": 1.0})
    assert _rest(uri, "runs/get", run_id=run_id)["run"]["info"]["status"] == "RUNNING"
    stop()
    for step in (2, 3, 4):
        tracker.log(step, {"loss": 1.0 / step})
    warned = capfd.readouterr()
    assert warned.err.count("covray: MLflow at") == 1
    assert "does not answer" in warned.err

    server()
    tracker.log(5, {"loss": 0.2})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    tracker.artefacts(str(tmp_path), ["adapter/adapter_model.safetensors"])
    tracker.finish("FINISHED")
    run = _rest(uri, "runs/get", run_id=run_id)["run"]
    assert run["info"]["status"] == "FINISHED"
    assert {entry["key"]: entry["value"] for entry in run["data"]["params"]}["lora.rank"] == "32"
    history = _rest(uri, "metrics/get-history", run_id=run_id, metric_key="loss")["metrics"]
    assert [(int(point["step"]), point["value"]) for point in history] == [
        (1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25), (5, 0.2),
    ]  # fmt: skip
    listed = _rest(uri, "artifacts/list", run_id=run_id, path="adapter")["files"]
    assert [file["path"] for file in listed] == ["adapter/adapter_model.safetensors"]
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_a_server_that_is_slow_is_waited_for_at_the_end(
    server: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    uri, _ = server()
    tracker = MlflowTracker(config_of("s3://bucket/slow", **{"tracking.uri": uri}), None)
    run_id = tracker.start()
    monkeypatch.setitem(tracking._ENVIRONMENT, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    (served,) = [child for child in psutil.Process().children() if "server" in child.cmdline()]
    processes = [served, *served.children(recursive=True)]
    for process in processes:
        process.suspend()
    try:
        tracker.log(1, {"loss": 1.0})
        assert "does not answer" in capfd.readouterr().err
        goes_on = threading.Timer(3, lambda: [process.resume() for process in processes])
        goes_on.start()
        assert tracker.finish("FINISHED")
    finally:
        for process in processes:
            process.resume()
    goes_on.join()
    run = _rest(uri, "runs/get", run_id=run_id)["run"]
    assert run["info"]["status"] == "FINISHED"
    assert [(metric["key"], metric["value"]) for metric in run["data"]["metrics"]] == [("loss", 1.0)]
    assert capfd.readouterr().err == ""


def test_a_server_that_never_comes_back_is_told_at_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tracker = MlflowTracker(config_of(folder / "lost"), None)
    assert tracker.start()
    from mlflow import MlflowClient

    tracker._client = MlflowClient(tracking_uri="http://127.0.0.1:9", registry_uri="http://127.0.0.1:9")
    for step in (1, 2):
        tracker.log(step, {"loss": 1.0})
    tracker.artefacts(str(folder / "mlartifacts"), ["file"])
    assert not tracker.finish("FAILED")
    said = capfd.readouterr().err
    assert "2 values could not be logged" in said
    assert "could not be closed" in said
    assert all(line.startswith("covray: MLflow at") for line in said.splitlines())
