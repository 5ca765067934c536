"""The engine: pictures in, frames between them out, with every slot of every UNet batch put to use.

An inversion and a denoising take the same number of steps, so the engine works in waves: up to ``batch`` jobs of either
kind go through all steps together, in one batch of one fixed shape. A chain's frames can only start from finished
noise, so inversions go first and frames fill the slots they leave.

Identity: a picture's noise and a request's frames are the same to the bit whatever stands beside them, because every
operation works on samples separately and every batch has the same shape, padded with zeros.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from covray.config import EngineConfig
from covray.models.diffusion.ddim import slerp
from covray.models.diffusion.prior import Prior

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """Frames wanted between two pictures of a call."""

    source: int
    """Index of the picture at alpha 0."""
    label: int
    """Index of the picture at alpha 1."""
    alphas: tuple[float, ...]
    """Positions of the frames, used as float32."""


@dataclass(frozen=True, eq=False)
class Interpolation:
    """What ``ChainEngine.interpolate`` returns, for m pictures and n requests."""

    frames: list[np.ndarray]
    """Per request: uint8 [K, S, S, 3], in the order of its alphas."""
    noise: np.ndarray
    """The inverted noise z_T of every picture, float32 [m, c, h, w]."""
    returned: dict[int, np.ndarray]
    """Per picture asked for: its noise denoised again, uint8 [S, S, 3]. Values that are not finite become grey."""
    finite_images: np.ndarray
    """bool [m]: whether a picture's noise is finite throughout."""
    finite_requests: np.ndarray
    """bool [n]: whether both noises and all frames of a request are finite; if not, its frames are not to be used."""
    evaluations: int
    """UNet evaluations of single samples that were wanted: jobs times steps."""
    padded: int
    """UNet evaluations spent on padding."""
    seconds: dict[str, float]
    """Wall time by stage: encode, diffuse, decode."""


Denoising = tuple[int, int, float]
"""A denoising: from the slerp of two pictures' noise at an alpha. A returned picture i is (i, i, 0)."""


@dataclass(frozen=True, eq=False)
class Diffusion:
    """The waves' results: noise by picture, and the latent of every distinct denoising."""

    noise: np.ndarray  # float32 [m, c, h, w]
    latents: dict[Denoising, np.ndarray]  # float32 [c, h, w] each
    evaluations: int
    padded: int


class ChainEngine:
    """Interpolates between pictures with one prior, in batches of ``batch`` UNet rows and ``engine.image_batch``
    pictures.

    Results depend to the bit on these two numbers, the prior, its device and dtype, and the threads; on nothing else.
    """

    def __init__(self, prior: Prior, engine: EngineConfig, batch: int):
        self.prior = prior
        self.batch = batch
        self.image_batch = engine.image_batch

    def interpolate(
        self,
        images: np.ndarray,
        requests: Sequence[Request],
        noise: Mapping[int, np.ndarray] | None = None,
        endpoints: Collection[int] = (),
    ) -> Interpolation:
        """Invert pictures and denoise the frames between them.

        ``images``: uint8 [m, S, S, 3] with S the prior's ``size_px``, distinct; each is inverted once, unless ``noise``
        has its z_T (float32 [c, h, w], by index). ``endpoints``: indices of pictures whose noise is also denoised.
        """
        given = dict(noise or {})
        start = time.perf_counter()
        latents = self._encode(images, [i for i in range(len(images)) if i not in given])
        encoded = time.perf_counter()
        diffusion = self.diffuse(latents, given, wanted_denoisings(requests, endpoints))
        diffused = time.perf_counter()
        pictures = self._decode(diffusion.latents)
        decoded = time.perf_counter()

        finite_images = np.isfinite(diffusion.noise).all(axis=(1, 2, 3))
        frames, finite_requests = [], []
        for request in requests:
            results = [pictures[key] for key in _denoisings(request)]
            shape = (0, *images.shape[1:])
            frames.append(np.stack([picture for picture, _ in results]) if results else np.empty(shape, np.uint8))
            finite = all(finite for _, finite in results)
            finite_requests.append(finite and finite_images[request.source] and finite_images[request.label])
        return Interpolation(
            frames=frames,
            noise=diffusion.noise,
            returned={i: pictures[i, i, 0.0][0] for i in endpoints},
            finite_images=finite_images,
            finite_requests=np.array(finite_requests, dtype=bool),
            evaluations=diffusion.evaluations,
            padded=diffusion.padded,
            seconds={"encode": encoded - start, "diffuse": diffused - encoded, "decode": decoded - diffused},
        )

    def diffuse(
        self, latents: Mapping[int, np.ndarray], noise: Mapping[int, np.ndarray], denoisings: Sequence[Denoising]
    ) -> Diffusion:
        """Run the waves: invert every one of ``latents``, denoise every one of ``denoisings`` (distinct).

        Pictures are numbered 0 to m - 1; each is in ``latents`` (float32 [c, h, w]) or in ``noise`` (its z_T). All
        inversions come before the first wave that is short of them, so that no wave but the last two is ever padded.
        """
        known = dict(noise)
        results: dict[Denoising, np.ndarray] = {}
        inversions, waiting = list(latents), list(denoisings)
        waves = 0
        while inversions or waiting:
            starting, inversions = inversions[: self.batch], inversions[self.batch :]
            free = self.batch - len(starting)
            ready = [key for key in waiting if key[0] in known and key[1] in known][:free]
            rows = [latents[i] for i in starting] + [_mix(known, key) for key in ready]
            finished = self._run_wave(np.stack(rows), len(starting))
            known.update(zip(starting, finished, strict=False))
            results.update(zip(ready, finished[len(starting) :], strict=True))
            done = set(ready)
            waiting = [key for key in waiting if key not in done]
            waves += 1
        jobs, steps = len(latents) + len(denoisings), self.prior.schedule.steps
        stacked = [np.asarray(known[i], dtype=np.float32) for i in range(len(known))]
        return Diffusion(
            noise=np.stack(stacked) if stacked else np.empty((0, *self.prior.latent_shape), np.float32),
            latents=results,
            evaluations=jobs * steps,
            padded=(waves * self.batch - jobs) * steps,
        )

    def _run_wave(self, rows: np.ndarray, inversions: int) -> np.ndarray:
        """Take ``rows`` [k <= batch, c, h, w] through all steps: the first ``inversions`` towards noise."""
        schedule, device = self.prior.schedule, self.prior.device
        latents = self._padded(rows, self.batch)
        inverse = (torch.arange(self.batch, device=device) < inversions).long()
        for step in range(schedule.steps):
            index = torch.where(inverse == 1, step, schedule.steps - 1 - step)
            output = self.prior.predict(latents, schedule.timesteps[index])
            latents = schedule.step(latents, output, index, inverse)
        return latents[: len(rows)].cpu().numpy()

    def _encode(self, images: np.ndarray, wanted: Sequence[int]) -> dict[int, np.ndarray]:
        latents: dict[int, np.ndarray] = {}
        for some in _batches(wanted, self.image_batch):
            padded = np.zeros((self.image_batch, *images.shape[1:]), np.uint8)
            padded[: len(some)] = images[some]
            encoded = self.prior.encode(torch.from_numpy(padded)).cpu().numpy()
            latents.update(zip(some, encoded, strict=False))
        return latents

    def _decode(self, latents: Mapping[Denoising, np.ndarray]) -> dict[Denoising, tuple[np.ndarray, bool]]:
        """Per latent its picture, uint8 [S, S, 3], and whether latent and picture are finite."""
        pictures: dict[Denoising, tuple[np.ndarray, bool]] = {}
        for some in _batches(list(latents), self.image_batch):
            rows = np.stack([latents[key] for key in some])
            decoded, finite = self.prior.decode(self._padded(rows, self.image_batch))
            sound = finite.cpu().numpy()[: len(some)] & np.isfinite(rows).all(axis=(1, 2, 3))
            pictures.update(zip(some, zip(decoded.cpu().numpy(), sound.tolist(), strict=False), strict=False))
        return pictures

    def _padded(self, rows: np.ndarray, batch: int) -> torch.Tensor:
        latents = torch.zeros((batch, *rows.shape[1:]), device=self.prior.device)
        latents[: len(rows)] = torch.from_numpy(rows).to(self.prior.device)
        return latents.contiguous(memory_format=torch.channels_last)


def wanted_denoisings(requests: Iterable[Request], endpoints: Iterable[int]) -> list[Denoising]:
    """The distinct denoisings of a call, in the order they are first asked for."""
    wanted = [key for request in requests for key in _denoisings(request)]
    return list(dict.fromkeys(wanted + [(i, i, 0.0) for i in endpoints]))


def _denoisings(request: Request) -> list[Denoising]:
    return [(request.source, request.label, float(np.float32(alpha))) for alpha in request.alphas]


def _mix(noise: Mapping[int, np.ndarray], key: Denoising) -> np.ndarray:
    return slerp(noise[key[0]], noise[key[1]], key[2])


def _batches(items: Sequence[T], size: int) -> Iterable[list[T]]:
    return (list(items[start : start + size]) for start in range(0, len(items), size))
