"""A tokenizer of pixels in [-1, 1] whose folder does not say so is refused; what says so is believed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import VQModel

from covray.config import EngineConfig, TokenizerConfig
from covray.errors import WeightsError
from covray.models.tokenizer.vqgan import Tokenizer, find_tokenizer, load_tokenizer

NANO = find_tokenizer(TokenizerConfig())


def load(folder: Path) -> Tokenizer:
    return load_tokenizer(TokenizerConfig(path=str(folder)), EngineConfig(device="cpu", image_batch=1))


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    """The nano tokenizer, rewritten to read and write [-1, 1]: the same network, but for the border's padding."""
    model = VQModel.from_pretrained(NANO)
    with torch.no_grad():
        first, last = model.encoder.conv_in, model.decoder.conv_out
        first.bias += first.weight.sum((1, 2, 3)) / 2  # (x + 1) / 2
        first.weight /= 2
        last.weight *= 2  # 2 y - 1
        last.bias.mul_(2).sub_(1)
    model.save_pretrained(tmp_path / "signed")
    return tmp_path / "signed"


def state(folder: Path, pixels: list[int]) -> Path:
    (folder / "covray.json").write_text(json.dumps({"version": 1, "pixels": pixels}))
    return folder


def test_a_tokenizer_of_signed_pixels_is_refused_until_it_says_so(signed: Path) -> None:
    with pytest.raises(WeightsError, match=r"is trained on pixels in \[-1, 1\].* \"pixels\": \[-1, 1\]") as refused:
        load(signed)
    message = str(refused.value)
    assert "\n" not in message
    statement = json.loads(message[message.index("{") : message.index("}") + 1])
    state(signed, statement["pixels"])
    assert json.loads((signed / "covray.json").read_text()) == statement, "what the message says to write"
    load(signed)


def test_what_a_folder_states_is_believed(signed: Path) -> None:
    load(state(signed, [0, 1]))


def test_tokenizers_of_plain_pixels_load_without_a_statement(tmp_path: Path, vqgan_folder: Path) -> None:
    load(Path(shutil.copytree(NANO, tmp_path / "plain")))
    load(vqgan_folder)  # random weights: no picture comes back in either way
