"""DeepSpeed's update is the plain one, and its state the same, for every stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from covray.config import TrainConfig, load_config
from covray.errors import ConfigError
from covray.models.lvm.scales import llama_config
from covray.training.checkpoints import read_last_checkpoint, read_records
from covray.training.trainer import Place, Wish, train
from covray.training.zero import STAGES, choose, read_settings

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is deprecated:FutureWarning", "ignore:.*is deprecated:DeprecationWarning"
)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one worker: DeepSpeed's arithmetic and state without the time that starting processes takes."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LOCAL_RANK", "0")  # as Ray Train sets it; DeepSpeed asks for it
        # ZeRO-3 puts a function of its own here for the whole process: put back what other tests measure.
        environment.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)
        yield
    dist.destroy_process_group()


def losses(config: TrainConfig) -> list[float]:
    return [record["loss"] for record in read_records(f"{config.out}/metrics.jsonl") if "loss" in record]


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
    monkeypatch.setattr("covray.training.trainer._ASK_EVERY_S", -1.0)
    assert train(mixed, Place(ask=lambda: Wish.STOP)) is None
    notices: list[str] = []
    train(tiny_config("mixed", compute__deepspeed=stage), Place(notice=notices.append))
    assert losses(mixed) == pytest.approx(losses(plain), rel=1e-5)
    assert any(f"deepspeed was none, is {stage}" in notice for notice in notices)
    for config in (whole, mixed):
        state, due = read_last_checkpoint(config)[0], read_last_checkpoint(plain)[0]
        assert state is not None
        assert due is not None
        assert state.tensors.keys() == due.tensors.keys()
        for name, tensor in state.tensors.items():
            torch.testing.assert_close(tensor, due.tensors[name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_bfloat16_stage_learns_and_keeps_float32_state(
    tiny_config: Callable[..., TrainConfig], process_group: None
) -> None:
    config = tiny_config(compute__deepspeed="zero2", compute__dtype="bfloat16")
    train(config)
    state, _ = read_last_checkpoint(config)
    assert state is not None
    assert {tensor.dtype for tensor in state.tensors.values()} == {torch.float32}
    plain = tiny_config("plain", compute__dtype="bfloat16")
    train(plain)
    assert losses(config) == pytest.approx(losses(plain), rel=1e-2)


@pytest.mark.parametrize("stage", STAGES)
def test_the_shipped_settings_are_those_of_the_configs_folder(stage: str) -> None:
    copy = Path(__file__).parents[2] / "configs" / "deepspeed" / f"{stage}.json"
    assert json.loads(copy.read_text()) == read_settings(stage)
    assert read_settings(stage)["zero_optimization"]["stage"] == int(stage[4])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        ("{", "not valid JSON"),
        ("{}", "has no zero_optimization"),
        ('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}', "sets bf16"),
    ],
)
def test_a_bad_file_of_settings_is_one_line(content: str | None, says: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=says) as refused:
        read_settings(str(file))
    assert "\n" not in str(refused.value)
    assert "mine.json" in str(refused.value)


GIB = 2**30


@pytest.mark.parametrize(
    ("scale", "workers", "gib", "recompute", "due"),
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
    scale: str, workers: int, gib: int | None, recompute: bool, due: str
) -> None:
    options = {"data": "chains", "out": "run", "workers.count": workers, "compute.recompute": recompute}
    config = load_config(TrainConfig, None, options)
    assert choose(config, llama_config(scale), None if gib is None else gib * GIB) == due
