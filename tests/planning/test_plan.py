"""The plan: what it says follows from what was asked, and what cannot be is one line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from covray.config import PlanConfig, load_config
from covray.errors import ConfigError
from covray.planning.plan import plan, train_config
from covray.planning.rates import nano_calibration
from tests.support.commands import Done

CONFIGS = Path(__file__).parents[2] / "configs" / "plan"
BASE = {
    "pairs": 20_000, "replicas": 4, "build.prior.path": "sd", "build_on.gpus": 16, "build_on.gpus_per_node": 4,
    "build_on.boot_s": 200, "build_on.price": 2, "build_on.interruptions": 0.5, "build_on.idle_timeout_s": 300,
}  # fmt: skip
TRAIN = {"steps": ["build", "train"], "train.backbone.scale": "7b", "train_on.gpus": 8, "train_on.gpu": "H100"}


def make(**options: Any) -> dict[str, Any]:
    return plan(load_config(PlanConfig, None, BASE | options)).to_json()


def test_what_is_paid_is_useful_lost_or_waiting_and_has_its_price() -> None:
    planned = make(**TRAIN, **{"train_on.price": 3.0, "train_on.interruptions": 0.2, "head_price": 0.5})
    for step, price in (("build", 2.0), ("train", 3.0)):
        figures = {key: value["mean"] for key, value in planned[step].items() if isinstance(value, dict)}
        parts = figures["useful_gpu_hours"] + figures["lost_gpu_hours"] + figures["waiting_gpu_hours"]
        assert figures["gpu_hours"] == pytest.approx(parts)
        assert figures["money"] == pytest.approx(figures["gpu_hours"] * price + figures["hours"] * 0.5)
        assert figures["lost_gpu_hours"] > 0
        assert planned[step]["hours"]["low"] < figures["hours"] < planned[step]["hours"]["high"]
    assert planned["rates"] == "assumed"


def test_the_nano_family_is_planned_from_rates_that_are_shipped_and_marked() -> None:
    planned = make(**{"build.prior.path": "nano", "steps": ["build", "train"], "train_on.gpu": "no such GPU"})
    assert re.fullmatch(r"measured on .*, 2\d{3}-\d\d-\d\d", planned["rates"])
    rates = nano_calibration().build
    assert rates is not None
    row_s = rates.row_s / rates.evaluations * planned["build"]["unet_evaluations"] / 20_000
    assert planned["build"]["seconds_per_pair"] == pytest.approx(row_s)
    slower = make(**{"build.prior.path": "nano", "build.engine.threads": 2})["build"]
    assert any("engine.threads was 1, is 2" in note for note in slower["notes"])
    mixed = make(steps=["build", "train"])
    assert mixed["rates"] == f"build: assumed; train: {planned['rates']}"


def test_a_plan_of_a_training_needs_no_rates_of_a_build() -> None:
    unknown = {"build.prior.size_px": 384, "build_on.gpu": "abacus"}
    assert make(**TRAIN | {"steps": ["train"]}, **unknown)["train"] == make(**TRAIN | {"steps": ["train"]})["train"]


def test_useful_hours_are_the_pairs_whatever_happens_to_the_machines() -> None:
    for interruptions in (0, 2):
        planned = make(**{"build_on.interruptions": interruptions})["build"]
        expected = 20_000 * planned["seconds_per_pair"] / 3600
        assert planned["useful_gpu_hours"]["low"] == pytest.approx(expected)
        assert planned["useful_gpu_hours"]["high"] == pytest.approx(expected)


def test_more_gpus_are_faster_and_hardly_cheaper() -> None:
    plans = [make(**{"build_on.gpus": gpus, "build_on.interruptions": 0})["build"] for gpus in (8, 32, 128)]
    hours = [planned["hours"]["mean"] for planned in plans]
    assert hours == sorted(hours, reverse=True)
    assert plans[0]["useful_gpu_hours"]["mean"] == pytest.approx(plans[-1]["useful_gpu_hours"]["mean"])
    assert plans[0]["gpu_hours"]["mean"] < plans[-1]["gpu_hours"]["mean"]


def test_the_plan_is_the_seeds() -> None:
    assert make(**TRAIN) == make(**TRAIN)
    assert make(seed=1)["build"]["hours"] != make(seed=2)["build"]["hours"]


def test_shards_are_the_blocks_tasks_and_bytes_grow_with_pairs() -> None:
    sorted_by_task, mixed = make()["build"], make(tasks_per_block=7)["build"]
    assert sorted_by_task["shards"] == sorted_by_task["blocks"] == -(-20_000 // 64)
    assert mixed["shards"] == 7 * sorted_by_task["shards"]
    assert mixed["audit_hours"] == pytest.approx(7 * sorted_by_task["audit_hours"])
    assert mixed["shard_bytes"] > sorted_by_task["shard_bytes"]
    assert make(pairs=40_000)["build"]["shard_bytes"] == pytest.approx(2 * sorted_by_task["shard_bytes"], rel=0.01)


def test_notes_name_what_limits_a_step() -> None:
    assert make()["build"]["notes"] == []
    assert "the driver hands out 0.01" in make(driver_blocks_per_s=0.01)["build"]["notes"][0]
    assert "the audit of" in make(**{"assumed.audit_shard_s": 100})["build"]["notes"][0]
    losses = make(**TRAIN, train_pairs=700_000, **{"train_on.interruptions": 1})["train"]
    assert "workers.max_failures is 3" in losses["notes"][0]


def test_the_training_has_the_steps_of_its_own_plan() -> None:
    planned = make(**TRAIN, train_pairs=8400, **{"train.optimizer.epochs": 2})["train"]
    assert planned["train_steps"] == 2 * 8400 / 84, "84 sentences of 2048 tokens a step"
    assert planned["tokens"] == 2 * 8400 * 2048
    assert planned["useful_gpu_hours"]["mean"] * 3600 >= planned["tokens"] / planned["tokens_per_s_per_gpu"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 0}, r"^pairs: "),
        ({"build_on.gpus": 10}, r"^build_on: gpus \(10\) are not whole nodes of gpus_per_node \(4\)"),
        ({"build_on.interruptions": -1}, r"^build_on\.interruptions: "),
        ({"build_on.colour": 1}, r"^build_on\.colour: no such key in PlanConfig"),
        ({"build.colour": 1}, r"^build: colour: no such key in BuildConfig"),
        ({"build.pairs": "x"}, r"^build\.pairs: is not for a plan"),
        ({"steps": ["train"], "train.workers.count": 3}, r"^train\.workers\.count: is not for a plan"),
        ({"steps": []}, "^steps: name build, train or vlm"),
        ({"build_on.gpu": "abacus"}, r"^build_on\.gpu: the peak of abacus is not known"),
        ({"build.prior.size_px": 384}, r"^build\.prior: FLOPs are known for"),
        ({"build_on.interruptions": 100, "build.rows_per_block": 2000}, r"^build_on\.interruptions: .*hardly anything"),
        ({"pairs": 10**11}, r"^build\.rows_per_block: 1,562,500,000 blocks of 64 pairs, 4 times, are more than can be"),
        ({"build_on.boot_s": 1e6}, r"^build_on\.interruptions: .*hardly anything"),
        (
            {"build_on.gpus": 1600, "build_on.interruptions": 9, "driver_blocks_per_s": 0.1, "replicas": 1},
            r"^build_on\.interruptions: .* nodes were taken away and",
        ),
        (
            {**TRAIN, "steps": ["train"], "train.optimizer.steps": 10**9, "train_on.interruptions": 1},
            r"^train_on\.interruptions: about .* nodes would be lost",
        ),
        ({"calibration": "/nowhere.yaml"}, r"^calibration /nowhere\.yaml: cannot be read"),
    ],
)
def test_what_cannot_be_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        make(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"train_pairs": 10**11},
        {"train.optimizer.steps": 10**9, "train_on.interruptions": 1e-6},
        {"train.optimizer.epochs": 1e6, "pairs": 10**6},
        {"pairs": 10**11, "build.rows_per_block": 100_000, "replicas": 1, "build_on.gpus": 4, "steps": ["build"]},
    ],
)
def test_the_largest_plans_are_made_at_once(options: dict[str, Any]) -> None:
    planned = make(**{**TRAIN, "steps": ["train"], "build_on.interruptions": 0} | options)
    for step in planned.keys() & {"build", "train"}:
        assert all(math.isfinite(figure["mean"]) for figure in planned[step].values() if isinstance(figure, dict))


def test_what_is_null_in_a_section_is_null_in_what_is_planned() -> None:
    """A training without validation has no pauses for one."""
    sections = {**TRAIN, "steps": ["train"], "train.validate_every_steps": 1}
    hours = [make(**sections, **{"train.sentences.validation_split": split})["train"] for split in (None, "val")]
    assert hours[0]["hours"]["mean"] < 0.9 * hours[1]["hours"]["mean"]
    config = load_config(PlanConfig, None, {"train": {"sentences": {"validation_split": None}, "optimizer": None}})
    assert train_config(config).sentences.validation_split is None


def test_the_command_prints_one_object_and_a_mistake_is_one_line(
    run: Callable[..., Done], mistake: Callable[..., str]
) -> None:
    few = ("--set", "replicas=1", "--pairs", 20_000)
    done = run("plan", "build", "--json", "--config", CONFIGS / "ten-million.yaml", *few, "--gpus", 64)
    planned = json.loads(done.out)
    assert (done.code, planned["build"]["pairs"], "train" in planned) == (0, 20_000, False)
    shown = run("plan", "build", "--config", CONFIGS / "ten-million.yaml", *few)
    assert "rates: assumed" in shown.out
    for key in planned["build"].keys() - {"notes"}:
        assert key.replace("_", " ") in shown.out
    assert "steps" in mistake("plan", "sweep")
    assert "build_on" in mistake("plan", "--gpus", 3, "--config", CONFIGS / "ten-million.yaml")
