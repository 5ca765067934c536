"""Judges of CoBSAT's two kinds: captions beside a picture, and questions of ten options."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from covray.config import load_config
from covray.config.think import JudgeConfig
from covray.config.vlm import VlmModelConfig
from covray.errors import ConfigError, WeightsError
from covray.models.vlm.checkpoint import load_vlm, vlm_facts
from covray.thinking.episodes import COBSAT, Cell
from covray.thinking.judging import VlmJudge, judge_fingerprint, load_judge
from tests.support.language_models import language_tokenizer
from tests.support.vlms import picture, write_vlm

CPU = torch.device("cpu")


def write_clip(folder: Path) -> str:
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    text = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "eos_token_id": 1,
            "num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": 0, "pad_token_id": 0}  # fmt: skip
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    language_tokenizer().save_pretrained(folder)
    return str(folder)


def test_clip_chooses_the_nearest_caption(tmp_path: Path) -> None:
    config = JudgeConfig(kind="clip", path=write_clip(tmp_path / "clip"))
    judge = load_judge(config, CPU)
    chosen = judge.choose(COBSAT[0], [picture(0), picture(1)])
    assert len(chosen) == 2
    for cell in chosen:
        assert cell is not None
        assert cell.detail in COBSAT[0].details
        assert cell.object in COBSAT[0].objects
    assert judge.choose(COBSAT[0], [picture(0)]) == chosen[:1]
    assert len(judge_fingerprint(config)) == 64


def test_a_vision_language_models_digits_are_its_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = vlm_facts(VlmModelConfig(path=write_vlm(tmp_path / "vlm", "qwen2_5_vl")))
    judge = VlmJudge(load_vlm(facts, torch.float32, CPU))
    said = iter(["(3)", "option 10.", "", "11", "1 2", "0"])
    monkeypatch.setattr("covray.models.vlm.prompts.Prompter.text", lambda *_: next(said))
    theme = COBSAT[0]
    assert judge.choose(theme, [picture(0)]) == [Cell(theme.details[2], theme.objects[9])]
    assert judge.choose(theme, [picture(0), picture(0)]) == [Cell("", ""), Cell("", "")]


def test_what_is_no_judge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="path: kind clip needs one; give the folder of a model, or a hub id"):
        load_config(JudgeConfig, None, {"kind": "clip"})
    with pytest.raises(WeightsError, match="no such folder"):
        judge_fingerprint(JudgeConfig(path=str(tmp_path / "absent")))
    write_vlm(tmp_path / "vlm", "llava")
    with pytest.raises(WeightsError, match="is of type llava; give a CLIP"):
        load_judge(JudgeConfig(kind="clip", path=str(tmp_path / "vlm")), CPU)
