"""Kill a training anywhere: the curve is that of an undisturbed one, to the bit."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from covray.config import TrainConfig
from covray.io import storage
from covray.training.metrics_log import read_metrics
from covray.training.run import train as train_in_process
from tests.support.chaos import S3
from tests.support.commands import RAY, actors_of, environment, finish_training, wait_for
from tests.support.trainings import curve

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end]
VICTIMS = ["worker", "driver", "ray"]


def wait_for_step(config: TrainConfig, process: subprocess.Popen[str], step: int) -> None:
    deadline = time.monotonic() + 600
    while max((record["step"] for record in read_metrics(f"{config.out}/metrics.jsonl")), default=0) < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"no step {step} in ten minutes"
        time.sleep(0.02)


def test_a_killed_training_equals_an_undisturbed_one(
    started: list[psutil.Process],  # first: what is still running after a failure ends before it looks
    start_training: Callable[[TrainConfig], subprocess.Popen[str]],
    tiny_config: Callable[..., TrainConfig],
    tmp_path: Path,
    rng: random.Random,
) -> None:
    long = {"optimizer__steps": 240, "validate_every_steps": 50, "checkpoints__every_steps": 10, "workers__count": 2}
    store = f"sqlite:///{tmp_path}/mlflow.db"
    whole, killed = tiny_config("whole", **long), tiny_config("killed", tracking__uri=store, **long)
    finish_training(start_training(whole))

    training: subprocess.Popen[str] | None = None
    victims = rng.sample(VICTIMS, len(VICTIMS))
    for victim, moment in zip(victims, sorted(rng.sample(range(12, 110), len(victims))), strict=True):
        training = training or start_training(killed)
        wait_for_step(killed, training, moment)
        # A step that an earlier process made is there before the next one's workers are.
        wait_for(lambda: len(actors_of(training, "RayTrainWorker")) == 2, "two workers", training)  # noqa: B023
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

    said = finish_training(training or start_training(killed))
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
    start_training: Callable[[TrainConfig], subprocess.Popen[str]],
    tiny_config: Callable[..., TrainConfig],
    s3: S3,
    tmp_path: Path,
) -> None:
    long = {"optimizer__steps": 60, "validate_every_steps": 20, "checkpoints__every_steps": 10}
    whole, store = tiny_config("whole", **long), f"sqlite:///{tmp_path}/mlflow.db"
    train_in_process(whole)
    MlflowClient(store).create_experiment("far", artifact_location="s3://covray/artefacts")
    far = tiny_config(**long, tracking__uri=store, tracking__experiment="far")
    far = far.model_copy(update={"out": "s3://covray/runs/far"})
    s3.refusals = 0.02

    training = start_training(far)
    checkpoints = "s3://covray/runs/far/checkpoints"
    wait_for(lambda: any(name.endswith("state.json") for name in storage.list_files(checkpoints)), "one", training)
    training.kill()
    training.communicate()
    assert "continuing after step" in finish_training(start_training(far))
    assert curve(far) == curve(whole)
    adapter = "adapter/adapter_model.safetensors"
    assert storage.read_bytes(f"{far.out}/{adapter}") == Path(whole.out, adapter).read_bytes()
    assert any(name.endswith(adapter) for name in storage.list_files("s3://covray/artefacts"))


def test_a_notice_of_preemption_is_answered_by_a_checkpoint(
    start_training: Callable[..., subprocess.Popen[str]],
    tiny_config: Callable[..., TrainConfig],
) -> None:
    """A node that is to go says so before: what was done until then is kept, and goes on where another node is."""
    long = {"optimizer__steps": 300, "validate_every_steps": 300, "checkpoints__every_steps": 1000}
    whole, moved = tiny_config("whole", **long), tiny_config("moved", workers__node_type="spot", **long)
    train_in_process(whole)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        going = cluster.add_node(num_cpus=1, resources={"spot": 1})
        training = start_training(moved, RAY_ADDRESS=cluster.address, RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="0.2")
        wait_for_step(moved, training, 20)
        cluster.add_node(num_cpus=1, resources={"spot": 1})
        drain = ["drain-node", "--address", cluster.address, "--node-id", going.node_id, "--reason-message", "spot"]
        drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", "15"]
        subprocess.run([RAY, *drain], env=environment(), check=True, capture_output=True, timeout=60)
        checkpoints = Path(moved.out, "checkpoints")
        wait_for(lambda: any(checkpoints.glob("*/state.json")), "a checkpoint out of turn", training)
        cluster.remove_node(going, allow_graceful=False)
        finish_training(training)
    finally:
        cluster.shutdown()
    assert curve(moved) == curve(whole)


def test_a_stopped_training_leaves_a_checkpoint_and_no_process(
    start_training: Callable[[TrainConfig], subprocess.Popen[str]],
    tiny_config: Callable[..., TrainConfig],
) -> None:
    config = tiny_config(optimizer__steps=100_000, checkpoints__every_steps=100_000, validate_every_steps=100_000)
    training = start_training(config)
    wait_for_step(config, training, 3)
    children = psutil.Process(training.pid).children(recursive=True)
    training.send_signal(signal.SIGTERM)
    said = training.communicate(timeout=120)[1]
    assert training.returncode != 0
    assert "stopping after this step" in said
    step = read_metrics(f"{config.out}/metrics.jsonl")[-1]["step"]
    assert Path(config.out, "checkpoints", f"step-{step:08d}", "state.json").exists()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive, f"left running: {alive}"
