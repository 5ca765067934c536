"""The engine computes the frames between pictures, and uses every slot of every UNet batch.

An inversion and a denoising evaluate the network equally often, so the engine works in waves: up to ``batch`` jobs of
either kind go through all steps together, in one batch of one fixed shape. Frames start from finished noise; inversions
therefore go first, and frames fill the slots that they leave.

Identity: a picture's noise and a request's frames are the same to the bit whatever else is in the batch, because every
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
from covray.models.diffusion.prior import Contexts, Prior
from covray.models.diffusion.slerp import slerp

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """Frames that are asked for between two pictures of a call."""

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
    """Per picture of ``endpoints``: its noise denoised again, uint8 [S, S, 3]. Values that are not finite are grey."""
    finite_images: np.ndarray
    """bool [m]: whether a picture's noise is finite throughout."""
    finite_requests: np.ndarray
    """bool [n]: whether both noises and all frames of a request are finite; if not, its frames must not be used."""
    evaluations: int
    """UNet evaluations of single samples that were asked for: jobs times evaluations of each."""
    padded: int
    """UNet evaluations spent on padding."""
    seconds: dict[str, float]
    """Wall time by stage: encode, diffuse, decode."""


Denoising = tuple[int, int, float]
"""A denoising: (source, label, alpha) starts from the slerp of two pictures' noise at alpha; a returned picture i is
(i, i, 0)."""


@dataclass(frozen=True, eq=False)
class Diffusion:
    """The results of the waves: noise by picture, and the latent of every distinct denoising."""

    noise: np.ndarray  # float32 [m, c, h, w]
    latents: dict[Denoising, np.ndarray]  # float32 [c, h, w] each
    evaluations: int
    padded: int


class ChainEngine:
    """Interpolates between pictures with one prior.

    Results depend to the bit on the prior, its device and dtype, the number of threads and the two batch sizes, and on
    nothing else.
    """

    def __init__(self, prior: Prior, engine: EngineConfig, batch: int):
        """Use ``prior`` in batches of ``batch`` UNet rows and ``engine.image_batch`` pictures."""
        self.prior = prior
        self.batch = batch
        self.image_batch = engine.image_batch

    def interpolate(
        self,
        images: np.ndarray,
        requests: Sequence[Request],
        noise: Mapping[int, np.ndarray] | None = None,
        endpoints: Collection[int] = (),
        contexts: Contexts | None = None,
    ) -> Interpolation:
        """Invert pictures and denoise the frames between them.

        Args:
            images: uint8 [m, S, S, 3] with S the prior's ``size_px``, distinct. Each is inverted once.
            requests: Frames between two of the pictures.
            noise: z_T by index of a picture, float32 [c, h, w]; such a picture is not inverted.
            endpoints: Indices of pictures whose noise is also denoised.
            contexts: What the UNet reads beside each picture, and beside the frames that begin at it, padded alike in
                all calls; None: the empty prompt.
        """
        given = dict(noise or {})
        start = time.perf_counter()
        to_invert = [index for index in range(len(images)) if index not in given]
        latents = self._encode(images, to_invert)
        encoded = time.perf_counter()
        diffusion = self.diffuse(latents, given, distinct_denoisings(requests, endpoints), contexts)
        diffused = time.perf_counter()
        pictures = self._decode(diffusion.latents)
        decoded = time.perf_counter()

        finite_images = np.isfinite(diffusion.noise).all(axis=(1, 2, 3))

        # Each request's frames are put together from the denoisings, which requests may share.
        frames, finite_requests = [], []
        for request in requests:
            of_request = np.empty((len(request.alphas), *images.shape[1:]), np.uint8)
            # A frame that is not finite must not be used, and neither must one between noises that are not.
            finite = finite_images[request.source] and finite_images[request.label]
            for position, key in enumerate(_denoisings(request)):
                of_request[position], finite_frame = pictures[key]
                finite = finite and finite_frame
            frames.append(of_request)
            finite_requests.append(finite)
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
        self,
        latents: Mapping[int, np.ndarray],
        noise: Mapping[int, np.ndarray],
        denoisings: Sequence[Denoising],
        contexts: Contexts | None = None,
    ) -> Diffusion:
        """Run the waves: invert every one of ``latents``, denoise every one of ``denoisings``.

        Inversions go first, so that only the last two waves can be padded. Pictures are numbered 0 to m - 1, and each
        is either in ``latents`` or in ``noise``.

        Args:
            latents: Latent by picture, to be inverted, float32 [c, h, w] each.
            noise: z_T by picture, float32 [c, h, w] each.
            denoisings: Distinct.
            contexts: As ``interpolate`` takes them.
        """
        known = dict(noise)
        results: dict[Denoising, np.ndarray] = {}
        inversions, waiting = list(latents), list(denoisings)
        waves = 0
        # A denoising can start once both of its noises are there; the other slots of its wave are inversions.
        while inversions or waiting:
            starting, inversions = inversions[: self.batch], inversions[self.batch :]
            ready, waiting = _take_ready(waiting, known, self.batch - len(starting))
            rows = [latents[index] for index in starting]
            rows += [_mix(known, key) for key in ready]
            sources = [source for source, _, _ in ready]
            pictures = [*starting, *sources]
            finished = self._run_wave(np.stack(rows), len(starting), self._of_wave(contexts, pictures))
            known.update(zip(starting, finished, strict=False))
            results.update(zip(ready, finished[len(starting) :], strict=True))
            waves += 1

        jobs, evaluations = len(latents) + len(denoisings), self.prior.schedule.evaluations
        # By number, whatever the order of the waves was.
        stacked = np.empty((len(known), *self.prior.latent_shape), np.float32)
        for picture, z in known.items():
            stacked[picture] = z
        return Diffusion(
            noise=stacked,
            latents=results,
            evaluations=jobs * evaluations,
            padded=(waves * self.batch - jobs) * evaluations,
        )

    def _of_wave(self, contexts: Contexts | None, pictures: Sequence[int]) -> Contexts | None:
        """Return the contexts of the rows of a wave, each of its picture; what fills the batch reads any."""
        if contexts is None:
            return None
        filling = [pictures[0]] * (self.batch - len(pictures))
        return contexts.rows([*pictures, *filling])

    def _run_wave(self, rows: np.ndarray, inversions: int, contexts: Contexts | None) -> np.ndarray:
        """Take rows through all steps.

        Args:
            rows: float32 [k <= batch, c, h, w].
            inversions: How many of them, the first, go towards noise.
            contexts: Of ``batch`` rows.
        """
        schedule, device = self.prior.schedule, self.prior.device
        latents = self._padded(rows, self.batch)
        # One network pass serves both kinds of row: each has its own time and its own step.
        inverse = (torch.arange(self.batch, device=device) < inversions).long()
        previous = torch.zeros_like(latents)
        for number in range(schedule.evaluations):
            output = self.prior.predict(latents, schedule.timesteps[inverse, number], contexts)
            latents, previous = schedule.step(latents, output, previous, number, inverse)
        return latents[: len(rows)].cpu().numpy()

    def _encode(self, images: np.ndarray, chosen: Sequence[int]) -> dict[int, np.ndarray]:
        """Return the latent, float32 [c, h, w], of each of the ``chosen`` pictures of ``images`` uint8 [m, S, S, 3]."""
        latents: dict[int, np.ndarray] = {}
        for indices in _batches(chosen, self.image_batch):
            padded = np.zeros((self.image_batch, *images.shape[1:]), np.uint8)
            padded[: len(indices)] = images[indices]
            encoded = self.prior.encode(torch.from_numpy(padded)).cpu().numpy()
            latents.update(zip(indices, encoded, strict=False))
        return latents

    def _decode(self, latents: Mapping[Denoising, np.ndarray]) -> dict[Denoising, tuple[np.ndarray, bool]]:
        """Return the picture of each latent, uint8 [S, S, 3], and whether latent and picture are finite."""
        pictures: dict[Denoising, tuple[np.ndarray, bool]] = {}
        for keys in _batches(list(latents), self.image_batch):
            rows = np.stack([latents[key] for key in keys])
            decoded, finite = self.prior.decode(self._padded(rows, self.image_batch))
            # The decoder's pixels may be finite where the latent was not, and the other way round.
            finite_rows = finite.cpu().numpy()[: len(keys)] & np.isfinite(rows).all(axis=(1, 2, 3))
            for key, picture, is_finite in zip(keys, decoded.cpu().numpy(), finite_rows.tolist(), strict=False):
                pictures[key] = (picture, is_finite)
        return pictures

    def _padded(self, rows: np.ndarray, batch: int) -> torch.Tensor:
        """Return ``rows`` [k, c, h, w] on the device, followed by zeros: [batch, c, h, w]."""
        latents = torch.zeros((batch, *rows.shape[1:]), device=self.prior.device)
        latents[: len(rows)] = torch.from_numpy(rows).to(self.prior.device)
        # The layout of the networks' weights: in another one every convolution would convert.
        return latents.contiguous(memory_format=torch.channels_last)


def distinct_denoisings(requests: Iterable[Request], endpoints: Iterable[int]) -> list[Denoising]:
    """Return the distinct denoisings of a call, in the order in which they are first asked for."""
    keys: dict[Denoising, None] = {}
    for request in requests:
        keys |= dict.fromkeys(_denoisings(request))
    for picture in endpoints:
        keys[picture, picture, 0.0] = None
    return list(keys)


def _take_ready(
    waiting: Sequence[Denoising], noise: Collection[int], most: int
) -> tuple[list[Denoising], list[Denoising]]:
    """Divide ``waiting`` into at most ``most`` denoisings whose pictures have ``noise``, and the others, in order."""
    ready: list[Denoising] = []
    others: list[Denoising] = []
    for key in waiting:
        if len(ready) < most and key[0] in noise and key[1] in noise:
            ready.append(key)
        else:
            others.append(key)
    return ready, others


def _denoisings(request: Request) -> list[Denoising]:
    source, label = request.source, request.label
    # Alphas that a shard cannot tell apart are one denoising.
    return [(source, label, float(np.float32(alpha))) for alpha in request.alphas]


def _mix(noise: Mapping[int, np.ndarray], key: Denoising) -> np.ndarray:
    source, label, alpha = key
    return slerp(noise[source], noise[label], alpha)


def _batches(items: Sequence[T], size: int) -> Iterable[list[T]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
