"""DeepSpeed's update is the plain one, and its state the same, for every stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from covray.config import TrainConfig
from covray.errors import ConfigError
from covray.training.loop import Place, Wish, train
from covray.training.state import read_last_checkpoint, read_records
from covray.training.zero import STAGES, read_settings, require_compiler


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one worker: DeepSpeed's arithmetic and state without the time that starting processes takes."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LOCAL_RANK", "0")  # as Ray Train sets it; DeepSpeed asks for it
        yield
    dist.destroy_process_group()


def losses(config: TrainConfig) -> list[float]:
    return [record["loss"] for record in read_records(f"{config.out}/metrics.jsonl") if "loss" in record]


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_a_stage_makes_the_plain_losses_and_continues_a_plain_run(
    stage: str, tiny_config: Callable[..., TrainConfig], process_group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, whole, mixed = tiny_config("plain"), tiny_config("zero", compute__deepspeed=stage), tiny_config("mixed")
    train(plain)
    train(whole)
    assert losses(whole) == pytest.approx(losses(plain), rel=1e-5)
    monkeypatch.setattr("covray.training.loop._ASK_EVERY_S", -1.0)
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
