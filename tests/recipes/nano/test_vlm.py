"""The recipe of the nano vision-language model: its size, its words, and a training of a few steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

from covray.config.vlm import VlmDecodingConfig, VlmModelConfig
from covray.errors import ConfigError
from covray.models.vlm.checkpoint import load_vlm, vlm_facts
from covray.models.vlm.decoding import decode
from covray.pairs.scenes.portrait_words import portrait_words
from covray.pairs.scenes.portraits import sample_portrait
from covray.recipes.nano import loop, recipe, vision, vlm
from covray.recipes.nano.portrait_data import portrait_manifest

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return vlm.new_tokenizer(0)


def test_it_has_six_million_parameters_and_a_free_row(tokenizer) -> None:  # type: ignore[no-untyped-def]
    config = vlm.new_config(tokenizer)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    parameters = sum(weight.numel() for weight in model.parameters())
    assert 5.5e6 < parameters < 7e6
    assert config.text_config.vocab_size == len(tokenizer) + 1


def test_the_worlds_words_are_a_token_each_and_any_text_can_be_read(tokenizer) -> None:  # type: ignore[no-untyped-def]
    lengths, words = [], []
    for number in range(200):
        rng = np.random.default_rng(10_000 + number)
        said = portrait_words(sample_portrait(rng, unseen=True), rng)
        ids = tokenizer(said.caption)["input_ids"]
        assert tokenizer.decode(ids) == said.caption
        lengths.append(len(ids))
        words.append(len(said.caption.split()))
    assert np.mean(lengths) < 1.25 * np.mean(words), "punctuation comes on top"
    other = "Ein Würfel – 方块?"
    assert tokenizer.decode(tokenizer(other)["input_ids"]) == other


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WIDTH": 64, "LAYERS": 1, "INNER": 32, "VISION_WIDTH": 32, "VISION_LAYERS": 1}.items():
        monkeypatch.setattr(vlm, name, value)
    monkeypatch.setattr(vlm, "VISION_INNER", 32)
    monkeypatch.setattr(vlm, "TOKENIZED_PORTRAITS", 50)


@pytest.mark.usefixtures("small")
def test_eyes_learn_without_a_word_of_the_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start, ended = tmp_path / "start", tmp_path / "ended"
    start.mkdir()
    vlm.write_start(start, 0)
    run = loop.Run("eyes", tmp_path, 2, 0, CPU, 1e-3)
    vision.train_vision(run, portrait_manifest(tmp_path, 40, 0), start, ended)
    before, after = load_file(start / "model.safetensors"), load_file(ended / "model.safetensors")
    changed = {name for name, weights in before.items() if not torch.equal(weights.half(), after[name])}
    assert before.keys() == after.keys()
    assert changed
    assert all(name.startswith("visual.") for name in changed)
    assert (ended / "tokenizer.json").read_bytes() == (start / "tokenizer.json").read_bytes()
    assert "held-out cells, right: " in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_a_training_is_continued_and_gives_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.0)
    stopped = RuntimeError("killed")
    saves: list[str] = []

    def killed(*_: object) -> str:
        saves.append("after a step")
        if len(saves) == 2:
            raise stopped
        return ""

    with monkeypatch.context() as patched:
        patched.setattr(vlm, "_validated", killed)
        with pytest.raises(RuntimeError, match="killed"):
            recipe.train_model("vlm", tmp_path, 3, 20, 1, "cpu", 0)
    recipe.train_model("vlm", tmp_path, 3, 20, 1, "cpu", 0)
    shown = capsys.readouterr().out
    assert "vlm-1: continues at step 2 of 3" in shown
    assert "validation perplexity" in shown
    monkeypatch.setattr(vlm, "_validated", lambda *_: "")
    recipe.train_model("vlm", tmp_path / "whole", 3, 20, 1, "cpu", 0)
    weights = [(folder / "vlm" / "model.safetensors").read_bytes() for folder in (tmp_path, tmp_path / "whole")]
    assert weights[0] == weights[1], "a killed training ends with the same bits"
    facts = vlm_facts(VlmModelConfig(path=str(tmp_path / "vlm")))
    assert facts.mask_id == facts.known_ids == facts.vocabulary - 1
    loaded = load_vlm(facts, torch.float32, CPU)
    prompt = loaded.prompter.prompt([np.zeros((64, 64, 3), np.uint8)], "What is shown?")
    assert int((prompt.ids == loaded.model.image_id).sum()) == 16
    (answer,) = decode(loaded, [prompt], VlmDecodingConfig(max_tokens=3), None)
    assert len(answer.ids) <= 3
    with pytest.raises(ConfigError, match="already exists"):
        recipe.train_model("vlm", tmp_path, 3, 20, 1, "cpu", 0)
