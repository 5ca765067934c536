"""The training of a command on one worker: its objective, its optimizer, the trainer."""

from __future__ import annotations

from collections.abc import Callable

from covray.config import TrainConfig
from covray.config.section import JsonObject
from covray.config.vlm import VlmTrainConfig
from covray.models.lvm.model import Batch
from covray.models.vlm.batch import VlmBatch
from covray.training.metrics_log import Metrics
from covray.training.objectives.base import B, Objective
from covray.training.objectives.block_diffusion import BlockDiffusion
from covray.training.objectives.drafts import Drafts
from covray.training.objectives.verdicts import Comparisons, Verdicts
from covray.training.objectives.vision_text import VisionText
from covray.training.objectives.visual_sentences import VisualSentences
from covray.training.optimizers import PlainUpdate, Update
from covray.training.records import TrainResult
from covray.training.trainer import Trainer
from covray.training.worker import WorkerContext
from covray.training.zero import ZeroUpdate, read_settings

_SENTENCES: dict[str, type[VisualSentences]] = {
    "autoregressive": VisualSentences,
    "block_diffusion": BlockDiffusion,
    "draft": Drafts,
}
"""Objectives over visual sentences, by ``TrainConfig.objective``."""


def train(
    config: TrainConfig | VlmTrainConfig,
    worker: WorkerContext | None = None,
    report: Callable[[Metrics], None] = lambda metrics: None,
) -> TrainResult | None:
    """Train as one of ``worker.world_size`` workers, from the last checkpoint of the run to its end.

    Args:
        config: The configuration, without an ``auto``. Worker 0 writes the run folder ``config.out``.
        worker: This worker; by default the only one.
        report: Called with the metrics of every validation, on every worker.

    Returns:
        The figures of the finished run. None after the signal to stop, and on workers other than 0.

    Raises:
        CovrayError: Data, model or checkpoint cannot be used, or the loss is not finite.
    """
    worker = worker or WorkerContext()
    if isinstance(config, VlmTrainConfig):
        vision_text: Objective[VlmBatch] = VisionText(config, worker.device)
        return _train(config, vision_text, worker, report)
    if config.objective == "verifier":
        verdicts: Objective[Comparisons] = Verdicts(config, worker.device)
        return _train(config, verdicts, worker, report)
    sentences: Objective[Batch] = _SENTENCES[config.objective](config, worker.device)
    return _train(config, sentences, worker, report)


def _train(
    config: TrainConfig | VlmTrainConfig,
    objective: Objective[B],
    worker: WorkerContext,
    report: Callable[[Metrics], None],
) -> TrainResult | None:
    """Train ``objective``; see ``train``."""
    update: Update[B]
    # DeepSpeed shares optimizer state, gradients or weights out among workers; without it every worker has all.
    if config.compute.deepspeed == "none":
        update = PlainUpdate(objective, config.optimizer)
    else:
        update = ZeroUpdate(objective, config.optimizer, read_settings(config.compute.deepspeed), worker.device)
    numerics = numerics_of(config, worker.world_size)
    return Trainer(config, objective, update, worker, numerics=numerics, report=report).run()


def numerics_of(config: TrainConfig | VlmTrainConfig, world_size: int) -> JsonObject:
    """Return the settings that may change between a run and its continuation, at the price of equality to the bit."""
    compute = config.compute.model_dump(include={"device", "threads", "recompute", "compile", "deepspeed"})
    micro_batch = config.optimizer.model_dump(include={"micro_batch_tokens", "micro_batch_samples"})
    return {"workers": world_size, **micro_batch, **compute}
