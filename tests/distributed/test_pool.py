"""The pool of actors: how large, where it may write, what a failure is called."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.exceptions

from covray.config import BuildConfig
from covray.distributed.pool import finish_commits, gpus_of, one_line_errors, pool_of, require_fresh
from covray.errors import ConfigError, DatasetError, WeightsError


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


def test_an_output_of_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DatasetError, match="holds files"):
        require_fresh(str(tmp_path), "dataset")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        require_fresh(str(tmp_path / "file" / "out"), "dataset")


def test_a_commit_that_was_cut_short_is_finished(tmp_path: Path) -> None:
    checkpoint = tmp_path / "_checkpoint"
    checkpoint.mkdir()
    for name in ("a.parquet", "a.pending.parquet", "b.pending.parquet", "c.parquet"):
        (checkpoint / name).touch()
    finish_commits(str(tmp_path))
    assert sorted(file.name for file in checkpoint.iterdir()) == ["a.parquet", "b.pending.parquet", "c.parquet"]
    finish_commits(str(tmp_path / "absent"))
