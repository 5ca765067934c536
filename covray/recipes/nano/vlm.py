"""Recipe of the nano vision-language model: a Qwen2.5-VL of 6 M parameters for portraits and few-shot episodes.

    captions and few-shot episodes -> tokenizer of their words, random weights -> the trainer of ``covray vlm train``

The result is a folder of transformers, trained token by token, which ``covray vlm train --objective block_diffusion``
converts to blocks.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from covray.config import load_config
from covray.config.vlm import VlmTrainConfig
from covray.io.tensor_files import new_folder
from covray.pairs.scenes.portrait_words import portrait_words
from covray.pairs.scenes.portraits import sample_portrait
from covray.recipes.nano.loop import new_part
from covray.recipes.nano.portrait_data import SIZE_PX, portrait_manifest
from covray.recipes.nano.vlm_list import EPISODE_INSTRUCTION, INSTRUCTIONS, sample_episode, write_vlm_list
from covray.seeds import seed_of
from covray.thinking.cells import answer_caption
from covray.training.checkpoints import EXPORT
from covray.training.metrics_log import Metrics
from covray.training.run import train
from covray.training.worker import WorkerContext

STEPS = 8000
"""Steps of 64 samples: 23 M tokens of pictures and text."""
WIDTH, LAYERS, HEADS, INNER = 256, 6, 4, 704
VISION_WIDTH, VISION_LAYERS, VISION_INNER = 128, 4, 512
PATCH_PX = 8
"""Side of a patch; 2 x 2 of them are a token, so that a picture of 64 pixels has 16."""
VOCABULARY = 1024
"""Tokens at most. Byte-pair encoding makes one of each of the world's words, and pieces of all other text."""
TOKENIZED_PORTRAITS = 3000
SPECIAL = (
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = (
    "{% for message in messages %}<|user|>{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_vlm(out: Path, steps: int | None, portraits: int, seed: int, device: torch.device, threads: int) -> None:
    """Train the model and save it as ``out``/vlm; a killed training continues.

    Args:
        out: Folder of the family. Portraits are rendered once and kept in ``out``/data.
        steps: Steps; None: the recipe's.
        portraits: Portraits to render, a fifth of them for validation and test.
        seed: Of portraits, weights and order.
        device: Where the model is trained.
        threads: CPU threads.

    Raises:
        ConfigError: ``out``/vlm is there already.
    """
    result = new_part(out, "vlm")
    data = write_vlm_list(portrait_manifest(out, portraits, seed), seed)
    # The trainer of ``covray vlm train`` starts from a folder, and so from random weights that are written to one.
    start = out / "vlm.start"
    if not start.exists():
        with new_folder(start) as folder:
            write_start(folder, seed)
    config = training(out, data, steps or STEPS, seed, device.type, threads)
    worker = WorkerContext(device=device, log=lambda message: print(f"vlm: {message}", flush=True))
    with torch.autocast(device.type, torch.bfloat16):  # as the other recipes
        train(config, worker, _report)
    # What the run exports is the model; its checkpoints stay with the run.
    with new_folder(result) as folder:
        shutil.copytree(out / "vlm.run" / EXPORT, folder, dirs_exist_ok=True)


def training(out: Path, data: Path, steps: int, seed: int, device: str, threads: int) -> VlmTrainConfig:
    """Return the configuration of the training."""
    options = {
        "data": str(data),
        "model": str(out / "vlm.start"),
        "out": str(out / "vlm.run"),
        "train": "full",
        "optimizer.learning_rate": 1e-3,
        "optimizer.weight_decay": 0.01,
        "optimizer.final": 0.02,
        "optimizer.steps": steps,
        "optimizer.batch_samples": 64,
        "optimizer.micro_batch_samples": 16,  # of like lengths: larger ones are padded more
        "compute.device": device,
        "compute.dtype": "float32",
        "compute.deepspeed": "none",
        "compute.threads": threads,
        "checkpoints.every_steps": 250,
        "checkpoints.keep": 1,
        "validate_every_steps": 500,
        "validation_samples": 512,
        "tracking.uri": "none",
        "seed": seed,
    }
    return load_config(VlmTrainConfig, None, options)


def write_start(folder: Path, seed: int) -> None:
    """Write tokenizer, image processor and random weights."""
    tokenizer = new_tokenizer(seed)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(new_config(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    new_image_processor().save_pretrained(folder)


def new_config(tokenizer: Any) -> Qwen2_5_VLConfig:
    """Return the architecture; one row of the embedding is free, for the mask of block diffusion."""
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    text = {
        "vocab_size": len(tokenizer) + 1,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 1024,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [WIDTH // HEADS // 8, WIDTH // HEADS * 3 // 16, WIDTH // HEADS * 3 // 16],
        },
        "bos_token_id": None,
        "eos_token_id": ids["<|end|>"],
        "pad_token_id": ids["<|end|>"],
    }
    vision = {
        "depth": VISION_LAYERS,
        "hidden_size": VISION_WIDTH,
        "intermediate_size": VISION_INNER,
        "num_heads": HEADS,
        "out_hidden_size": WIDTH,
        "patch_size": PATCH_PX,
        "window_size": SIZE_PX,
        "fullatt_block_indexes": list(range(VISION_LAYERS)),
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def new_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Return a byte-level byte-pair encoding of what is said of portraits; it reads any text."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(_texts(seed), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|end|>",
        pad_token="<|end|>",
        additional_special_tokens=list(SPECIAL[1:]),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def new_image_processor() -> Qwen2VLImageProcessorPil:
    """Return the image processor: 16 to 64 tokens a picture."""
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH_PX, merge_size=2, min_pixels=SIZE_PX * SIZE_PX, max_pixels=4 * SIZE_PX * SIZE_PX
    )


def _texts(seed: int) -> Iterator[str]:
    """Yield captions, questions and answers of portraits that nobody renders."""
    for number in range(TOKENIZED_PORTRAITS):
        generator = np.random.default_rng(seed_of("nano vlm tokenizer", seed, number))
        words = portrait_words(sample_portrait(generator), generator)
        yield words.caption
        for question in words.questions:
            yield question.question
            yield question.answer
        episode = sample_episode(generator)
        yield from episode.prompt(EPISODE_INSTRUCTION)
        yield answer_caption(episode, generator)
        yield INSTRUCTIONS[number % len(INSTRUCTIONS)]


def _report(metrics: Metrics) -> None:
    """Print a validation."""
    loss, perplexity = metrics["validation_loss"], metrics["answer_perplexity"]
    print(f"vlm: step {metrics['step']:.0f}  validation loss {loss:.4f}, perplexity {perplexity:.3f}", flush=True)
