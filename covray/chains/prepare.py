"""The half of a build that needs no model: rows of a manifest become square pictures, or reasons to reject the pair.

It is a module of its own so that the many short-lived workers that feed the actors need not load PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from covray.chains.kept_noise import KeptNoise, picture_digest
from covray.chains.shard_rows import union_alphas
from covray.config import BuildConfig
from covray.errors import PairError
from covray.io.images import square
from covray.methods import BY_ENGINE
from covray.pairs.loading import load_pair
from covray.pairs.manifest_reading import row_dicts
from covray.pairs.rows import PairRow
from covray.tasks import TASKS
from covray.tasks.base import Resample

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
        ("caption", pa.string()),  # of the source; null unless the prior reads it
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
    """Return whether any frame or kept noise of ``config`` needs diffusion."""
    # A chain of length 2 has no alphas, and then no method makes frames.
    frames = BY_ENGINE in config.methods and bool(union_alphas(config.lengths, config.alphas))
    return frames or config.keep_noise


def reads_captions(config: BuildConfig) -> bool:
    """Return whether frames of ``config`` depend on the captions of the manifest."""
    return config.prior.context == "caption" and needs_prior(config)


def prepare_block(
    table: pa.Table, config: BuildConfig, models: BuildModels, root: str | None, noise: KeptNoise | None = None
) -> pa.Table:
    """Return ``PREPARED_SCHEMA`` of manifest rows: pictures decoded and square, or why the pair is rejected.

    Args:
        table: rows of a manifest.
        config: of the build.
        models: the sizes of its models.
        root: the folder that URIs are below.
        noise: an earlier build's, which is used where the pixels are still the same.
    """
    noise_by_pair = {}
    if noise is not None:
        noise_by_pair = noise.read(table["pair_id"].to_numpy())
    rows: list[dict[str, Any]] = []
    for row in row_dicts(table):
        prepared: dict[str, Any] = {"pair_id": row["pair_id"], "task": row["task"], "split": row["split"]}
        try:
            # A pair that cannot be used is a row with its reason; the block goes on.
            prepared |= _prepare_pair(row, config, models, root)
            for name, known in noise_by_pair.get(row["pair_id"], {}).items():
                # Noise belongs to the very pixels that were inverted: a picture that changed is inverted again.
                if known.pixels_digest == picture_digest(prepared[name]):
                    prepared[f"{name}_noise"] = known.noise
        except PairError as error:
            prepared["error"] = str(error)
        rows.append(prepared)
    return pa.Table.from_pylist(rows, PREPARED_SCHEMA)


def _prepare_pair(row: PairRow, config: BuildConfig, models: BuildModels, root: str | None) -> dict[str, Any]:
    pair = load_pair(row, root)
    # Labels of classes must not be blended: their task says "nearest".
    resamples: dict[str, Resample] = {"source": "bicubic", "label": TASKS[row["task"]].resample}
    prepared: dict[str, Any] = {}
    if reads_captions(config):
        prepared["caption"] = _caption(row)
    for name, picture in (("source", pair.image), ("label", pair.label)):
        prepared[name] = square(picture, models.prior_px, config.fit, resamples[name]).tobytes()
        # Null where the sizes are one: the block travels between nodes, and pixels are most of it.
        if models.tokenizer_px != models.prior_px:
            prepared[f"{name}_small"] = square(picture, models.tokenizer_px, config.fit, resamples[name]).tobytes()
    return prepared


def _caption(row: PairRow) -> str:
    """Return the caption of a pair. Raises PairError where it has none."""
    caption = row.get("caption")
    if not caption:
        raise PairError("no_caption", "the row has no caption for the prior to read")
    return caption
