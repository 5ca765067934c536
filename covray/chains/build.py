"""One block of a manifest to shard rows: decode, invert once per picture, interpolate, tokenize. Knows no ray.

What an actor of ``covray build`` does, and what a bare GPU machine can profile. Two halves, so that CPUs can feed GPUs:
``covray.chains.prepare`` decodes and checks, ``BlockBuilder`` computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from covray.chains.dataset import frame_order, shard_schema, union_alphas
from covray.chains.prepare import Facts, needs_prior, picture_digest
from covray.config import BuildConfig
from covray.io.device import resolve_device
from covray.io.images import square
from covray.io.pixels import path_ratio, psnr
from covray.models.diffusion.engine import ChainEngine, Interpolation, Request
from covray.models.diffusion.prior import load_prior, propose_batch
from covray.models.tokenizer.vqgan import load_tokenizer


@dataclass
class Work:
    """What a block cost."""

    rows: int = 0
    rejected: int = 0
    evaluations: int = 0
    padded: int = 0


class BlockBuilder:
    """Holds the models of a build and turns prepared blocks into shard rows."""

    def __init__(self, config: BuildConfig):
        """Load the models and resolve what ``config`` left open. Raises WeightsError, ConfigError."""
        self.alphas = union_alphas(config.lengths, config.alphas)
        self.tokenizer = load_tokenizer(config.tokenizer, config.engine)
        device, dtype = resolve_device(config.engine)
        engine: dict[str, Any] = {"device": device.type, "dtype": str(dtype).removeprefix("torch.")}
        prior_px = config.prior.size_px
        self.engine: ChainEngine | None = None
        if needs_prior(config):
            prior = load_prior(config.prior, config.engine)
            self.engine = ChainEngine(prior, config.engine, config.engine.batch or propose_batch(prior))
            engine["batch"] = self.engine.batch
            prior_px = prior.size_px
        self.config = config.model_copy(
            update={
                "engine": config.engine.model_copy(update=engine),
                "prior": config.prior.model_copy(update={"size_px": prior_px}),
                "tokenizer": config.tokenizer.model_copy(update={"size_px": self.tokenizer.size_px}),
            }
        )
        """The resolved configuration."""

    def facts(self) -> Facts:
        """What was loaded."""
        prior = self.engine.prior if self.engine else None
        return Facts(
            prior_px=prior.size_px if prior else self.tokenizer.size_px,
            tokenizer_px=self.tokenizer.size_px,
            tokens_per_image=self.tokenizer.tokens_per_image,
            codes=self.tokenizer.codes,
            latent_shape=prior.latent_shape if prior else None,
            fingerprints={
                "prior": prior.fingerprint if prior else "",
                "tokenizer": self.tokenizer.fingerprint,
                "codebook": self.tokenizer.codebook_fingerprint,
            },
        )

    def build(self, prepared: pa.Table) -> tuple[pa.Table, Work]:
        """Shard rows (``shard_schema``) of a prepared block, one a pair in the same order, and what they cost."""
        schema = shard_schema(self.config.keep_noise)
        columns = ("pair_id", "task", "split", "error")
        rows: list[dict[str, Any]] = prepared.select(columns).to_pylist()
        work = Work(rows=len(rows))
        good = [index for index, row in enumerate(rows) if row["error"] is None]
        if good:
            self._fill(rows, good, prepared.take(good), work)
        work.rejected = sum(row["error"] is not None for row in rows)
        return pa.Table.from_pylist(rows, schema), work

    def _fill(self, rows: list[dict[str, Any]], good: list[int], prepared: pa.Table, work: Work) -> None:
        size, small = self.facts().prior_px, self.tokenizer.size_px
        distinct: dict[bytes, int] = {}
        ends = [
            tuple(distinct.setdefault(pixels, len(distinct)) for pixels in pair)
            for pair in zip(prepared["source"].to_pylist(), prepared["label"].to_pylist(), strict=True)
        ]
        images = np.stack([_pixels(pixels, size) for pixels in distinct])
        ids = prepared["pair_id"].to_pylist()
        chains = self._interpolate(images, ends, ids, prepared, work) if self.engine else None

        # Every picture of the block in one list, tokenized together: ends first, then frames row by row.
        if small == size:
            ends_small = [(images[source], images[label]) for source, label in ends]
        else:
            ends_small = [
                (_pixels(source, small), _pixels(label, small))
                for source, label in zip(
                    prepared["source_small"].to_pylist(), prepared["label_small"].to_pylist(), strict=True
                )
            ]
        pictures: list[np.ndarray] = []
        for number, pair in enumerate(ends_small):
            pictures += pair
            for method in self.config.methods:
                if method == "linear":
                    pictures += [mix_pixels(*pair, alpha) for alpha in self.alphas]
                elif chains is not None:
                    pictures += [square(frame, small) for frame in chains.frames[number]]
        order = frame_order(self.config.methods, self.alphas)
        tokens = self.tokenizer.encode(np.stack(pictures)).reshape(len(good), 2 + len(order), -1)
        for number, index in enumerate(good):
            row = rows[index]
            if chains is not None and not chains.finite_requests[number]:
                row["error"] = "not_finite: the prior's latents of this pair are not finite"
                continue
            row["source"], row["label"] = tokens[number, 0], tokens[number, 1]
            row["frames"] = [
                {"method": method, "alpha": alpha, "tokens": ids}
                for (method, alpha), ids in zip(order, tokens[number, 2:], strict=True)
            ]
            row["quality"] = self._quality(row["pair_id"], images, ends[number], number, chains)
            if self.config.keep_noise and chains is not None:
                for name, end in zip(("source", "label"), ends[number], strict=True):
                    row[f"{name}_noise"] = chains.noise[end].astype("<f4").tobytes()
                    row[f"{name}_pixels"] = picture_digest(images[end].tobytes())

    def _interpolate(
        self, images: np.ndarray, ends: list[tuple[int, ...]], ids: list[int], prepared: pa.Table, work: Work
    ) -> Interpolation:
        assert self.engine is not None
        alphas = self.alphas if "diffusion" in self.config.methods else ()
        shape = self.engine.prior.latent_shape
        noise: dict[int, np.ndarray] = {}
        kept = zip(prepared["source_noise"].to_pylist(), prepared["label_noise"].to_pylist(), strict=True)
        for pair, pair_noise in zip(ends, kept, strict=True):
            for image, data in zip(pair, pair_noise, strict=True):
                if data is not None:
                    noise[image] = np.frombuffer(data, "<f4").reshape(shape)
        checked = [number for number, pair_id in enumerate(ids) if is_checked(pair_id, self.config.check_endpoints)]
        chains = self.engine.interpolate(
            images,
            [Request(source, label, alphas) for source, label in ends],
            noise,
            {image for number in checked for image in ends[number]},
        )
        work.evaluations, work.padded = chains.evaluations, chains.padded
        return chains

    def _quality(
        self, pair_id: int, images: np.ndarray, ends: tuple[int, ...], number: int, chains: Interpolation | None
    ) -> dict[str, float | None]:
        source, label = ends
        quality: dict[str, float | None] = {}
        if "linear" in self.config.methods and self.alphas:
            mixed = [mix_pixels(images[source], images[label], alpha) for alpha in self.alphas]
            quality["linear_path"] = path_ratio([images[source], *mixed, images[label]])
        if chains is not None:
            # A picture may have been returned for a neighbour that shares it: the row must not show its neighbours.
            returned = chains.returned if is_checked(pair_id, self.config.check_endpoints) else {}
            quality |= {
                "source_noise_rms": float(np.sqrt(np.mean(np.square(chains.noise[source], dtype=np.float64)))),
                "label_noise_rms": float(np.sqrt(np.mean(np.square(chains.noise[label], dtype=np.float64)))),
                "source_psnr": _round_trip(images[source], returned.get(source)),
                "label_psnr": _round_trip(images[label], returned.get(label)),
            }
            if len(chains.frames[number]):
                quality["diffusion_path"] = path_ratio([images[source], *chains.frames[number], images[label]])
        return quality


def mix_pixels(source: np.ndarray, label: np.ndarray, alpha: float) -> np.ndarray:
    """The paper's baseline: pixels mixed linearly, uint8 [h, w, 3] each."""
    return np.rint((1 - alpha) * source.astype(np.float64) + alpha * label.astype(np.float64)).astype(np.uint8)


def is_checked(pair_id: int, share: float) -> bool:
    """Whether a pair is among the ``share`` whose ends are checked: a function of the pair alone (splitmix64)."""
    mixed = (pair_id + 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return (mixed ^ (mixed >> 31)) / 2**64 < share


def _round_trip(picture: np.ndarray, returned: np.ndarray | None) -> float | None:
    """Return the PSNR in dB of a picture that was ``returned`` from noise, at most 99; None where it was not."""
    return None if returned is None else psnr(picture, returned, most_db=99.0)


def _pixels(data: bytes, size_px: int) -> np.ndarray:
    return np.frombuffer(data, np.uint8).reshape(size_px, size_px, 3)
