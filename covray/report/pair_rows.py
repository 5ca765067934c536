"""All pairs of a dataset as the page's list shows them: what to filter and to sort by, without tokens."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from covray.chains.quality import chain_quality
from covray.chains.shard_rows import QUALITY
from covray.io.records import RecordPart

COLUMNS = ("pair_id", "task", "split", "quality", "error")
"""The columns of a shard that a list needs."""
FIGURES = ("quality", "diffusion_path", "linear_path", "end_psnr", "source_noise_rms", "label_noise_rms")
"""Figures of a pair, in the order of the list. ``quality`` is that of ``sentences.drop_worst``; ``end_psnr`` is that of
the end which is worse after a round trip."""


class PackedRows(RecordPart):
    """Rows as the page reads them: a text of base64 a column, so that 100,000 pairs are some 5 MB.

    Numbers are little-endian. Without rows there is nothing but the count.
    """

    count: int
    pair_id: str = ""
    """int64."""
    tasks: tuple[str, ...] = ()
    task: str = ""
    """Places in ``tasks``, uint16, as those of the next two."""
    splits: tuple[str, ...] = ()
    split: str = ""
    reasons: tuple[str, ...] = ()
    """Why pairs are rejected; a good pair has the reason "", which is among them."""
    reason: str = ""
    figures: dict[str, str] = Field(default_factory=dict)
    """``FIGURES`` by name, float32 with NaN where unknown."""
    details: dict[int, str] = Field(default_factory=dict)
    """What the error of a rejected pair adds to its reason, by the place of its row."""


def packed_rows(rows: pa.Table) -> PackedRows:
    """Return rows with the columns of ``COLUMNS`` as the page reads them."""
    # An error is REASON: DETAIL. Reasons are few and are coded; details are many and stand by row.
    errors = pc.fill_null(rows["error"], "")
    reasons = pc.replace_substring_regex(errors, r"(?s):.*", "")
    tasks, task = _coded(rows["task"])
    splits, split = _coded(pc.fill_null(rows["split"], ""))
    distinct_reasons, reason = _coded(reasons)
    return PackedRows(
        count=len(rows),
        pair_id=_base64(rows["pair_id"].to_numpy().astype("<i8")),
        tasks=tasks,
        task=task,
        splits=splits,
        split=split,
        reasons=distinct_reasons,
        reason=reason,
        figures={name: _base64(figure) for name, figure in _figures(rows).items()},
        details=_details(errors.to_pylist()),
    )


def _coded(names: pa.ChunkedArray) -> tuple[tuple[str, ...], str]:
    """Return the distinct names, and the place of each name among them."""
    coded = pc.dictionary_encode(names).combine_chunks()
    # uint16 holds 65,536 names, more than there are tasks, splits and reasons.
    return tuple(coded.dictionary.to_pylist()), _base64(coded.indices.to_numpy().astype("<u2"))


def _figures(rows: pa.Table) -> dict[str, NDArray[np.float32]]:
    """Return the figures of all rows by name, float32 [rows]."""
    stored = {}
    for name in QUALITY:
        # NaN, not null: the browser reads the bytes as a Float32Array.
        column = pc.fill_null(pc.struct_field(rows["quality"], name), float("nan"))
        stored[name] = column.to_numpy().astype("<f4")
    # fmin takes the figure that is known where the other one is NaN.
    stored["end_psnr"] = np.fmin(stored["source_psnr"], stored["label_psnr"])
    # The quality of a chain is computed from several figures at once, row by row.
    qualities = np.full(len(rows), np.nan, "<f4")
    for index, figures in enumerate(rows["quality"].to_pylist()):
        quality = chain_quality(figures)
        if quality is not None:
            qualities[index] = quality
    stored["quality"] = qualities
    return {name: stored[name] for name in FIGURES}


def _details(errors: Sequence[str]) -> dict[int, str]:
    details = {}
    for index, error in enumerate(errors):
        detail = error.partition(":")[2].strip()
        if detail:
            details[index] = detail
    return details


def _base64(values: NDArray[Any]) -> str:
    return base64.b64encode(values.tobytes()).decode()
