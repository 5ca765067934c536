"""What the trainer asks of an objective.

The trainer knows steps, checkpoints, metrics and signals; an objective knows data, model and loss. A further objective
is a class with these members, and needs no change of the trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from covray.training.worker import WorkerContext


class DeviceBatch(Protocol):
    """What a worker computes at a time."""

    def to(self, device: torch.device) -> Self:
        """Return the batch with its tensors on ``device``."""


B = TypeVar("B", bound=DeviceBatch)
# For protocols that only take batches: type checkers want their variance declared.
B_contra = TypeVar("B_contra", bound=DeviceBatch, contravariant=True)


@dataclass(frozen=True)
class StepBatches(Generic[B]):
    """The work of one step."""

    next_cursor: int
    """Where the next step begins."""
    batches: list[B | None]
    """The micro-batches of this worker. None: the worker computes nothing while others still compute, because all
    workers must take part in the same collectives."""
    loss_tokens: int
    """Tokens that carry loss, over all workers: the summed loss is divided by them."""
    sentences: int
    """Examples, over all workers."""
    tokens: int
    """Tokens, over all workers."""
    epoch: float
    """How often each example was seen at the end of the step."""


@dataclass(frozen=True)
class Loss:
    """The loss of a batch, in nats."""

    total: Tensor
    """The sum, a scalar with a gradient."""
    each: Tensor
    """The loss of every position that carries loss, float32 [P]."""


def perplexity(nats: float) -> float:
    """Return the perplexity of a mean loss; all above 100 nats are as bad."""
    # Python's exp raises OverflowError from 710 on, which would end a training that only diverges.
    return math.exp(min(nats, 100.0))


class Rewriter(Protocol):
    """Training data that the model writes itself, anew every so often."""

    def is_due(self, cursor: int) -> bool:
        """Return whether the data must be written before the batches at ``cursor`` are assembled."""

    def rewrite(self, cursor: int, worker: WorkerContext) -> None:
        """Write the data with the current weights. All workers call it alike, between two steps."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the data on the CPU, by names that no parameter has, for a checkpoint; the same on all workers."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue with the data of a checkpoint; its tensors have the names of ``tensors()``, among other names."""


class Objective(Protocol[B]):
    """What is learned. All that it computes depends on the configuration, the cursor and the weights only."""

    @property
    def module(self) -> nn.Module:
        """The network, of which the parameters that require a gradient are trained."""

    @property
    def steps(self) -> int:
        """Steps of the whole training."""

    @property
    def idle_batch(self) -> B:
        """Return a batch on the device that costs next to nothing.

        A worker without a batch computes it where the update needs every worker in every collective; its loss is not
        counted.
        """

    @property
    def rewriter(self) -> Rewriter | None:
        """What writes training data with the weights as they are; None: the data depend on no weights."""

    @property
    def flops_per_token(self) -> float:
        """FLOPs of a forward and a backward pass, divided by the tokens."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by the names that a checkpoint has for them."""

    def batches(self, cursor: int, worker: WorkerContext) -> StepBatches[B]:
        """Return the work of ``worker`` in the step that begins at ``cursor``, on the CPU. Called in a thread."""

    def loss(self, forward: Callable[[B], Any], batch: B) -> Loss:
        """Return the loss of ``batch``.

        Args:
            forward: What to call in place of ``module``: the module itself, or an engine around it.
            batch: The batch, on the device.
        """

    def validate(self, evaluate: Callable[[B | None], Tensor], worker: WorkerContext) -> dict[str, float] | None:
        """Return the metrics of the validation data over all workers, ``validation_loss`` among them.

        Args:
            evaluate: Returns ``Loss.each`` of a batch, without gradients; of None nothing, [0]. All workers must call
                it equally often.
            worker: This worker.

        Returns:
            The metrics, the same on all workers; None where there is no validation data.
        """

    def export(self, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
        """Return the files of the result by name. Called in a thread.

        Args:
            tensors: The values of ``parameters`` by name, float32, on the CPU; further tensors may lie between them.
        """
