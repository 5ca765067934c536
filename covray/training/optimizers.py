"""How gradients become an update, on one worker or many, without DeepSpeed; and the schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Generic, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from covray.config import AdamWConfig
from covray.config.think import AlignmentConfig
from covray.training.objectives.base import B, B_contra, Objective

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The first and second moment of Adam, by torch's names."""


class Update(Protocol[B_contra]):
    """What the trainer asks of an optimizer; all workers call its methods alike."""

    def evaluate(self, batch: B_contra | None) -> Tensor:
        """Return the loss of every position of ``batch`` in nats, float32 [P], without gradients; of None [0]."""

    def accumulate(self, batch: B_contra | None, loss_tokens: int, is_last: bool) -> Tensor:
        """Add the gradients of a micro-batch.

        Args:
            batch: The micro-batch, on the device; None adds nothing.
            loss_tokens: Tokens of the step that carry loss, over all workers: the gradient is of their mean loss.
            is_last: Whether this is the worker's last micro-batch of the step.

        Returns:
            The summed loss of the micro-batch in nats, a scalar.
        """

    def step(self, learning_rate: float) -> float:
        """Sum the gradients over the workers, clip them and update; return their norm before clipping."""

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of parameters and moments on the CPU, by the names of ``State.tensors``."""

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Continue from ``tensors`` after ``step`` steps."""


def learning_rate(config: AdamWConfig | AlignmentConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step: a linear warm-up, then half a cosine down to the share ``final``.

    That of an aligner is ``aligner_rate``.

    Args:
        config: The optimizer's configuration.
        step: The step, counted from 1.
        steps: Steps of the whole training.
    """
    if isinstance(config, AlignmentConfig):
        return aligner_rate(config, step - 1)
    warmup = math.ceil(config.warmup * steps)
    if step <= warmup:
        return config.learning_rate * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return config.learning_rate * (config.final + (1 - config.final) * (1 + math.cos(math.pi * progress)) / 2)


def aligner_rate(config: AlignmentConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 0: a line up, then the rest of a cosine (ThinkDiff's code)."""
    if step < config.warmup_steps:
        share = step / config.warmup_steps
        return config.warmup_from + (config.learning_rate - config.warmup_from) * share
    falls = (1 + math.cos(math.pi * min(1.0, step / config.cosine_steps))) / 2
    return config.final + (config.learning_rate - config.final) * falls


def adamw(parameters: list[torch.nn.Parameter], config: AdamWConfig | AlignmentConfig) -> torch.optim.AdamW:
    """Return the optimizer, plain or inside DeepSpeed; the learning rate is set before every step.

    Biases and norms of an aligner do not decay.
    """
    if isinstance(config, AlignmentConfig):
        # No weight decay for norms and biases.
        matrices, vectors = [], []
        for parameter in parameters:
            if parameter.ndim > 1:
                matrices.append(parameter)
            else:
                vectors.append(parameter)
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, weight_decay=config.weight_decay, fused=True)
    # The rate is set before every step.
    return torch.optim.AdamW(parameters, lr=0.0, betas=config.betas, weight_decay=config.weight_decay, fused=True)


class PlainUpdate(Generic[B]):
    """Every worker holds the whole model; gradients lie in one flat buffer, which one all-reduce sums."""

    def __init__(self, objective: Objective[B], config: AdamWConfig | AlignmentConfig):
        """Make the optimizer of the trained parameters."""
        self._objective, self._clip = objective, config.clip
        self._parameters = objective.parameters()
        parameters = list(self._parameters.values())
        self._optimizer = adamw(parameters, config)
        # One flat tensor for all gradients: workers add theirs in one collective, and the norm is one operation.
        sizes = [parameter.numel() for parameter in parameters]
        self.gradients = torch.zeros(sum(sizes), device=parameters[0].device)
        for parameter, part in zip(parameters, self.gradients.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)  # autograd adds in place to a gradient that is present

    def evaluate(self, batch: B | None) -> Tensor:
        """See ``Update``."""
        if batch is None:
            return self.gradients.new_zeros(0)
        with torch.no_grad():
            return self._objective.loss(self._objective.module, batch).each

    def accumulate(self, batch: B | None, loss_tokens: int, is_last: bool) -> Tensor:
        """See ``Update``."""
        if batch is None:
            return self.gradients.new_zeros(())
        total = self._objective.loss(self._objective.module, batch).total
        (total / loss_tokens).backward()
        return total.detach()

    def step(self, learning_rate: float) -> float:
        """See ``Update``."""
        if dist.is_initialized():
            dist.all_reduce(self.gradients)
        norm = torch.linalg.vector_norm(self.gradients)
        # As torch's clip_grad_norm_; multiplied in any case, so that the GPU is not waited for.
        if self._clip is not None:
            self.gradients.mul_(torch.clamp(self._clip / (norm + 1e-6), max=1.0))
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self.gradients.zero_()  # in place: the parameters' gradients are views of it
        return float(norm)

    def tensors(self) -> dict[str, Tensor]:
        """See ``Update``."""
        copies = {}
        for name, parameter in self._parameters.items():
            copies[name] = parameter.detach().to("cpu", copy=True)
            for moment in MOMENTS:
                copies[f"{name}.{moment}"] = self._optimizer.state[parameter][moment].to("cpu", copy=True)
        return copies

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """See ``Update``."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[name])
                state = {"step": torch.tensor(float(step), device=parameter.device)}
                for moment in MOMENTS:
                    state[moment] = tensors[f"{name}.{moment}"].to(parameter.device, copy=True)
                self._optimizer.state[parameter] = state
