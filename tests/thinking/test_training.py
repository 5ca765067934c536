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
    lvlm_batches,
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
