"""``covray vlm train``: captions and questions to an adapter or a model, on the workers of ``covray train``.

The driver checks data and model, writes ``_run.json`` and starts Ray Train's workers; see ``covray.distributed.train``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from covray.config.vlm import VlmTrainConfig
from covray.distributed.resumable import Output
from covray.distributed.trackers.base import require_trackers
from covray.distributed.train import run_training
from covray.distributed.train_checks import CheckedRun, binding_record, open_run, with_recorded_dtype
from covray.errors import ConfigError
from covray.models.vlm.checkpoint import VlmFacts, vlm_facts
from covray.pairs.values import absolute
from covray.training.metrics_log import Metrics
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
    output = open_run(config.out, command="covray vlm train")
    return run_training(output, "data and model", lambda: _check(config, output), watch)


@dataclass(frozen=True)
class _CheckedVlm(CheckedRun[VlmTrainConfig]):
    """A training of ``covray vlm train`` that has passed the checks."""

    facts: VlmFacts

    def choose_stage(self, config: VlmTrainConfig, gpu_bytes: int | None) -> str:
        """Return the fastest stage of DeepSpeed that fits."""
        return _choose_stage(config, self.facts, gpu_bytes)

    def settle(self, config: VlmTrainConfig) -> VlmTrainConfig:
        """Return ``config`` with the number format that its weights can be trained in. Raises ConfigError."""
        return with_trainable_dtype(config, self.config.compute.dtype)


def _check(config: VlmTrainConfig, output: Output[RunRecord]) -> _CheckedVlm:
    """Check data and model, and that the run of ``output`` was begun with them. Raises CovrayError."""
    begun = binding_record(output)
    if begun is not None:
        output.require_same(begun.identity, config.identity(), open_matches=True)
        config = with_recorded_dtype(config, begun)
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
    fingerprints: dict[str, str | None] = {"backbone": facts.fingerprint, "data": data.fingerprint()}
    if begun is not None:
        output.require_same(begun.fingerprints, fingerprints)
    return _CheckedVlm(config, fingerprints, facts)


def _choose_stage(config: VlmTrainConfig, facts: VlmFacts, gpu_bytes: int | None) -> str:
    """Return what ``compute.deepspeed: auto`` means: the fastest of which weights and optimizer fill half of a GPU.

    The other half is for activations, which nobody has computed. Weights are counted from their files, as bfloat16.
    """
    if gpu_bytes is None:
        return "none"
    weights = sum(file.stat().st_size for file in facts.folder.glob("*.safetensors"))
    trained, without_sharding = weights, "zero1"
    if config.train == "lora":  # an adapter and its moments are next to nothing
        trained, without_sharding = 0, "none"
    shared = trained * 7 / config.workers.count  # float32 master, gradient and two moments: 14 bytes for 2
    if weights + trained * 7 <= gpu_bytes / 2:
        return without_sharding
    if weights + shared <= gpu_bytes / 2:
        return "zero2"
    return "zero3"


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
