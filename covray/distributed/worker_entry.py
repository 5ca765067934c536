"""What one worker of Ray Train does.

A module of its own: Ray Train's controller imports it for the function's name, and what training needs takes seconds to
import.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.collective

from covray.config import TrainConfig
from covray.config.think import ThinkTrainConfig
from covray.config.vlm import VlmTrainConfig
from covray.errors import CovrayError


@dataclass(frozen=True)
class WorkerSettings:
    """What the driver gives every worker."""

    config: TrainConfig | VlmTrainConfig | ThinkTrainConfig
    """The resolved configuration."""
    control: Any
    """The handle of a ``ControlActor``."""


def work(settings: dict[str, WorkerSettings]) -> None:
    """Train as one worker.

    Args:
        settings: The settings under the key ``settings``, as Ray Train passes a dictionary.
    """
    import torch
    from ray.train.torch import get_device

    from covray.thinking.objective import train_aligner
    from covray.training.run import train
    from covray.training.worker import Signal, WorkerContext

    config, control = settings["settings"].config, settings["settings"].control
    if ray.get(control.failure.remote()) is not None:
        return  # Ray Train restarts the workers after any error; this one would only come again
    context = ray.train.get_context()
    rank = context.get_world_rank()
    torch.set_num_threads(config.compute.threads or 1)
    device = torch.device("cpu")
    if config.compute.device == "cuda":
        device = get_device()

    def poll_signal() -> Signal:
        # Worker 0 asks for all of them, so that all stop after the same step.
        stop = None
        if rank == 0:
            stop = ray.get(control.stop_requested.remote())
        if ray.train.collective.broadcast_from_rank_zero(stop):
            return Signal.STOP
        if ray.train.get_preemption_info() is not None:
            return Signal.SAVE
        return Signal.CONTINUE

    def log(message: str) -> None:
        control.log.remote(message)

    worker = WorkerContext(rank, context.get_world_size(), device, poll_signal, log)
    try:
        if isinstance(config, ThinkTrainConfig):
            train_aligner(config, worker, ray.train.report)
        else:
            train(config, worker, ray.train.report)
    except CovrayError as error:
        # Waited for: the process may end before a call that nobody waits for is sent.
        ray.get(control.report_failure.remote(error))
        raise
