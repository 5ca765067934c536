"""The half of a build that needs no model: rows of a manifest to pixels, each side of a pair decoded, checked, square.

Apart from ``covray.chains.build``, so that the many short-lived workers that feed the actors need not load PyTorch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from covray.chains.dataset import ChainDataset, union_alphas
from covray.config import BuildConfig
from covray.errors import DatasetError, PairError
from covray.io import storage
from covray.io.images import square
from covray.pairs.loading import load_pair
from covray.pairs.manifest import row_dicts
from covray.tasks import TASKS

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
class BuildModels:
    """What the models of a build are: looked up once, before the build starts."""

    prior_px: int
    """Side of the pictures that are interpolated; the tokenizer's where no frame needs the prior."""
    tokenizer_px: int
    tokens_per_image: int
    codes: int
    latent_shape: tuple[int, int, int] | None
    """None where no frame needs the prior."""
    fingerprints: dict[str, str]


def needs_prior(config: BuildConfig) -> bool:
    """Whether any frame or kept noise of ``config`` needs diffusion."""
    frames = "diffusion" in config.methods and bool(union_alphas(config.lengths, config.alphas))
    return frames or config.keep_noise


def prepare_block(
    table: pa.Table, config: BuildConfig, models: BuildModels, root: str | None, noise: KeptNoise | None = None
) -> pa.Table:
    """Manifest rows to ``PREPARED_SCHEMA``: pictures decoded and square, or a reason why the pair is rejected."""
    kept = noise.read(table["pair_id"].to_numpy()) if noise is not None else {}
    rows: list[dict[str, Any]] = []
    for row in row_dicts(table):
        prepared: dict[str, Any] = {name: row[name] for name in ("pair_id", "task", "split")}
        try:
            prepared |= _prepare_pair(row, config, models, root)
            for name, (noise_of_it, digest) in kept.get(row["pair_id"], {}).items():
                if digest == picture_digest(prepared[name]):
                    prepared[f"{name}_noise"] = noise_of_it
        except PairError as error:
            prepared["error"] = str(error)
        rows.append(prepared)
    return pa.Table.from_pylist(rows, PREPARED_SCHEMA)


def _prepare_pair(row: dict[str, Any], config: BuildConfig, models: BuildModels, root: str | None) -> dict[str, bytes]:
    pair = load_pair(row, root)
    prepared: dict[str, bytes] = {}
    label_resample = TASKS[row["task"]].resample
    for name, picture, resample in (("source", pair.image, "bicubic"), ("label", pair.label, label_resample)):
        how = cast(Literal["bicubic", "nearest"], resample)
        prepared[name] = square(picture, models.prior_px, config.fit, how).tobytes()
        if models.tokenizer_px != models.prior_px:
            prepared[f"{name}_small"] = square(picture, models.tokenizer_px, config.fit, how).tobytes()
    return prepared


def picture_digest(pixels: bytes) -> bytes:
    """What a picture's noise is found by again, beside its pair: a pair's id follows from names, and files change."""
    return hashlib.blake2b(pixels, digest_size=16).digest()


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
    def of(cls, path: str, config: BuildConfig, models: BuildModels) -> KeptNoise:
        """Index the dataset at ``path``. Raises DatasetError where its noise is not what ``config`` would invert."""
        dataset = ChainDataset(path)
        theirs, ours = dataset.identity, config.identity()
        if not theirs.get("keep_noise"):
            raise DatasetError(f"noise_from: {path} was built without --keep-noise; build it again with it")
        if dataset.fingerprints["prior"] != models.fingerprints["prior"]:
            raise DatasetError(
                f"noise_from: {path} was inverted with prior {dataset.fingerprints['prior'][:12]}, "
                f"this build has {models.fingerprints['prior'][:12]}; use the same prior"
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

    def read(self, pair_ids: np.ndarray) -> dict[int, dict[str, tuple[bytes, bytes]]]:
        """Noise (float32 little-endian bytes) and ``picture_digest`` of ``source`` and ``label`` of those of
        ``pair_ids`` that the dataset has."""
        place = np.searchsorted(self.pair_ids, pair_ids)
        place = np.minimum(place, max(len(self.pair_ids) - 1, 0))
        wanted = place[self.pair_ids[place] == pair_ids] if len(self.pair_ids) else place[:0]
        asked = set(pair_ids.tolist())
        ends = ("source", "label")
        columns = ["pair_id", *(f"{end}_{what}" for end in ends for what in ("noise", "pixels"))]
        noise: dict[int, dict[str, tuple[bytes, bytes]]] = {}
        for number in np.unique(self.file_of[wanted]):
            table = _read_columns(self.path, self.files[number], columns)
            for row in table.to_pylist():
                if row["pair_id"] in asked and row["source_noise"] is not None:
                    noise[row["pair_id"]] = {end: (row[f"{end}_noise"], row[f"{end}_pixels"]) for end in ends}
        return noise


def _read_columns(path: str, name: str, columns: list[str]) -> pa.Table:
    filesystem, inner = storage.resolve(storage.join(path, name))
    with pq.ParquetFile(inner, filesystem=filesystem) as file:
        return file.read(columns=columns)
