"""What a build decides before it computes: the pool, what a resume may change, what a failure is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from covray.chains.records import DatasetRecord
from covray.config import BuildConfig, PriorConfig
from covray.config.build import with_solver
from covray.distributed.build import plan_build
from covray.distributed.resumable import Output
from covray.errors import DatasetError
from covray.pairs.manifest import ManifestWriter, Pair, Picture


def config(**values: Any) -> BuildConfig:
    return BuildConfig(pairs="pairs", out="out", **values)


def test_a_resume_must_agree_in_everything_that_decides_tokens() -> None:
    begun = config(lengths=(4,), engine={"batch": 32, "device": "cpu", "dtype": "float32"})
    same = config(lengths=(4,), rows_per_block=7, actors={"max": 3})
    output = Output("out", DatasetRecord, "covray build")
    output.require_same(begun.identity(), same.identity(), open_matches=True)
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
            output.require_same(begun.identity(), other.identity(), open_matches=True)


def test_a_resume_must_agree_in_the_solver_and_an_older_dataset_is_of_ddim() -> None:
    output = Output("out", DatasetRecord, "covray build")

    def require(begun: BuildConfig, current: BuildConfig) -> None:
        pairs = (with_solver(begun.identity()), with_solver(current.identity()))
        output.require_same(*pairs, open_matches=True)

    plain = config()
    older = plain.identity()
    assert older["prior"] == {"path": "nano", "revision": None, "size_px": None, "steps": 50}  # as before solvers
    for values, key in (({"solver": "dpm", "steps": 50}, "prior.solver"), ({"evaluations": 16}, "prior.evaluations")):
        other = config(prior=values)
        for begun, current in ((plain, other), (other, plain)):
            with pytest.raises(DatasetError, match=f"{key} was"):
                require(begun, current)
        require(other, other)
    require(plain, config(prior={"solver": "ddim", "evaluations": 50}))


def test_the_plan_counts_inversions_frames_and_checks(tmp_path: Path) -> None:
    with ManifestWriter(str(tmp_path / "pairs.parquet")) as writer:
        for number in range(10):
            writer.add(Pair("depth", "train", Picture(uri=f"{number}.png"), Picture(uri="label.png")))
    common: dict[str, Any] = {"pairs": str(tmp_path / "pairs.parquet"), "out": "out", "check_endpoints": 0.5}
    assert plan_build(BuildConfig(**common)).unet_evaluations == 10 * (2 + 1 + 2) * 50
    assert plan_build(BuildConfig(**common, methods=("linear",))).unet_evaluations == 0
    for values, evaluations, solver in (
        ({"solver": "dpm"}, 12, "12 DPM-Solver++ steps"),
        ({"evaluations": 16}, 16, "50 DDIM steps, 16 of them evaluated"),
    ):
        plan = plan_build(BuildConfig(**common, prior=PriorConfig(**values)))
        assert (plan.unet_evaluations, plan.solver) == (10 * (2 + 1 + 2) * evaluations, solver)
    assert plan_build(BuildConfig(**common, lengths=(2,))).unet_evaluations == 0
