"""What the end-to-end tests share: the console script, run as a user would, and manifests of rendered scenes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from covray.pairs.manifest import ManifestWriter
from covray.pairs.scenes import scene_pairs
from covray.tokens.shards import ChainDataset

COVRAY = str(Path(sys.executable).parent / "covray")
FAST = ("--lengths", "3", "--set", "prior.steps=5", "--set", "engine.batch=16")
"""Fewer steps than anyone would build with: the tests ask whether rows are lost, not how frames look."""


def environment(**changes: str) -> dict[str, str]:
    """The environment of a command: no cluster of others, one thread of OpenMP, this virtual environment first.

    A job's ``python`` is the one on its head's PATH, and tests run without the environment being activated.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return kept | {"OMP_NUM_THREADS": "1", "PATH": path} | changes


def run(*arguments: str, code: int = 0, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run ``covray`` to its end and check its exit code."""
    done = subprocess.run(
        [COVRAY, *arguments], capture_output=True, text=True, env=environment(**changes), timeout=600, check=False
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def tokens_of(dataset: Path) -> dict[int, Any]:
    """Everything that a pair's identity promises, by pair."""
    rows = ChainDataset(str(dataset)).rows(errors=True)
    found: dict[int, Any] = {}
    for row in rows:
        assert row["pair_id"] not in found, f"pair {row['pair_id']} is there twice"
        frames = row["frames"] or []
        found[row["pair_id"]] = (
            row["task"],
            row["split"],
            row["error"],
            None if row["source"] is None else row["source"].tobytes(),
            None if row["label"] is None else row["label"].tobytes(),
            tuple((frame["method"], frame["alpha"], frame["tokens"].tobytes()) for frame in frames),
        )
    return found


def committed(out: Path) -> int:
    """Rows of a build or an evaluation whose files are committed."""
    files = [file for file in (out / "_checkpoint").glob("*.parquet") if not file.name.endswith(".pending.parquet")]
    return sum(pq.read_metadata(file).num_rows for file in files)


def actors_of(driver: subprocess.Popen[bytes], name: str) -> list[psutil.Process]:
    """The processes of the actors of class ``name`` in the Ray that ``driver`` started."""
    children = psutil.Process(driver.pid).children(recursive=True)
    return [child for child in children if any(name in word for word in child.cmdline()[:1])]


@pytest.fixture
def scenes_manifest(tmp_path: Path) -> Callable[..., Path]:
    """Writes a manifest of rendered scenes, seven pairs each."""

    def write(scenes: int, name: str = "pairs.parquet", reverse: bool = False) -> Path:
        pairs = list(scene_pairs(scenes))
        with ManifestWriter(str(tmp_path / name)) as writer:
            for pair in reversed(pairs) if reverse else pairs:
                writer.add(pair)
        return tmp_path / name

    return write
