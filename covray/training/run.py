"""The training of ``covray train`` on one worker: its objective, its optimizer, the trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from covray.config import TrainConfig
from covray.models.lvm.model import Batch
from covray.training.metrics_log import Metrics
from covray.training.objectives.block_diffusion import BlockDiffusion
from covray.training.objectives.visual_sentences import VisualSentences
from covray.training.optimizers import PlainUpdate, Update
from covray.training.records import TrainResult
from covray.training.trainer import Trainer
from covray.training.worker import WorkerContext
from covray.training.zero import ZeroUpdate, read_settings


def train(
    config: TrainConfig,
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
        CovrayError: The dataset, backbone or checkpoint cannot be used, or the loss is not finite.
    """
    worker = worker or WorkerContext()
    chosen = BlockDiffusion if config.objective == "block_diffusion" else VisualSentences
    objective = chosen(config, worker.device)
    update: Update[Batch]
    if config.compute.deepspeed == "none":
        update = PlainUpdate(objective, config.optimizer)
    else:
        update = ZeroUpdate(objective, config.optimizer, read_settings(config.compute.deepspeed), worker.device)
    numerics = numerics_of(config, worker.world_size)
    return Trainer(config, objective, update, worker, numerics=numerics, report=report).run()


def numerics_of(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """Return the settings that may change between a run and its continuation, at the price of equality to the bit."""
    compute = config.compute.model_dump(include={"device", "threads", "recompute", "compile", "deepspeed"})
    return {"workers": world_size, "micro_batch_tokens": config.optimizer.micro_batch_tokens, **compute}
