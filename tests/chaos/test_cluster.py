"""A cluster that grows with a build and shrinks after it; a node of it dies, then its head: the same command continues.

The nodes are processes of this machine, of Ray's fake provider, with the node types of ``cluster/gpu.yaml``.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from tests.support.chaos import folders_left
from tests.support.commands import COVRAY, FAST, RAY, Head, committed, computed, is_called, tokens_of, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end]
FAKE = Path(__file__).parents[2] / "cluster" / "fake.yaml"
SCENES = 16  # 112 pairs


def raylets(head: Head) -> list[psutil.Process]:
    """Of the nodes that came; the head's own is not among them."""
    return [raylet for raylet in head.processes() if is_called(raylet, "raylet") and _came(raylet)]


def actors(head: Head) -> list[psutil.Process]:
    """The actors at work, wherever they are."""
    found = []
    for raylet in raylets(head):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [child for child in raylet.children(recursive=True) if is_called(child, "ChainActor")]
    return found


def _came(raylet: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return raylet.environ().get("RAY_NODE_TYPE_NAME") == "spot"
    return False


def test_nodes_come_die_and_go(
    tmp_path: Path, scenes_manifest: Callable[..., Path], rng: random.Random, started: list[psutil.Process]
) -> None:
    pairs, out = scenes_manifest(SCENES), tmp_path / "chains"
    config = yaml.safe_load(FAKE.read_text())
    file = tmp_path / "fake.yaml"
    head = Head(
        tmp_path,
        "--num-cpus=2",
        "--num-gpus=0",
        "--object-store-memory=100000000",
        f"--autoscaling-config={file}",
        RAY_FAKE_CLUSTER="1",
        AUTOSCALER_UPDATE_INTERVAL_S="1",
    )
    for kind in config["available_node_types"].values():
        # All nodes share one machine: one CPU for the actor, and no further nodes for tasks that only wait.
        kind["resources"] |= {"CPU": 1, "object_store_memory": 10**8}
        kind["max_workers"] = 2 if "spot" in kind["resources"] else 0
    config["provider"]["gcs_address"] = f"127.0.0.1:{head.port}"
    file.write_text(yaml.safe_dump(config))
    # Without packages: the fake nodes share a folder for them, and one that comes deletes what others stand in.
    command = [RAY, "job", "submit", "--address", head.dashboard, "--", COVRAY, "build"]
    command += ["--pairs", str(pairs), "--out", str(out), *FAST]
    for key, value in {
        "rows_per_block": 8, "actors.node_type": "spot", "actors.gpus": 1, "actors.max": 2, "engine.device": "cpu",
    }.items():  # fmt: skip
        command += ["--set", f"{key}={value}"]

    def submit() -> subprocess.Popen[bytes]:
        with (tmp_path / "said").open("ab") as said:
            return subprocess.Popen(command, env=head.environment, stdout=said, stderr=said)

    try:
        head.start()
        job = submit()
        wait_for(lambda: len(actors(head)) == 2, "two actors on two nodes that came", job)
        assert len(raylets(head)) == 2
        wait_for(lambda: committed(out) >= 16 + 8 * rng.randrange(4), "some rows", job)
        started += head.processes()
        rng.choice(raylets(head)).kill()
        before = committed(out)
        wait_for(lambda: committed(out) >= before + 16, "rows after the loss of a node", job)
        started += head.processes()
        head.kill()
        assert job.wait(120) != 0
        assert committed(out) < SCENES * 7

        head.start()
        assert submit().wait(600) == 0, (tmp_path / "said").read_text()
        wait_for(lambda: not raylets(head), "the nodes have gone")
        started += head.processes()
    finally:
        head.stop()
    said = (tmp_path / "said").read_text()
    assert "continuing: " in said
    assert tokens_of(out) == computed(pairs)
    assert not folders_left(out)
