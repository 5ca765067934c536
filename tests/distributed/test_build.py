"""What a build decides before it computes: the pool, what a resume may change, what a failure is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from covray.chains.records import DatasetRecord
from covray.config import BuildConfig
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


def test_the_plan_counts_inversions_frames_and_checks(tmp_path: Path) -> None:
    with ManifestWriter(str(tmp_path / "pairs.parquet")) as writer:
        for number in range(10):
            writer.add(Pair("depth", "train", Picture(uri=f"{number}.png"), Picture(uri="label.png")))
    common: dict[str, Any] = {"pairs": str(tmp_path / "pairs.parquet"), "out": "out", "check_endpoints": 0.5}
    assert plan_build(BuildConfig(**common)).unet_evaluations == 10 * (2 + 1 + 2) * 50
    assert plan_build(BuildConfig(**common, methods=("linear",))).unet_evaluations == 0
    assert plan_build(BuildConfig(**common, lengths=(2,))).unet_evaluations == 0
