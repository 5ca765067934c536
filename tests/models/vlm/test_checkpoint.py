"""Folders of transformers are read without their code, and refused where they are not what they should be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from covray.config.vlm import VlmModelConfig
from covray.errors import ConfigError, PairError, WeightsError
from covray.models.vlm.batch import Blocks
from covray.models.vlm.checkpoint import BLOCKS_FILE, LoadedVlm, blocks_file, load_prompter, load_vlm, vlm_facts
from covray.models.vlm.convert import convert_vlm
from tests.support.vlms import picture, write_vlm

CPU = torch.device("cpu")


@pytest.fixture
def copy(vlm_folder: Callable[[str], str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(vlm_folder("llava"), tmp_path / "copy"))


def test_the_mask_is_the_first_free_row_and_the_mean_of_all_others(vlm: LoadedVlm) -> None:
    rows = vlm.model.model.get_input_embeddings().weight
    known = len(vlm.prompter.tokenizer)
    assert vlm.model.mask_id == known < len(rows)
    torch.testing.assert_close(rows[known], rows[:known].mean(0))


def test_a_full_vocabulary_gets_one_row(tmp_path: Path) -> None:
    facts = vlm_facts(VlmModelConfig(path=write_vlm(tmp_path, "llava", reserved=0)))
    vlm = load_vlm(facts, torch.float32, CPU)
    assert facts.mask_id == facts.vocabulary == facts.known_ids
    assert len(vlm.model.model.get_input_embeddings().weight) == facts.vocabulary + 1


def test_a_converted_folder_is_whole_for_transformers(tmp_path: Path) -> None:
    source = VlmModelConfig(path=write_vlm(tmp_path / "full", "llava", reserved=0))
    result = convert_vlm(source, str(tmp_path / "converted"))
    assert result["new_row"]
    facts = vlm_facts(VlmModelConfig(path=str(tmp_path / "converted")))
    assert result["mask_id"] == facts.mask_id == facts.vocabulary - 1
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "converted", dtype=torch.float32)
    own = load_vlm(vlm_facts(source), torch.float32, CPU).model
    for name, value in own.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_mask_that_is_a_token_is_refused(copy: Path) -> None:
    with pytest.raises(WeightsError, match=r"mask_id: 3 is a token of"):
        vlm_facts(VlmModelConfig(path=str(copy), mask_id=3))


def test_what_a_folder_was_trained_for_is_read(copy: Path) -> None:
    before = vlm_facts(VlmModelConfig(path=str(copy)))
    (copy / BLOCKS_FILE).write_bytes(blocks_file(28, Blocks(16, "block", "sequence")))
    facts = vlm_facts(VlmModelConfig(path=str(copy)))
    assert (facts.mask_id, facts.blocks) == (28, Blocks(16, "block", "sequence"))
    assert facts.fingerprint != before.fingerprint
    (copy / BLOCKS_FILE).write_bytes(blocks_file(28, Blocks(4, shift=True)))
    assert vlm_facts(VlmModelConfig(path=str(copy))).blocks == Blocks(4, shift=True)
    (copy / BLOCKS_FILE).write_text('{"version": 1, "block": 0}')
    with pytest.raises(WeightsError, match="does not describe blocks"):
        vlm_facts(VlmModelConfig(path=str(copy)))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("config.json", "config.json is missing"),
        ("*.safetensors", "model.safetensors or model.safetensors.index.json is missing"),
        ("*processor_config.json", "preprocessor_config.json or processor_config.json is missing"),
        ("tokenizer*", "its tokenizer cannot be loaded"),
    ],
)
def test_an_incomplete_folder_is_refused(copy: Path, pattern: str, message: str) -> None:
    for file in copy.glob(pattern):
        file.unlink()
    with pytest.raises(WeightsError, match=message):
        vlm_facts(VlmModelConfig(path=str(copy)))


def test_another_kind_of_model_is_refused(copy: Path) -> None:
    (copy / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(WeightsError, match="is of type llama; give one of llava, qwen2_vl, qwen2_5_vl"):
        vlm_facts(VlmModelConfig(path=str(copy)))


def test_a_tensor_that_is_missing_is_not_filled_with_random_numbers(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    del tensors[next(name for name in tensors if "q_proj" in name)]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match="1 tensors are missing"):
        load_vlm(vlm_facts(VlmModelConfig(path=str(copy))), torch.float32, CPU)


def test_a_prompt_cannot_smuggle_a_picture_in(vlm: LoadedVlm) -> None:
    with pytest.raises(ConfigError, match="has a placeholder of a picture"):
        vlm.prompter.prompt([picture(0)], "what <image> is it")


def test_prompts_are_those_of_the_processor_of_transformers(vlm_folder: Callable[[str], str]) -> None:
    """LLaVA's processor needs no torchvision, so that it can be asked."""
    from transformers import LlavaProcessor

    facts = vlm_facts(VlmModelConfig(path=vlm_folder("llava")))
    prompter = load_prompter(facts)
    processor = LlavaProcessor(
        prompter._image_processor, prompter.tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>",
    )  # fmt: skip
    from PIL import Image

    expected = processor(
        images=[Image.fromarray(picture(0))], text="<user><image>what is it<assistant>", return_tensors="pt"
    )
    prompt = prompter.prompt([picture(0)], "what is it")
    assert prompt.ids.tolist() == expected["input_ids"][0].tolist()
    assert torch.equal(prompt.images["pixel_values"], expected["pixel_values"])


def test_a_mask_is_no_token_where_ids_have_gaps(copy: Path) -> None:
    file = copy / "tokenizer.json"
    about = json.loads(file.read_text())
    assert about["model"]["vocab"]["it"] == 25
    about["model"]["vocab"]["it"] = 26  # 26 ids, of which the last is 26
    file.write_text(json.dumps(about))
    assert vlm_facts(VlmModelConfig(path=str(copy))).mask_id == 27


def test_an_answer_cannot_smuggle_a_picture_in(vlm: LoadedVlm) -> None:
    prompt = vlm.prompter.prompt([picture(0)], "what is it")
    with pytest.raises(ConfigError, match="answer 'a red <image>': has a placeholder of a picture in it"):
        vlm.prompter.sample(prompt, "a red <image>")


def test_a_prompt_of_no_token_is_refused(vlm: LoadedVlm) -> None:
    vlm.prompter._template = None
    with pytest.raises(ConfigError, match="prompt: is empty"):
        vlm.prompter.prompt([], "")
    assert len(vlm.prompter.prompt([picture(0)], "").ids) > 1


def test_a_strip_is_refused_before_it_is_scaled_up(vlm: LoadedVlm) -> None:
    vlm.prompter.prompt([picture(0, 2, 400)], "what is it")
    for height, width in ((2, 401), (401, 2)):
        with pytest.raises(PairError, match=f"unsupported: {width}x{height} px; .* up to 200 times as long as wide"):
            vlm.prompter.prompt([picture(0, height, width)], "what is it")
