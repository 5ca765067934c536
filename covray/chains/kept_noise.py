"""Noise that an earlier build has kept: the inversion of a picture, which is most of a build's work, is done once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from covray.chains.dataset import ChainDataset
from covray.config import BuildConfig, recorded_section
from covray.config.build import with_solver
from covray.errors import DatasetError
from covray.io import storage

ENDS = ("source", "label")


@dataclass(frozen=True)
class PictureNoise:
    """The noise of one picture."""

    noise: bytes
    """float32, little-endian."""
    pixels_digest: bytes
    """``picture_digest`` of the pixels that were inverted."""


def picture_digest(pixels: bytes) -> bytes:
    """Return 16 bytes that tell pixels from others: a pair's id follows from names, and files change."""
    return hashlib.blake2b(pixels, digest_size=16).digest()


@dataclass(frozen=True, eq=False)
class KeptNoise:
    """An index of the noise in a dataset that was built with ``keep_noise``: which shard has which pair.

    16 bytes a pair, so that ten million pairs travel to the workers as 160 MB, once.
    """

    path: str
    files: tuple[str, ...]
    """Shards, relative to ``path``."""
    pair_ids: NDArray[np.int64]
    """[n], ascending."""
    shard_of_pair: NDArray[np.int32]
    """[n], indices of ``files``."""

    @classmethod
    def of(cls, path: str, config: BuildConfig, prior_fingerprint: str) -> KeptNoise:
        """Index the dataset at ``path``.

        Args:
            path: the dataset's folder.
            config: of the build that wants the noise.
            prior_fingerprint: of the prior that this build inverts with.

        Raises:
            DatasetError: the dataset's noise is not what this build would compute.
        """
        dataset = ChainDataset(path)
        _require_same_inversion(dataset, config, prior_fingerprint)
        shards = tuple(dataset.shards)

        # The empty arrays give a dataset without shards their dtypes.
        pair_ids = [np.zeros(0, np.int64)]
        shard_of_pair = [np.zeros(0, np.int32)]
        for number, shard in enumerate(shards):
            ids = _read_columns(path, shard, ["pair_id"])["pair_id"].to_numpy()
            pair_ids.append(ids)
            shard_of_pair.append(np.full(len(ids), number, np.int32))

        all_ids = np.concatenate(pair_ids)
        # Sorted once, so that a lookup is a binary search.
        order = np.argsort(all_ids, kind="stable")
        return cls(path, shards, all_ids[order], np.concatenate(shard_of_pair)[order])

    def read(self, pair_ids: NDArray[np.int64]) -> dict[int, dict[str, PictureNoise]]:
        """Return the noise of ``source`` and ``label`` of those of ``pair_ids`` that the dataset has, by pair."""
        if not len(self.pair_ids):
            return {}
        # An id behind the last one would have a place outside the array; it is clamped and then found unequal.
        place = np.minimum(np.searchsorted(self.pair_ids, pair_ids), len(self.pair_ids) - 1)
        present = place[self.pair_ids[place] == pair_ids]
        wanted = set(pair_ids.tolist())

        columns = ["pair_id"]
        for end in ENDS:
            columns += [f"{end}_noise", f"{end}_pixels"]
        noise: dict[int, dict[str, PictureNoise]] = {}
        # Shard by shard: each one that holds a wanted pair is read once.
        for number in np.unique(self.shard_of_pair[present]):
            for row in _read_columns(self.path, self.files[number], columns).to_pylist():
                if row["pair_id"] in wanted and row["source_noise"] is not None:
                    of_pair = {}
                    for end in ENDS:
                        of_pair[end] = PictureNoise(row[f"{end}_noise"], row[f"{end}_pixels"])
                    noise[row["pair_id"]] = of_pair
        return noise


def _require_same_inversion(dataset: ChainDataset, config: BuildConfig, prior_fingerprint: str) -> None:
    # An identity leaves out defaults of the solver: with_solver states them on both sides.
    path, theirs, ours = dataset.path, with_solver(dataset.identity), with_solver(config.identity())
    if not theirs.get("keep_noise"):
        raise DatasetError(f"noise_from: {path} was built without --keep-noise; build it again with it")
    if dataset.fingerprints["prior"] != prior_fingerprint:
        raise DatasetError(
            f"noise_from: {path} was inverted with prior {dataset.fingerprints['prior'][:12]}, "
            f"this build has {prior_fingerprint[:12]}; use the same prior"
        )
    differing = []
    if theirs["fit"] != ours["fit"]:
        differing.append("fit")
    # Noise of one solver, denoised by another, loses 11 dB.
    their_prior, our_prior = recorded_section(theirs, "prior"), recorded_section(ours, "prior")
    for key in ("size_px", "solver", "steps", "evaluations", "context"):
        if their_prior[key] != our_prior[key]:
            differing.append(f"prior.{key}")
    their_engine = recorded_section(theirs, "engine")
    for key, value in recorded_section(ours, "engine").items():
        if their_engine.get(key) != value:
            differing.append(f"engine.{key}")
    if differing:
        raise DatasetError(f"noise_from: {path} was inverted with another {', '.join(differing)}; use the same")


def _read_columns(path: str, name: str, columns: list[str]) -> pa.Table:
    filesystem, inner = storage.resolve(storage.join(path, name))
    with pq.ParquetFile(inner, filesystem=filesystem) as file:
        return file.read(columns=columns)
