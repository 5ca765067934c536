"""Kill an append: the larger manifest's new pairs are computed once, and the finished version stays as it was."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from covray.pairs.manifest import ManifestWriter
from covray.pairs.scenes import scene_pairs
from tests.support.chaos import folders_left
from tests.support.commands import COVRAY, FAST, committed, computed, environment, tokens_of, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end]


def test_an_append_that_is_killed_computes_only_what_is_new(tmp_path: Path, run_on_ray: Any, run_here: Any) -> None:
    manifests, out = tmp_path / "manifests", tmp_path / "chains"
    manifests.mkdir()

    def write(name: str, seed: int) -> None:
        with ManifestWriter(str(manifests / name)) as writer:
            for pair in scene_pairs(2, seed=seed):
                writer.add(pair)

    build = ["build", "--manifest", str(manifests), "--out", str(out), "--actors", "1", *FAST]
    build += ["--set", "rows_per_block=3", "--json"]
    write("a.parquet", 0)
    run_on_ray(*build)
    first, shards = tokens_of(out), sorted(out.rglob("*.parquet"))
    write("b.parquet", 1)
    appending = subprocess.Popen(
        [COVRAY, *build, "--append"], env=environment(**run_on_ray.keywords), stdout=subprocess.DEVNULL
    )
    wait_for(lambda: committed(out) >= 17, "a block more than the 14 rows of the first version", appending)
    appending.kill()
    assert appending.wait(120) != 0
    assert tokens_of(out) == first, "readers see the finished version"
    audit = json.loads(run_on_ray(*build, "--append").stdout.splitlines()[-1])

    assert audit["asked"] == 28
    assert [version["asked"] for version in audit["versions"]] == [14, 28]
    assert audit["rows_of_earlier_runs"] >= 17
    assert tokens_of(f"{out}@1") == first
    assert [file for file in shards if file.exists()] == shards, "the first version's files are left as they are"
    whole = tokens_of(out)
    assert whole == computed(manifests / "a.parquet") | computed(manifests / "b.parquet")
    assert not folders_left(out)
    assert json.loads(run_here(*build).stdout.splitlines()[-1]) == audit, "a finished append is left as it is"
