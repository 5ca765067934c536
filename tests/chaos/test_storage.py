"""Storage that is slow, refuses, goes away or is full: the same command continues, and no half file counts."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from covray.io import storage
from tests.support.chaos import S3, folders_left
from tests.support.commands import COVRAY, FAST, computed, environment, run, tokens_of, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end]


def committed(out: str) -> int:
    """Rows of a build on any storage whose files are committed."""
    filesystem, inner = storage.resolve(storage.join(out, "_checkpoint"))
    names = [name for name in storage.list_files(f"{out}/_checkpoint", ".parquet") if "pending" not in name]
    return sum(pq.read_metadata(f"{inner}/{name}", filesystem=filesystem).num_rows for name in names)


def test_a_build_on_s3_outlives_its_outages(s3: S3, scenes_manifest: Callable[..., Path], rng: random.Random) -> None:
    manifest = scenes_manifest(9)  # 63 pairs
    storage.write_bytes("s3://covray/in/pairs.parquet", manifest.read_bytes())
    out = "s3://covray/out/chains"
    command = [COVRAY, "build", "--pairs", "s3://covray/in/pairs.parquet", "--out", out, *FAST]
    command += ["--set", "rows_per_block=8"]
    s3.refusals = 0.02

    build = subprocess.Popen(command, env=environment())
    wait_for(lambda: committed(out) >= 16, "16 rows", build)
    s3.stop()
    time.sleep(rng.uniform(2, 8))
    s3.start()
    before = committed(out)
    wait_for(lambda: committed(out) > before, "rows after the outage", build)
    s3.stop()
    time.sleep(rng.uniform(0, 3))
    build.kill()
    build.wait()
    s3.start()
    assert committed(out) < 63
    run(*command[1:])
    assert not storage.list_files(f"{out}/_checkpoint")

    assert len(tokens_of(out)) == 63
    assert tokens_of(out) == computed(manifest)


def test_a_build_on_a_full_disk_is_one_line_and_continues_when_there_is_room(
    tmp_path: Path, scenes_manifest: Callable[..., Path]
) -> None:
    """A disk of our own, in a namespace of mounts that ends with the script: nothing else sees it."""
    own_mounts = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*own_mounts, "true"], check=False).returncode:
        pytest.skip("this kernel gives no namespace of mounts to its users")
    manifest, disk, kept = scenes_manifest(12), tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    build = f"{COVRAY} build --pairs {manifest} --out {disk}/chains --set rows_per_block=8 {' '.join(FAST)}"
    script = f"""
        mount -t tmpfs -o size=192k none {disk}
        {build} 2> {tmp_path}/said; echo $? > {tmp_path}/code
        mount -o remount,size=64m none {disk}
        {build} && cp -r {disk}/chains {kept}
    """
    done = subprocess.run(
        [*own_mounts, "sh", "-c", script], env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "code").read_text() == "2\n"
    lines = (tmp_path / "said").read_text().splitlines()
    assert "storage failed (No space left on device)" in lines[-1]
    assert lines[-1].startswith("covray: ")
    assert not any("Traceback" in line for line in lines)
    assert "continuing" in done.stderr
    assert tokens_of(kept) == computed(manifest)
    assert not folders_left(kept)
