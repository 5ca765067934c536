"""``covray think train``: features to an aligner, on the workers of ``covray train``.

The driver checks features and language model, writes ``_run.json`` and starts Ray Train's workers; see
``covray.distributed.train``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from covray.config.think import ThinkTrainConfig
from covray.distributed.features import absolute_model
from covray.distributed.pool import absolute
from covray.distributed.resumable import Output
from covray.distributed.session import ray_session
from covray.distributed.trackers.base import require_trackers
from covray.distributed.train import resolve_compute, run_workers
from covray.errors import ConfigError
from covray.models.aligner.language import language_facts
from covray.progress import stage
from covray.thinking.dataset import FeatureDataset
from covray.thinking.objective import open_captions
from covray.thinking.plan import AlignerPlan, plan_aligner
from covray.training.checkpoints import EXPORT
from covray.training.metrics_log import METRICS_FILE, Metrics, MetricsTail
from covray.training.records import RunRecord, TrainResult

COMMAND = "covray think train"


def train_aligner(config: ThinkTrainConfig, watch: Callable[[Metrics], None] | None = None) -> TrainResult:
    """Train the aligner of the run ``config.out``.

    Called again on an unfinished run it continues the run; on a finished one it returns the result at once.

    Args:
        config: The configuration.
        watch: Called with every record of ``metrics.jsonl``; of a continued or finished run with the earlier ones too.

    Returns:
        The figures of ``_result.json``.

    Raises:
        CovrayError: Features, language model, configuration or storage cannot be used; raised before any worker starts.
        KeyboardInterrupt: After SIGINT or SIGTERM, once a checkpoint is written.
    """
    config = _absolute_paths(config)
    with Output(config.out, RunRecord, COMMAND, result=TrainResult.FILE) as output:
        # Workers write the metrics first: a run without them has learned nothing that another one would spoil.
        begun = output.begun if output.folder.exists(METRICS_FILE) else None
        if begun is not None:
            output.require_same(begun.identity, config.identity(), open_matches=True)
            config = _with_recorded_dtype(config, begun)
        with stage("checking features and language model"):
            fingerprints = check(config)
        if begun is not None:
            output.require_same(begun.fingerprints, fingerprints)
        if output.finished:
            if watch is not None:
                for metrics in MetricsTail(config.out).read_new():
                    watch(metrics)
            return TrainResult.read(output.folder)
        with ray_session() as cores:
            config = resolve_compute(config, cores, lambda config, gpu: "none")
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


def plan_train(config: ThinkTrainConfig) -> AlignerPlan:
    """Return what a training would take; nothing is started or written.

    Raises:
        CovrayError: The features or the run folder cannot be used, or the size of the language model is not known.
    """
    config = _absolute_paths(config)
    Output(config.out, RunRecord, COMMAND, result=TrainResult.FILE).inspect()
    dataset = FeatureDataset(config.data)
    open_captions(config, dataset, config.train_split)
    longest = dataset.longest(config.train_split)
    return plan_aligner(config, dataset.record.width, longest, encoder=dataset.variant == "clip")


def check(config: ThinkTrainConfig) -> dict[str, str | None]:
    """Check features and language model; return the fingerprints of what the run is trained from.

    Raises:
        CovrayError: One of them cannot be used, or there are more workers than captions in a step.
    """
    dataset = FeatureDataset(config.data)
    open_captions(config, dataset, config.train_split)
    if config.validation_split is not None:
        open_captions(config, dataset, config.validation_split, config.validation_samples)
    facts = language_facts(config.language_model)
    if config.workers.count > config.optimizer.batch:
        raise ConfigError(
            f"workers.count: {config.workers.count} workers, but a step has {config.optimizer.batch} captions; lower "
            "--workers, or raise optimizer.batch"
        )
    require_trackers(config)
    data = json.dumps(dataset.fingerprint(), sort_keys=True).encode()
    return {
        "language_model": facts.fingerprint,
        "vlm": dataset.record.fingerprints["vlm"],
        "data": hashlib.sha256(data).hexdigest(),
    }


def _absolute_paths(config: ThinkTrainConfig) -> ThinkTrainConfig:
    update: dict[str, Any] = {
        "data": absolute(config.data),
        "out": absolute(config.out),
        "language_model": absolute_model(config.language_model),
    }
    return config.model_copy(update=update)


def _with_recorded_dtype(config: ThinkTrainConfig, begun: RunRecord) -> ThinkTrainConfig:
    """Return ``config`` with the arithmetic of the run that is continued, where it is left open."""
    if config.compute.dtype != "auto":
        return config
    compute = config.compute.model_copy(update={"dtype": begun.config["compute"]["dtype"]})
    return config.model_copy(update={"compute": compute})
