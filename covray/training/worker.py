"""One worker of a training: its place among the others, and how signals reach it and messages leave it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

import torch
import torch.distributed as dist
from torch import Tensor


class Signal(IntEnum):
    """What is asked of a training at the end of a step."""

    CONTINUE = 0
    SAVE = 1
    """Write a checkpoint now and continue: a machine is about to be taken away."""
    STOP = 2
    """Write a checkpoint and end."""


@dataclass(frozen=True)
class WorkerContext:
    """What a worker knows of the training around it; the default is a training of one worker."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    poll_signal: Callable[[], Signal] = lambda: Signal.CONTINUE
    """Return what is asked of the training. All workers call it after the same step, every few seconds, and all get
    the same answer."""
    log: Callable[[str], None] = lambda message: None
    """Show the user one line. Only worker 0 calls it."""

    @property
    def is_first(self) -> bool:
        """Whether this is worker 0, which writes the run folder."""
        return self.rank == 0

    def sum(self, values: Tensor) -> list[float]:
        """Return ``values``, a flat tensor on the device, summed over all workers; all must call it."""
        if dist.is_initialized():
            dist.all_reduce(values)
        return [float(value) for value in values.cpu()]

    def sum_tensor(self, values: Tensor) -> Tensor:
        """Sum ``values``, a tensor on the device, over all workers in place and return it; all must call it."""
        if dist.is_initialized():
            dist.all_reduce(values)
        return values

    def broadcast(self, value: int) -> int:
        """Return the ``value`` of worker 0; all workers must call it."""
        tensor = torch.tensor([value], device=self.device)
        if dist.is_initialized():
            dist.broadcast(tensor, 0)
        return int(tensor)

    def wait_for_all(self) -> None:
        """Wait until all workers have come here."""
        if dist.is_initialized():
            dist.barrier()
