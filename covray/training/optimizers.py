"""How gradients become an update, on one worker or many, without DeepSpeed; and the schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from covray.config import OptimizerConfig
from covray.models.lvm.model import Batch, Lvm

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's first and second moment, by torch's names."""


class Update(Protocol):
    """What the loop asks of an optimizer; all workers call its methods alike."""

    def evaluate(self, batch: Batch | None) -> Tensor:
        """Negative log likelihood in nats of every position with loss, float32 [P]; None computes nothing of use."""

    def accumulate(self, batch: Batch | None, tokens: int, last: bool) -> Tensor:
        """Add the gradients of a micro-batch over the step's ``tokens`` with loss; gives its summed loss in nats.

        ``last``: it is this worker's last of the step.
        """

    def step(self, learning_rate: float) -> float:
        """Sum the gradients over the workers, clip, update; gives their norm before clipping."""

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and moments as ``State.tensors`` has them, copied to the CPU: training may go on beside them."""

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Go on from ``tensors`` after ``step`` steps."""


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Of step ``step``, counted from 1 to ``steps``: linear warm-up, then half a cosine down to ``final``."""
    warmup = math.ceil(config.warmup * steps)
    if step <= warmup:
        return config.learning_rate * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return config.learning_rate * (config.final + (1 - config.final) * (1 + math.cos(math.pi * done)) / 2)


def adamw(parameters: list[torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """The optimizer, plain or inside DeepSpeed; the loop sets its learning rate before every step."""
    return torch.optim.AdamW(parameters, lr=0.0, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def trainable(model: Lvm) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class PlainUpdate:
    """Every worker holds the whole model; gradients lie in one flat buffer, which one all-reduce sums."""

    def __init__(self, model: Lvm, config: OptimizerConfig):
        self.model, self.clip = model, config.clip
        self.parameters = trainable(model)
        self.optimizer = adamw(list(self.parameters.values()), config)
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        self.gradients = torch.zeros(sum(sizes), device=model.norm.weight.device)
        for parameter, part in zip(self.parameters.values(), self.gradients.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)  # autograd adds in place to a gradient that is there

    def evaluate(self, batch: Batch | None) -> Tensor:
        """See ``Update``."""
        if batch is None:
            return self.gradients.new_zeros(0)
        with torch.no_grad():
            each: Tensor = self.model(batch)[1]
        return each

    def accumulate(self, batch: Batch | None, tokens: int, last: bool) -> Tensor:
        """See ``Update``."""
        if batch is None:
            return self.gradients.new_zeros(())
        total: Tensor = self.model(batch)[0]
        (total / tokens).backward()
        return total.detach()

    def step(self, learning_rate: float) -> float:
        """See ``Update``."""
        if dist.is_initialized():
            dist.all_reduce(self.gradients)
        norm = torch.linalg.vector_norm(self.gradients)
        self.gradients.mul_(torch.clamp(self.clip / (norm + 1e-6), max=1.0))
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.gradients.zero_()
        return float(norm)

    def tensors(self) -> dict[str, Tensor]:
        """See ``Update``."""
        found = {}
        for name, parameter in self.parameters.items():
            found[name] = parameter.detach()
            for moment in MOMENTS:
                found[f"{name}.{moment}"] = self.optimizer.state[parameter][moment]
        return {name: tensor.to("cpu", copy=True) for name, tensor in found.items()}

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """See ``Update``."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(step), device=parameter.device),
                    **{moment: tensors[f"{name}.{moment}"].to(parameter.device, copy=True) for moment in MOMENTS},
                }
