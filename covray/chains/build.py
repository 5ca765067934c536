"""From one block of a manifest to shard rows: decode, invert each picture once, interpolate, tokenize.

This is what an actor of ``covray build`` does; it does not import Ray, so that a bare GPU machine can profile it. The
work has two halves, so that CPUs can feed GPUs: ``covray.chains.prepare`` decodes and checks pictures, ``BlockBuilder``
computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from covray.chains.kept_noise import picture_digest
from covray.chains.prepare import BuildModels, needs_prior
from covray.chains.shard_rows import ShardRow, frame_order, shard_schema, union_alphas
from covray.chains.spacing import PROBE_ALPHAS, coarse_label, even_path_alphas
from covray.config import BuildConfig
from covray.errors import ConfigError, PairError
from covray.io.device import resolve_device
from covray.io.images import square
from covray.io.pixels import path_ratio, psnr
from covray.methods import BY_BLOCK, BY_ENGINE, make_frames, mix_pixels
from covray.models.diffusion.engine import ChainEngine, Interpolation, Request
from covray.models.diffusion.prior import Contexts, load_prior, propose_batch
from covray.models.tokenizer.vqgan import load_tokenizer
from covray.tasks import TASKS


@dataclass
class BlockStats:
    """What a block cost."""

    rows: int = 0
    rejected: int = 0
    evaluations: int = 0
    """Forward passes of the UNet, counted by picture."""
    padded: int = 0
    """Further passes that only filled batches."""


@dataclass(frozen=True)
class _Pairs:
    """The good pairs of a block, with every distinct picture once."""

    ids: list[int]
    tasks: list[str]
    ends: list[tuple[int, int]]
    """Of each pair: where its source and its label are in ``images``."""
    images: np.ndarray
    """uint8 [distinct pictures, h, w, 3], at the prior's size."""
    small: list[tuple[np.ndarray, np.ndarray]]
    """Of each pair: source and label at the tokenizer's size, uint8 [h, w, 3]."""
    noise: dict[int, np.ndarray]
    """Noise that an earlier build kept, by the place of its picture in ``images``: float32 [c, h, w]."""
    contexts: Contexts | None
    """What the prior reads beside each of ``images``; None: the empty prompt."""


class ContextReader(Protocol):
    """What makes the contexts that ``prior.context`` asks for; see ``covray.thinking.chain_contexts``."""

    fingerprints: dict[str, str]
    """SHA-256 (hex) of its models, by name."""
    tokens: int
    """Tokens of a context, at most: all are padded to them."""

    def read(self, text_or_image: str | np.ndarray) -> torch.Tensor:
        """Return the context, [n <= tokens, d], of a caption or of an image, uint8 [h, w, 3]."""


class BlockBuilder:
    """Holds the models of a build and turns prepared blocks into shard rows."""

    def __init__(self, config: BuildConfig, reader: ContextReader | None = None):
        """Load the models and resolve what ``config`` left open.

        Args:
            config: The build.
            reader: Reads what ``prior.context`` says; None: the empty prompt.

        Raises:
            WeightsError: A model cannot be loaded.
            ConfigError: The configuration does not fit the models, or asks for contexts without a ``reader``.
        """
        self._reader = reader
        require_reader(config, reader is not None)
        self.alphas = union_alphas(config.lengths, config.alphas)

        self._frame_alphas = self.alphas
        # Given alphas space the frames by themselves; the alphas of a chain then only number them.
        if isinstance(config.spacing, tuple):
            self._frame_alphas = union_alphas((), config.spacing)

        self.tokenizer = load_tokenizer(config.tokenizer, config.engine)
        device, dtype = resolve_device(config.engine)
        # The configuration that is recorded says what was used, not "auto".
        update = {"device": device.type, "dtype": str(dtype).removeprefix("torch.")}
        engine = config.engine.model_copy(update=update)
        prior_px = config.prior.size_px
        self.engine: ChainEngine | None = None
        # A build that interpolates nothing loads no prior.
        if needs_prior(config):
            prior = load_prior(config.prior, config.engine)
            if reader is not None:
                prior.read_contexts()
            self.engine = ChainEngine(prior, config.engine, config.engine.batch or propose_batch(prior))
            engine = engine.model_copy(update={"batch": self.engine.batch})
            prior_px = prior.size_px
        self.config = config.model_copy(
            update={
                "engine": engine,
                "prior": config.prior.model_copy(update={"size_px": prior_px}),
                "tokenizer": config.tokenizer.model_copy(update={"size_px": self.tokenizer.size_px}),
            }
        )
        """The resolved configuration."""

    def models(self) -> BuildModels:
        """Return what was loaded."""
        tokenizer = self.tokenizer
        fingerprints = {
            "prior": "",
            "tokenizer": tokenizer.fingerprint,
            "codebook": tokenizer.codebook_fingerprint,
        }
        # Without a prior pictures have one size only, the tokenizer's.
        prior_px, latent_shape = tokenizer.size_px, None
        if self.engine is not None:
            prior = self.engine.prior
            prior_px, latent_shape = prior.size_px, prior.latent_shape
            fingerprints["prior"] = prior.fingerprint
            if self._reader is not None:
                fingerprints |= self._reader.fingerprints
        return BuildModels(
            prior_px, tokenizer.size_px, tokenizer.tokens_per_image, tokenizer.codes, latent_shape, fingerprints
        )

    def build(self, prepared: pa.Table) -> tuple[pa.Table, BlockStats]:
        """Turn a prepared block (``PREPARED_SCHEMA``) into shard rows.

        Returns:
            The rows (``shard_schema``), one a pair in the same order, and what they cost.
        """
        columns = ("pair_id", "task", "split", "error")
        rows: list[ShardRow] = prepared.select(columns).to_pylist()
        stats = BlockStats(rows=len(rows))
        # Rejected pairs keep their row and their error; only the others are computed.
        good = [index for index, row in enumerate(rows) if row["error"] is None]
        if good:
            pairs = self._pairs(prepared.take(good))
            chains = None
            if self.engine is not None:
                chains = self._interpolate(pairs, stats)
            plain, errors = self._plain_frames(pairs)
            tokens = self._tokens(pairs, chains, plain)
            # What failed here is an error of one pair; its neighbours in the block go on.
            for number, error in errors.items():
                rows[good[number]]["error"] = error
            for number, index in enumerate(good):
                if number not in errors:
                    self._fill(rows[index], number, pairs, chains, tokens[number])
        stats.rejected = sum(row["error"] is not None for row in rows)
        return pa.Table.from_pylist(rows, shard_schema(self.config.keep_noise)), stats

    def _pairs(self, prepared: pa.Table) -> _Pairs:
        """Decode prepared rows without errors; a picture that several pairs share is kept once."""
        size_px, small_px = self.models().prior_px, self.tokenizer.size_px
        # Of distinct pictures, in order of appearance; one that is read with two contexts counts twice.
        places: dict[tuple[str | bytes, bytes], int] = {}
        ends: list[tuple[int, int]] = []
        for (source, label), caption in zip(_both(prepared, ""), prepared["caption"].to_pylist(), strict=True):
            read: str | bytes = ""  # the same for all: then the prior reads the empty prompt beside every picture
            if self._reader is not None:
                read = caption or source
            source_at = places.setdefault((read, source), len(places))
            ends.append((source_at, places.setdefault((read, label), len(places))))
        images = np.stack([_pixels(pixels, size_px) for _, pixels in places])
        # Where both sizes are one, the small pictures are views of the large ones.
        small = []
        if small_px == size_px:
            for source_at, label_at in ends:
                small.append((images[source_at], images[label_at]))
        else:
            for source, label in _both(prepared, "_small"):
                small.append((_pixels(source, small_px), _pixels(label, small_px)))

        # Pairs that share a picture may each have its noise; it is the same.
        noise: dict[int, np.ndarray] = {}
        if self.engine is not None:
            shape = self.engine.prior.latent_shape
            for pair, kept in zip(ends, _both(prepared, "_noise"), strict=True):
                for image, data in zip(pair, kept, strict=True):
                    if data is not None:
                        noise[image] = np.frombuffer(data, "<f4").reshape(shape)
        contexts = self._contexts([read for read, _ in places], size_px)
        return _Pairs(
            prepared["pair_id"].to_pylist(), prepared["task"].to_pylist(), ends, images, small, noise, contexts
        )

    def _contexts(self, read: Sequence[str | bytes], size_px: int) -> Contexts | None:
        """Return what the prior reads beside each picture: a caption, or the pixels of an image, each read once."""
        if self._reader is None:
            return None
        states: dict[str | bytes, torch.Tensor] = {}
        for key in read:
            if key in states:
                continue
            if isinstance(key, str):
                states[key] = self._reader.read(key)
            else:
                states[key] = self._reader.read(_pixels(key, size_px))
        # [pictures] states of [n, d], in the order of the pictures; equal contexts share one tensor.
        return Contexts.of([states[key] for key in read], self._reader.tokens)

    def _interpolate(self, pairs: _Pairs, stats: BlockStats) -> Interpolation:
        """Invert every picture once, and denoise every frame once."""
        assert self.engine is not None
        noise = pairs.noise
        alphas: tuple[float, ...] = ()
        if BY_ENGINE in self.config.methods:
            alphas = self._frame_alphas
        requests = [Request(source, label, alphas) for source, label in pairs.ends]
        if self.config.spacing == "path" and alphas:
            # Frames at fixed alphas show how long each chain's path is; then frames are made where equal shares of it
            # end. Every picture is inverted once: its noise is taken over.
            probe_requests = [Request(*ends, PROBE_ALPHAS) for ends in pairs.ends]
            probes = self.engine.interpolate(pairs.images, probe_requests, pairs.noise, (), pairs.contexts)
            stats.evaluations, stats.padded = probes.evaluations, probes.padded
            noise = dict(enumerate(probes.noise))
            requests = [self._evenly(pairs, probes, number) for number in range(len(pairs.ends))]
        # To return a picture from its noise is to denoise it, as a frame: only a share of the pairs is checked.
        to_return: set[int] = set()
        for pair_id, ends in zip(pairs.ids, pairs.ends, strict=True):
            if is_checked(pair_id, self.config.check_endpoints):
                to_return.update(ends)
        chains = self.engine.interpolate(pairs.images, requests, noise, to_return, pairs.contexts)
        stats.evaluations += chains.evaluations
        stats.padded += chains.padded
        return chains

    def _evenly(self, pairs: _Pairs, probes: Interpolation, number: int) -> Request:
        """Return the request of the pair at place ``number``, with the alphas at which its steps are even."""
        source, label = pairs.ends[number]
        # The path goes through both ends, whose alphas are 0 and 1.
        path = [pairs.images[source], *probes.frames[number], pairs.images[label]]
        return Request(source, label, tuple(even_path_alphas(path, (0.0, *PROBE_ALPHAS, 1.0), self.alphas)))

    def _plain_frames(self, pairs: _Pairs) -> tuple[list[dict[str, list[np.ndarray]]], dict[int, str]]:
        """Make the frames of the methods that need no engine.

        Returns:
            Of each pair its frames by method, uint8 [h, w, 3] each, and the errors of pairs whose frames could not be
            made, by their place; black frames stand in for theirs.
        """
        plain: list[dict[str, list[np.ndarray]]] = []
        errors: dict[int, str] = {}
        for number, (source, label) in enumerate(pairs.small):
            by_method = {}
            for method in self.config.methods:
                if method in BY_BLOCK:
                    continue
                try:
                    by_method[method] = make_frames(method, source, label, self._frame_alphas)
                except PairError as error:
                    # The pair is rejected, but its block has one shape of rows: what stands here is never written.
                    errors.setdefault(number, str(error))
                    by_method[method] = [np.zeros_like(source)] * len(self.alphas)
            plain.append(by_method)
        return plain, errors

    def _tokens(
        self, pairs: _Pairs, chains: Interpolation | None, plain: Sequence[Mapping[str, list[np.ndarray]]]
    ) -> np.ndarray:
        """Tokenize all pictures of the block together.

        Args:
            pairs: The good pairs of the block.
            chains: Frames by the engine.
            plain: The other frames of each pair, by method.

        Returns:
            uint16 [pairs, 2 + frames, tokens per image]: of each pair source, label, then frames in ``frame_order``.
        """
        pictures: list[np.ndarray] = []
        # One call for the block: the tokenizer computes batches of a fixed size, however few pictures it is given.
        for number, ends in enumerate(pairs.small):
            pictures += ends
            for method in self.config.methods:
                if method in plain[number]:
                    pictures += plain[number][method]
                # Two controls: as many pictures without anything new, and the label at a low resolution.
                elif method == "copy":
                    pictures += [ends[0]] * len(self.alphas)
                elif method == "coarse":
                    resample = TASKS[pairs.tasks[number]].resample
                    pictures += [coarse_label(ends[1], alpha, resample) for alpha in self._frame_alphas]
                elif chains is not None:
                    pictures += [square(frame, self.tokenizer.size_px) for frame in chains.frames[number]]
        frames = len(self.config.methods) * len(self.alphas)
        return self.tokenizer.encode(np.stack(pictures)).reshape(len(pairs.ids), 2 + frames, -1)

    def _fill(
        self, row: ShardRow, number: int, pairs: _Pairs, chains: Interpolation | None, tokens: np.ndarray
    ) -> None:
        """Complete the row of a good pair.

        Args:
            row: The row, which has its pair's id, task and split.
            number: The pair's place in ``pairs``.
            pairs: The good pairs of the block.
            chains: Their frames and noise.
            tokens: uint16 [2 + frames, tokens per image], as ``_tokens`` orders them.
        """
        # The frames of a pair that overflowed would be black; it is rejected, and its neighbours are not touched.
        if chains is not None and not chains.finite_requests[number]:
            row["error"] = "not_finite: the prior's latents of this pair are not finite"
            return
        row["source"], row["label"] = tokens[0], tokens[1]
        row["frames"] = []
        order = frame_order(self.config.methods, self.alphas)
        for (method, alpha), frame_tokens in zip(order, tokens[2:], strict=True):
            row["frames"].append({"method": method, "alpha": alpha, "tokens": frame_tokens})
        row["quality"] = self._quality(number, pairs, chains)
        if self.config.keep_noise and chains is not None:
            # Kept with a digest of the pixels, so that a later build takes it over only for the same picture.
            source, label = pairs.ends[number]
            row["source_noise"] = chains.noise[source].astype("<f4").tobytes()
            row["label_noise"] = chains.noise[label].astype("<f4").tobytes()
            row["source_pixels"] = picture_digest(pairs.images[source].tobytes())
            row["label_pixels"] = picture_digest(pairs.images[label].tobytes())

    def _quality(self, number: int, pairs: _Pairs, chains: Interpolation | None) -> dict[str, float | None]:
        """Return the quality figures (``QUALITY``) of the pair at place ``number``."""
        source, label = pairs.ends[number]
        ends = pairs.images[source], pairs.images[label]
        quality: dict[str, float | None] = {}
        if "linear" in self.config.methods and self.alphas:
            mixed = [mix_pixels(*ends, alpha) for alpha in self._frame_alphas]
            quality["linear_path"] = path_ratio([ends[0], *mixed, ends[1]])
        if chains is None:
            return quality
        # A picture may have been returned for another pair that shares it: the row must not depend on its neighbours.
        returned: dict[int, np.ndarray] = {}
        if is_checked(pairs.ids[number], self.config.check_endpoints):
            returned = chains.returned
        quality["source_noise_rms"] = _rms(chains.noise[source])
        quality["label_noise_rms"] = _rms(chains.noise[label])
        quality["source_psnr"] = _round_trip(ends[0], returned.get(source))
        quality["label_psnr"] = _round_trip(ends[1], returned.get(label))
        if len(chains.frames[number]):
            quality["diffusion_path"] = path_ratio([ends[0], *chains.frames[number], ends[1]])
        return quality


def require_reader(config: BuildConfig, present: bool) -> None:
    """Refuse frames of a context that nothing reads. Raises ConfigError."""
    if needs_prior(config) and config.prior.context != "empty" and not present:
        raise ConfigError(
            f"prior.context: {config.prior.context} is for covray build; pictures given as examples have no such "
            "context: give none, or a run of chains without diffused frames"
        )


def is_checked(pair_id: int, share: float) -> bool:
    """Return whether a pair is among the ``share`` whose ends are checked.

    The answer depends on the pair's id alone, through splitmix64 (Steele et al., "Fast splittable pseudorandom number
    generators", 2014).
    """
    # The constants are those of the paper; each step is taken modulo 2^64, as uint64 would.
    mixed = (pair_id + 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return (mixed ^ (mixed >> 31)) / 2**64 < share


def _round_trip(picture: np.ndarray, returned: np.ndarray | None) -> float | None:
    """Return the PSNR in dB of a picture that was ``returned`` from noise, at most 99; None where it was not."""
    if returned is None:
        return None
    return psnr(picture, returned, most_db=99.0)


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def _both(prepared: pa.Table, suffix: str) -> Iterator[tuple[Any, Any]]:
    """Yield the values of the columns of source and label whose names end in ``suffix``, row by row."""
    return zip(prepared[f"source{suffix}"].to_pylist(), prepared[f"label{suffix}"].to_pylist(), strict=True)


def _pixels(data: bytes, size_px: int) -> np.ndarray:
    return np.frombuffer(data, np.uint8).reshape(size_px, size_px, 3)
