"""A T5 comes back from its folder to the bit, and a folder of anything else is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from covray.config.think import LanguageModelConfig
from covray.errors import WeightsError
from covray.models.aligner.language import LanguageModel, load_language_model
from tests.support.language_models import language_model, language_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    language_model().save_pretrained(tmp_path)
    language_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path) -> LanguageModel:
    return load_language_model(LanguageModelConfig(path=str(folder)), torch.float32, torch.device("cpu"))


def test_a_language_model_comes_back_to_the_bit(folder: Path) -> None:
    loaded, expected = load(folder), language_model().eval()
    ids = loaded.tokenizer(["a red ball"], return_tensors="pt")["input_ids"]
    assert ids.tolist() == language_tokenizer()(["a red ball"])["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded.model(input_ids=ids, labels=ids).logits, expected(input_ids=ids, labels=ids).logits)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert load(folder).fingerprint == loaded.fingerprint


def test_other_weights_have_another_fingerprint(folder: Path) -> None:
    before = load(folder).fingerprint
    language_model(1).save_pretrained(folder)
    assert load(folder).fingerprint != before


def test_a_folder_that_is_none_is_one_line(folder: Path) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    first = next(name for name in tensors if name.startswith("decoder.block"))
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, weights, {"format": "pt"})
    with pytest.raises(WeightsError, match="1 tensors are missing"):
        load(folder)
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"model_type": "bart"}))
    with pytest.raises(WeightsError, match="is of type bart; give a T5, such as google/flan-t5-xxl"):
        load(folder)
    weights.unlink()
    with pytest.raises(WeightsError, match=r"model\.safetensors or model\.safetensors\.index\.json is missing"):
        load(folder)
