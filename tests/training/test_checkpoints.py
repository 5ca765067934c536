"""The run folder: whole checkpoints only, and a curve without gaps or repetition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from covray.config import TrainConfig
from covray.errors import ConfigError
from covray.training.checkpoints import Curve, State, read_last_checkpoint, read_records, write_checkpoint


def state(step: int, best: int | None = None) -> State:
    generator = torch.Generator().manual_seed(step)
    tensors = {name: torch.randn(3, 2, generator=generator) for name in ("a", "a.exp_avg", "a.exp_avg_sq")}
    return State(step, 5 * step, tensors, {"step": best, "validation_loss": 1.5} if best else None, {"workers": 1})


def test_a_checkpoint_comes_back_as_it_was(tiny_config: Callable[..., TrainConfig]) -> None:
    config = tiny_config()
    written = state(7, best=7)
    write_checkpoint(config, written, {"adapter_config.json": b"{}"})
    read, torn = read_last_checkpoint(config)
    assert read is not None
    assert not torn
    assert (read.step, read.cursor, read.best, read.how) == (7, 35, written.best, written.how)
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in written.tensors.items())


def test_only_the_last_and_the_best_stay_and_later_ones_go(tiny_config: Callable[..., TrainConfig]) -> None:
    config = tiny_config(checkpoints__keep=2)
    for step in (2, 4, 6, 8):
        write_checkpoint(config, state(step, best=2), {})
    folder = Path(config.out, "checkpoints")
    assert sorted(entry.name[-1] for entry in folder.iterdir()) == ["2", "6", "8"]
    (folder / "step-00000008" / "state.safetensors").write_bytes(b"torn")
    assert read_last_checkpoint(config)[1] == ["step-00000008"]
    write_checkpoint(config, state(7, best=2), {})  # what a run writes that went on from 6
    assert sorted(entry.name[-1] for entry in folder.iterdir()) == ["2", "6", "7"]


def test_a_checkpoint_of_another_configuration_is_refused_with_what_differs(
    tiny_config: Callable[..., TrainConfig],
) -> None:
    write_checkpoint(tiny_config(), state(1), {})
    with pytest.raises(ConfigError, match=r"lora.rank was 4, is 8.*; give the same, or another --out") as refused:
        read_last_checkpoint(tiny_config(lora__rank=8))
    assert "\n" not in str(refused.value)


def test_the_curve_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    curve = Curve(str(tmp_path), None)
    for step in range(1, 6):
        curve.add({"step": step, "loss": 0.1})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "lo')  # killed in the middle of a line
    again = Curve(str(tmp_path), 3)
    again.add({"step": 4, "loss": 0.2})
    assert [(record["step"], record["loss"]) for record in read_records(again.path)] == [
        (1, 0.1), (2, 0.1), (3, 0.1), (4, 0.2),
    ]  # fmt: skip
    again.close()
    Curve(str(tmp_path), None).close()
    assert read_records(again.path) == [], "without a checkpoint the run begins again"


def test_a_curve_in_a_store_without_appending_is_there_after_a_flush(tmp_path: Path) -> None:
    out = f"file://{tmp_path}"  # a URI: written as to an object store
    curve = Curve(out, None)
    for step in (1, 2, 3):
        curve.add({"step": step, "loss": 0.1})
    curve.flush()
    assert [record["step"] for record in read_records(f"{out}/metrics.jsonl")] == [1, 2, 3]
    assert [record["step"] for record in Curve(out, 2).records] == [1, 2]
