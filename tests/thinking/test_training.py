"""A step is a function of (seed, step); a training that continues is the uninterrupted one to the bit."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from covray.config.think import AlignmentConfig, SplitConfig
from covray.models.aligner.aligner import new_aligner
from covray.thinking.alignment import Alignment
from covray.thinking.training import (
    AlignerTraining,
    Caption,
    clip_batches,
    learning_rate,
    lvlm_batches,
    make_optimizer,
    step_captions,
)
from tests.support.language_models import WORDS, language_model, language_tokenizer

FEATURES = 12
CONFIG = AlignmentConfig(steps=6, batch=3, learning_rate=1e-2, warmup_steps=2, cosine_steps=8)


def captions() -> list[Caption]:
    generator = np.random.default_rng(0)
    made = []
    for number in range(5):
        ids = generator.integers(0, len(WORDS), 4 + number)
        features = torch.from_numpy(generator.standard_normal((len(ids), FEATURES), np.float32))
        made.append(Caption(features, ids, " ".join(WORDS[token] for token in ids)))
    return made


def decode(ids: list[int]) -> str:
    return " ".join(WORDS[token] for token in ids)


def training(variant: str = "lvlm", config: AlignmentConfig = CONFIG) -> tuple[Alignment, AlignerTraining]:
    model = language_model()
    alignment = Alignment(new_aligner(FEATURES, model, "encoder", 0).network, model)
    if variant == "lvlm":
        batches = lvlm_batches(captions(), SplitConfig(), decode, language_tokenizer(), 16)
    else:
        batches = clip_batches(captions(), language_tokenizer(), 16)
    return alignment, AlignerTraining(alignment, batches, 5, config)


@pytest.mark.parametrize("variant", ["lvlm", "clip"])
def test_a_training_that_continues_is_the_uninterrupted_one_to_the_bit(variant: str) -> None:
    whole, run = training(variant)
    losses = [run.run_step() for _ in range(6)]
    assert run.is_done
    _, first = training(variant)
    begun = [first.run_step() for _ in range(3)]
    kept = io.BytesIO()
    torch.save(first.state(), kept)
    kept.seek(0)
    continued, second = training(variant)
    second.load_state(torch.load(kept, weights_only=True))
    assert begun + [second.run_step() for _ in range(3)] == losses
    for name, tensor in whole.aligner.state_dict().items():
        assert torch.equal(continued.aligner.state_dict()[name], tensor)


def test_an_epoch_has_every_caption_once_in_an_order_of_its_own() -> None:
    seeds = [seed for step in range(10) for seed in step_captions(5, CONFIG, step)]
    orders = []
    for epoch in range(6):
        own = seeds[5 * epoch : 5 * epoch + 5]
        assert {seed.epoch for seed in own} == {epoch}
        orders.append([seed.index for seed in own])
        assert sorted(orders[-1]) == list(range(5))
    assert len({tuple(order) for order in orders}) > 1
    assert step_captions(5, CONFIG, 3) == seeds[9:12]
    assert step_captions(5, CONFIG.model_copy(update={"seed": 1}), 3) != seeds[9:12]


def test_the_learning_rate_is_the_authors() -> None:
    config = AlignmentConfig()
    assert learning_rate(config, 0) == pytest.approx(1e-6)
    assert learning_rate(config, 1000) == pytest.approx(5.05e-5)
    assert learning_rate(config, 2000) == pytest.approx(1e-4, rel=1e-3)
    assert learning_rate(config, 25_000) == pytest.approx(9.92e-5, rel=1e-3)
    assert learning_rate(config, 200_000) == learning_rate(config, 300_000) == pytest.approx(8e-5)
    assert learning_rate(AlignmentConfig(warmup_steps=0), 0) == pytest.approx(1e-4)


def test_only_matrices_decay() -> None:
    alignment, _ = training()
    matrices, vectors = make_optimizer(alignment.aligner, CONFIG).param_groups
    assert [tensor.ndim for tensor in matrices["params"]] == [2, 2]
    assert [tensor.ndim for tensor in vectors["params"]] == [1, 1, 1]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.05, 0.0)


def test_clipping_cuts_a_step_and_a_loss_that_is_not_finite_ends_the_training() -> None:
    plain, run = training()
    run.run_step()
    cut, clipped = training(config=CONFIG.model_copy(update={"clip": 1e-6}))
    clipped.run_step()
    assert not torch.equal(plain.aligner[0].weight, cut.aligner[0].weight)
    with torch.no_grad():
        plain.aligner[0].weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 1: the loss is nan; set a smaller learning rate"):
        run.run_step()
