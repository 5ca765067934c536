"""Pairs made by a pool: killed and resumed they are the bytes that one process writes."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from covray.distributed.pairs import parts_folder
from tests.support.commands import COVRAY, committed, environment, kill_all, run, wait_for
from tests.support.photographs import photo, save

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end]


def test_killed_and_resumed_pairs_are_the_bytes_of_one_process(
    tmp_path: Path, run_here: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    for number in range(40):
        save(tmp_path / f"photos{number % 2}" / f"{number}.png", photo(number, 240, 320))
    (tmp_path / "photos1" / "broken.png").write_text("no picture")
    source = ("pairs", "photos", str(tmp_path / "photos0"), str(tmp_path / "photos1"))
    alone, pooled = tmp_path / "alone.parquet", tmp_path / "pooled.parquet"
    run_here(*source, "--out", str(alone))
    command = [*source, "--actors", "2", "--out", str(pooled)]
    parts = Path(parts_folder(str(pooled)))
    killed = subprocess.Popen([COVRAY, *command], env=environment(), stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: committed(parts) > 0, "a block is committed", killed)
    finally:
        kill_all([killed])
    assert 0 < committed(parts) < 41, "killed at work"
    assert not pooled.exists()
    refused = run_here(*command, "--size", "256", code=2)
    assert "was begun with another configuration: size_px" in refused.stderr
    resumed = run(*command)
    assert "of 41 photographs are written already" in resumed.stderr
    assert pooled.read_bytes() == alone.read_bytes()
    assert not parts.exists()
