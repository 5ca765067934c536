"""A step is a function of (seed, place); a training that continues is the uninterrupted one to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from covray.config.think import AlignmentConfig, ThinkFeaturesConfig, ThinkTrainConfig
from covray.errors import ConfigError
from covray.models.aligner.aligner import load_aligner
from covray.thinking.dataset import FeatureDataset
from covray.thinking.objective import AlignerObjective, open_captions, train_aligner
from covray.thinking.splits import SplitSeed
from covray.thinking.training import captions_at
from covray.training.checkpoints import Checkpoints
from covray.training.optimizers import PlainUpdate, aligner_rate
from covray.training.worker import Signal, WorkerContext
from tests.support.thinking import write_features
from tests.support.trainings import curve

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, think_folders: dict[str, str]) -> dict[str, str]:
    """Features of both variants, and of the prompt's tokens."""
    from covray.config import load_config

    root = tmp_path_factory.mktemp("features")
    written = {}
    for name, variant, places in (("lvlm", "lvlm", "text"), ("clip", "clip", "text"), ("prompt", "lvlm", "prompt")):
        options = {
            "data": think_folders["manifest"], "out": str(root / name), "variant": variant, "places": places,
            "vlm.path": think_folders["clip" if variant == "clip" else "vlm"], "instructions": ["what is it"],
            "thought.max_tokens": 6, "thought.min_tokens": 3, "thought.temperature": 1.0, "engine.device": "cpu",
        }  # fmt: skip
        written[name] = write_features(load_config(ThinkFeaturesConfig, None, options))
    return written


def losses(run: ThinkTrainConfig) -> list[float]:
    return [record["loss"] for record in curve(run) if "loss" in record]  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", ["lvlm", "clip", "prompt"])
def test_a_training_that_continues_is_the_uninterrupted_one_to_the_bit(
    variant: str, folders: dict[str, str], aligner_config: Callable[..., ThinkTrainConfig]
) -> None:
    whole, parted = aligner_config(folders[variant], "whole"), aligner_config(folders[variant], "parted")
    result = train_aligner(whole)
    assert result is not None
    assert result.steps == 6

    def killed(metrics: dict[str, float]) -> None:
        if metrics["step"] == 3:  # after the checkpoint of step 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_aligner(parted, report=killed)
    assert len(losses(parted)) < 6
    train_aligner(parted)
    assert losses(parted) == losses(whole)
    assert len(losses(whole)) == 6
    first, second = (load_file(f"{run.out}/adapter/aligner.safetensors") for run in (whole, parted))
    assert all(torch.equal(first[name], second[name]) for name in first)
    loaded = load_aligner(Path(whole.out) / "adapter", CPU)
    assert loaded.record.vlm == FeatureDataset(folders[variant]).record.fingerprints["vlm"]


def test_two_workers_share_the_captions_of_one(
    folders: dict[str, str], aligner_config: Callable[..., ThinkTrainConfig]
) -> None:
    objective = AlignerObjective(aligner_config(folders["lvlm"]), CPU)
    alone = objective.batches(4, WorkerContext())
    shares = [objective.batches(4, WorkerContext(rank, 2)) for rank in range(2)]
    assert {share.loss_tokens for share in shares} == {alone.loss_tokens}
    rows = []
    for work in (alone, *shares):
        rows.append([row for batch in work.batches if batch is not None for row in batch.labels.tolist()])
    cleaned = [sorted(tuple(token for token in row if token >= 0) for row in part) for part in rows]
    assert cleaned[0] == sorted(cleaned[1] + cleaned[2])
    with torch.no_grad():
        totals = []
        for work in (alone, *shares):
            each = [objective.loss(objective.module, batch).total for batch in work.batches if batch is not None]
            totals.append(float(sum(each)))
    assert totals[0] == pytest.approx(totals[1] + totals[2], rel=1e-5)


def test_only_the_aligner_has_gradients_and_its_norm_is_the_encoders(
    folders: dict[str, str], aligner_config: Callable[..., ThinkTrainConfig], think_folders: dict[str, str]
) -> None:
    objective = AlignerObjective(aligner_config(folders["lvlm"]), CPU)
    trained = {name for name, value in objective.module.named_parameters() if value.requires_grad}
    assert trained == {f"aligner.{name}" for name in objective.parameters()}
    weights = load_file(f"{think_folders['text']}/model.safetensors")
    norm = objective.parameters()["3.weight"]
    assert torch.equal(norm, weights["encoder.final_layer_norm.weight"])
    update = PlainUpdate(objective, objective.config.optimizer)
    (batch, _) = objective.batches(0, WorkerContext()).batches
    update.accumulate(batch, 10, True)
    assert all(value.grad is None for name, value in objective.module.named_parameters() if name not in trained)
    assert float(update.gradients.abs().sum()) > 0


def test_a_prefix_never_holds_a_feature_of_what_is_written(
    folders: dict[str, str], aligner_config: Callable[..., ThinkTrainConfig]
) -> None:
    dataset = FeatureDataset(folders["lvlm"])
    captions = open_captions(aligner_config(folders["lvlm"]), dataset, "train")
    rows = dataset.of_split("train", 2)
    tokenizer = dataset.tokenizer()
    for index in range(len(captions)):
        for epoch in range(5):
            parts = captions.parts(SplitSeed(0, epoch, index))
            assert parts.features is not None
            ids = rows.ids(index)
            cut = len(parts.features)
            assert parts.features.tolist() == list(range(cut))
            assert 1 <= cut < len(ids)
            assert parts.target == tokenizer.decode(ids[cut:].tolist(), skip_special_tokens=True).strip()
            (features,) = captions.features([index], [parts])
            (whole,) = rows.features([index])
            assert torch.equal(features, whole[:cut])


def test_an_epoch_has_every_caption_once_in_an_order_of_its_own() -> None:
    seeds = captions_at(5, 42, range(30))
    orders = []
    for epoch in range(6):
        own = seeds[5 * epoch : 5 * epoch + 5]
        assert {seed.epoch for seed in own} == {epoch}
        orders.append([seed.index for seed in own])
        assert sorted(orders[-1]) == list(range(5))
    assert len({tuple(order) for order in orders}) > 1
    assert captions_at(5, 42, range(9, 12)) == seeds[9:12]
    assert captions_at(5, 1, range(9, 12)) != seeds[9:12]


def test_the_learning_rate_is_the_authors() -> None:
    config = AlignmentConfig()
    assert aligner_rate(config, 0) == pytest.approx(1e-6)
    assert aligner_rate(config, 1000) == pytest.approx(5.05e-5)
    assert aligner_rate(config, 2000) == pytest.approx(1e-4, rel=1e-3)
    assert aligner_rate(config, 25_000) == pytest.approx(9.92e-5, rel=1e-3)
    assert aligner_rate(config, 200_000) == aligner_rate(config, 300_000) == pytest.approx(8e-5)
    assert aligner_rate(AlignmentConfig(warmup_steps=0), 0) == pytest.approx(1e-4)


def test_only_matrices_decay(folders: dict[str, str], aligner_config: Callable[..., ThinkTrainConfig]) -> None:
    objective = AlignerObjective(aligner_config(folders["lvlm"]), CPU)
    update = PlainUpdate(objective, objective.config.optimizer)
    matrices, vectors = update._optimizer.param_groups
    assert [tensor.ndim for tensor in matrices["params"]] == [2, 2]
    assert [tensor.ndim for tensor in vectors["params"]] == [1, 1, 1]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.05, 0.0)


def test_clipping_cuts_a_step_and_a_loss_that_is_not_finite_ends_the_training(
    folders: dict[str, str], aligner_config: Callable[..., ThinkTrainConfig]
) -> None:
    weights = []
    for clip in (None, 1e-6):
        run = aligner_config(folders["lvlm"], f"clip-{clip}", optimizer__steps=2, optimizer__clip=clip)
        train_aligner(run)
        weights.append(load_file(f"{run.out}/adapter/aligner.safetensors")["0.weight"])
    assert not torch.equal(*weights)
    with pytest.raises(ConfigError, match=r"loss nan and gradient norm nan are not finite; lower optimizer\.learning"):
        train_aligner(aligner_config(folders["lvlm"], "nan", optimizer__learning_rate=1e38, optimizer__steps=4))


def test_a_signal_to_stop_writes_a_checkpoint(
    folders: dict[str, str], aligner_config: Callable[..., ThinkTrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("covray.training.trainer._POLL_SIGNAL_EVERY_S", 0.0)
    config = aligner_config(folders["lvlm"], "stopped")
    assert train_aligner(config, WorkerContext(poll_signal=lambda: Signal.STOP)) is None
    state, _ = Checkpoints(config.out, config.identity(), 2).read_last()
    assert state is not None
    assert (state.step, state.cursor) == (1, 4)
