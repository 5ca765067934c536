"""The training loop the nano models share: seeded by the step, resumable after any kill, under bf16 autocast."""

from __future__ import annotations

import math
import os
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from covray.errors import ConfigError, CovrayError, one_line
from covray.progress import own_display

SAVE_EVERY_S = 120.0
REPORT_EVERY_S = 8.0
EMA_DECAY = 0.99
"""The learning rate itself falls to 2%, so that the average only has to smooth the last hundred steps."""


@dataclass(frozen=True)
class Run:
    """Which model is trained, where, and for how long."""

    name: str
    """Name of the model in progress lines and in the file that keeps the state."""
    out: Path
    """Folder of the family; ``out``/<name>.state.pt holds the state from which a stopped training resumes."""
    steps: int
    seed: int
    device: torch.device
    learning_rate: float
    """Highest learning rate of the AdamW that ``train`` makes if it gets no ``optimizers``."""


def new_part(out: Path, name: str) -> Path:
    """Return the folder of the model ``name`` in the folder of the family. Raises ConfigError if it exists."""
    part = out / name
    if part.exists():
        raise ConfigError(f"{part}: already exists; give another --out, or delete it to train it again")
    return part


_UNLOADABLE = (OSError, EOFError, RuntimeError, ValueError, TypeError, KeyError, pickle.UnpicklingError)
"""What torch raises for a file that is damaged, or whose tensors do not fit the model."""

_SAME_RATE = 1e-5
"""Relative difference up to which learning rates are the same: another machine may round the schedule otherwise."""


class _State:
    """What a training needs to resume: the model, its average and its optimizers."""

    def __init__(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], path: Path) -> None:
        self.model = model
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True)
        self.optimizers = optimizers
        self.path = path

    def load(self, device: torch.device) -> int:
        """Load the last save and return how many steps it has taken; 0 if there is none.

        Raises ConfigError for a file that is damaged, or is of another model.
        """
        if not self.path.exists():
            return 0
        try:
            saved = torch.load(self.path, map_location=device, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.average.load_state_dict(saved["average"])
            for optimizer, values in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(values)
            return int(saved["step"])
        except _UNLOADABLE as error:
            raise ConfigError(
                f"{self.path}: cannot be continued ({one_line(error)}); correct that, or delete the file to begin again"
            ) from error

    def save(self, step: int) -> None:
        """Save the state after ``step`` steps; a kill meanwhile leaves the save before."""
        aside = self.path.with_suffix(".part")
        torch.save(
            {
                "model": self.model.state_dict(),
                "average": self.average.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "step": step,
            },
            aside,
        )
        os.replace(aside, self.path)


def _require_same_rates(state: _State, highest: Sequence[Sequence[float]], step: int, steps: int) -> None:
    """Refuse a state whose learning rates are not those of this training; they follow from its number of steps.

    Args:
        state: As it was loaded: its optimizers have the learning rates of the last step.
        highest: The highest learning rates of each optimizer.
        step: How many steps the state has taken.
        steps: Steps of this training.

    Raises:
        ConfigError: The state is of a training with other steps or learning rates.
    """
    share = schedule(step - 1, steps)
    for optimizer, rates in zip(state.optimizers, highest, strict=True):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            if step > steps or not math.isclose(group["lr"], rate * share, rel_tol=_SAME_RATE):
                raise ConfigError(
                    f"{state.path}: was trained with another number of steps than {steps}, or at another learning "
                    "rate; train as many steps as before, or delete the file to begin again"
                )


class _Progress:
    """Prints the mean loss, the rate and the time left every REPORT_EVERY_S."""

    def __init__(self, run: Run, first: int) -> None:
        self.run, self.first = run, first
        self.started = self.reported = time.monotonic()
        self.losses: list[float] = []

    def step(self, done: int, loss: float) -> None:
        """Record the loss of a step; ``done`` counts the steps taken, this one included."""
        self.losses.append(loss)
        now = time.monotonic()
        if now - self.reported <= REPORT_EVERY_S and done < self.run.steps:
            return
        rate = (done - self.first) / (now - self.started)
        mean = sum(self.losses) / len(self.losses)
        minutes_left = (self.run.steps - done) / rate / 60
        print(
            f"{self.run.name}: step {done}/{self.run.steps}  loss {mean:.5f}  {rate:.2f} steps/s"
            f"  {minutes_left:.0f} min left",
            flush=True,
        )
        self.reported = now
        self.losses = []


@own_display()
def train(
    model: Any,
    loss_of: Callable[[Any, int, torch.Generator], Tensor],
    run: Run,
    *,
    measure: Callable[[Any], str] | None = None,
    on_step: Callable[[Any, int], None] | None = None,
    optimizers: Callable[[Any], Sequence[torch.optim.Optimizer]] | None = None,
) -> Any:
    """Train a model and return its moving average (EMA), in float32.

    A training that was killed and started again equals one that was not, to the bit.

    Args:
        model: The model; it is moved to the run's device.
        loss_of: Computes the loss of (model, step, generator). It takes all its randomness from the generator, which is
            seeded by the run's seed and the step.
        run: What is trained, where, and for how long.
        measure: Describes the average in one line, which is printed at every save.
        on_step: May change (model, step) before a step, such as the codebook by k-means.
        optimizers: Returns the optimizers of a model, each at its highest learning rate; by default one AdamW.

    Raises:
        ConfigError: The state in ``out`` is damaged, or of another training.
        CovrayError: The loss or its gradient is not finite.
    """
    run.out.mkdir(parents=True, exist_ok=True)
    model.to(run.device)
    for module in model.modules():
        # Convolutions over pictures are faster in this order. That of Qwen2.5-VL's patches has three dimensions, and
        # torch no such order for it.
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    chosen = [adamw(model.parameters(), run.learning_rate)] if optimizers is None else list(optimizers(model))
    highest = highest_rates(chosen)
    state = _State(model, chosen, run.out / f"{run.name}.state.pt")
    first = state.load(run.device)
    if first:
        _require_same_rates(state, highest, first, run.steps)
        print(f"{run.name}: continues at step {first} of {run.steps}", flush=True)
    progress = _Progress(run, first)
    saved = time.monotonic()
    for step in range(first, run.steps):
        set_rates(chosen, highest, schedule(step, run.steps))
        if on_step is not None:
            on_step(model, step)
        loss = _take_step(model, chosen, loss_of, run, step)
        state.average.update_parameters(model)
        progress.step(step + 1, loss)
        if time.monotonic() - saved > SAVE_EVERY_S or step + 1 == run.steps:
            state.save(step + 1)
            saved = time.monotonic()
            if measure is not None:
                # What is measured and returned is the average of the weights.
                print(f"{run.name}: step {step + 1}  {measure(state.average.module)}", flush=True)
    return state.average.module


def _take_step(
    model: Any,
    optimizers: Sequence[torch.optim.Optimizer],
    loss_of: Callable[[Any, int, torch.Generator], Tensor],
    run: Run,
    step: int,
) -> float:
    """Change the weights by one step and return its loss. Raises CovrayError for one that is not finite."""
    # Seeded by the step: a resumed training draws what an uninterrupted one draws.
    generator = torch.Generator().manual_seed(run.seed * 1_000_003 + step)
    with torch.autocast(run.device.type, torch.bfloat16):
        loss = loss_of(model, step, generator)
    loss.backward()
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    value = float(loss.detach())
    # Before the weights change: a save would keep what is not finite, and the training could not be continued.
    if not math.isfinite(value) or not math.isfinite(norm):
        raise CovrayError(
            f"{run.name}: step {step + 1}: loss {value} and gradient norm {norm} are not finite; train in another "
            "--out with another --seed"
        )
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return value


def highest_rates(optimizers: Sequence[torch.optim.Optimizer]) -> list[list[float]]:
    """Return the learning rates that the groups of each optimizer begin with."""
    rates = []
    for optimizer in optimizers:
        rates.append([group["lr"] for group in optimizer.param_groups])
    return rates


def set_rates(optimizers: Sequence[torch.optim.Optimizer], highest: Sequence[Sequence[float]], share: float) -> None:
    """Set every learning rate to ``share`` of its highest."""
    for optimizer, rates in zip(optimizers, highest, strict=True):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share


def muon_and_adamw(
    model: nn.Module, layers: nn.Module, muon_rate: float, adamw_rate: float
) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of ``layers`` (Jordan et al. 2024) and AdamW for all else of ``model``."""
    matrices = [parameter for parameter in layers.parameters() if parameter.ndim == 2]
    # By identity: tensors compare elementwise.
    by_muon = {id(matrix) for matrix in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in by_muon]
    muon = torch.optim.Muon(matrices, lr=muon_rate, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw(rest, adamw_rate)]


def adamw(parameters: Any, learning_rate: float) -> torch.optim.Optimizer:
    """Return AdamW with the settings that all nano models share."""
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)


def schedule(step: int, steps: int) -> float:
    """Return the share of the learning rate at ``step``: 200 steps of warm-up, then a cosine down to 2%."""
    warm = min(1.0, (step + 1) / 200)
    progress = torch.tensor(step / max(steps, 1) * torch.pi)
    return warm * (0.02 + 0.98 * 0.5 * (1 + float(torch.cos(progress))))


def draw(pictures: Tensor, batch: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Return a random batch of uint8 ``pictures`` [n, h, w, 3] as float [batch, 3, h, w] in [0, 1], channels last."""
    index = torch.randint(len(pictures), (batch,), generator=generator)
    return pictures[index].to(device).permute(0, 3, 1, 2).float().div_(255)


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of every picture in [0, 1], [n, 3, h, w] -> [n]; at most 99."""
    error = (first - second).square().flatten(1).mean(1)
    return (-10 * torch.log10(error.clamp_min(1e-10))).clamp_max(99)
