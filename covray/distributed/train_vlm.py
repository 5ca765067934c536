"""``covray vlm train``: captions and questions to an adapter or a model, on the workers of ``covray train``.

The driver checks data and model, writes ``_run.json`` and starts Ray Train's workers; see ``covray.distributed.train``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from covray.config.vlm import VlmTrainConfig
from covray.distributed.resumable import Output
from covray.distributed.session import ray_session
from covray.distributed.trackers.base import require_trackers
from covray.distributed.train import resolve_compute, run_workers
from covray.errors import ConfigError
from covray.models.vlm.checkpoint import VlmFacts, vlm_facts
from covray.pairs.values import absolute
from covray.progress import stage
from covray.training.checkpoints import EXPORT
from covray.training.metrics_log import METRICS_FILE, Metrics, MetricsTail
from covray.training.objectives.vision_text import read_data
from covray.training.records import RunRecord, TrainResult
from covray.training.zero import check_settings


def train_vlm(config: VlmTrainConfig, watch: Callable[[Metrics], None] | None = None) -> TrainResult:
    """Train the vision-language model of the run ``config.out``.

    Called again on an unfinished run it continues the run; on a finished one it returns the result at once.

    Args:
        config: The configuration.
        watch: Called with every record of ``metrics.jsonl``; of a continued or finished run with the earlier ones too.

    Returns:
        The figures of ``_result.json``.

    Raises:
        CovrayError: Data, model, configuration or storage cannot be used; raised before any worker starts.
        KeyboardInterrupt: After SIGINT or SIGTERM, once a checkpoint is written.
    """
    config = _absolute_paths(config)
    with Output(config.out, RunRecord, "covray vlm train", result=TrainResult.FILE) as output:
        # Workers write the metrics first: a run without them has learned nothing that another one would spoil.
        begun = output.begun if output.folder.exists(METRICS_FILE) else None
        if begun is not None:
            output.require_same(begun.identity, config.identity(), open_matches=True)
            config = _with_recorded_dtype(config, begun)
        with stage("checking data and model"):
            fingerprints, facts = _check(config)
        if begun is not None:
            output.require_same(begun.fingerprints, fingerprints)
        if output.finished:
            if watch is not None:
                for metrics in MetricsTail(config.out).read_new():
                    watch(metrics)
            return TrainResult.read(output.folder)
        with ray_session() as cores:
            resolved = resolve_compute(config, cores, lambda config, gpu: _choose_stage(config, facts, gpu))
            config = with_trainable_dtype(resolved, config.compute.dtype)
            if begun is not None:
                output.require_same(begun.identity, config.identity())
            record = RunRecord(
                config=config.model_dump(mode="json"),
                identity=config.identity(),
                fingerprints=fingerprints,
                mlflow_run_id=None if begun is None else begun.mlflow_run_id,
            )
            with output.tracked(config, record) as (tracker, _):
                result = run_workers(config, output.folder, tracker, watch)
                names = (output.folder / EXPORT).list_files()
                tracker.artefacts(config.out, [f"{EXPORT}/{name}" for name in names])
    return result


def _check(config: VlmTrainConfig) -> tuple[dict[str, str | None], VlmFacts]:
    """Check data and model; return the fingerprints of what the run is trained from, and the model's facts."""
    data = read_data(config.data, config.texts)
    data.of_split(config.texts.split)
    if config.texts.validation_split is not None:
        data.of_split(config.texts.validation_split)
    facts = vlm_facts(config.checkpoint())
    if config.workers.count > config.optimizer.batch_samples:
        raise ConfigError(
            f"workers.count: {config.workers.count} workers, but a step has {config.optimizer.batch_samples} samples; "
            "lower --workers, or raise optimizer.batch_samples"
        )
    if config.compute.deepspeed not in ("auto", "none"):
        check_settings(config.compute.deepspeed)
    require_trackers(config)
    return {"backbone": facts.fingerprint, "data": data.fingerprint()}, facts


def _choose_stage(config: VlmTrainConfig, facts: VlmFacts, gpu_bytes: int | None) -> str:
    """Return what ``compute.deepspeed: auto`` means: the fastest of which weights and optimizer fill half of a GPU.

    The other half is for activations, which nobody has computed. Weights are counted from their files, as bfloat16.
    """
    if gpu_bytes is None:
        return "none"
    weights = sum(file.stat().st_size for file in facts.folder.glob("*.safetensors"))
    trained = 0 if config.train == "lora" else weights
    shared = trained * 7 / config.workers.count  # float32 master, gradient and two moments: 14 bytes for 2
    if weights + trained * 7 <= gpu_bytes / 2:
        return "none" if config.train == "lora" else "zero1"
    return "zero2" if weights + shared <= gpu_bytes / 2 else "zero3"


def with_trainable_dtype(config: VlmTrainConfig, wanted: str) -> VlmTrainConfig:
    """Return ``config`` with float32 weights where weights themselves are trained without DeepSpeed.

    DeepSpeed keeps float32 masters of bfloat16 weights, the plain update does not. An adapter is float32 anyway.

    Args:
        config: The configuration, without an ``auto``.
        wanted: ``compute.dtype`` before ``auto`` was decided.

    Raises:
        ConfigError: bfloat16 was asked for.
    """
    compute = config.compute
    if config.train == "lora" or compute.deepspeed != "none" or compute.dtype == "float32":
        return config
    if wanted != "auto":
        raise ConfigError(
            f"compute.dtype: {wanted} with train={config.train} needs DeepSpeed, which keeps float32 masters; give "
            "--deepspeed zero1, or compute.dtype=float32"
        )
    return config.model_copy(update={"compute": compute.model_copy(update={"dtype": "float32"})})


def _absolute_paths(config: VlmTrainConfig) -> VlmTrainConfig:
    """Return ``config`` with paths that mean the same in a worker's folder. A model without a folder is a hub id."""
    update: dict[str, Any] = {"out": absolute(config.out), "data": absolute(config.data)}
    if config.texts.root is not None:
        update["texts"] = config.texts.model_copy(update={"root": absolute(config.texts.root)})
    if os.path.isdir(os.path.expanduser(config.model)):
        update["model"] = absolute(config.model)
    if config.compute.deepspeed.endswith(".json"):
        path = absolute(config.compute.deepspeed)
        update["compute"] = config.compute.model_copy(update={"deepspeed": path})
    return config.model_copy(update=update)


def _with_recorded_dtype(config: VlmTrainConfig, begun: RunRecord) -> VlmTrainConfig:
    """Return ``config`` with the arithmetic of the run that is continued, where it is left open."""
    if config.compute.dtype != "auto":
        return config
    compute = config.compute.model_copy(update={"dtype": begun.config["compute"]["dtype"]})
    return config.model_copy(update={"compute": compute})
