"""The audit of a dataset: every pair that was asked for is in exactly one row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from covray.chains.dataset import shard_files, task_of
from covray.chains.records import Audit, TaskCounts
from covray.errors import DatasetError
from covray.io import storage

_UNREADABLE = (OSError, pa.ArrowInvalid)
_READERS = 16


def audit_dataset(out: str, pair_ids: np.ndarray, per_task: Mapping[str, int] | None = None) -> Audit:
    """Compare the shards of the dataset folder ``out`` with the manifest, and count them.

    ``pair_ids``: int64 ``[n]``, the manifest's, distinct; ``per_task``: its rows per task, compared when given.
    Reads only the narrow columns, file by file; memory is 24 bytes a row, more where something is wrong. Raises
    DatasetError that lists unreadable shards, missing, doubled and foreign pairs.
    """
    asked = np.sort(np.asarray(pair_ids, dtype=np.int64))
    if np.any(asked[1:] == asked[:-1]):
        raise ValueError("pair_ids are not distinct")
    found: list[np.ndarray] = []
    good: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = {}
    torn: list[str] = []
    for name, narrow in _read_narrow(out, ["pair_id", "error"]):
        if narrow is None:
            torn.append(name)
            continue
        task = task_of(name)
        found.append(narrow["pair_id"].to_numpy())
        errors = narrow["error"].cast(pa.string()).drop_null()
        good[task] += len(narrow) - len(errors)
        per_reason = reasons.setdefault(task, Counter())
        for entry in pc.value_counts(pc.replace_substring_regex(errors, r"(?s):.*", "")).to_pylist():
            per_reason[entry["values"]] += entry["counts"]

    rows = np.concatenate([np.zeros(0, np.int64), *found])
    del found
    rows.sort()
    problems = [] if not torn and np.array_equal(asked, rows) else _problems(asked, rows, torn)
    per_task_rows = {task: good[task] + counts.total() for task, counts in sorted(reasons.items())}
    if not problems and per_task is not None:
        expected = {task: rows for task, rows in sorted(per_task.items()) if rows}
        if per_task_rows != expected:
            problems.append(f"rows per task are {per_task_rows}, the manifest has {expected}")
    if problems:
        raise DatasetError(f"{out}: {'; '.join(problems)}; run the same covray build again")
    counts_per_task = {}
    for task, task_rows in per_task_rows.items():
        counts = reasons[task]
        counts_per_task[task] = TaskCounts(
            asked=task_rows, written=good[task], rejected=counts.total(), reasons=dict(sorted(counts.items()))
        )
    return Audit(
        asked=len(asked),
        written=good.total(),
        rejected=sum(counts.total() for counts in reasons.values()),
        per_task=counts_per_task,
    )


def unreadable_shards(out: str) -> list[str]:
    """Shards of ``out``, relative to it, that a killed writer left without a readable footer. A resume deletes them."""
    return [name for name, narrow in _read_narrow(out, []) if narrow is None]


def _read_narrow(out: str, columns: list[str]) -> Iterator[tuple[str, pa.Table | None]]:
    """``columns`` of every shard of ``out``, several at a time: of an object store each takes three requests."""
    filesystem, folder = storage.resolve(out)

    def read(name: str) -> pa.Table | None:
        try:
            with pq.ParquetFile(f"{folder}/{name}", filesystem=filesystem) as file:
                return file.read(columns=columns)
        except _UNREADABLE:
            return None

    names = shard_files(out)
    with ThreadPoolExecutor(_READERS) as readers:
        yield from zip(names, readers.map(read, names), strict=True)


def _problems(asked: np.ndarray, rows: np.ndarray, torn: list[str]) -> list[str]:
    distinct = np.unique(rows)
    lists = {
        "unreadable shards": torn,
        "pairs missing": np.setdiff1d(asked, distinct, assume_unique=True).tolist(),
        "rows doubled": rows[1:][rows[1:] == rows[:-1]].tolist(),
        "pairs not in the manifest": np.setdiff1d(distinct, asked, assume_unique=True).tolist(),
    }
    return [
        f"{len(items)} {what} ({', '.join(map(str, items[:3]))}{', ...' if len(items) > 3 else ''})"
        for what, items in lists.items()
        if items
    ]
