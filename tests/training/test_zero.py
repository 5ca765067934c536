"""DeepSpeed's update is the plain one, and its state the same, for every stage."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from covray.config import TrainConfig, load_config
from covray.errors import ConfigError
from covray.models.lvm.scales import llama_config
from covray.training.checkpoints import Checkpoints, State
from covray.training.metrics_log import read_metrics
from covray.training.run import train
from covray.training.worker import Signal, WorkerContext
from covray.training.zero import STAGES, check_settings, choose, read_settings

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is deprecated:FutureWarning", "ignore:.*is deprecated:DeprecationWarning"
)


def losses(config: TrainConfig) -> list[float]:
    return [record["loss"] for record in read_metrics(f"{config.out}/metrics.jsonl") if "loss" in record]


def last_state(config: TrainConfig) -> State:
    state, _ = Checkpoints(config.out, config.identity(), 1).read_last()
    assert state is not None
    return state


@pytest.mark.parametrize(("stage", "recompute"), [("zero1", False), ("zero2", False), ("zero3", True)])
def test_a_stage_makes_the_plain_losses_and_continues_a_plain_run(
    stage: str,
    recompute: bool,
    tiny_config: Callable[..., TrainConfig],
    process_group: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, mixed = tiny_config("plain"), tiny_config("mixed")
    whole = tiny_config("zero", compute__deepspeed=stage, compute__recompute=recompute)
    train(plain)
    train(whole)
    assert losses(whole) == pytest.approx(losses(plain), rel=1e-5)
    assert not hasattr(torch.ops.deepspeed, "inference_all_reduce_"), "a minute was spent on compiling it"
    monkeypatch.setattr("covray.training.trainer._POLL_SIGNAL_EVERY_S", -1.0)
    assert train(mixed, WorkerContext(poll_signal=lambda: Signal.STOP)) is None
    messages: list[str] = []
    train(tiny_config("mixed", compute__deepspeed=stage), WorkerContext(log=messages.append))
    assert losses(mixed) == pytest.approx(losses(plain), rel=1e-5)
    assert any(f"deepspeed was none, is {stage}" in message for message in messages)
    for config in (whole, mixed):
        state, expected = last_state(config), last_state(plain)
        assert state.tensors.keys() == expected.tensors.keys()
        for name, tensor in state.tensors.items():
            torch.testing.assert_close(tensor, expected.tensors[name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_bfloat16_stage_learns_and_keeps_float32_state(
    tiny_config: Callable[..., TrainConfig], process_group: None
) -> None:
    config = tiny_config(compute__deepspeed="zero2", compute__dtype="bfloat16")
    train(config)
    assert {tensor.dtype for tensor in last_state(config).tensors.values()} == {torch.float32}
    plain = tiny_config("plain", compute__dtype="bfloat16")
    train(plain)
    assert losses(config) == pytest.approx(losses(plain), rel=1e-2)


@pytest.mark.parametrize("stage", STAGES)
def test_the_shipped_settings_are_those_of_the_configs_folder(stage: str) -> None:
    copy = Path(__file__).parents[2] / "configs" / "deepspeed" / f"{stage}.json"
    assert json.loads(copy.read_text()) == read_settings(stage)
    assert read_settings(stage)["zero_optimization"]["stage"] == int(stage[4])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "not valid JSON"),
        ("{}", "has no zero_optimization"),
        ('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}', "sets bf16"),
        (
            '{"zero_optimization": {"stage": 2, "reduce_buckets": 5}}',
            "zero_optimization.reduce_buckets: DeepSpeed has no such key",
        ),
        ('{"zero_optimization": {"stage": 7}}', "zero_optimization.stage: Input should be 0, 1, 2, 3"),
    ],
)
def test_a_bad_file_of_settings_is_one_line(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=message) as refused:
        check_settings(str(file))
    assert "\n" not in str(refused.value)
    assert "mine.json" in str(refused.value)


GIB = 2**30


@pytest.mark.parametrize(
    ("scale", "workers", "gib", "recompute", "expected"),
    [
        ("nano", 2, None, False, "none"),
        ("7b", 8, None, False, "none"),
        ("300m", 1, 24, False, "none"),
        ("7b", 8, 80, False, "none"),
        ("7b", 8, 24, True, "none"),
        ("7b", 8, 16, True, "zero3"),
        ("7b", 2, 8, True, "zero3_offload"),
    ],
)
def test_the_stage_is_the_fastest_that_fits(
    scale: str, workers: int, gib: int | None, recompute: bool, expected: str
) -> None:
    options = {"data": "chains", "out": "run", "workers.count": workers, "compute.recompute": recompute}
    config = load_config(TrainConfig, None, options)
    assert choose(config, llama_config(scale), None if gib is None else gib * GIB) == expected


def test_without_deepspeed_a_stage_is_refused_in_one_line(
    tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name))
    advice = r"needs DeepSpeed, which is not installed; pip install deepspeed"
    with pytest.raises(ConfigError, match=rf"^compute\.deepspeed: zero2 {advice}"):
        check_settings("zero2")
    config, llama = tiny_config(), llama_config("7b")
    assert choose(config, llama, None) == "none"
    assert choose(config, llama, 2**50) == "none"
    with pytest.raises(ConfigError, match=rf"^compute\.deepspeed: auto chooses zero3_offload, which {advice}"):
        choose(config, llama, 2**20)
