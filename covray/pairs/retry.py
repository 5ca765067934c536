"""Rows of a manifest that could not be made, made again: pictures of the web that could not be had, above all."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

import pyarrow as pa

from covray.errors import ManifestError
from covray.pairs.manifest import MANIFEST_SCHEMA, Pair, pair_of_row
from covray.pairs.manifest_reading import ManifestInfo, check_manifest, read_manifest, read_meta, row_dicts
from covray.pairs.user_labels import LabelRules, check_pair, in_order
from covray.tasks.base import Meta


def retried_pairs(manifest: str, reasons: Collection[str], rules: LabelRules) -> tuple[ManifestInfo, Iterator[Pair]]:
    """Return what a manifest holds, and its pairs with those made again that were rejected for one of ``reasons``.

    A rejected row still names the pictures that it was to be made of. All other rows stay as they are.

    Args:
        manifest: A manifest of ``covray pairs``.
        reasons: Such as ``unreachable``.
        rules: What the user declares of the labels, as when the manifest was made.

    Raises:
        ManifestError: The manifest cannot be read, or no row was rejected for these reasons.
    """
    info = check_manifest(manifest)
    if not any(_is_due(meta, reasons) for meta in _metas(manifest)):
        raise ManifestError(
            f"{manifest}: has no row that was rejected as {' or '.join(sorted(reasons))}; leave --retry out"
        )

    def made_again(pair: Pair) -> Pair:
        if not _is_due(pair.meta, reasons):
            return pair
        # The old reason is dropped first: the check writes it again where it still holds.
        known = {key: value for key, value in pair.meta.items() if key != "error"}
        return check_pair(replace(pair, meta=known), info.root, rules)

    return info, in_order(made_again, _pairs(manifest))


def _is_due(meta: Meta, reasons: Collection[str]) -> bool:
    """Return whether a row was rejected for one of ``reasons``: an error is ``reason: text``."""
    return str(meta.get("error", "")).partition(":")[0] in reasons


def _metas(manifest: str) -> Iterator[Meta]:
    for batch in read_manifest(manifest, ["meta"]):
        for row in batch.to_pylist():
            yield read_meta(row["meta"])


def _pairs(manifest: str) -> Iterator[Pair]:
    for batch in read_manifest(manifest, MANIFEST_SCHEMA.names):
        for row in row_dicts(pa.Table.from_batches([batch])):
            yield pair_of_row(row)
