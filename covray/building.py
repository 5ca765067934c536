"""One block of a manifest to shard rows: decode, invert once per picture, interpolate, tokenize. Knows no ray.

What an actor of ``covray build`` does, and what a bare GPU machine can profile. Two halves, so that CPUs can feed GPUs:
``prepare_block`` decodes and checks, ``BlockBuilder`` computes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from covray import storage
from covray.config import BuildConfig
from covray.diffusion.chains import ChainEngine, Interpolation, Request
from covray.diffusion.prior import load_prior, propose_batch, resolve_device
from covray.errors import DatasetError, PairError
from covray.images import decode, load_picture, square
from covray.tasks import TASKS
from covray.tokens.shards import ChainDataset, frame_order, shard_schema, union_alphas
from covray.tokens.tokenizer import load_tokenizer

ASPECT_TOLERANCE = 0.02
"""A label may be of another size than its image, but of the same shape: its aspect within this share."""

PREPARED_SCHEMA = pa.schema(
    [
        ("pair_id", pa.int64()),
        ("task", pa.string()),
        ("split", pa.string()),
        ("source", pa.large_binary()),  # pixels at the prior's size
        ("label", pa.large_binary()),
        ("source_small", pa.large_binary()),  # pixels at the tokenizer's size; null where the sizes are one
        ("label_small", pa.large_binary()),
        ("source_noise", pa.binary()),  # kept by an earlier build
        ("label_noise", pa.binary()),
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class Facts:
    """What the models of a build are, found once before it starts."""

    prior_px: int
    """Side of the pictures that are interpolated; the tokenizer's where no frame needs the prior."""
    tokenizer_px: int
    tokens_per_image: int
    codes: int
    latent_shape: tuple[int, int, int] | None
    """None where no frame needs the prior."""
    fingerprints: dict[str, str]


@dataclass
class Work:
    """What a block cost."""

    rows: int = 0
    rejected: int = 0
    evaluations: int = 0
    padded: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


def needs_prior(config: BuildConfig) -> bool:
    """Whether any frame or kept noise of ``config`` needs diffusion."""
    frames = "diffusion" in config.methods and bool(union_alphas(config.lengths, config.alphas))
    return frames or config.keep_noise


def prepare_block(
    table: pa.Table, config: BuildConfig, facts: Facts, root: str | None, noise: KeptNoise | None = None
) -> pa.Table:
    """Manifest rows to ``PREPARED_SCHEMA``: pictures decoded and square, or a reason why the pair is rejected."""
    kept = noise.read(table["pair_id"].to_numpy()) if noise is not None else {}
    rows: list[dict[str, Any]] = []
    for row in table.to_pylist():
        prepared: dict[str, Any] = {name: row[name] for name in ("pair_id", "task", "split")}
        try:
            prepared |= _prepare_pair(row, config, facts, root)
            source_noise, label_noise = kept.get(row["pair_id"], (None, None))
            prepared |= {"source_noise": source_noise, "label_noise": label_noise}
        except PairError as error:
            prepared["error"] = str(error)
        rows.append(prepared)
    return pa.Table.from_pylist(rows, PREPARED_SCHEMA)


def _prepare_pair(row: dict[str, Any], config: BuildConfig, facts: Facts, root: str | None) -> dict[str, bytes]:
    if row["task"] not in TASKS:
        raise PairError("unknown_task", f"{row['task']!r} is none of {', '.join(TASKS)}")
    task = TASKS[row["task"]]
    image, label = (_decoded(row[name], name, root) for name in ("image", "label"))
    aspects = [picture.shape[1] / picture.shape[0] for picture in (image, label)]
    if abs(aspects[0] / aspects[1] - 1) > ASPECT_TOLERANCE:
        sizes = [f"{picture.shape[1]}x{picture.shape[0]}" for picture in (image, label)]
        raise PairError("label_shape", f"label is {sizes[1]} px, image is {sizes[0]} px; their aspects differ")
    prepared: dict[str, bytes] = {}
    for name, picture, resample in (("source", image, "bicubic"), ("label", label, task.RESAMPLE)):
        how = cast(Literal["bicubic", "nearest"], resample)
        prepared[name] = square(picture, facts.prior_px, config.fit, how).tobytes()
        if facts.tokenizer_px != facts.prior_px:
            prepared[f"{name}_small"] = square(picture, facts.tokenizer_px, config.fit, how).tobytes()
    return prepared


def _decoded(picture: dict[str, Any] | None, name: str, root: str | None) -> np.ndarray:
    try:
        return decode(load_picture(picture or {}, root))
    except PairError as error:
        reason, _, detail = str(error).partition(": ")
        raise PairError(reason, f"{name}: {detail}") from error


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
                source, label = ends[number]
                row["source_noise"] = chains.noise[source].astype("<f4").tobytes()
                row["label_noise"] = chains.noise[label].astype("<f4").tobytes()

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
        work.evaluations, work.padded, work.seconds = chains.evaluations, chains.padded, chains.seconds
        return chains

    def _quality(
        self, pair_id: int, images: np.ndarray, ends: tuple[int, ...], number: int, chains: Interpolation | None
    ) -> dict[str, float | None]:
        source, label = ends
        first, last = images[source].astype(np.float32), images[label].astype(np.float32)
        quality: dict[str, float | None] = {}
        if "linear" in self.config.methods and self.alphas:
            mixed = [mix_pixels(images[source], images[label], alpha) for alpha in self.alphas]
            quality["linear_path"] = path_ratio([first, *mixed, last])
        if chains is not None:
            # A picture may have been returned for a neighbour that shares it: the row must not show its neighbours.
            returned = chains.returned if is_checked(pair_id, self.config.check_endpoints) else {}
            quality |= {
                "source_noise_rms": float(np.sqrt(np.mean(np.square(chains.noise[source], dtype=np.float64)))),
                "label_noise_rms": float(np.sqrt(np.mean(np.square(chains.noise[label], dtype=np.float64)))),
                "source_psnr": psnr(images[source], returned.get(source)),
                "label_psnr": psnr(images[label], returned.get(label)),
            }
            if len(chains.frames[number]):
                quality["diffusion_path"] = path_ratio([first, *chains.frames[number], last])
        return quality


@dataclass(frozen=True, eq=False)
class KeptNoise:
    """The noise of a dataset built with ``keep_noise``, found by pair: which file holds whom.

    16 bytes a pair, so that ten million pairs travel to the workers as 160 MB, once.
    """

    path: str
    files: tuple[str, ...]
    pair_ids: np.ndarray  # int64 [n], ascending
    file_of: np.ndarray  # int32 [n]

    @classmethod
    def of(cls, path: str, config: BuildConfig, facts: Facts) -> KeptNoise:
        """Index the dataset at ``path``. Raises DatasetError where its noise is not what ``config`` would invert."""
        dataset = ChainDataset(path)
        theirs, ours = dataset.identity, config.identity()
        if not theirs.get("keep_noise"):
            raise DatasetError(f"noise_from: {path} was built without --keep-noise; build it again with it")
        if dataset.fingerprints["prior"] != facts.fingerprints["prior"]:
            raise DatasetError(
                f"noise_from: {path} was inverted with prior {dataset.fingerprints['prior'][:12]}, "
                f"this build has {facts.fingerprints['prior'][:12]}; use the same prior"
            )
        differing = [key for key in ("fit",) if theirs[key] != ours[key]]
        differing += [f"prior.{key}" for key in ("size_px", "steps") if theirs["prior"][key] != ours["prior"][key]]
        differing += [f"engine.{key}" for key in ours["engine"] if theirs["engine"].get(key) != ours["engine"][key]]
        if differing:
            raise DatasetError(f"noise_from: {path} was inverted with another {', '.join(differing)}; use the same")
        files = tuple(dataset.shards)
        found = [_read_columns(path, name, ["pair_id"])["pair_id"].to_numpy() for name in files]
        ids = np.concatenate([np.zeros(0, np.int64), *found])
        owners = np.repeat(np.arange(len(files), dtype=np.int32), [len(part) for part in found])
        order = np.argsort(ids, kind="stable")
        return cls(path, files, ids[order], owners[order])

    def read(self, pair_ids: np.ndarray) -> dict[int, tuple[bytes, bytes]]:
        """Source and label noise (float32 little-endian bytes) of those of ``pair_ids`` that the dataset has."""
        place = np.searchsorted(self.pair_ids, pair_ids)
        place = np.minimum(place, max(len(self.pair_ids) - 1, 0))
        wanted = place[self.pair_ids[place] == pair_ids] if len(self.pair_ids) else place[:0]
        asked = set(pair_ids.tolist())
        noise: dict[int, tuple[bytes, bytes]] = {}
        for number in np.unique(self.file_of[wanted]):
            table = _read_columns(self.path, self.files[number], ["pair_id", "source_noise", "label_noise"])
            for row in table.to_pylist():
                if row["pair_id"] in asked and row["source_noise"] is not None:
                    noise[row["pair_id"]] = (row["source_noise"], row["label_noise"])
        return noise


def _read_columns(path: str, name: str, columns: list[str]) -> pa.Table:
    filesystem, inner = storage.resolve(storage.join(path, name))
    with pq.ParquetFile(inner, filesystem=filesystem) as file:
        return file.read(columns=columns)


def mix_pixels(source: np.ndarray, label: np.ndarray, alpha: float) -> np.ndarray:
    """The paper's baseline: pixels mixed linearly, uint8 [h, w, 3] each."""
    return np.rint((1 - alpha) * source.astype(np.float64) + alpha * label.astype(np.float64)).astype(np.uint8)


def path_ratio(pictures: list[np.ndarray]) -> float | None:
    """Way through ``pictures`` over the direct way from first to last, in RMS pixel distances; None if they are one."""
    floats = [picture.astype(np.float32) for picture in pictures]
    direct = _rms(floats[0], floats[-1])
    if direct == 0:
        return None
    return sum(_rms(first, second) for first, second in itertools.pairwise(floats)) / direct


def psnr(picture: np.ndarray, returned: np.ndarray | None) -> float | None:
    """Peak signal-to-noise ratio in dB of uint8 pictures, at most 99; None where nothing was returned."""
    if returned is None:
        return None
    error = _rms(picture.astype(np.float32), returned.astype(np.float32))
    return min(99.0, 20 * float(np.log10(255 / error))) if error else 99.0


def is_checked(pair_id: int, share: float) -> bool:
    """Whether a pair is among the ``share`` whose ends are checked: a function of the pair alone (splitmix64)."""
    mixed = (pair_id + 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return (mixed ^ (mixed >> 31)) / 2**64 < share


def _rms(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(first - second, dtype=np.float64))))


def _pixels(data: bytes, size_px: int) -> np.ndarray:
    return np.frombuffer(data, np.uint8).reshape(size_px, size_px, 3)
