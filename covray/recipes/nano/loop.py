"""The training loop the nano models share: seeded by step, resumable anywhere, bf16 where the CPU has it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

SAVE_EVERY_S = 120.0
REPORT_EVERY_S = 15.0
EMA_DECAY = 0.99
"""The learning rate falls to next to nothing by itself: the average only smooths the last hundred steps."""


def train(
    model: Any,
    loss_of: Callable[[Any, int, torch.Generator], Tensor],
    out: Path,
    steps: int,
    seed: int,
    learning_rate: float,
    name: str,
    device: torch.device,
    measure: Callable[[Any], str] | None = None,
    on_step: Callable[[Any, int], None] | None = None,
    optimizers: Callable[[Any], Sequence[torch.optim.Optimizer]] | None = None,
) -> Any:
    """Train ``model`` for ``steps`` and return its moving average (EMA), in float32.

    ``loss_of(model, step, generator)`` draws all its randomness from the generator, which is seeded by (seed, step):
    a run that was killed and started again equals one that was not. ``measure`` is printed at every save.
    ``on_step(model, step)`` may change the model before a step (the codebook's k-means).
    ``optimizers(model)`` share out the parameters, each at its highest learning rate; by default one AdamW.
    """
    out.mkdir(parents=True, exist_ok=True)
    state_path = out / f"{name}.state.pt"
    model.to(device=device, memory_format=torch.channels_last)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True)
    chosen = [adamw(model.parameters(), learning_rate)] if optimizers is None else list(optimizers(model))
    highest = [[group["lr"] for group in optimizer.param_groups] for optimizer in chosen]
    first = 0
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, kept in zip(chosen, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        first = int(state["step"])
        print(f"{name}: continues at step {first} of {steps}", flush=True)
    started = reported = saved = time.monotonic()
    running, seen = 0.0, 0
    for step in range(first, steps):
        for optimizer, rates in zip(chosen, highest, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(step, steps)
        if on_step is not None:
            on_step(model, step)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(model, step, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update_parameters(model)
        running, seen = running + float(loss.detach()), seen + 1
        now = time.monotonic()
        if now - reported > REPORT_EVERY_S or step + 1 == steps:
            rate = (step + 1 - first) / (now - started)
            print(
                f"{name}: step {step + 1}/{steps}  loss {running / seen:.5f}  {rate:.2f} steps/s"
                f"  {(steps - step - 1) / rate / 60:.0f} min left",
                flush=True,
            )
            reported, running, seen = now, 0.0, 0
        if now - saved > SAVE_EVERY_S or step + 1 == steps:
            aside = state_path.with_suffix(".part")
            torch.save(
                {
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in chosen],
                    "step": step + 1,
                },
                aside,
            )
            os.replace(aside, state_path)
            saved = now
            if measure is not None:
                print(f"{name}: step {step + 1}  {measure(average.module)}", flush=True)
    return average.module


def adamw(parameters: Any, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW as all nano models have it."""
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate at ``step``: 200 steps of warm-up, then a cosine down to 2%."""
    warm = min(1.0, (step + 1) / 200)
    progress = torch.tensor(step / max(steps, 1) * torch.pi)
    return warm * (0.02 + 0.98 * 0.5 * (1 + float(torch.cos(progress))))


def draw(pictures: Tensor, batch: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """A random batch of uint8 ``pictures`` [n, h, w, 3] as float [batch, 3, h, w] in [0, 1], channels last."""
    index = torch.randint(len(pictures), (batch,), generator=generator)
    return pictures[index].to(device).permute(0, 3, 1, 2).float().div_(255)


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of every picture in [0, 1], [n, 3, h, w] -> [n]; at most 99."""
    error = (first - second).square().flatten(1).mean(1)
    return (-10 * torch.log10(error.clamp_min(1e-10))).clamp_max(99)
