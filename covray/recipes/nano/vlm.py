"""Recipe of the nano vision-language model: a Qwen2.5-VL of 6 M parameters for portraits and few-shot episodes.

    captions and few-shot episodes -> tokenizer of their words, random weights -> next-token loss of the answers
    portraits                      -> the vision tower alone learns what they show -> next-token loss, other portraits

Data, their order and the loss are those of ``covray vlm train``. The optimizer is Muon, as for the nano LVM: after 40
steps the answers' loss was 0.74 nats, and 1.78 with AdamW. The result is a folder of transformers, trained token by
token, which ``covray vlm train --objective block_diffusion`` converts to blocks.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from covray.config import load_config
from covray.config.vlm import VlmTrainConfig
from covray.io.tensor_files import new_folder
from covray.models.vlm.batch import VlmBatch
from covray.pairs.scenes.portrait_words import portrait_words
from covray.pairs.scenes.portraits import sample_portrait
from covray.recipes.nano.loop import Run, muon_and_adamw, new_part, train
from covray.recipes.nano.lvm import ADAMW_RATE, MUON_RATE
from covray.recipes.nano.portrait_data import SIZE_PX, portrait_manifest
from covray.recipes.nano.vision import train_vision
from covray.recipes.nano.vlm_list import EPISODE_INSTRUCTION, INSTRUCTIONS, sample_episode, write_vlm_list
from covray.seeds import seed_of
from covray.thinking.cells import answer_caption
from covray.training.objectives.vision_text import VisionText
from covray.training.worker import WorkerContext


@dataclass(frozen=True)
class Stage:
    """A part of the training with portraits of its own, which ends at a low learning rate; its weights are saved."""

    steps: int
    rate: float
    """Highest learning rate, as a share of ``MUON_RATE`` and ``ADAMW_RATE``."""
    looks: int = 0
    """Steps before, in which the vision tower alone learns what portraits show (``covray.recipes.nano.vision``)."""


STAGES = (Stage(1000, 1.0), Stage(500, 0.7, looks=2000))
SAMPLES = 64
"""Samples of a step: about 2,600 tokens of answers, and 7,000 with pictures and prompts."""
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


def train_vlm(out: Path, steps: int | None, portraits: int, seed: int, device: torch.device) -> None:
    """Train the model and save it as ``out``/vlm; a killed training continues.

    Every stage of ``STAGES`` is saved as ``out``/vlm-<number>; a stage whose folder exists is not trained again.

    Args:
        out: Folder of the family. Portraits are rendered once and kept in ``out``/data.
        steps: Steps of every stage, in place of its own.
        portraits: Portraits to render for a stage, a fifth of them for validation and test.
        seed: Of portraits, weights and order.
        device: Where the model is trained.

    Raises:
        ConfigError: ``out``/vlm exists.
    """
    result = new_part(out, "vlm")
    begun_from = out / "vlm.start"
    if not begun_from.exists():
        with new_folder(begun_from) as folder:
            write_start(folder, seed)
    for number, stage in enumerate(STAGES, 1):
        ended = out / f"vlm-{number}"
        if not ended.is_dir():
            manifest = portrait_manifest(out, portraits, seed + number - 1)
            if stage.looks:
                looked = out / f"{ended.name}-looks"
                if not looked.is_dir():
                    run = Run(looked.name, out, steps or stage.looks, seed, device, ADAMW_RATE)
                    train_vision(run, manifest, begun_from, looked)
                begun_from = looked
            run = Run(ended.name, out, steps or stage.steps, seed, device, stage.rate * ADAMW_RATE)
            _train_stage(run, stage, write_vlm_list(manifest, seed), begun_from, ended)
        begun_from = ended
    with new_folder(result) as folder:
        shutil.copytree(begun_from, folder, dirs_exist_ok=True)


def _train_stage(run: Run, stage: Stage, data: Path, begun_from: Path, ended: Path) -> None:
    """Train the model in ``begun_from`` and save it as ``ended``.

    Args:
        run: The training.
        stage: The stage, for its learning rate.
        data: Samples to learn, a list of ``write_vlm_list``.
        begun_from: Folder of the model to start from, as transformers writes it.
        ended: The folder to write.
    """
    objective = VisionText(lessons(run, data, begun_from), run.device)
    worker = WorkerContext(device=run.device)

    def loss_of(model: Any, step: int, _: torch.Generator) -> Tensor:
        # The order of the samples follows from the seed and the step.
        samples = objective.batches(step * SAMPLES, worker)
        losses = [model(batch.to(run.device))[0] for batch in samples.batches if batch is not None]
        return torch.stack(losses).sum() / samples.loss_tokens

    def optimizers(model: Any) -> Sequence[torch.optim.Optimizer]:
        layers = nn.ModuleList([model.model.model.language_model.layers, model.model.model.visual.blocks])
        return muon_and_adamw(model, layers, stage.rate * MUON_RATE, stage.rate * ADAMW_RATE)

    def measure(model: Any) -> str:
        return _validated(model, objective, worker)

    model = train(objective.module, loss_of, run, measure=measure, optimizers=optimizers)
    files = objective.export({name: value.detach().half() for name, value in model.named_parameters()})
    with new_folder(ended) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)


def lessons(run: Run, data: Path, begun_from: Path) -> VlmTrainConfig:
    """Return the configuration of the training, as ``covray vlm train`` takes it."""
    options = {
        "data": str(data),
        "model": str(begun_from),
        "out": str(run.out / run.name),
        "train": "full",
        "optimizer.steps": run.steps,
        "optimizer.batch_samples": SAMPLES,
        "optimizer.micro_batch_samples": 16,  # samples of one have like lengths; larger ones are padded more
        "compute.device": run.device.type,
        "compute.dtype": "float32",
        "compute.deepspeed": "none",
        "validation_samples": 512,
        "tracking.uri": "none",
        "seed": run.seed,
    }
    return load_config(VlmTrainConfig, None, options)


@torch.inference_mode()
def _validated(model: Any, objective: VisionText, worker: WorkerContext) -> str:
    """Return the perplexity of the answers of validation samples, in one line."""
    with torch.autocast(worker.device.type, torch.bfloat16):
        metrics = objective.validate(lambda batch: _each(model, batch), worker)
    return "no validation samples" if metrics is None else f"validation perplexity {metrics['answer_perplexity']:.3f}"


def _each(model: Any, batch: VlmBatch | None) -> Tensor:
    """Return the loss of every token of a batch in nats; of None, an empty tensor."""
    return torch.zeros(0) if batch is None else model(batch)[1]


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
