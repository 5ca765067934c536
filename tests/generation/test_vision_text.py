"""An answer is shown whole, and a run whose files are gone is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from covray.config.vlm import VlmGenerateConfig, VlmSourceConfig, VlmTrainConfig
from covray.errors import ConfigError, WeightsError
from covray.generation import vision_text
from covray.models.vlm.decoding import Piece
from tests.support.vlm_trainings import trained
from tests.support.vlms import picture


@pytest.mark.parametrize(
    ("texts", "parts"),
    [
        (["a", "a b"], ["a", " b"]),
        (["a", "a \ufffd", "a é b"], ["a", " é b"]),
        (["a", "a b \ufffd"], ["a", " b \ufffd"]),
        (["\ufffd"], ["\ufffd"]),
    ],
)
def test_an_answer_is_shown_whole_where_it_is_cut_within_a_character(
    texts: list[str], parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = [Piece(0, [number], number == len(texts) - 1, number) for number in range(len(texts))]
    prompter = SimpleNamespace(text=lambda ids: texts[len(ids) - 1])
    answerer = SimpleNamespace(trained=None, prompt=lambda *_: None, vlm=SimpleNamespace(prompter=prompter))
    monkeypatch.setattr(vision_text, "load_answerer", lambda _: answerer)
    monkeypatch.setattr(vision_text, "stream", lambda *_: iter(pieces))
    assert list(vision_text.stream_answer(VlmGenerateConfig(model="any", prompt="what"))) == parts


def test_a_run_without_its_adapter_is_refused_in_one_line(vlm_config: Callable[..., VlmTrainConfig]) -> None:
    run = trained(vlm_config(optimizer__steps=1))
    Path(run, "adapter", "adapter_model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"adapter: cannot be read .*; restore it"):
        vision_text.answerer_facts(VlmSourceConfig(run=run))


def test_a_strip_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    Image.fromarray(picture(0, 2, 500)).save(tmp_path / "strip.png")
    config = VlmGenerateConfig(model="absent", prompt="what", images=(str(tmp_path / "strip.png"),))
    with pytest.raises(ConfigError, match=r"--image .*strip.png: unsupported: 500x2 px"):
        next(vision_text.stream_answer(config))
