"""What a benchmark makes of measured times: the rates that they follow from."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from covray.chains.records import Audit
from covray.config import BuildConfig, PlanConfig, TrainConfig, load_config
from covray.distributed import benchmark
from covray.distributed.benchmark import MeasuredBuild, MeasuredCheckpoint, build_rates, calibrate, train_rates
from covray.distributed.progress import BlockReport, ProgressActor
from covray.errors import ConfigError, CovrayError
from covray.planning.plan import plan
from covray.planning.rates import Calibration, write_calibration
from covray.planning.simulation import BuildWork, Fleet, simulate_build
from covray.training.metrics_log import Metrics

START_S, LOAD_S, ROW_S, WARM_UP_S, AUDIT_SHARD_S = 14.0, 8.0, 0.5, 3.0, 0.01


def built(blocks: int, actors: int = 2, rows: int = 8) -> MeasuredBuild:
    """What would be measured of a build with these rates, an actor's first block longer than the others."""
    progress = ProgressActor()
    for number in range(blocks):
        first = number < actors
        begin = progress.created + LOAD_S + (0 if first else WARM_UP_S) + number // actors * rows * ROW_S
        end = begin + rows * ROW_S + (WARM_UP_S if first else 0)
        progress.report(BlockReport(f"{number % actors}", begin, end, rows, 0, rows * 200))
    usage = progress.usage()
    audit_s = blocks * AUDIT_SHARD_S
    return MeasuredBuild(
        audit=Audit(asked=blocks * rows, written=blocks * rows, rejected=0, per_task={}, **asdict(usage)),
        wall_s=START_S + (usage.last_block_s or 0.0) + audit_s,
        audit_s=audit_s,
        rows=blocks * rows,
        shards=blocks,
        row_bytes=700 * blocks * rows,
        other_bytes=5000 * blocks,
        tokens_per_image=64,
    )


def test_a_build_s_time_comes_apart_into_its_rates() -> None:
    rates = build_rates(BuildConfig(pairs="p", out="o", rows_per_block=8), [built(4), built(12)])
    assert rates.row_s == pytest.approx(ROW_S)
    assert rates.load_s == pytest.approx(LOAD_S + WARM_UP_S, abs=0.02)
    assert rates.start_s == pytest.approx(START_S, abs=0.02)
    assert (rates.audit_shard_s, rates.row_bytes, rates.shard_bytes) == (AUDIT_SHARD_S, 700, 5000)
    assert (rates.actors, rates.evaluations, rates.pictures) == (2, 200, 6)


def test_the_plan_of_a_build_that_was_measured_is_its_time(tmp_path: Path) -> None:
    large = built(30)
    config = BuildConfig(pairs="p", out="o", rows_per_block=8, check_endpoints=0.0)
    path = str(tmp_path / "calibration.yaml")
    rates = build_rates(config, [built(4), built(12)])
    write_calibration(path, Calibration(hardware="here", date="2026-11-21", build=rates))
    options = {
        "pairs": 240, "calibration": path, "build.rows_per_block": 8, "build.check_endpoints": 0.0,
        "build_on.gpus": 2, "build_on.gpus_per_node": 2,
    }  # fmt: skip
    planned = plan(load_config(PlanConfig, None, options)).to_json()
    assert planned["rates"] == "measured on here, 2026-11-21"
    assert planned["build"]["hours"]["mean"] * 3600 == pytest.approx(large.wall_s, abs=0.1)
    assert planned["build"]["shard_bytes"] == 240 * 700 + 30 * 5000
    alone = simulate_build(BuildWork(240, 8, ROW_S), Fleet(1, 2), np.random.default_rng(0))
    assert planned["build"]["useful_gpu_hours"]["mean"] * 3600 == pytest.approx(alone.busy_s)


def test_a_training_s_time_comes_apart_into_its_rates() -> None:
    """Steps of 2 s after a first of 7, a pause of 5 s every fourth, of which the checkpoint is 1."""
    records: list[tuple[float, Metrics]] = [(20.0, {"step": 0, "validation_loss": 1.0})]
    now = 20.0
    for step in range(1, 13):
        seconds = 7.0 if step == 1 else 2.0
        now += seconds
        records.append((now, {"step": step, "loss": 1.0, "seconds": seconds, "tokens": 8000, "sentences": 16}))
        if step % 4 == 0:
            now += 5.0
            records.append((now, {"step": step, "validation_loss": 1.0}))
    config = TrainConfig(data="d", out="o", workers={"count": 2})
    rates = train_rates(config, records, now + 3, 32, MeasuredCheckpoint(1.0, 1000))
    assert rates.token_s == pytest.approx(2 * 2 / 8000)
    assert rates.validation_token_s == pytest.approx(4 * 2 / (32 * 500))
    assert (rates.checkpoint_s, rates.checkpoint_bytes, rates.workers) == (1, 1000, 2)
    assert rates.start_s == pytest.approx(20 + 3 + (7 - 2)), "what is left is paid at every start"


@pytest.mark.parametrize("pairs", [[56], [168, 56], [0, 168], [7, 56], [56, 168, 700]])
def test_two_sizes_are_asked_for_before_anything_starts(pairs: list[int], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--pairs .*: give two numbers"):
        calibrate(PlanConfig(), str(tmp_path / "work"), pairs)


def test_a_folder_of_another_benchmark_is_not_touched(tmp_path: Path) -> None:
    mine = tmp_path / "rates.yaml.work" / "mine"
    mine.parent.mkdir()
    mine.write_text("x")
    with pytest.raises(ConfigError, match="is left of a benchmark"):
        calibrate(PlanConfig(), str(tmp_path / "rates.yaml"))
    assert mine.read_text() == "x"


@pytest.mark.parametrize(
    ("out", "train", "message"),
    [
        ("rates.yaml", {"optimizer": {"learning_rte": 1}}, "^train: optimizer.learning_rte: no such key"),
        ("rates.yaml", {"backbone": {"path": "./absent"}}, "absent: no such folder"),
        ("rates.yaml", {"compute": {"deepspeed": "zero9"}}, "zero9 is none of"),
        ("rates.yaml", {"sentences": {"lengths": [6]}}, "^train.sentences: has lengths or a method"),
        ("rates.yaml", {"sentences": {"pairs": [63]}}, r"^sentences: 4 pictures x \(63 \+ 1\) chains x 64 tokens"),
        ("rates.yaml", {"sentences": {"validation_split": "test"}}, "^train.sentences: .* not test"),
        ("s3://bucket/rates.yaml", {}, "^train.tracking.uri: "),
        ("folder", {}, "is a folder"),
        ("folder/file/rates.yaml", {}, "cannot be written"),
        ("/proc/rates.yaml", {}, "cannot be written"),
    ],
)
def test_what_could_lose_the_measurements_is_found_before_the_first_build(
    out: str, train: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("")
    monkeypatch.setattr("covray.distributed.benchmark._measure_build", lambda *_: pytest.fail("a build was begun"))
    with pytest.raises(CovrayError, match=message) as error:
        calibrate(PlanConfig(steps=("build", "train"), train=train), out)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.parametrize(
    ("cpuinfo", "processor"),
    [("model name\t: A Chip @ 2GHz\nmodel name\t: A Chip @ 2GHz\n", "A Chip @ 2GHz"), ("processor\t: 0\n", "arm64")],
)
def test_hardware_has_its_cores_also_where_they_have_no_names(
    monkeypatch: pytest.MonkeyPatch, cpuinfo: str, processor: str
) -> None:
    file = SimpleNamespace(exists=lambda: True, read_text=lambda: cpuinfo)
    monkeypatch.setattr(benchmark, "Path", lambda _: file)
    monkeypatch.setattr(benchmark.platform, "processor", lambda: "")
    monkeypatch.setattr(benchmark.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(benchmark.os, "cpu_count", lambda: 64)
    assert benchmark.hardware().startswith(f"{processor}, 64 cores")
