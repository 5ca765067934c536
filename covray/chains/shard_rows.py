"""The row of a shard: its columns, the alphas and the order of its frames, and rows as Python values.

A row is a pair; its frames serve every method and every length that was built.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, TypedDict, cast

import numpy as np
import pyarrow as pa

from covray.errors import ConfigError

QUALITY = ("source_noise_rms", "label_noise_rms", "source_psnr", "label_psnr", "diffusion_path", "linear_path")
"""Figures of a row: ``*_noise_rms`` is |z_T|/sqrt(d), expected 1; ``*_psnr`` the round trip of an end in dB, null where
it was not checked; ``*_path`` the way through the frames over the direct way, as RMS pixel distances (linear: 1)."""

_TOKENS = pa.list_(pa.uint16())


Tokens = np.ndarray | list[int]
"""The tokens of a picture, uint16 [tokens_per_image] as rows are read; their numbers where a row is made up."""


class FrameColumn(TypedDict):
    """A frame of a row."""

    method: str
    alpha: float
    tokens: Tokens


class ShardRow(TypedDict, total=False):
    """A row of ``ChainDataset.rows``: those columns of ``shard_schema`` that were asked for."""

    pair_id: int
    task: str
    split: str
    source: Tokens
    label: Tokens
    frames: list[FrameColumn]
    quality: dict[str, float | None] | None
    error: str | None
    source_noise: bytes | None
    label_noise: bytes | None
    source_pixels: bytes | None
    label_pixels: bytes | None


def shard_schema(keep_noise: bool) -> pa.Schema:
    """Return the schema of a shard.

    ``keep_noise`` adds the inverted noise of both ends (float32 little-endian bytes), and the BLAKE2b digests (16
    bytes) of the pixels that were inverted.
    """
    frame = pa.struct([("method", pa.string()), ("alpha", pa.float32()), ("tokens", _TOKENS)])
    fields = [
        ("pair_id", pa.int64()),
        ("task", pa.string()),
        ("split", pa.string()),
        ("source", _TOKENS),
        ("label", _TOKENS),
        ("frames", pa.list_(frame)),
        ("quality", pa.struct([(name, pa.float32()) for name in QUALITY])),
        ("error", pa.string()),
    ]
    if keep_noise:
        for name in ("source_noise", "label_noise", "source_pixels", "label_pixels"):
            fields.append((name, pa.binary()))
    return pa.schema(fields)


def alphas_of(length: int) -> tuple[float, ...]:
    """Return the alphas k/(length-1), k = 1..length-2, of a chain of ``length`` pictures, as float32 stores them."""
    alphas = []
    for frame in range(1, length - 1):
        alphas.append(float(np.float32(frame / (length - 1))))  # the value that a shard returns
    return tuple(alphas)


def union_alphas(lengths: Iterable[int], alphas: Iterable[float] = ()) -> tuple[float, ...]:
    """Return all alphas that chains of ``lengths`` need, and ``alphas``: distinct as float32, ascending.

    Raises ConfigError for an alpha that float32 cannot tell from an end of the chain.
    """
    union = {float(np.float32(alpha)) for alpha in alphas}
    for alpha in union:
        if not 0.0 < alpha < 1.0:
            raise ConfigError(
                "alphas: an alpha is not between 0 and 1 as float32; leave it out, a chain always has both ends"
            )
    for length in lengths:
        union.update(alphas_of(length))
    return tuple(sorted(union))


def frame_order(methods: Iterable[str], alphas: Iterable[float]) -> list[tuple[str, float]]:
    """Return the (method, alpha) of a row's frames in their fixed order: by method, then by alpha."""
    return list(itertools.product(sorted(methods), sorted(alphas)))


def python_rows(batch: pa.RecordBatch) -> Iterator[ShardRow]:
    """Yield the rows of ``batch`` as dicts, with tokens as uint16 arrays."""
    # Column by column first: Arrow converts a whole column in one call.
    values = {name: _python_values(batch.column(name)) for name in batch.schema.names}
    for index in range(len(batch)):
        yield cast(ShardRow, {name: column[index] for name, column in values.items()})


def _python_values(column: pa.Array) -> list[Any]:
    """Return the values of a column, with lists of tokens as uint16 arrays."""
    if column.type == _TOKENS:
        # Tokens stay arrays: as Python integers they would take many times the memory and time.
        return _token_arrays(column)
    if pa.types.is_list(column.type):
        # A row's frames are a list of structs; its fields are flat columns.
        flat = column.flatten()
        tokens = _token_arrays(flat.field("tokens"))
        methods, alphas = flat.field("method").to_pylist(), flat.field("alpha").to_pylist()
        frames = []
        for method, alpha, ids in zip(methods, alphas, tokens, strict=True):
            frames.append({"method": method, "alpha": alpha, "tokens": ids})
        return [None if place is None else frames[place] for place in _list_slices(column)]
    return list(column.to_pylist())


def _token_arrays(column: pa.Array) -> list[np.ndarray | None]:
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return [None if place is None else flat[place] for place in _list_slices(column)]


def _list_slices(column: pa.Array) -> list[slice | None]:
    """Return where each list of ``column`` is in ``column.flatten()``, which leaves out what is below null lists."""
    slices: list[slice | None] = []
    start = 0
    # A null list takes no place in the flat column.
    for length in column.value_lengths().to_pylist():
        slices.append(None if length is None else slice(start, start + length))
        start += length or 0
    return slices
