"""``covray think train``: features to an aligner, on the workers of ``covray train``.

The driver checks features and language model, writes ``_run.json`` and starts Ray Train's workers; see
``covray.distributed.train``.
"""

from __future__ import annotations

from collections.abc import Callable

from covray.config.think import ThinkTrainConfig
from covray.distributed.paths import absolute_fields, absolute_model
from covray.distributed.resumable import Output
from covray.distributed.trackers.base import require_trackers
from covray.distributed.train import run_training
from covray.distributed.train_checks import CheckedRun, binding_record, open_run, with_recorded_dtype
from covray.errors import ConfigError
from covray.models.aligner.language import language_facts
from covray.thinking.dataset import FeatureDataset
from covray.thinking.objective import open_captions
from covray.thinking.plan import AlignerPlan, plan_aligner
from covray.training.metrics_log import Metrics
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
    output = open_run(config.out, command=COMMAND)
    return run_training(output, "features and language model", lambda: _check(config, output), watch)


def plan_train(config: ThinkTrainConfig) -> AlignerPlan:
    """Return what a training would take; nothing is started or written.

    Raises:
        CovrayError: The features or the run folder cannot be used, or the size of the language model is not known.
    """
    config = _absolute_paths(config)
    open_run(config.out, command=COMMAND).inspect()
    dataset = FeatureDataset(config.data)
    open_captions(config, dataset, config.train_split)
    longest = dataset.longest(config.train_split)
    return plan_aligner(config, dataset.record.width, longest, encoder=dataset.variant == "clip")


def _check(config: ThinkTrainConfig, output: Output[RunRecord]) -> CheckedRun[ThinkTrainConfig]:
    """Check features and language model, and that the run of ``output`` was begun with them.

    Raises:
        CovrayError: One of them cannot be used, or there are more workers than captions in a step.
    """
    begun = binding_record(output)
    if begun is not None:
        output.require_same(begun.identity, config.identity(), open_matches=True)
        config = with_recorded_dtype(config, begun)
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
    fingerprints: dict[str, str | None] = {
        "language_model": facts.fingerprint,
        "vlm": dataset.record.fingerprints["vlm"],
        "data": dataset.digest(),
    }
    if begun is not None:
        output.require_same(begun.fingerprints, fingerprints)
    return CheckedRun(config, fingerprints)


def _absolute_paths(config: ThinkTrainConfig) -> ThinkTrainConfig:
    paths = absolute_fields(config, "data", "out")
    return config.model_copy(update=paths | {"language_model": absolute_model(config.language_model)})
