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
from covray.io.storage import Folder

_UNREADABLE = (OSError, pa.ArrowInvalid)
_READERS = 16
_LISTED = 3  # ids of each kind of problem in a message


def audit_dataset(out: str, pair_ids: np.ndarray, per_task: Mapping[str, int] | None = None, version: int = 1) -> Audit:
    """Compare the shards of a dataset folder with its manifest, and count them.

    Reads only the narrow columns, file by file; memory is 24 bytes a row, more where something is wrong.

    Args:
        out: The dataset folder.
        pair_ids: Those of the manifest, distinct, int64 [n].
        per_task: The manifest's rows by task; None: not compared.
        version: The version of the dataset: its shards and those of the versions before it are read.

    Raises:
        DatasetError: Shards are unreadable, or pairs are missing, doubled or not in the manifest; the message lists
            some of each.
    """
    # The ids of both sides are compared sorted: no table of ids by pair, which would take several times the memory.
    expected = np.sort(np.asarray(pair_ids, dtype=np.int64))
    if np.any(expected[1:] == expected[:-1]):
        raise ValueError("pair_ids are not distinct")

    ids_of_shards: list[np.ndarray] = []
    good: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = {}
    unreadable: list[str] = []
    for name, narrow in _read_narrow(Folder(out), ["pair_id", "error"], version):
        if narrow is None:
            unreadable.append(name)
            continue
        task = task_of(name)
        ids_of_shards.append(narrow["pair_id"].to_numpy())
        errors = narrow["error"].cast(pa.string()).drop_null()
        good[task] += len(narrow) - len(errors)
        of_task = reasons.setdefault(task, Counter())
        # An error is REASON: DETAIL, and only reasons are counted.
        reasons_of_rows = pc.replace_substring_regex(errors, r"(?s):.*", "")
        for entry in pc.value_counts(reasons_of_rows).to_pylist():
            of_task[entry["values"]] += entry["counts"]

    # The empty array gives a dataset without shards a dtype.
    rows = np.concatenate([np.zeros(0, np.int64), *ids_of_shards])
    del ids_of_shards  # half of the memory
    rows.sort()
    problems: list[str] = []
    if unreadable or not np.array_equal(expected, rows):
        # The lists of what is wrong take several times the memory: they are made only where something is.
        problems = _problems(expected, rows, unreadable)

    counts = {}
    for task in sorted(reasons):
        counts[task] = _counts(good[task], reasons[task])
    # A row in the folder of another task changes no id: the ids alone would not show it.
    if not problems and per_task is not None:
        problems = _task_problems(counts, per_task)
    if problems:
        raise DatasetError(f"{out}: {'; '.join(problems)}; run the same covray build again")
    rejected = 0
    for of_task_counts in counts.values():
        rejected += of_task_counts.rejected
    return Audit(asked=len(expected), written=good.total(), rejected=rejected, per_task=counts)


def _counts(good: int, reasons: Counter[str]) -> TaskCounts:
    rejected = reasons.total()
    return TaskCounts(asked=good + rejected, written=good, rejected=rejected, reasons=dict(sorted(reasons.items())))


def _read_narrow(folder: Folder, columns: list[str], version: int) -> Iterator[tuple[str, pa.Table | None]]:
    """Yield ``columns`` of every shard of a version, None for one that cannot be read.

    Several are read at a time, because each takes three requests of an object store.
    """

    def read(name: str) -> pa.Table | None:
        try:
            with pq.ParquetFile(folder.inner_path(name), filesystem=folder.filesystem) as file:
                return file.read(columns=columns)
        except _UNREADABLE:
            return None

    names = shard_files(folder, version)
    with ThreadPoolExecutor(_READERS) as readers:
        yield from zip(names, readers.map(read, names), strict=True)


def _problems(expected: np.ndarray, rows: np.ndarray, unreadable: list[str]) -> list[str]:
    """Say what is wrong with the pair ids of all ``rows``; both arrays are int64 and ascending."""
    distinct = np.unique(rows)
    lists = {
        "unreadable shards": unreadable,
        "pairs missing": np.setdiff1d(expected, distinct, assume_unique=True).tolist(),
        # Sorted, so that a doubled row stands beside its twin.
        "rows doubled": rows[1:][rows[1:] == rows[:-1]].tolist(),
        "pairs not in the manifest": np.setdiff1d(distinct, expected, assume_unique=True).tolist(),
    }
    problems = []
    for problem, items in lists.items():
        if items:
            listed = [str(item) for item in items[:_LISTED]]
            if len(items) > _LISTED:
                listed.append("...")
            problems.append(f"{len(items)} {problem} ({', '.join(listed)})")
    return problems


def _task_problems(counts: Mapping[str, TaskCounts], per_task: Mapping[str, int]) -> list[str]:
    """Say where rows are in the folder of another task than the manifest's."""
    rows = {task: of_task.asked for task, of_task in counts.items()}
    # A task without pairs has no folder.
    expected = {task: count for task, count in sorted(per_task.items()) if count}
    if rows == expected:
        return []
    return [f"rows per task are {rows}, the manifest has {expected}"]
