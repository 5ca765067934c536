"""What one worker of Ray Train does.

A module of its own: Ray Train's controller imports it for the function's name, and what training needs takes seconds.
"""

from __future__ import annotations

from typing import Any

import ray
import ray.train
import ray.train.collective

from covray.config import TrainConfig
from covray.errors import CovrayError


def work(settings: dict[str, Any]) -> None:
    """Train as ``settings["config"]`` says; what the user has to know goes to ``settings["board"]``."""
    import torch
    from ray.train.torch import get_device

    from covray.training import trainer as loop
    from covray.training.trainer import Place, Wish

    config: TrainConfig = settings["config"]
    board = settings["board"]
    if ray.get(board.failure.remote()) is not None:
        return  # Ray Train restarts whatever fails; this would only fail again
    context = ray.train.get_context()
    torch.set_num_threads(config.compute.threads or 1)
    device = get_device() if config.compute.device == "cuda" else torch.device("cpu")

    def ask() -> Wish:
        stop = ray.get(board.stopping.remote()) if context.get_world_rank() == 0 else None
        if ray.train.collective.broadcast_from_rank_zero(stop):
            return Wish.STOP
        return Wish.SAVE if ray.train.get_preemption_info() is not None else Wish.GO_ON

    def notice(text: str) -> None:
        board.notice.remote(text)

    place = Place(context.get_world_rank(), context.get_world_size(), device, ask, notice)
    try:
        loop.train(config, place, ray.train.report)
    except CovrayError as error:
        ray.get(board.fail.remote(error))
        raise
