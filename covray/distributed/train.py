"""``covray train``: chains to an adapter, on Ray Train's workers, continued by the same command after any kill.

    driver: checks, resolves what is left open, writes _run.json -> TorchTrainer -> worker_entry.work
    worker 0 writes the run folder; the driver follows metrics.jsonl, shows progress and logs to MLflow

Ray Train restarts a lost worker; the user restarts a lost driver or Ray. All continue from the last checkpoint of the
run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import Any

import ray
import ray.exceptions
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from covray.config import TrainConfig
from covray.config.think import ThinkTrainConfig
from covray.config.vlm import VlmTrainConfig
from covray.distributed.control import ControlActor
from covray.distributed.interrupts import GracefulStop
from covray.distributed.pool import on
from covray.distributed.resumable import Output
from covray.distributed.session import cluster_address, here, ray_session
from covray.distributed.trackers.together import RunTrackers
from covray.distributed.train_checks import C, CheckedRun, absolute_paths, binding_record, check, open_run
from covray.distributed.train_progress import TrainProgress
from covray.distributed.worker_entry import WorkerSettings, work
from covray.errors import ConfigError, last_line
from covray.io.device import bfloat16_units
from covray.io.storage import Folder
from covray.progress import stage
from covray.training.checkpoints import EXPORT
from covray.training.metrics_log import Metrics, MetricsTail
from covray.training.records import RunRecord, TrainResult

AnyTrainConfig = TrainConfig | VlmTrainConfig | ThinkTrainConfig
"""What the workers can train."""
POLL_S = 0.5
_RAY_FOLDER = "_ray"


def train(config: TrainConfig, watch: Callable[[Metrics], None] | None = None, patience_s: float = 0.0) -> TrainResult:
    """Train the adapter of the run ``config.out``.

    Called again on an unfinished run it continues the run; on a finished one it returns the result at once.

    Args:
        config: The configuration.
        watch: Called with every record of ``metrics.jsonl``; of a continued or finished run with the earlier ones too.
        patience_s: Seconds to wait for another command that is at work in the folder.

    Returns:
        The figures of ``_result.json``.

    Raises:
        CovrayError: The dataset, backbone, configuration or storage cannot be used; raised before any worker starts.
        KeyboardInterrupt: After SIGINT or SIGTERM, once a checkpoint is written.
    """
    config = absolute_paths(config)
    output = open_run(config.out, patience_s)
    return run_training(output, "data and backbone", lambda: check(config, output), watch)


def run_training(
    output: Output[RunRecord],
    subjects: str,
    check: Callable[[], CheckedRun[C]],
    watch: Callable[[Metrics], None] | None,
) -> TrainResult:
    """Check, start and follow a training of any command to its end.

    Args:
        output: The run folder, not yet opened.
        subjects: What is checked, for the line of progress.
        check: Checks the training against its data, its models and the run that it continues, which ``output`` then
            holds. Raises CovrayError.
        watch: Called with every record of ``metrics.jsonl``.

    Returns:
        The figures of ``_result.json``; of a finished run at once.
    """
    with output:
        with stage(f"checking {subjects}"):
            checked = check()
        out = checked.config.out
        if output.finished:
            if watch is not None:
                for metrics in MetricsTail(out).read_new():
                    watch(metrics)
            return TrainResult.read(output.folder)
        begun = binding_record(output)
        checked.prepare()
        with ray_session() as cores:
            config = checked.settle(resolve_compute(checked.config, cores, checked.choose_stage))
            if begun is not None:
                output.require_same(begun.identity, config.identity())
            with output.tracked(config, checked.record(config, begun)) as (tracker, _):
                result = run_workers(config, output.folder, tracker, watch)
                names = (output.folder / EXPORT).list_files()
                tracker.artefacts(out, [f"{EXPORT}/{name}" for name in names])
    return result


def run_workers(
    config: AnyTrainConfig, folder: Folder, tracker: RunTrackers, watch: Callable[[Metrics], None] | None
) -> TrainResult:
    """Start the workers of a training and follow them to the end.

    Args:
        config: The configuration, without an ``auto``.
        folder: The run folder, which the driver has locked.
        tracker: The run in its trackers.
        watch: Called with every record of ``metrics.jsonl``.

    Raises:
        CovrayError: The training failed.
        KeyboardInterrupt: After a signal to stop, once a checkpoint is written.
    """
    # A node may take minutes to arrive and to load; by default Ray Train begins again after one minute.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "900")
    control = ControlActor.options(scheduling_strategy=here()).remote()
    trainer = _torch_trainer(config, folder / _RAY_FOLDER, control)
    progress = TrainProgress(config.out, tracker, control, watch)
    message = "stopping after this step, with a checkpoint; once more to stop at once"
    stop = GracefulStop(control.request_stop.remote, message)
    threads = ThreadPoolExecutor(1)  # not this thread: Ray Train would take the signals, and end the workers
    try:
        with stop, progress:
            _follow(threads.submit(trainer.fit), progress, control, config.out)
    except ray.exceptions.RayError as error:
        raise ConfigError(f"{config.out}: {_reason(error)}; run the same command again to continue") from error
    finally:
        threads.shutdown(wait=False)  # after a second signal the workers would be waited for to their end
    # What a worker reported itself is one line for the user; Ray Train wraps it in errors of its own.
    failure = ray.get(control.failure.remote())
    if failure is not None:
        raise failure
    # Workers that end well without a result were asked to stop.
    if not folder.exists(TrainResult.FILE):
        stop.end()
    (folder / _RAY_FOLDER).delete()
    return TrainResult.read(folder)


def _torch_trainer(config: AnyTrainConfig, ray_folder: Folder, control: Any) -> TorchTrainer:
    """Return Ray Train's trainer; ``ray_folder`` is where it keeps what its nodes share."""
    workers = config.workers
    resources = {"CPU": workers.cpus, **on(workers.node_type)}
    if workers.gpus:
        resources["GPU"] = workers.gpus
    ray_folder.create()
    backend = "gloo"
    if config.compute.device == "cuda":
        backend = "nccl"
    return TorchTrainer(
        work,
        train_loop_config={"settings": WorkerSettings(config, control)},
        scaling_config=ScalingConfig(
            num_workers=workers.count, use_gpu=bool(workers.gpus), resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="train",
            storage_path=ray_folder.inner,
            storage_filesystem=ray_folder.filesystem,
            failure_config=FailureConfig(max_failures=workers.max_failures),
        ),
        torch_config=TorchConfig(backend=backend),
    )


def _follow(fitting: Future[Any], progress: TrainProgress, control: Any, out: str) -> None:
    """Wait for the end of the workers.

    Raises:
        ConfigError: A worker failed, other than by a CovrayError: those are with the control.
    """
    while True:
        try:
            fitting.result(timeout=POLL_S)
        except NotYet:
            progress.update()
            continue
        except ray.train.TrainingFailedError as error:
            if ray.get(control.failure.remote()) is None:
                raise ConfigError(
                    f"{out}: the training failed in a worker: {_reason(error)}; "
                    "correct the cause and run the same command again to continue"
                ) from error
        progress.update()
        return


def resolve_compute(config: C, cores: int, choose_stage: Callable[[C, int | None], str]) -> C:
    """Return ``config`` with every ``auto`` decided for the cluster.

    Args:
        config: The configuration.
        cores: CPU cores of this machine.
        choose_stage: Returns what ``compute.deepspeed: auto`` means for a GPU of so many bytes, or None without GPUs.

    Raises:
        ConfigError: The workers do not fit.
    """
    workers, compute = config.workers, config.compute
    gpus_in_cluster = ray.cluster_resources().get("GPU", 0)
    gpus = workers.gpus
    if gpus is None:
        gpus = 0.0
        if compute.device != "cpu" and gpus_in_cluster:
            gpus = 1.0
    device = compute.device
    if device == "auto":
        device = "cpu"
        if gpus:
            device = "cuda"
    if (device == "cuda") != bool(gpus):
        raise ConfigError(
            f"compute.device: {device} with {gpus:g} GPUs a worker, of {gpus_in_cluster:g} in the cluster; "
            "set workers.gpus and compute.device to agree"
        )
    _require_resources(config, gpus)
    dtype = compute.dtype
    if dtype == "auto":
        dtype = "float32"
        if device == "cuda" or bfloat16_units():
            dtype = "bfloat16"
    deepspeed = compute.deepspeed
    if deepspeed == "auto":
        gpu_bytes = None
        if device == "cuda":
            gpu_bytes = _gpu_bytes(gpus, workers.node_type)
        deepspeed = choose_stage(config, gpu_bytes)
    threads = compute.threads
    if threads is None:
        # On a CPU the workers share the cores; beside a GPU they need what they have reserved.
        threads = max(1, int(workers.cpus))
        if device == "cpu":
            threads = max(1, cores // workers.count)
    chosen = {"device": device, "dtype": dtype, "deepspeed": deepspeed, "threads": threads}
    return config.model_copy(
        update={
            "workers": workers.model_copy(update={"gpus": gpus}),
            "compute": compute.model_copy(update=chosen),
        }
    )


def _require_resources(config: AnyTrainConfig, gpus: float) -> None:
    """Refuse more workers, of ``gpus`` each, than this machine holds; a cluster may still grow. Raises ConfigError."""
    if cluster_address() is not None:
        return
    workers, resources = config.workers, ray.cluster_resources()
    for name, each in (("CPU", workers.cpus), ("GPU", gpus)):
        present = resources.get(name, 0)
        if workers.count * each > present:
            raise ConfigError(
                f"workers.count: {workers.count} workers of {each:g} {name} do not fit in {present:g}; lower "
                f"--workers, or workers.{name.lower()}s"
            )


def _gpu_bytes(gpus: float, node_type: str | None) -> int:
    """Return the memory of a GPU of the cluster, looked up where a worker will be."""

    @ray.remote(num_cpus=0, num_gpus=gpus, resources=on(node_type))
    def look_up() -> int:
        return int(torch.cuda.get_device_properties(0).total_memory)

    memory: int = ray.get(look_up.remote())
    return memory


def _reason(error: BaseException) -> str:
    """Return the line of an error that tells most: a worker's own, not that others lost the connection to it."""
    raised = []
    for failure in getattr(error, "worker_failures", {}).values():
        raised.append(getattr(failure, "_base_exc", failure))
    telling = [cause for cause in raised if "onnection" not in str(cause)]
    candidates = telling or raised or [error]
    return last_line(candidates[0])
