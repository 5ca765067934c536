"""What a build decides before it computes: the pool, what a resume may change, what a failure is called."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.exceptions

from covray.config import BuildConfig
from covray.distributed import build as module
from covray.distributed.build import plan_build
from covray.errors import ConfigError, DatasetError, WeightsError
from covray.pairs.manifest import ManifestWriter, Pair, Picture


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
    pool = module._pool(config(), cores, gpus=0)
    assert (pool["compute"].max_size, pool["num_cpus"]) == (actors, cpus)
    assert pool["num_cpus"] * actors <= max(0, resources["CPU"] - 2) or pool["num_cpus"] == 0
    assert "num_gpus" not in pool


def test_the_pool_takes_every_gpu_or_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 32, "GPU": 4})
    assert module._gpus(config()) == 1
    assert module._gpus(config(engine={"device": "cpu"})) == 0
    assert module._gpus(config(actors={"gpus": 0.5})) == 0.5
    halves = module._pool(config(actors={"gpus": 0.5}), 32, 0.5)
    assert (halves["compute"].max_size, halves["num_gpus"]) == (8, 0.5)
    more = module._pool(config(actors={"min": 2, "max": 64}), 32, 1.0)
    assert (more["compute"].min_size, more["compute"].max_size, more["compute"].initial_size) == (2, 64, 4)


def test_a_resume_must_agree_in_everything_that_decides_tokens() -> None:
    begun = config(lengths=(4,), engine={"batch": 32, "device": "cpu", "dtype": "float32"})
    same = config(lengths=(4,), rows_per_block=7, actors={"max": 3})
    module._require_same(same, begun.identity(), same.identity(), open_matches=True)
    for values, key in (
        ({"lengths": (4, 8)}, "lengths"),
        ({"methods": ("linear",)}, "methods"),
        ({"prior": {"steps": 25}}, "prior.steps"),
        ({"engine": {"batch": 16}}, "engine.batch"),
        ({"engine": {"threads": 2}}, "engine.threads"),
        ({"fit": "crop"}, "fit"),
    ):
        other = config(**{"lengths": (4,), **values})
        with pytest.raises(DatasetError, match=f"{key} was"):
            module._require_same(other, begun.identity(), other.identity(), open_matches=True)


def test_what_fails_in_a_worker_is_one_line() -> None:
    def raised(error: Exception) -> str:
        with pytest.raises((DatasetError, WeightsError)) as caught, module._one_line_errors(config()):
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
        module._require_fresh(BuildConfig(pairs="p", out=str(tmp_path)))
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        module._require_fresh(BuildConfig(pairs="p", out=str(tmp_path / "file" / "out")))


def test_the_plan_counts_inversions_frames_and_checks(tmp_path: Path) -> None:
    with ManifestWriter(str(tmp_path / "pairs.parquet")) as writer:
        for number in range(10):
            writer.add(Pair("depth", "train", Picture(uri=f"{number}.png"), Picture(uri="label.png")))
    common: dict[str, Any] = {"pairs": str(tmp_path / "pairs.parquet"), "out": "out", "check_endpoints": 0.5}
    assert plan_build(BuildConfig(**common)).unet_evaluations == 10 * (2 + 1 + 2) * 50
    assert plan_build(BuildConfig(**common, methods=("linear",))).unet_evaluations == 0
    assert plan_build(BuildConfig(**common, lengths=(2,))).unet_evaluations == 0
