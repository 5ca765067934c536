"""Chains a second: covray's engine against the loop a user would write with diffusers, on the same weights.

    python benchmarks/build.py --random --pairs 32
    python benchmarks/build.py --prior nano --pairs 64 --result benchmarks/results/build.md

The plain loop takes one pair after another: diffusers' DDIMInverseScheduler for both ends in a batch of two, then
DDIMScheduler for all frames in one batch, VAE included, with all the threads. The engine runs (a) in this process with
all the threads and (b) as one process a thread, as the actors of ``covray build`` do. The three alternate, so that a
machine's moods meet them alike, and their pictures must agree. Run it on a quiet machine: threads that wait for each
other suffer from company far more than single ones, the plain loop most of all.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMInverseScheduler, DDIMScheduler, UNet2DConditionModel
from results_file import write_result
from safetensors.torch import load_file, save_file

from covray.config import EngineConfig, PriorConfig
from covray.io.model_folders import resolve_folder
from covray.models.diffusion.engine import ChainEngine, Request
from covray.models.diffusion.prior import load_prior, propose_batch
from covray.models.diffusion.slerp import slerp

ALPHAS = (1 / 3, 2 / 3)  # L = 4, the paper's main setting: two frames


def write_random_prior(folder: Path) -> Path:
    """A UNet of 5.5 million parameters on 16x16x4 latents and a VAE for 64 px, random weights, four context tokens."""
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
    ).save_pretrained(folder / "vae")
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    save_file({"context": torch.randn(1, 4, 64)}, folder / "empty_prompt.safetensors")
    return folder


class PlainLoop:
    """What a user would write: diffusers' own models and schedulers, one pair after another."""

    def __init__(self, folder: Path, steps: int):
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
        self.vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
        self.inverse = DDIMInverseScheduler.from_pretrained(folder / "scheduler")
        self.forward = DDIMScheduler.from_pretrained(folder / "scheduler")
        self.inverse.set_timesteps(steps)
        self.forward.set_timesteps(steps)
        self.context = load_file(folder / "empty_prompt.safetensors")["context"].float()

    @torch.inference_mode()
    def frames(self, pair: np.ndarray) -> np.ndarray:
        """The frames between the two pictures of ``pair``, uint8 [2, S, S, 3]; as uint8 [K, S, S, 3]."""
        scale = self.vae.config.scaling_factor
        pixels = torch.from_numpy(pair).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = self.vae.encode(pixels).latent_dist.mode() * scale
        context = self.context.expand(2, -1, -1)
        for t in self.inverse.timesteps:
            latents = self.inverse.step(self.unet(latents, t, context).sample, t, latents).prev_sample
        noise = latents.numpy()
        latents = torch.from_numpy(np.stack([slerp(noise[0], noise[1], alpha) for alpha in ALPHAS]))
        context = self.context.expand(len(ALPHAS), -1, -1)
        for t in self.forward.timesteps:
            latents = self.forward.step(self.unet(latents, t, context).sample, t, latents).prev_sample
        pixels = (self.vae.decode(latents / scale).sample / 2 + 0.5).clamp(0, 1)
        return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def make_engine(options: argparse.Namespace, folder: Path) -> ChainEngine:
    """The engine as a build would set it up."""
    config = EngineConfig(device="cpu", compile=options.compile, dtype=options.dtype)
    prior = load_prior(PriorConfig(path=str(folder), steps=options.steps), config, verify=not options.random)
    return ChainEngine(prior, config, options.batch or propose_batch(prior))


def run_engine(engine: ChainEngine, images: np.ndarray) -> np.ndarray:
    """All frames of consecutive pairs of ``images``, uint8 [pairs, K, S, S, 3]."""
    requests = [Request(i, i + 1, ALPHAS) for i in range(0, len(images), 2)]
    return np.stack(engine.interpolate(images, requests).frames)


def work(options: argparse.Namespace, folder: Path, connection: Connection) -> None:
    """A process of one thread: load, report ready, then answer every array of pictures with its frames."""
    torch.set_num_threads(1)
    engine = make_engine(options, folder)
    run_engine(engine, np.zeros((2, engine.prior.size_px, engine.prior.size_px, 3), np.uint8))
    connection.send("ready")
    while (images := connection.recv()) is not None:
        connection.send(run_engine(engine, images))


@dataclass
class Contender:
    """Something that turns pictures into frames, and how long it took each time."""

    name: str
    run: Callable[[np.ndarray], np.ndarray]
    seconds: list[float]


def measure(contenders: list[Contender], images: np.ndarray, repetitions: int) -> dict[str, np.ndarray]:
    """Run all contenders in turn, ``repetitions`` times; the frames of each."""
    frames = {}
    for _ in range(repetitions):
        for contender in contenders:
            start = time.perf_counter()
            frames[contender.name] = contender.run(images)
            contender.seconds.append(time.perf_counter() - start)
    return frames


def table(contenders: list[Contender], pairs: int, steps: int) -> list[str]:
    """Markdown rows: chains a second (median, and the range), the ratio to the first, UNet evaluations a second."""
    lines = ["| | chains/s, median (range) | ratio | UNet evaluations/s |", "|---|---|---|---|"]
    plain = statistics.median(contenders[0].seconds)
    for contender in contenders:
        median = statistics.median(contender.seconds)
        spread = f"{pairs / max(contender.seconds):.2f} to {pairs / min(contender.seconds):.2f}"
        evaluations = pairs * (2 + len(ALPHAS)) * steps / median
        lines.append(
            f"| {contender.name} | {pairs / median:.2f} ({spread}) | {plain / median:.2f} | {evaluations:.0f} |"
        )
    return lines


def main() -> None:
    """Measure, compare, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prior", default="nano", help="nano, or a prior folder with empty_prompt.safetensors")
    parser.add_argument("--random", action="store_true", help="a UNet of 5.5 M parameters with random weights instead")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--batch", type=int, help="rows of the UNet's batch; by default what a build would take")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2, help="of the plain loop and of (a); processes of (b)")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--result", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (
            write_random_prior(Path(scratch)) if options.random else resolve_folder(options.prior, None, "prior", [])
        )
        compare(options, folder)


def compare(options: argparse.Namespace, folder: Path) -> None:
    """The measurement of ``main`` on one prior folder."""
    torch.set_num_threads(options.threads)
    plain, engine = PlainLoop(folder, options.steps), make_engine(options, folder)
    size = engine.prior.size_px
    smooth = np.random.default_rng(0).integers(0, 256, (2 * options.pairs, 8, 8, 3), dtype=np.uint8)
    images = smooth.repeat(size // 8, axis=1).repeat(size // 8, axis=2)

    context = multiprocessing.get_context("spawn")
    workers = []
    for _ in range(options.threads):
        here, there = context.Pipe()
        process = context.Process(target=work, args=(options, folder, there), daemon=True)
        process.start()
        workers.append((process, here))
    for _, here in workers:
        here.recv()  # all are loaded and warm before anything is timed

    def run_workers(images: np.ndarray) -> np.ndarray:
        share = -(-options.pairs // len(workers)) * 2
        parts = [images[at * share : (at + 1) * share] for at in range(len(workers))]
        for (_, here), part in zip(workers, parts, strict=True):
            here.send(part)
        return np.concatenate([here.recv() for _, here in workers])

    contenders = [
        Contender(
            f"plain diffusers loop, {options.threads} threads",
            lambda images: np.stack([plain.frames(images[i : i + 2]) for i in range(0, len(images), 2)]),
            [],
        ),
        Contender(
            f"(a) engine, {options.threads} threads, batch {engine.batch}",
            lambda images: run_engine(engine, images),
            [],
        ),
        Contender(f"(b) engine, {options.threads} processes, batch {engine.batch}", run_workers, []),
    ]
    for contender in contenders[:2]:
        contender.run(images[:2])
    frames = measure(contenders, images, options.repetitions)
    for process, here in workers:
        here.send(None)
        process.join()

    reference, *others = (frames[contender.name].astype(int) for contender in contenders)
    differences = [np.abs(other - reference) for other in others]
    worst, mean = max(int(d.max()) for d in differences), max(float(d.mean()) for d in differences)
    parameters = sum(p.numel() for p in plain.unet.parameters()) / 1e6
    report = [
        *table(contenders, options.pairs, options.steps),
        "",
        f"{options.pairs} pairs, K = {len(ALPHAS)}, {options.steps} steps, {parameters:.1f} M parameters, latents "
        f"{engine.prior.latent_shape}, {options.repetitions} repetitions in turn. "
        f"Pictures of the engine and of the loop differ by {mean:.4f} of 255 on average, at most by {worst}.",
    ]
    print("\n".join(report))
    if options.dtype == "float32" and mean > 0.05:
        sys.exit("the pictures do not agree: the figures above compare different things")
    if options.result:
        packages = ("torch", "diffusers", "numpy")
        write_result(options.result, "Engine against the plain loop", packages, report)


if __name__ == "__main__":
    main()
