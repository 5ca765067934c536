"""A second objective is an addition: a toy one goes through the trainer, its checkpoints and its metrics."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from covray.config import CheckpointsConfig, OptimizerConfig
from covray.training.metrics_log import read_metrics
from covray.training.objectives.base import Loss, Rewriter, StepBatches
from covray.training.optimizers import PlainUpdate
from covray.training.records import TrainResult
from covray.training.trainer import Trainer
from covray.training.worker import Signal, WorkerContext

STEPS, PER_STEP = 12, 8
SLOPE, OFFSET = 2.0, -1.0


@dataclass(frozen=True)
class Points:
    """Points on a line."""

    x: Tensor
    y: Tensor

    def to(self, device: torch.device) -> Points:
        return Points(self.x.to(device), self.y.to(device))


class Line:
    """Fits a line by least squares."""

    steps = STEPS
    flops_per_token = 6.0
    rewriter: Rewriter | None = None

    def __init__(self) -> None:
        self.module = nn.Linear(1, 1)
        nn.init.zeros_(self.module.weight)
        nn.init.zeros_(self.module.bias)
        self.idle_batch = self._points(0)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def batches(self, cursor: int, worker: WorkerContext) -> StepBatches[Points]:
        end = cursor + PER_STEP
        share = [self._points(number) for number in range(cursor + worker.rank, end, worker.world_size)]
        return StepBatches(end, [*share], PER_STEP, PER_STEP, PER_STEP, end / 100)

    def loss(self, forward: Callable[[Tensor], Tensor], batch: Points) -> Loss:
        each = (forward(batch.x) - batch.y).square().flatten()
        return Loss(each.sum(), each.detach())

    def validate(self, evaluate: Callable[[Points | None], Tensor], worker: WorkerContext) -> dict[str, float] | None:
        (total,) = worker.sum(evaluate(self._points(-1)).sum().double()[None])
        return {"validation_loss": total}

    def export(self, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
        return {"line.safetensors": save({name: tensors[name] for name in self.parameters()})}

    @staticmethod
    def _points(number: int) -> Points:
        x = torch.randn(1, 1, generator=torch.Generator().manual_seed(number % 1000))
        return Points(x, SLOPE * x + OFFSET)


@dataclass(frozen=True)
class LineConfig:
    """A configuration of its own: the trainer asks for these members only."""

    out: str
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=0.3, warmup=0.0))
    checkpoints: CheckpointsConfig = field(default_factory=lambda: CheckpointsConfig(every_steps=5))
    validate_every_steps: int = 4

    def identity(self) -> dict[str, Any]:
        return {"objective": "line"}


def fit(config: LineConfig, worker: WorkerContext | None = None) -> TrainResult | None:
    objective = Line()
    update = PlainUpdate(objective, config.optimizer)
    return Trainer(config, objective, update, worker or WorkerContext(), numerics={"workers": 1}).run()


def test_another_objective_is_trained_stopped_and_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("covray.training.trainer._POLL_SIGNAL_EVERY_S", -1.0)
    whole, stopped = LineConfig(str(tmp_path / "whole")), LineConfig(str(tmp_path / "stopped"))
    result = fit(whole)
    assert result is not None
    assert result.validation_loss is not None
    assert result.validation_loss_before is not None
    assert result.validation_loss < result.validation_loss_before / 10, "it learns"
    assert "answer_perplexity" not in json.loads(Path(whole.out, "_result.json").read_text())

    signals = iter([Signal.CONTINUE] * 6 + [Signal.STOP])
    assert fit(stopped, WorkerContext(poll_signal=lambda: next(signals))) is None
    messages: list[str] = []
    assert fit(stopped, WorkerContext(log=messages.append)) is not None
    assert messages == [f"continuing after step 7 of {STEPS}"]
    losses = []
    for config in (whole, stopped):
        losses.append([record["loss"] for record in read_metrics(f"{config.out}/metrics.jsonl") if "loss" in record])
    assert losses[0] == losses[1], "to the bit"
    assert len(losses[0]) == STEPS
    weights = [load_file(f"{config.out}/adapter/line.safetensors") for config in (whole, stopped)]
    assert torch.equal(weights[0]["weight"], weights[1]["weight"])
