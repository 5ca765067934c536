"""Vision-language models of two layers with random weights, written as folders in a moment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

FAMILIES = ("llava", "qwen2_5_vl")
WORDS = [
    "what", "colour", "is", "the", "ball", "box", "red", "blue", "one", "two", "a", "in", "on", "of", "and", "left",
    "right", "where", "it",
]  # fmt: skip
SPECIAL = ["<pad>", "<end>", "<user>", "<assistant>", "<image>", "<start>", "<stop>"]
TEMPLATE = (
    "{% for message in messages %}<user>{% for part in message.content %}{% if part.type == 'image' %}"
    "{{ picture }}{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
RESERVED = 3
"""Rows of the embedding that no token uses."""


def write_vlm(folder: Path, family: str, reserved: int = RESERVED) -> str:
    """Write a random model of ``family`` with its tokenizer and its image processor."""
    torch.manual_seed(0)
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    rows = len(vocabulary) + reserved
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    picture = "<image>" if family == "llava" else "<start><image><stop>"
    tokenizer.chat_template = TEMPLATE.replace("{{ picture }}", picture)
    sizes = {
        "vocab_size": rows, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3,
        "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    if family == "llava":
        vision = CLIPVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28,
            patch_size=14, projection_dim=16,
        )  # fmt: skip
        config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**sizes), image_token_id=4)
        model = LlavaForConditionalGeneration(config)
        processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    else:
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
        vision_sizes = {
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
            "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1],
        }  # fmt: skip
        config = Qwen2_5_VLConfig(
            text_config=sizes | {"rope_parameters": rope}, vision_config=vision_sizes, image_token_id=4,
            video_token_id=rows - 1, vision_start_token_id=5, vision_end_token_id=6,
        )  # fmt: skip
        model = Qwen2_5_VLForConditionalGeneration(config)
        processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=84 * 84)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def picture(seed: int, height: int = 40, width: int = 60) -> NDArray[np.uint8]:
    """A random picture."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
