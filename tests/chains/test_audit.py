from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from covray.chains.audit import audit_dataset
from covray.chains.shard_rows import shard_schema
from covray.errors import DatasetError

Writer = Callable[..., tuple[str, list[dict[str, Any]]]]


def _ids(rows: list[dict[str, Any]]) -> np.ndarray:
    return np.array([row["pair_id"] for row in rows])


def test_counts_add_up_per_task_and_reason(write_dataset: Writer) -> None:
    rejects = {0: "missing: a: b", 1: "missing: c\nline two: d", 2: "empty: e", 6: "missing: f"}
    out, rows = write_dataset({"depth": 5, "edges": 3}, rejects=rejects, finished=False)
    audit = audit_dataset(out, _ids(rows)[::-1], {"depth": 5, "edges": 3, "pose": 0})
    assert (audit.asked, audit.written, audit.rejected) == (8, 4, 4)
    assert audit.to_json()["per_task"] == {
        "depth": {"asked": 5, "written": 2, "rejected": 3, "reasons": {"empty": 1, "missing": 2}},
        "edges": {"asked": 3, "written": 2, "rejected": 1, "reasons": {"missing": 1}},
    }


def test_missing_doubled_and_foreign_pairs_are_listed_with_their_ids(write_dataset: Writer) -> None:
    out, rows = write_dataset({"depth": 6}, finished=False)
    ids = _ids(rows)
    with pytest.raises(DatasetError, match=r"1 pairs missing \(12345\); run the same covray build again"):
        audit_dataset(out, np.append(ids, 12345))
    with pytest.raises(DatasetError, match=rf"1 pairs not in the manifest \({ids[0]}\)"):
        audit_dataset(out, ids[1:])
    pq.write_table(pa.Table.from_pylist(rows[2:4], shard_schema(False)), Path(out, "shards/task=depth/again.parquet"))
    doubled = ", ".join(str(pair_id) for pair_id in sorted(ids[2:4].tolist()))
    with pytest.raises(DatasetError, match=rf"2 rows doubled \({doubled}\)"):
        audit_dataset(out, ids)


def test_incomplete_shards_are_named(write_dataset: Writer) -> None:
    out, rows = write_dataset({"depth": 6}, finished=False)
    assert audit_dataset(out, _ids(rows)).written == 6
    whole = Path(out, "shards/task=depth/part-0.parquet").read_bytes()
    damaged = {"a.parquet": whole[: len(whole) // 2], "b.parquet": b"", "c.parquet": whole[:-1]}
    for name, data in damaged.items():
        Path(out, "shards/task=depth", name).write_bytes(data)
    Path(out, "shards/task=depth/.part-0.parquet").write_bytes(b"a writer's own, put aside")
    listed = ", ".join(f"shards/task=depth/{name}" for name in damaged)
    with pytest.raises(DatasetError, match=re.escape(f"3 unreadable shards ({listed})")):
        audit_dataset(out, _ids(rows))


def test_rows_in_the_wrong_task_are_seen(write_dataset: Writer) -> None:
    out, rows = write_dataset({"depth": 4, "edges": 2}, finished=False)
    with pytest.raises(DatasetError, match="rows per task"):
        audit_dataset(out, _ids(rows), {"depth": 3, "edges": 3})


def test_an_empty_folder_lacks_everything(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="3 pairs missing"):
        audit_dataset(str(tmp_path), np.array([1, 2, 3]))
    assert audit_dataset(str(tmp_path), np.zeros(0, np.int64)).asked == 0


def test_a_manifest_with_double_ids_is_a_bug_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="distinct"):
        audit_dataset(str(tmp_path), np.array([1, 1]))
