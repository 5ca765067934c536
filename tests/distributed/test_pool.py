"""The pool of actors: how large, where it may write, what a failure is called."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.exceptions

from covray.config import BuildConfig
from covray.distributed import pool as pool_module
from covray.distributed.pool import (
    CommittedRows,
    choose_rows_per_block,
    finish_commits,
    gpus_of,
    one_line_errors,
    pool_of,
)
from covray.errors import DatasetError, WeightsError
from covray.io.storage import Folder


def config(**values: Any) -> BuildConfig:
    return BuildConfig(pairs="pairs", out="out", **values)


@pytest.mark.parametrize(
    ("resources", "cores", "actors", "cpus"),
    [
        ({"CPU": 4}, 2, 2, 1.0),  # a Ray of our own on two cores
        ({"CPU": 2}, 2, 2, 0.0),  # a head of two CPUs: all of them stay for reading, or a resume would hang
        ({"CPU": 3}, 3, 3, 0.33),
        ({"CPU": 64}, 64, 64, 0.96),
    ],
)
def test_the_pool_leaves_room_for_reading(
    monkeypatch: pytest.MonkeyPatch, resources: dict[str, float], cores: int, actors: int, cpus: float
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    pool = pool_of(config().actors, config().engine, cores, gpus=0)
    assert (pool["compute"].max_size, pool["num_cpus"]) == (actors, cpus)
    assert pool["num_cpus"] * actors <= max(0, resources["CPU"] - 2) or pool["num_cpus"] == 0
    assert "num_gpus" not in pool


def test_the_pool_takes_every_gpu_or_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 32, "GPU": 4})
    assert gpus_of(config().actors, config().engine) == 1
    assert gpus_of(config().actors, config(engine={"device": "cpu"}).engine) == 0
    assert gpus_of(config(actors={"gpus": 0.5}).actors, config().engine) == 0.5
    halves = pool_of(config(actors={"gpus": 0.5}).actors, config().engine, 32, 0.5)
    assert (halves["compute"].max_size, halves["num_gpus"]) == (8, 0.5)
    more = pool_of(config(actors={"min": 2, "max": 64}).actors, config().engine, 32, 1.0)
    assert (more["compute"].min_size, more["compute"].max_size, more["compute"].initial_size) == (2, 64, 64)


def test_what_fails_in_a_worker_is_one_line() -> None:
    def raised(error: Exception) -> str:
        with pytest.raises((DatasetError, WeightsError)) as caught, one_line_errors("out", "build"):
            raise error
        assert "\n" not in str(caught.value)
        return f"{caught.type.__name__} {caught.value}"

    wrapped = ray.exceptions.RayTaskError("f", "Traceback\n  File x\n", WeightsError("unet/config.json: missing"))
    assert raised(wrapped.as_instanceof_cause()) == "WeightsError unet/config.json: missing"
    full = ray.exceptions.RayTaskError("f", "Traceback\n", OSError(errno.ENOSPC, "No space left on device"))
    assert "out: storage failed (No space left on device)" in raised(full.as_instanceof_cause())
    assert "run the same command again" in raised(full.as_instanceof_cause())
    assert "boom" in raised(ValueError("first\nboom"))


@pytest.mark.parametrize(
    ("rows", "actors", "fewest", "expected"),
    [
        (60, 2, 8, 8),  # several blocks for each of two actors
        (60, 1, 8, 15),
        (60, 2, 40, 30),  # batches would be fuller, but one actor would have nothing to do
        (60, 1, 64, 30),  # progress is seen
        (1, 8, 8, 1),
        (10**6, 2, 8, 64),
        (10**6, 1000, 8, 64),
        (1000, 1000, 1, 1),
    ],
)
def test_all_actors_have_blocks_and_full_batches_where_there_are_rows(
    rows: int, actors: int, fewest: int, expected: int
) -> None:
    chosen = choose_rows_per_block(None, rows, actors, fewest)
    assert chosen == expected
    assert -(-rows // chosen) >= min(rows, actors, 2 * actors)
    assert choose_rows_per_block(64, rows, actors, fewest) == 64, "what a user says holds"


def test_written_rows_are_counted_and_no_file_is_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "_checkpoint"
    committed = CommittedRows(Folder(str(tmp_path)))
    assert committed.count() == 0
    checkpoint.mkdir()
    reads: list[str] = []
    read = pq.read_metadata
    monkeypatch.setattr(pool_module.pq, "read_metadata", lambda path, **more: reads.append(path) or read(path, **more))
    for number, rows in enumerate((3, 5), 1):
        pq.write_table(pa.table({"pair_id": range(rows)}), checkpoint / f"{number}.parquet")
        pq.write_table(pa.table({"pair_id": range(rows)}), checkpoint / f"{number}x.pending.parquet")
        assert committed.count() == sum((3, 5)[:number])
        assert len(reads) == number


def test_a_commit_that_was_cut_short_is_finished(tmp_path: Path) -> None:
    checkpoint = tmp_path / "_checkpoint"
    checkpoint.mkdir()
    for name in ("a.parquet", "a.pending.parquet", "b.pending.parquet", "c.parquet"):
        (checkpoint / name).touch()
    finish_commits(Folder(str(tmp_path)))
    assert sorted(file.name for file in checkpoint.iterdir()) == ["a.parquet", "b.pending.parquet", "c.parquet"]
    finish_commits(Folder(str(tmp_path / "absent")))
