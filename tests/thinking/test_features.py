"""Features read after generation are the states of generation; patches are pooled after their norm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.blip_2 import Blip2VisionConfig, Blip2VisionModel

from covray.config.think import ThoughtConfig
from covray.config.vlm import VlmModelConfig
from covray.models.vlm.checkpoint import LoadedVlm, load_vlm, vlm_facts
from covray.models.vlm.prompts import Prompt
from covray.thinking.episodes import PORTRAITS, episode_prompt, make_episode, sample_orders, tasks_of
from covray.thinking.features import patch_features, read_features, think, write_text
from tests.support.vlms import SPECIAL, WORDS, picture, write_vlm

GREEDY = ThoughtConfig(max_tokens=9, temperature=0)
SAMPLED = ThoughtConfig(max_tokens=9, min_tokens=9, temperature=1.0, top_p=0.9, seed=3)
ROWS = len(SPECIAL) + len(WORDS) + 3
PLACEHOLDERS = {"qwen2_vl": {4, 5, 6, ROWS - 1}, "llava": {4}}
"""Ids of pictures and videos."""


def write_qwen2_vl(folder: Path) -> str:
    """Write a random Qwen2-VL with the tokenizer and the image processor of Qwen2.5-VL's test model."""
    write_vlm(folder, "qwen2_5_vl")
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": ROWS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
            "rope_parameters": rope,
        },
        vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 32},
        image_token_id=4, video_token_id=ROWS - 1, vision_start_token_id=5, vision_end_token_id=6,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["qwen2_vl", "llava"])
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedVlm:
    folder = tmp_path_factory.mktemp(request.param)
    path = write_qwen2_vl(folder) if request.param == "qwen2_vl" else write_vlm(folder, request.param)
    loaded = load_vlm(vlm_facts(VlmModelConfig(path=path)), torch.float32, torch.device("cpu"))
    assert loaded.model.model.config.model_type == request.param
    return loaded


@pytest.fixture
def prompts(vlm: LoadedVlm) -> list[Prompt]:
    return [
        vlm.prompter.prompt([picture(0)], "what colour is the ball"),
        vlm.prompter.prompt([picture(1, 60, 40), picture(2, 30, 30)], "where is it"),
        vlm.prompter.prompt([], "what is the box"),
    ]


def unwritten(vlm: LoadedVlm) -> list[int]:
    """Return the ids that no text has."""
    return sorted(PLACEHOLDERS[vlm.model.model.config.model_type] | {vlm.model.mask_id})


def states_of_generate(vlm: LoadedVlm, prompt: Prompt, count: int) -> tuple[list[int], torch.Tensor]:
    """Return the tokens that ``generate`` chooses greedily, and the last layer's states that it chose them from."""
    ids = torch.from_numpy(prompt.ids)[None]
    kinds = {"mm_token_type_ids": (ids == 4).int()} if "image_grid_thw" in prompt.images else {}
    output = vlm.model.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **prompt.images, **kinds, max_new_tokens=count,
        do_sample=False, suppress_tokens=unwritten(vlm),
        return_dict_in_generate=True, output_hidden_states=True,
    )  # fmt: skip
    states = [step[-1][0, -1] for step in output.hidden_states]
    return output.sequences[0, len(prompt.ids) :].tolist(), torch.stack(states)


def test_features_after_generation_are_the_states_of_generation(vlm: LoadedVlm, prompts: list[Prompt]) -> None:
    thoughts = think(vlm, prompts, GREEDY)
    for prompt, thought in zip(prompts, thoughts, strict=True):
        ids, states = states_of_generate(vlm, prompt, GREEDY.max_tokens)
        assert thought.ids.tolist() == ids
        torch.testing.assert_close(thought.features, states, atol=2e-5, rtol=2e-5)


def test_the_head_chooses_each_greedy_token_from_its_feature(vlm: LoadedVlm, prompts: list[Prompt]) -> None:
    for thought in think(vlm, prompts, GREEDY):
        logits = vlm.model.logits(thought.features)
        logits[:, unwritten(vlm)] = -torch.inf
        assert logits.argmax(1).tolist() == thought.ids.tolist()
        assert thought.text == vlm.prompter.text(thought.ids.tolist())


def test_a_sampled_text_is_its_prompts_own_and_has_no_placeholder(vlm: LoadedVlm, prompts: list[Prompt]) -> None:
    before = torch.random.get_rng_state()
    together = [thought.ids.tolist() for thought in think(vlm, prompts, SAMPLED)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [write_text(vlm, prompt, SAMPLED).tolist() for prompt in reversed(prompts)] == together[::-1]
    assert [len(ids) for ids in together] == [9, 9, 9]
    others = [write_text(vlm, prompt, SAMPLED.model_copy(update={"seed": 4})).tolist() for prompt in prompts]
    assert others != together
    for seed in range(10):
        config = SAMPLED.model_copy(update={"seed": seed, "temperature": 50.0, "top_p": 1.0})
        written = set(write_text(vlm, prompts[2], config).tolist())
        assert not written & set(unwritten(vlm))


def test_a_feature_sees_no_later_token(vlm: LoadedVlm, prompts: list[Prompt]) -> None:
    answer = np.array([7, 8, 9, 10])
    features = read_features(vlm, prompts[:1], [answer])[0]
    changed = read_features(vlm, prompts[:1], [np.array([7, 8, 11, 12])])[0]
    assert torch.equal(features[:3], changed[:3])
    assert not torch.equal(features[3], changed[3])


def test_features_of_the_prompt_are_those_of_its_tokens(vlm: LoadedVlm, prompts: list[Prompt]) -> None:
    answers = [np.array([7, 8, 9]), np.array([7]), np.array([8, 9])]
    of_prompts = read_features(vlm, prompts, answers, "prompt")
    of_texts = read_features(vlm, prompts, answers)
    for prompt, answer, own, text in zip(prompts, answers, of_prompts, of_texts, strict=True):
        assert (len(own), len(text)) == (len(prompt.ids), len(answer))
        assert torch.equal(own[-1], text[0])


def test_bounds_that_contradict_are_refused() -> None:
    with pytest.raises(ValueError, match="min_tokens 9 is over max_tokens 8; give fewer"):
        ThoughtConfig(min_tokens=9, max_tokens=8)


SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8, "initializer_range": 0.3,
}  # fmt: skip


@pytest.mark.parametrize("family", ["clip", "blip2"])
def test_patches_are_pooled_after_their_norm_and_the_class_token_stays(family: str) -> None:
    torch.manual_seed(0)
    tower = (
        CLIPVisionModel(CLIPVisionConfig(**SIZES)) if family == "clip" else Blip2VisionModel(Blip2VisionConfig(**SIZES))
    )
    torch.nn.init.uniform_(tower.post_layernorm.weight)
    tower.eval()
    pixels = torch.randn(2, 3, 32, 32)
    features = patch_features(tower, pixels)
    assert features.shape == (2, 1 + 4, 16)
    output = tower(pixel_values=pixels)
    normed = tower.post_layernorm(output.last_hidden_state) if family == "clip" else output.last_hidden_state
    torch.testing.assert_close(features[:, 0], normed[:, 0])
    # Halving bilinearly is the mean of two by two.
    grid = normed[:, 1:].reshape(2, 4, 4, 16).permute(0, 3, 1, 2)
    torch.testing.assert_close(features[:, 1:].transpose(1, 2), F.avg_pool2d(grid, 2).flatten(2))
    assert patch_features(tower, pixels, 1).shape == (2, 17, 16)


def test_an_episode_is_words_and_pictures_by_turns(vlm: LoadedVlm) -> None:
    task = tasks_of(PORTRAITS)[0]
    episode = make_episode(task, 0, sample_orders(1, 0)[0], 2)
    prompt = episode_prompt(vlm.prompter, episode, [picture(0, 28, 28), picture(1, 28, 28)], "what is it")
    words = vlm.prompter.tokenizer.convert_ids_to_tokens(prompt.ids.tolist())
    runs = []
    for word in words:
        kind = word == "<image>"
        if not runs or runs[-1] != kind:
            runs.append(kind)
    assert runs == [False, True, False, True, False]
    assert words[:4] == ["<user>", "what", "is", "it"]
    assert words[-1] == "<assistant>"
    first, *_ = vlm.prompter.prompt([picture(0, 28, 28)], "what").images.values()
    assert torch.equal(next(iter(prompt.images.values()))[: len(first)], first)
    with pytest.raises(ValueError, match="zip"):
        episode_prompt(vlm.prompter, episode, [picture(0)], "what is it")
    assert len(think(vlm, [prompt], GREEDY)[0].features) <= GREEDY.max_tokens
