"""``covray train``: chains to an adapter, on Ray Train's workers, continued by the same command wherever it was killed.

    driver: checks, resolves what was left open, writes _run.json -> TorchTrainer -> worker_entry.work
    worker 0 writes the run folder; the driver follows metrics.jsonl, shows progress and logs to MLflow

A lost worker is Ray Train's to restart, a lost driver or Ray the user's; all continue from the run's last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal

import ray
import ray.exceptions
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from covray.chains.compatibility import require_same_codes
from covray.chains.dataset import ChainDataset
from covray.chains.sentences import count_pairs, require_context
from covray.config import TrainConfig
from covray.distributed.control import Board
from covray.distributed.pool import absolute, on, read_description, require_fresh
from covray.distributed.progress import time_left
from covray.distributed.session import here, ray_session
from covray.distributed.tracking import Tracker, store_of
from covray.distributed.worker_entry import work
from covray.errors import ConfigError, last_line
from covray.io import storage
from covray.models.lvm.adapter import WEIGHTS_FILE, read_start
from covray.models.lvm.backbone import BackboneFacts, backbone_facts
from covray.models.lvm.model import bfloat16_units
from covray.training.checkpoints import require_same
from covray.training.zero import choose, read_settings

POLL_S = 0.5
LINE_EVERY_S = 30.0
_KEYS = ("config", "identity", "fingerprints", "mlflow_run_id")
_STARTED = "metrics.jsonl"  # the first that workers write: before it, a run holds nothing that would bind it


def train(config: TrainConfig, watch: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Train the adapter of the run ``config.out``; returns the figures of ``_result.json``.

    ``watch`` is given every record of ``metrics.jsonl``, of a continued or finished run those before too.

    Called again on an unfinished run it continues it; on a finished one it returns the result at once. Raises
    CovrayError: a dataset, backbone, configuration or storage that cannot be used, before any worker is started;
    KeyboardInterrupt after SIGINT or SIGTERM, when a checkpoint is written.
    """
    config = _absolute(config)
    described = _read_run(config)
    if described is not None:
        require_same(config.out, described["identity"], config.identity(), open_matches=True)
        config = _as_recorded(config, described["config"])
    dataset, facts = ChainDataset(config.data), backbone_facts(config.backbone)
    _check(config, dataset, facts)
    fingerprints = {
        "backbone": facts.fingerprint,
        "codebook": dataset.fingerprints["codebook"],
        "data": _data_fingerprint(dataset),
    }
    if config.lora.path is not None:
        weights = storage.read_bytes(storage.join(config.lora.path, WEIGHTS_FILE))
        fingerprints["adapter"] = hashlib.sha256(weights).hexdigest()
    if described is None:
        _require_same_classes(config, dataset.record.classes)
    else:
        require_same(config.out, described["fingerprints"], fingerprints)
        if storage.exists(storage.join(config.out, "_result.json")):
            if watch is not None:
                for record in Tail(storage.join(config.out, _STARTED)).new():
                    watch(record)
            return dict(storage.read_json(storage.join(config.out, "_result.json")))
    with ray_session() as cores:
        config = _resolve(config, facts, cores)
        if described is not None:
            require_same(config.out, described["identity"], config.identity())
        run: dict[str, Any] = {
            "version": 1,
            "config": config.model_dump(mode="json"),
            "identity": config.identity(),
            "fingerprints": fingerprints,
            "mlflow_run_id": described["mlflow_run_id"] if described else None,
        }
        if dataset.record.classes is not None:
            run["classes"] = dataset.record.classes
        _write_run(config, run)
        tracker = Tracker(config, run["mlflow_run_id"])
        run["mlflow_run_id"] = tracker.start()
        _write_run(config, run)
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        try:
            result = _run(config, tracker, watch)
            files = storage.list_files(storage.join(config.out, "adapter"))
            tracker.artefacts(config.out, [f"adapter/{name}" for name in files])
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            tracker.finish(status)
    return result


def _run(config: TrainConfig, tracker: Tracker, watch: Callable[[dict[str, Any]], None] | None) -> dict[str, Any]:
    """Start the workers and follow them to the end."""
    # A node may take minutes to arrive, and to load; by default Ray Train begins again after one.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "900")
    board = Board.options(scheduling_strategy=here()).remote()
    trainer = TorchTrainer(
        work,
        train_loop_config={"config": config, "board": board},
        scaling_config=ScalingConfig(
            num_workers=config.workers.count,
            use_gpu=bool(config.workers.gpus),
            resources_per_worker={"CPU": config.workers.cpus, **_gpu(config), **on(config.workers.node_type)},
        ),
        run_config=_ray_folder(config),
        torch_config=TorchConfig(backend="nccl" if config.compute.device == "cuda" else "gloo"),
    )
    follower = _Follower(config, tracker, board, watch)
    threads = ThreadPoolExecutor(1)  # not this thread: Ray Train would take the signals for itself, and end workers
    try:
        with _stopping(board, follower.say), follower:
            fitting: Future[Any] = threads.submit(trainer.fit)
            _follow(fitting, follower, config)
    except ray.exceptions.RayError as error:
        raise ConfigError(f"{config.out}: {_reason(error)}; run the same command again to continue") from error
    finally:
        threads.shutdown(wait=False)
    failure = ray.get(board.failure.remote())
    if failure is not None:
        raise failure
    if not storage.exists(storage.join(config.out, "_result.json")):
        raise KeyboardInterrupt
    _delete_ray_folder(config)
    return dict(storage.read_json(storage.join(config.out, "_result.json")))


def _follow(fitting: Future[Any], follower: _Follower, config: TrainConfig) -> None:
    """Wait for the workers' end. What they raised comes out as one line; their own CovrayErrors are on the board."""
    while True:
        try:
            fitting.result(timeout=POLL_S)
        except NotYet:
            follower.look()
            continue
        except ray.train.TrainingFailedError as error:
            if ray.get(follower.board.failure.remote()) is None:
                raise ConfigError(
                    f"{config.out}: the training failed in a worker: {_reason(error)}; "
                    "mend it and run the same command again to continue"
                ) from error
        follower.look()
        return


def _gpu(config: TrainConfig) -> dict[str, float]:
    return {"GPU": config.workers.gpus} if config.workers.gpus else {}


def _ray_folder(config: TrainConfig) -> RunConfig:
    """Where Ray Train keeps what it must share between nodes; our checkpoints are the run's own."""
    filesystem, inner = storage.resolve(storage.join(config.out, "_ray"))
    filesystem.create_dir(inner, recursive=True)
    return RunConfig(
        name="train",
        storage_path=inner,
        storage_filesystem=filesystem,
        failure_config=FailureConfig(max_failures=config.workers.max_failures),
    )


def _delete_ray_folder(config: TrainConfig) -> None:
    filesystem, inner = storage.resolve(storage.join(config.out, "_ray"))
    filesystem.delete_dir(inner)


# --- before anything expensive ---------------------------------------------------------------------------------------


def _check(config: TrainConfig, dataset: ChainDataset, facts: BackboneFacts) -> None:
    """All that can be wrong with data and backbone together, and with what the run would find only later."""
    chosen = config.sentences
    require_same_codes(facts, dataset)
    tokens = require_context(chosen, dataset.tokens_per_image, facts.llama.max_position_embeddings)
    count_pairs(dataset, chosen, chosen.split)
    if chosen.validation_split is not None:
        count_pairs(dataset, chosen, chosen.validation_split)
    fit = max(1, config.optimizer.batch_tokens // tokens)
    if config.workers.count > fit:
        raise ConfigError(
            f"workers.count: {config.workers.count} workers, but a step of {config.optimizer.batch_tokens} tokens has "
            f"{fit} sentences of {tokens}; lower --workers, or raise optimizer.batch_tokens"
        )
    if config.compute.deepspeed not in ("auto", "none"):
        read_settings(config.compute.deepspeed)
    if config.lora.path is not None:
        read_start(config.lora, facts.llama)
    store_of(config)


def _resolve(config: TrainConfig, facts: BackboneFacts, cores: int) -> TrainConfig:
    """``config`` with every ``auto`` decided for the cluster at hand. Raises ConfigError when it cannot hold it."""
    resources = ray.cluster_resources()
    workers, compute = config.workers, config.compute
    gpus = workers.gpus
    if gpus is None:
        gpus = 1.0 if compute.device != "cpu" and resources.get("GPU", 0) else 0.0
    device = compute.device if compute.device != "auto" else "cuda" if gpus else "cpu"
    if (device == "cuda") != bool(gpus):
        raise ConfigError(
            f"compute.device: {device} with {gpus:g} GPUs a worker, of {resources.get('GPU', 0):g} in the cluster; "
            "set workers.gpus and compute.device to agree"
        )
    dtype = compute.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" or bfloat16_units() else "float32"
    if "RAY_ADDRESS" not in os.environ:  # a cluster may still grow
        for name, each in (("CPU", workers.cpus), ("GPU", gpus)):
            if workers.count * each > resources.get(name, 0):
                raise ConfigError(
                    f"workers.count: {workers.count} workers of {each:g} {name} do not fit in "
                    f"{resources.get(name, 0):g}; lower --workers, or workers.{name.lower()}s"
                )
    if compute.deepspeed == "auto":
        deepspeed = choose(config, facts.llama, _gpu_bytes(gpus, workers.node_type) if device == "cuda" else None)
    else:
        deepspeed = compute.deepspeed
    threads = compute.threads or (max(1, cores // workers.count) if device == "cpu" else max(1, int(workers.cpus)))
    return config.model_copy(
        update={
            "workers": workers.model_copy(update={"gpus": gpus}),
            "compute": compute.model_copy(
                update={"device": device, "dtype": dtype, "deepspeed": deepspeed, "threads": threads}
            ),
        }
    )


def _gpu_bytes(gpus: float, node_type: str | None) -> int:
    """Memory of a GPU of the cluster, looked up where a worker will be."""

    @ray.remote(num_cpus=0, num_gpus=gpus, resources=on(node_type))
    def look() -> int:
        return int(torch.cuda.get_device_properties(0).total_memory)

    found: int = ray.get(look.remote())
    return found


def _absolute(config: TrainConfig) -> TrainConfig:
    """``config`` with paths that mean the same in a worker's folder. A backbone that is no folder is a hub id."""
    update: dict[str, Any] = {key: absolute(getattr(config, key)) for key in ("data", "out")}
    backbone, compute, lora = config.backbone, config.compute, config.lora
    if lora.path is not None:
        update["lora"] = lora.model_copy(update={"path": absolute(lora.path)})
    if backbone.path is not None and os.path.isdir(os.path.expanduser(backbone.path)):
        update["backbone"] = backbone.model_copy(update={"path": absolute(backbone.path)})
    if compute.deepspeed.endswith(".json"):
        update["compute"] = compute.model_copy(update={"deepspeed": absolute(compute.deepspeed)})
    return config.model_copy(update=update)


def _data_fingerprint(dataset: ChainDataset) -> str:
    """SHA-256 (hex) over what decides the chains: configuration, models, pairs and how many were good."""
    pairs = dataset.record.pairs
    what = [dataset.identity, dataset.fingerprints, pairs and pairs.to_json(), dataset.count()]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _require_same_classes(config: TrainConfig, classes: dict[str, Any] | None) -> None:
    """Refuse to go on from an adapter whose run was trained on other classes of segmentation, if it says so.

    Raises:
        ConfigError: One colour would stand for two classes.
    """
    if config.lora.path is None or classes is None:
        return
    folder, _, name = config.lora.path.rstrip("/").rpartition("/")
    try:
        earlier = storage.read_json(storage.join(folder, "_run.json")).get("classes") if name else None
    except (OSError, ValueError, AttributeError):
        return  # an adapter from elsewhere
    if earlier is not None and earlier != classes:
        raise ConfigError(
            f"--data {config.data}: its segmentation has other classes than the run of --set lora.path="
            f"{config.lora.path}, so that one colour would stand for two things; train a new adapter, or build the "
            "data with the same --classes"
        )


def _read_run(config: TrainConfig) -> dict[str, Any] | None:
    """``_run.json`` of a run that has begun; None when there is nothing to continue."""
    described = read_description(storage.join(config.out, "_run.json"), _KEYS)
    if described is None:
        require_fresh(config.out, "run")
        return None
    return described if storage.exists(storage.join(config.out, _STARTED)) else None


def _write_run(config: TrainConfig, run: dict[str, Any]) -> None:
    try:
        storage.write_json(storage.join(config.out, "_run.json"), run)
    except OSError as error:
        raise ConfigError(f"{config.out}: cannot be written ({_reason(error)}); give another --out") from error


def _as_recorded(config: TrainConfig, recorded: dict[str, Any]) -> TrainConfig:
    """``config`` with the arithmetic that the begun run recorded, where today's leaves it open."""
    if config.compute.dtype != "auto":
        return config
    return config.model_copy(
        update={"compute": config.compute.model_copy(update={"dtype": recorded["compute"]["dtype"]})}
    )


# --- following -------------------------------------------------------------------------------------------------------


class Tail:
    """The records of a growing ``metrics.jsonl``, each step and each validation once.

    The file is cut back when a run continues; what was given already is then not given again.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._offset = 0
        self._newest = {"loss": -1, "validation_loss": -1}

    def new(self) -> list[dict[str, Any]]:
        """The records that are new since the last call."""
        try:
            data = storage.read_bytes(self.path)
        except FileNotFoundError:
            return []
        if len(data) < self._offset or data[self._offset - 1 : self._offset] not in (b"", b"\n"):
            self._offset = 0
        end = data.rfind(b"\n") + 1
        lines, self._offset = data[self._offset : end].splitlines(), max(end, self._offset)
        records = []
        for record in map(json.loads, lines):
            kind = "loss" if "loss" in record else "validation_loss"
            if record["step"] > self._newest[kind]:
                self._newest[kind] = record["step"]
                records.append(record)
        return records


class _Follower:
    """Shows how the training is getting on, and logs it."""

    def __init__(
        self, config: TrainConfig, tracker: Tracker, board: Any, watch: Callable[[dict[str, Any]], None] | None
    ):
        self.board = board
        self._watch = watch
        self._tracker = tracker
        self._tail = Tail(storage.join(config.out, _STARTED))
        self._console = Console(stderr=True, emoji=False)
        self._line_due = time.monotonic() + LINE_EVERY_S
        self._bar = _Bar(self._console)
        self._checked = ""

    def __enter__(self) -> _Follower:
        for record in self._tail.new():  # of earlier runs: MLflow may lack the last of them
            self._take(record)
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def say(self, text: str) -> None:
        """A line for the user."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def look(self) -> None:
        """Take what is new."""
        for text in ray.get(self.board.notices.remote()):
            self.say(text)
        records = self._tail.new()
        for record in records:
            self._take(record)
            if "validation_loss" in record:
                self._checked = f", validation {record['validation_loss']:.3f}"
        steps = [record for record in records if "loss" in record]
        if steps:
            self._show(steps[-1])

    def _take(self, record: dict[str, Any]) -> None:
        self._tracker.log(record["step"], _values(record))
        if self._watch is not None:
            self._watch(record)

    def _show(self, record: dict[str, Any]) -> None:
        left = time_left(record["seconds"] * (record["steps"] - record["step"]))
        text = f"loss {record['loss']:.3f}{self._checked}, {record['tokens_per_s']:.0f} tokens/s"
        self._bar.show(record["step"], record["steps"], text)
        if not sys.stderr.isatty() and time.monotonic() > self._line_due:
            self._line_due = time.monotonic() + LINE_EVERY_S
            self.say(f"step {record['step']}/{record['steps']}, {text}, {left}")


class _Bar:
    """The bar on a terminal; elsewhere nothing."""

    def __init__(self, console: Console):
        columns = (
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )  # fmt: skip
        self._progress = Progress(*columns, console=console, disable=not sys.stderr.isatty())
        self._task = self._progress.add_task("starting workers", total=None)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, step: int, steps: int, text: str) -> None:
        """The step that is done, of how many, and what to say of it."""
        self._progress.update(self._task, completed=step, total=steps, description=text)


@contextmanager
def _stopping(board: Any, say: Any) -> Iterator[None]:
    """SIGINT and SIGTERM ask for a checkpoint and an end; a second one ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def handle(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        board.stop.remote()
        say("stopping after this step, with a checkpoint; once more to stop at once")

    kept = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _values(record: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in record.items() if key not in ("step", "steps")}


def _reason(error: BaseException) -> str:
    """The last telling line of what a worker raised; that others then lost the connection tells nothing."""
    raised = [getattr(cause, "_base_exc", cause) for cause in getattr(error, "worker_failures", {}).values()]
    telling = [cause for cause in raised if "onnection" not in str(cause)] or raised or [error]
    return last_line(telling[0])
