"""Kill a training anywhere: the curve is that of an undisturbed one, to the bit; and ZeRO's is the plain one."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from covray import storage
from covray.config import TrainConfig
from covray.training import loop
from covray.training.state import read_records
from tests.chaos.conftest import S3
from tests.end_to_end.conftest import RAY, actors_of, environment, wait_for
from tests.training.conftest import curve, tiny_config  # noqa: F401 (a fixture)

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end]
VICTIMS = ["worker"] * 2 + ["driver", "ray"]
COMMAND = """
import sys
from covray.config import TrainConfig, load_config
from covray.distributed.train import train
train(load_config(TrainConfig, sys.argv[1]))
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[TrainConfig], subprocess.Popen[str]]]:
    """Starts a training as a process of its own; nothing of it outlives the test."""
    processes: list[subprocess.Popen[str]] = []

    def begin(config: TrainConfig, **changes: str) -> subprocess.Popen[str]:
        file = tmp_path / f"{Path(config.out).name}.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
        # A driver whose Ray is gone gives up after these seconds (a minute by default).
        variables = environment(RAY_gcs_rpc_server_reconnect_timeout_s="5", **changes)
        command = [sys.executable, "-c", COMMAND, str(file)]
        processes.append(subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield begin
    for process in processes:
        if process.poll() is None:
            for child in (*psutil.Process(process.pid).children(recursive=True), process):
                child.kill()


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a good end; gives what it said."""
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


def wait_for_step(config: TrainConfig, process: subprocess.Popen[str], step: int) -> None:
    deadline = time.monotonic() + 600
    while max((record["step"] for record in read_records(f"{config.out}/metrics.jsonl")), default=0) < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"no step {step} in ten minutes"
        time.sleep(0.02)


def test_a_killed_training_equals_an_undisturbed_one(
    start: Callable[[TrainConfig], subprocess.Popen[str]],
    tiny_config: Callable[..., TrainConfig],  # noqa: F811
    tmp_path: Path,
    rng: random.Random,
    started: list[psutil.Process],
) -> None:
    long = {"optimizer__steps": 200, "validate_every_steps": 20, "checkpoints__every_steps": 10, "workers__count": 2}
    store = f"sqlite:///{tmp_path}/mlflow.db"
    whole, killed = tiny_config("whole", **long), tiny_config("killed", tracking__uri=store, **long)
    finish(start(whole))

    training: subprocess.Popen[str] | None = None
    victims = rng.sample(VICTIMS, len(VICTIMS))
    for victim, moment in zip(victims, sorted(rng.sample(range(12, 110), len(victims))), strict=True):
        training = training or start(killed)
        wait_for_step(killed, training, moment)
        everything = psutil.Process(training.pid).children(recursive=True)
        started += everything
        if victim == "worker":  # Ray Train starts the workers again
            workers = actors_of(training, "RayTrainWorker")
            rng.choice(workers).kill()
            psutil.wait_procs(workers, timeout=60)
            continue
        for process in everything if victim == "ray" else [psutil.Process(training.pid)]:
            process.kill()
        assert training.wait(120) != 0
        training.communicate()
        training = None

    said = finish(training or start(killed))
    assert "continuing after step" in said
    assert curve(killed) == curve(whole)
    adapters = [Path(run.out, "adapter", "adapter_model.safetensors").read_bytes() for run in (killed, whole)]
    assert adapters[0] == adapters[1]
    assert not Path(killed.out, "_ray").exists()
    run_id = json.loads(Path(killed.out, "_run.json").read_text())["mlflow_run_id"]
    history = MlflowClient(store).get_metric_history(run_id, "loss")
    losses = {record["step"]: record["loss"] for record in curve(killed) if "loss" in record}
    assert [(metric.step, metric.value) for metric in history] == list(losses.items()), "one run, every step once"


def test_a_training_keeps_checkpoints_and_artefacts_on_s3(
    start: Callable[[TrainConfig], subprocess.Popen[str]],
    tiny_config: Callable[..., TrainConfig],  # noqa: F811
    s3: S3,
    tmp_path: Path,
) -> None:
    long = {"optimizer__steps": 60, "validate_every_steps": 20, "checkpoints__every_steps": 10}
    whole, store = tiny_config("whole", **long), f"sqlite:///{tmp_path}/mlflow.db"
    loop.train(whole)
    MlflowClient(store).create_experiment("far", artifact_location="s3://covray/artefacts")
    far = tiny_config(**long, tracking__uri=store, tracking__experiment="far")
    far = far.model_copy(update={"out": "s3://covray/runs/far"})
    s3.refusals = 0.02

    training = start(far)
    checkpoints = "s3://covray/runs/far/checkpoints"
    wait_for(lambda: any(name.endswith("state.json") for name in storage.list_files(checkpoints)), "one", training)
    training.kill()
    training.communicate()
    assert "continuing after step" in finish(start(far))
    assert curve(far) == curve(whole)
    adapter = "adapter/adapter_model.safetensors"
    assert storage.read_bytes(f"{far.out}/{adapter}") == Path(whole.out, adapter).read_bytes()
    assert any(name.endswith(adapter) for name in storage.list_files("s3://covray/artefacts"))


def test_a_notice_of_preemption_is_answered_by_a_checkpoint(
    start: Callable[..., subprocess.Popen[str]],
    tiny_config: Callable[..., TrainConfig],  # noqa: F811
) -> None:
    """A node that is to go says so before: what was done until then is kept, and goes on where another node is."""
    long = {"optimizer__steps": 300, "validate_every_steps": 300, "checkpoints__every_steps": 1000}
    whole, moved = tiny_config("whole", **long), tiny_config("moved", workers__node_type="spot", **long)
    loop.train(whole)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        going = cluster.add_node(num_cpus=1, resources={"spot": 1})
        training = start(moved, RAY_ADDRESS=cluster.address, RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="0.2")
        wait_for_step(moved, training, 20)
        cluster.add_node(num_cpus=1, resources={"spot": 1})
        drain = ["drain-node", "--address", cluster.address, "--node-id", going.node_id, "--reason-message", "spot"]
        drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", "15"]
        subprocess.run([RAY, *drain], env=environment(), check=True, capture_output=True, timeout=60)
        checkpoints = Path(moved.out, "checkpoints")
        wait_for(lambda: any(checkpoints.glob("*/state.json")), "a checkpoint out of turn", training)
        cluster.remove_node(going, allow_graceful=False)
        finish(training)
    finally:
        cluster.shutdown()
    assert curve(moved) == curve(whole)


def test_a_stopped_training_leaves_a_checkpoint_and_no_process(
    start: Callable[[TrainConfig], subprocess.Popen[str]],
    tiny_config: Callable[..., TrainConfig],  # noqa: F811
) -> None:
    config = tiny_config(optimizer__steps=100_000, checkpoints__every_steps=100_000, validate_every_steps=100_000)
    training = start(config)
    wait_for_step(config, training, 3)
    children = psutil.Process(training.pid).children(recursive=True)
    training.send_signal(signal.SIGTERM)
    said = training.communicate(timeout=120)[1]
    assert training.returncode != 0
    assert "stopping after this step" in said
    step = read_records(f"{config.out}/metrics.jsonl")[-1]["step"]
    assert Path(config.out, "checkpoints", f"step-{step:08d}", "state.json").exists()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive, f"left running: {alive}"


def test_a_mistake_that_workers_find_is_one_line(
    start: Callable[[TrainConfig], subprocess.Popen[str]],
    tiny_config: Callable[..., TrainConfig],  # noqa: F811
) -> None:
    training = start(tiny_config(optimizer__learning_rate=1e38, optimizer__warmup=0))
    said = training.communicate(timeout=600)[1]
    assert training.returncode != 0
    last = said.strip().splitlines()[-1]
    assert last.startswith("covray.errors.ConfigError: step ")
    assert "not finite; lower optimizer.learning_rate" in last


def test_two_workers_with_zero_make_the_losses_of_one_without(
    start: Callable[[TrainConfig], subprocess.Popen[str]],
    tiny_config: Callable[..., TrainConfig],  # noqa: F811
) -> None:
    one_worker = tiny_config("plain", optimizer__steps=20, validate_every_steps=20)
    loop.train(one_worker)
    plain = [record["loss"] for record in curve(one_worker) if "loss" in record]
    assert len(plain) == 20
    for stage in ("zero2", "zero3"):
        config = tiny_config(
            stage, optimizer__steps=20, validate_every_steps=20, workers__count=2, compute__deepspeed=stage
        )
        finish(start(config))
        losses = [record["loss"] for record in curve(config) if "loss" in record]
        assert losses == pytest.approx(plain, rel=1e-4), stage
