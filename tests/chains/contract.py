"""The contract of a shard's rows, as a check."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from covray.chains.shard_rows import frame_order, shard_schema


def validate_rows(
    table: pa.Table, *, tokens_per_image: int, codes: int, methods: Sequence[str], alphas: Sequence[float]
) -> None:
    """Check that every row of a shard ``table`` keeps the contract.

    A good row: ``tokens_per_image`` tokens below ``codes`` in source, label and every frame, frames exactly
    ``frame_order(methods, alphas)``. A bad row: an error ``reason: detail``, and no tokens, quality or noise.
    Raises AssertionError naming the first pair that breaks it.
    """
    schema = shard_schema(keep_noise="source_noise" in table.column_names)
    for field in schema:
        if field.name not in table.column_names:
            raise AssertionError(f"shard: column {field.name} is missing")
        if table.schema.field(field.name).type != field.type:
            found = table.schema.field(field.name).type
            raise AssertionError(f"shard: column {field.name} is {found}, not {field.type}")
    if table["pair_id"].null_count:
        raise AssertionError("shard: a row has no pair_id")
    pair_ids = table["pair_id"].to_numpy()

    def refuse(broken: np.ndarray, ids: np.ndarray, what: str) -> None:
        if broken.any():
            raise AssertionError(f"pair {ids[np.argmax(broken)]}: {what}")

    rejected = _flags(pc.is_valid(table["error"]))
    well_formed = pc.match_substring_regex(table["error"], r"^[a-z][a-z0-9_]*: ")
    refuse(~_flags(pc.fill_null(well_formed, True)), pair_ids, "its error is not 'reason: detail'")
    for name in schema.names:
        present = _flags(pc.is_valid(table[name]))
        if name not in ("pair_id", "task", "split", "error"):
            refuse(rejected & present, pair_ids, f"it has an error and yet {name}")
        if name in ("task", "source", "label", "frames"):
            refuse(~rejected & ~present, pair_ids, f"it has no error and no {name}")

    good, good_ids = table.filter(pa.array(~rejected)), pair_ids[~rejected]
    order = frame_order(methods, alphas)
    frame_counts = pc.list_value_length(good["frames"]).to_numpy()
    refuse(frame_counts != len(order), good_ids, f"it does not have {len(order)} frames")
    pictures = [("source", good["source"], 1), ("label", good["label"], 1)]
    if order and len(good):
        frames = pc.list_flatten(good["frames"])
        methods_due = pa.array([method for method, _ in order] * len(good), pa.string())
        alphas_due = pa.array([alpha for _, alpha in order] * len(good), pa.float32())
        as_due = pc.and_(
            pc.fill_null(pc.equal(pc.struct_field(frames, "method"), methods_due), False),
            pc.fill_null(pc.equal(pc.struct_field(frames, "alpha"), alphas_due), False),
        )
        ids = np.repeat(good_ids, len(order))
        refuse(~_flags(as_due), ids, "its frames are not the methods and alphas of the build, in order")
        pictures.append(("a frame", pc.struct_field(frames, "tokens"), len(order)))
    for name, column, per_row in pictures:
        ids = np.repeat(good_ids, per_row)
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
        refuse(lengths != tokens_per_image, ids, f"{name} does not have {tokens_per_image} tokens")
        tokens, owners = pc.list_flatten(column), np.repeat(ids, tokens_per_image)
        refuse(_flags(pc.is_null(tokens)), owners, f"{name} has an empty token")
        refuse(tokens.to_numpy() >= codes, owners, f"{name} has a token beyond the {codes} codes")


def _flags(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy().astype(bool)
