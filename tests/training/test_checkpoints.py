"""The checkpoints of a run folder: only whole ones of the same configuration are read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from covray.config import TrainConfig
from covray.errors import ConfigError
from covray.io.storage import Folder
from covray.training.checkpoints import Checkpoints, State
from covray.training.records import BestValidation


def state(step: int, best: int | None = None) -> State:
    generator = torch.Generator().manual_seed(step)
    tensors = {name: torch.randn(3, 2, generator=generator) for name in ("a", "a.exp_avg", "a.exp_avg_sq")}
    validation = None if best is None else BestValidation(step=best, validation_loss=1.5)
    return State(step, 5 * step, tensors, validation, {"workers": 1})


def checkpoints_of(config: TrainConfig) -> Checkpoints:
    return Checkpoints(config.out, config.identity(), config.checkpoints.keep)


def test_a_checkpoint_comes_back_as_it_was(tiny_config: Callable[..., TrainConfig]) -> None:
    checkpoints = checkpoints_of(tiny_config())
    written = state(7, best=7)
    checkpoints.write(written, {"adapter_config.json": b"{}"})
    read, corrupt = checkpoints.read_last()
    assert read is not None
    assert not corrupt
    assert (read.step, read.cursor, read.best, read.numerics) == (7, 35, written.best, written.numerics)
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in written.tensors.items())


def test_only_the_last_and_the_best_stay_and_later_ones_go(tiny_config: Callable[..., TrainConfig]) -> None:
    config = tiny_config(checkpoints__keep=2)
    for step in (2, 4, 6, 8):
        checkpoints_of(config).write(state(step, best=2), {})
    folder = Path(config.out, "checkpoints")
    assert sorted(entry.name[-1] for entry in folder.iterdir()) == ["2", "6", "8"]
    (folder / "step-00000008" / "state.safetensors").write_bytes(b"corrupt")
    assert checkpoints_of(config).read_last()[1] == ["step-00000008"]
    checkpoints_of(config).write(state(7, best=2), {})  # as a run that continued from 6
    assert sorted(entry.name[-1] for entry in folder.iterdir()) == ["2", "6", "7"]


def test_what_else_lies_beside_checkpoints_is_left_alone(tiny_config: Callable[..., TrainConfig]) -> None:
    config = tiny_config(checkpoints__keep=1)
    checkpoints_of(config).write(state(2), {})
    folder = Path(config.out, "checkpoints")
    shutil.copytree(folder / "step-00000002", folder / "step-00000002.good")
    (folder / ".DS_Store").write_bytes(b"a file manager's")
    checkpoints_of(config).write(state(4), {})
    assert sorted(entry.name for entry in folder.iterdir()) == [".DS_Store", "step-00000002.good", "step-00000004"]
    read, corrupt = checkpoints_of(config).read_last()
    assert read is not None
    assert (read.step, corrupt) == (4, [])


def test_a_checkpoint_of_another_configuration_is_refused_with_what_differs(
    tiny_config: Callable[..., TrainConfig],
) -> None:
    checkpoints_of(tiny_config()).write(state(1), {})
    with pytest.raises(ConfigError, match=r"lora.rank was 4, is 8.*; give the same, or another --out") as refused:
        checkpoints_of(tiny_config(lora__rank=8)).read_last()
    assert "\n" not in str(refused.value)


def test_storage_that_fails_does_not_make_a_checkpoint_corrupt(
    tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = checkpoints_of(tiny_config())
    checkpoints.write(state(1), {})

    def read_json(folder: Folder, name: str) -> None:
        raise OSError("503 Slow Down")

    monkeypatch.setattr(Folder, "read_json", read_json)
    with pytest.raises(OSError, match="503"):
        checkpoints.read_last()


def test_the_result_is_a_copy_of_what_the_checkpoint_exports(tiny_config: Callable[..., TrainConfig]) -> None:
    config = tiny_config(checkpoints__keep=2)
    for step in (2, 4):
        checkpoints_of(config).write(state(step), {"weights": b"%d" % step, "about.json": b"{}"})
    folder = checkpoints_of(config).export(2)
    assert folder == f"{config.out}/adapter"
    assert {file.name: file.read_bytes() for file in Path(folder).iterdir()} == {"weights": b"2", "about.json": b"{}"}
