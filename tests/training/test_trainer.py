"""The loop: the same curve however often it is stopped, however many workers share a step."""

from __future__ import annotations

import json
import math
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from covray.chains.dataset import ChainDataset
from covray.chains.loading import Chains
from covray.chains.sentences import Sentences, loss_tokens, micro_batches, step_bounds
from covray.config import TrainConfig
from covray.errors import ConfigError
from covray.models.lvm.model import Batch
from covray.training.metrics_log import read_metrics
from covray.training.objectives.visual_sentences import VisualSentences, answer_positions
from covray.training.optimizers import PlainUpdate, learning_rate
from covray.training.run import train
from covray.training.trainer import peak_flops
from covray.training.worker import Signal, WorkerContext
from tests.support.datasets import TOKENS
from tests.support.trainings import STEPS, curve, stop_after

GOLDEN = Path(__file__).parent / "golden_losses.json"


def objective_of(config: TrainConfig) -> VisualSentences:
    return VisualSentences(config, torch.device("cpu"))


def test_the_golden_losses_are_made_again(tiny_config: Callable[..., TrainConfig]) -> None:
    """A change that is not meant to change the numbers does not.

    Tolerance: another CPU adds in another order. What that is worth grows with the learning rate: at 3e-2 an EPYC was
    1.6% from a Xeon after twenty steps, at 5e-3 two instruction sets are 1e-7 apart.
    """
    config = tiny_config(optimizer__steps=20, optimizer__learning_rate=5e-3, validate_every_steps=20)
    result = train(config)
    assert result is not None
    losses = [record["loss"] for record in curve(config) if "loss" in record]
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())["losses"], rel=1e-4)
    assert losses[-1] < losses[0] - 0.3, "it learns"
    assert result.validation_loss is not None
    assert result.validation_loss_before is not None
    assert result.validation_loss < result.validation_loss_before


def test_a_run_stopped_after_every_step_equals_an_undisturbed_one(
    tiny_config: Callable[..., TrainConfig], poll_every_step: None
) -> None:
    config, whole = tiny_config("often"), tiny_config("whole")
    for _ in range(STEPS - 1):
        stop_after(config, 1)
    result, expected = train(config), train(whole)
    assert result is not None
    assert expected is not None
    assert curve(config) == curve(whole), "to the bit"
    steps = [record["step"] for record in curve(config) if "loss" in record]
    assert steps == list(range(1, STEPS + 1)), "every step is there once"
    adapters = [Path(run.out, "adapter", "adapter_model.safetensors").read_bytes() for run in (config, whole)]
    assert adapters[0] == adapters[1]
    assert result.answer_perplexity == expected.answer_perplexity
    assert train(config) == result, "a finished run only gives its result again"


@pytest.mark.parametrize(
    "damage", ["no state.json", "corrupt tensors", "corrupt state.json", "missing adapter", "a flipped bit"]
)
def test_a_corrupt_checkpoint_is_skipped(
    damage: str, tiny_config: Callable[..., TrainConfig], poll_every_step: None
) -> None:
    config, whole = tiny_config("corrupt"), tiny_config("whole")
    stop_after(config, 5)  # checkpoints after 4 and 5
    folder = Path(config.out, "checkpoints", "step-00000005")
    file = folder / {
        "corrupt tensors": "state.safetensors",
        "a flipped bit": "state.safetensors",
        "missing adapter": "adapter_model.safetensors",
    }.get(damage, "state.json")
    data = file.read_bytes()
    if damage.startswith("corrupt"):
        file.write_bytes(data[:-20])
    elif damage == "a flipped bit":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        file.unlink()
    messages: list[str] = []
    train(config, WorkerContext(log=messages.append))
    train(whole)
    assert any("step-00000005 is incomplete or corrupt" in message for message in messages)
    assert any("after step 4" in message for message in messages)
    assert curve(config) == curve(whole)


def test_the_user_is_told_of_a_batch_too_large_for_the_data(tiny_config: Callable[..., TrainConfig]) -> None:
    messages: list[str] = []
    train(
        tiny_config("few", optimizer__steps=None, optimizer__batch_tokens=100_000), WorkerContext(log=messages.append)
    )
    assert [message for message in messages if "takes 1 steps of 100000 tokens" in message]
    messages.clear()
    train(tiny_config("as asked for"), WorkerContext(log=messages.append))
    assert not messages


def test_a_tuning_goes_on_from_an_adapter_and_is_continued(
    tiny_config: Callable[..., TrainConfig], poll_every_step: None
) -> None:
    first = tiny_config("first")
    train(first)
    path = f"{first.out}/adapter"
    whole, killed = tiny_config("whole", lora__path=path), tiny_config("killed", lora__path=path)
    result = train(whole)
    assert result is not None
    # It begins where the first one ended: at its best validation, not at the backbone's.
    checks = [record["validation_loss"] for record in curve(first) if "validation_loss" in record]
    assert result.validation_loss_before == pytest.approx(min(checks[1:]), rel=1e-6)
    assert result.validation_loss_before < checks[0] - 0.01
    stop_after(killed, 3)
    train(killed)
    assert curve(killed) == curve(whole)


def test_other_numerics_are_logged_and_continue(tiny_config: Callable[..., TrainConfig], poll_every_step: None) -> None:
    config, whole = tiny_config("other"), tiny_config("whole")
    stop_after(config, 3)
    messages: list[str] = []
    train(tiny_config("other", optimizer__micro_batch_tokens=5 * 96), WorkerContext(log=messages.append))
    train(whole)
    assert any("micro_batch_tokens was 192, is 480" in message for message in messages)
    losses = [[record["loss"] for record in curve(run) if "loss" in record] for run in (config, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_last_and_the_best_checkpoints_are_kept(
    tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, poll_every_step: None
) -> None:
    # After three steps nothing changes any more: as good is not better.
    monkeypatch.setattr("covray.training.trainer.learning_rate", lambda config, step, steps: 1e-2 * (step <= 3))
    config = tiny_config(validate_every_steps=1, checkpoints__every_steps=1, checkpoints__keep=1)
    stop_after(config, 4)  # which was best must survive that
    result = train(config)
    assert result is not None
    checks = [record for record in curve(config) if "validation_loss" in record and record["step"]]
    best = min(checks, key=lambda record: float(record["validation_loss"]))["step"]
    assert best <= 3
    kept = sorted(folder.name for folder in Path(config.out, "checkpoints").iterdir())
    assert kept == [f"step-{best:08d}", f"step-{STEPS:08d}"]
    assert result.adapter_step == best
    assert result.validation_loss == min(record["validation_loss"] for record in checks)


def test_a_warning_of_preemption_saves_once_and_goes_on(
    tiny_config: Callable[..., TrainConfig], poll_every_step: None
) -> None:
    config = tiny_config(checkpoints__every_steps=100, validate_every_steps=100, checkpoints__keep=10)
    signals = iter([Signal.CONTINUE, Signal.SAVE, Signal.SAVE, Signal.SAVE, Signal.CONTINUE, Signal.CONTINUE])
    assert train(config, WorkerContext(poll_signal=lambda: next(signals))) is not None
    kept = sorted(folder.name for folder in Path(config.out, "checkpoints").iterdir())
    assert kept == ["step-00000002", f"step-{STEPS:08d}"]


def test_a_warning_that_stands_while_steps_go_by_unpolled_saves_once(
    tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def poll_after_even_steps(config: Any, step: int, steps: int) -> float:
        monkeypatch.setattr("covray.training.trainer._POLL_SIGNAL_EVERY_S", math.inf if step % 2 else -1.0)
        return 1e-3

    monkeypatch.setattr("covray.training.trainer.learning_rate", poll_after_even_steps)
    config = tiny_config(checkpoints__every_steps=100, validate_every_steps=100, checkpoints__keep=10)
    polled: list[Signal] = []

    def poll_signal() -> Signal:
        polled.append(Signal.SAVE)
        return Signal.SAVE

    assert train(config, WorkerContext(poll_signal=poll_signal)) is not None
    assert 2 <= len(polled) < STEPS
    kept = sorted(folder.name for folder in Path(config.out, "checkpoints").iterdir())
    assert kept == ["step-00000002", f"step-{STEPS:08d}"]


@pytest.mark.parametrize("loss", ["all", "chains", "chain", "answer"])
def test_workers_and_micro_batches_only_change_the_order_of_sums(
    loss: str, tiny_config: Callable[..., TrainConfig]
) -> None:
    config = tiny_config(sentences__loss=loss, sentences__lengths=[2, 3], sentences__pairs=[0, 1])
    objective = objective_of(config)
    sentences = objective.training
    last = step_bounds(sentences, 0, 5 * 96)
    expected = None
    for world, micro_tokens in ((1, 10**6), (1, 1), (2, 192), (3, 96)):
        update = PlainUpdate(objective, config.optimizer)
        total = 0.0
        for rank in range(world):  # one after another into one buffer, which is what the all-reduce sums
            for batch in micro_batches(sentences, 0, last, rank, world, micro_tokens):
                total += float(update.accumulate(batch, loss_tokens(sentences, 0, last), False))
        gradients = update.gradients.clone()
        expected = (total, gradients) if expected is None else expected
        assert total == pytest.approx(expected[0], rel=1e-5)
        torch.testing.assert_close(gradients, expected[1], rtol=1e-4, atol=1e-6)


def test_the_update_is_torchs_clipping_and_adamw(tiny_config: Callable[..., TrainConfig]) -> None:
    config = tiny_config(optimizer__clip=0.01, optimizer__weight_decay=0.1)
    ours, theirs = objective_of(config), objective_of(config)
    sentences = ours.training
    update = PlainUpdate(ours, config.optimizer)
    parameters = list(theirs.parameters().values())
    reference = torch.optim.AdamW(
        parameters, lr=1e-2, betas=config.optimizer.betas, weight_decay=config.optimizer.weight_decay
    )
    for first in range(3):
        (batch,) = micro_batches(sentences, first, first + 1, 0, 1, 1)
        assert batch is not None
        tokens = loss_tokens(sentences, first, first + 1)
        update.accumulate(batch, tokens, True)
        norm = update.step(1e-2)
        (theirs.model(batch)[0] / tokens).backward()
        assert norm == pytest.approx(float(clip_grad_norm_(parameters, config.optimizer.clip)), rel=1e-5)
        assert norm > config.optimizer.clip, "else nothing is clipped"
        reference.step()
        reference.zero_grad()
    for name, parameter in ours.parameters().items():
        torch.testing.assert_close(parameter, theirs.parameters()[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_bfloat16_backbone_trains_a_float32_adapter(tiny_config: Callable[..., TrainConfig]) -> None:
    config = tiny_config(compute__dtype="bfloat16")
    objective = objective_of(config)
    update = PlainUpdate(objective, config.optimizer)
    (batch,) = micro_batches(objective.training, 0, 1, 0, 1, 1)
    update.accumulate(batch, 10, True)
    for name, parameter in objective.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, name
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32, name
        else:
            assert parameter.dtype == torch.bfloat16, name
            assert parameter.grad is None, name
    assert update.gradients.abs().sum() > 0
    assert math.isfinite(update.step(1e-3))


def test_answers_are_the_last_pictures(tiny_config: Callable[..., TrainConfig]) -> None:
    config = tiny_config(sentences__lengths=[2, 3], sentences__pairs=[0, 1])
    (batch,) = micro_batches(objective_of(config).training, 0, 6, 0, 1, 10**6)
    assert batch is not None
    expected = torch.zeros(len(batch.ids), dtype=torch.bool)
    start = 0
    for length in batch.lengths:
        expected[start + length - TOKENS : start + length] = True
        start += length
    assert len(set(batch.lengths)) > 1
    assert torch.equal(answer_positions(batch, TOKENS), expected[batch.positions + 1])


def test_validation_is_the_mean_over_each_sentence_alone(tiny_config: Callable[..., TrainConfig]) -> None:
    config = tiny_config(optimizer__steps=1, validation_sentences=4)
    train(config)
    model = objective_of(config).model
    chains = Chains.load(ChainDataset(config.data), config.sentences, "val")
    sentences = Sentences(chains, config.sentences, 128, config.seed)
    losses, answers = [], []
    for index in range(4):
        ids = torch.from_numpy(sentences.sentence(index).ids.astype("int64"))
        each = model(Batch(ids, (len(ids),), torch.arange(len(ids) - 1)))[1]
        losses.append(each.mean().item())
        answers.append(each[-TOKENS:].mean().item())
    record = curve(config)[0]
    assert record["step"] == 0
    assert record["validation_loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert record["answer_perplexity"] == pytest.approx(math.exp(sum(answers) / 4), rel=1e-5)


def test_epochs_show_every_query_as_often(tiny_config: Callable[..., TrainConfig]) -> None:
    config = tiny_config(optimizer__steps=None, optimizer__epochs=2)
    result = train(config)
    assert result is not None
    objective = objective_of(config)
    assert result.sentences == 2 * len(objective.training)
    assert result.epochs == 2
    assert result.steps == objective.steps


def test_without_a_validation_split_the_last_adapter_is_taken(tiny_config: Callable[..., TrainConfig]) -> None:
    config = tiny_config()
    sentences = config.sentences.model_copy(update={"validation_split": None})
    result = train(config.model_copy(update={"sentences": sentences}))
    assert result is not None
    assert result.adapter_step == STEPS
    assert result.validation_loss is None
    assert "validation_loss" not in json.loads(Path(config.out, "_result.json").read_text())


def test_the_learning_rate_rises_then_falls_along_a_cosine(tiny_config: Callable[..., TrainConfig]) -> None:
    config = tiny_config(
        optimizer__warmup=0.1, optimizer__final=0.2, optimizer__learning_rate=1.0, optimizer__steps=100
    ).optimizer
    rates = [learning_rate(config, step, 100) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[54] == pytest.approx(0.6), "half way down: the mean of highest and final"
    assert rates[-1] == pytest.approx(0.2)
    assert learning_rate(config, 1, 1) <= 1.0


def test_the_peak_is_claimed_only_of_known_gpus() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA GeForce RTX 3060") is None


def test_compiling_without_pythons_headers_is_refused(
    tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("CXX", sys.executable)
    with pytest.raises(ConfigError, match=r"compute\.compile: .*Python\.h is not there; apt-get install python3-dev"):
        train(tiny_config(compute__compile=True))


@pytest.mark.parametrize(("system", "unit_bytes"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_bytes_on_every_system(
    system: str, unit_bytes: int, tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux counts it in KiB, macOS in bytes."""
    config = tiny_config()
    usage = SimpleNamespace(ru_maxrss=12345)
    monkeypatch.setattr("covray.training.trainer.resource.getrusage", lambda who: usage)
    monkeypatch.setattr("covray.training.trainer.sys", SimpleNamespace(platform=system))
    train(config)
    steps = [record for record in read_metrics(f"{config.out}/metrics.jsonl") if "loss" in record]
    assert {record["memory_bytes"] for record in steps} == {12345 * unit_bytes}
