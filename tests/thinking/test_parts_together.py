"""From pictures to a drawn answer: the parts of ThinkDiff fit together, with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from covray.config.think import AlignmentConfig, LanguageModelConfig, SplitConfig, ThoughtConfig
from covray.config.vlm import VlmModelConfig
from covray.models.aligner.aligner import load_aligner, new_aligner, save_aligner
from covray.models.aligner.language import load_language_model
from covray.models.vlm.checkpoint import load_vlm, vlm_facts
from covray.thinking.alignment import Alignment
from covray.thinking.features import think
from covray.thinking.painters import painter_of
from covray.thinking.training import AlignerTraining, Caption, lvlm_batches
from tests.support.language_models import language_model, language_tokenizer
from tests.support.vlms import picture, write_vlm
from tests.thinking.test_painters import config_of, make_pipeline

DEVICE = torch.device("cpu")


def test_features_train_an_aligner_whose_output_is_drawn(tmp_path: Path) -> None:
    facts = vlm_facts(VlmModelConfig(path=write_vlm(tmp_path / "vlm", "qwen2_5_vl")))
    vlm = load_vlm(facts, torch.float32, DEVICE)
    language_model().save_pretrained(tmp_path / "text")
    language_tokenizer().save_pretrained(tmp_path / "text")
    language = load_language_model(LanguageModelConfig(path=str(tmp_path / "text")), torch.float32, DEVICE)
    prompts = [vlm.prompter.prompt([picture(number, 28, 28)], "what is it") for number in range(4)]
    thoughts = think(vlm, prompts, ThoughtConfig(max_tokens=6, min_tokens=6, temperature=1.0, top_p=1.0))

    aligner = new_aligner(
        vlm.model.width, language.model, "encoder", 0,
        vlm_fingerprint=facts.fingerprint, language_fingerprint=language.fingerprint,
    )  # fmt: skip
    captions = [Caption(thought.features, thought.ids) for thought in thoughts]
    batches = lvlm_batches(captions, SplitConfig(mode="none"), vlm.prompter.text, language.tokenizer, 16)
    config = AlignmentConfig(steps=8, batch=4, learning_rate=1e-2, warmup_steps=0, cosine_steps=8)
    training = AlignerTraining(Alignment(aligner.network, language.model), batches, len(captions), config)
    losses = []
    while not training.is_done:
        losses.append(training.run_step())
    assert losses[-1] < losses[0]

    save_aligner(tmp_path / "aligner", aligner)
    loaded = load_aligner(tmp_path / "aligner", DEVICE)
    loaded.require_fit("aligner", vlm=facts.fingerprint, language_model=language.fingerprint)
    with torch.no_grad():
        aligned = [loaded.network(thought.features) for thought in thoughts[:2]]
    first, second = painter_of(make_pipeline("pixart"), config_of("pixart")).paint(aligned)
    assert first.shape == (1, 8, 8, 3)
    assert not np.array_equal(first, second)
