"""Chains a second of every solver, against the loops a user would write with diffusers' schedulers.

    python benchmarks/solvers.py --pairs 16 --repetitions 3 --result benchmarks/results/solvers.md

All run in this process on one thread. Each repetition runs all of them in turn, so that other load meets them alike,
and ratios are taken within a repetition. The plain loops take one pair after another, as in ``benchmarks/build.py``;
the second one uses diffusers' multistep schedulers with 12 steps, and its pictures are not compared with anything.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from build import ALPHAS, PlainLoop, run_engine
from diffusers import DPMSolverMultistepInverseScheduler, DPMSolverMultistepScheduler
from results_file import write_result

from covray.config import EngineConfig, PriorConfig
from covray.io.pixels import psnr
from covray.models.diffusion.engine import ChainEngine
from covray.models.diffusion.prior import CPU_BATCH, find_prior, load_prior, read_schedule
from covray.pairs.scenes.pairs import labelled
from covray.pairs.scenes.render import render_scene
from covray.tasks import TASKS

SOLVERS = {
    "ddim, 50 steps": PriorConfig(),
    "ddim, 16 of 50 evaluated": PriorConfig(evaluations=16),
    "dpm, 12 steps": PriorConfig(solver="dpm"),
}


@dataclass
class Contender:
    """Something that turns pictures into frames."""

    name: str
    run: Callable[[np.ndarray], np.ndarray]
    evaluations: int
    """Of the UNet, each way."""
    seconds: list[float] = field(default_factory=list)


def scene_pictures(pairs: int) -> np.ndarray:
    """Pictures and labels in turn, a scene for each pair, the tasks one after another, uint8 [2 * pairs, 64, 64, 3]."""
    pictures: list[np.ndarray] = []
    tasks = sorted(TASKS)
    for number in range(pairs):
        view = render_scene(number)[0]
        pictures += labelled(view, tasks[number % len(tasks)], np.random.default_rng(number))
    return np.stack(pictures)


def plain_loop(name: str, folder: Path, steps: int, multistep: bool) -> Contender:
    """The loop of ``benchmarks/build.py``, with diffusers' DDIM or multistep schedulers."""
    loop = PlainLoop(folder, steps)
    if multistep:
        options = {"use_karras_sigmas": True, "solver_type": "midpoint"}
        loop.inverse = DPMSolverMultistepInverseScheduler.from_pretrained(folder / "scheduler", **options)
        loop.forward = DPMSolverMultistepScheduler.from_pretrained(folder / "scheduler", **options)

    def run(images: np.ndarray) -> np.ndarray:
        frames = []
        for first in range(0, len(images), 2):
            loop.inverse.set_timesteps(steps)  # their state is of one solution
            loop.forward.set_timesteps(steps)
            frames.append(loop.frames(images[first : first + 2]))
        return np.stack(frames)

    return Contender(name, run, steps)


def engines(batch: int) -> list[Contender]:
    """The engine with each solver."""
    config = EngineConfig(device="cpu", dtype="float32")
    prior = load_prior(PriorConfig(), config)
    folder = find_prior(PriorConfig())
    contenders = []
    for name, solver in SOLVERS.items():
        engine = ChainEngine(replace(prior, schedule=read_schedule(folder, solver)), config, batch)

        def run(images: np.ndarray, engine: ChainEngine = engine) -> np.ndarray:
            return run_engine(engine, images)

        contenders.append(Contender(f"engine, {name}", run, solver.evaluations_each_way))
    return contenders


def ratios(contender: Contender, reference: Contender) -> str:
    """How many times as fast as the reference: the median over repetitions, and the range."""
    faster = [theirs / ours for ours, theirs in zip(contender.seconds, reference.seconds, strict=True)]
    return f"{statistics.median(faster):.2f} ({min(faster):.2f} to {max(faster):.2f})"


def likeness(frames: np.ndarray, reference: np.ndarray) -> float:
    """Mean PSNR of frames, uint8 [pairs, K, S, S, 3]."""
    picture = frames.shape[2:]
    pairs = zip(frames.reshape(-1, *picture), reference.reshape(-1, *picture), strict=True)
    return float(np.mean([psnr(ours, theirs, most_db=99.0) for ours, theirs in pairs]))


def main() -> None:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--batch", type=int, default=CPU_BATCH, help="rows of the UNet's batch")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--result", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = find_prior(PriorConfig())
    images = scene_pictures(options.pairs)
    contenders = [
        plain_loop("plain loop, DDIM schedulers, 50 steps", folder, 50, multistep=False),
        plain_loop("plain loop, multistep schedulers, 12 steps", folder, 12, multistep=True),
        *engines(options.batch),
    ]
    load = os.getloadavg()[0]
    frames: dict[str, np.ndarray] = {}
    for _ in range(options.repetitions):
        for contender in contenders:
            start = time.perf_counter()
            frames[contender.name] = contender.run(images)
            contender.seconds.append(time.perf_counter() - start)
    plain, ddim = contenders[0], contenders[2]
    lines = [
        "| | evaluations each way | chains/s, median | times the plain DDIM loop "
        "| times the engine with ddim, 50 steps "
        "| frames against those, dB |",
        "|---|---|---|---|---|---|",
    ]
    for contender in contenders:
        rate = options.pairs / statistics.median(contender.seconds)
        alike = "not compared"
        if contender is not contenders[1]:
            alike = f"{likeness(frames[contender.name], frames[ddim.name]):.1f}"
        lines.append(
            f"| {contender.name} | {contender.evaluations} | {rate:.2f} | {ratios(contender, plain)} | "
            f"{ratios(contender, ddim)} | {alike} |"
        )
    lines += [
        "",
        f"Nano prior, {options.pairs} pairs of rendered scenes, K = {len(ALPHAS)}, one thread each, "
        f"the engine's batch {options.batch}, {options.repetitions} repetitions in turn; ranges are over "
        f"repetitions. Load average at the start: {load:.1f} on {os.cpu_count()} logical cores: above 1, other "
        "processes were running.",
    ]
    print("\n".join(lines))
    if options.result:
        write_result(options.result, "Chains a second by solver", ("torch", "diffusers", "numpy"), lines)


if __name__ == "__main__":
    main()
