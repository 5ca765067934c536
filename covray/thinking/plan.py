"""What features and a training would take, before anything is downloaded or started.

Sizes of published models are known by their names, so that a plan needs no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, T5Config, T5ForConditionalGeneration

from covray.config.think import ThinkFeaturesConfig, ThinkTrainConfig
from covray.errors import ConfigError, WeightsError, one_line
from covray.io.model_folders import is_here, resolve_folder
from covray.models.aligner.language import language_facts
from covray.thinking.building import facts_of, feature_width, read_samples
from covray.thinking.towers import TowerFacts, pooled_count

_WIDTHS = {
    "Qwen/Qwen2-VL-2B-Instruct": 1536, "Qwen/Qwen2-VL-7B-Instruct": 3584, "Qwen/Qwen2-VL-72B-Instruct": 8192,
    "Qwen/Qwen2.5-VL-3B-Instruct": 2048, "Qwen/Qwen2.5-VL-7B-Instruct": 3584,
}  # fmt: skip
"""Numbers of a feature of published vision-language models, from their config.json."""
_TOWERS = {"Salesforce/blip2-flan-t5-xxl": (1408, 16), "openai/clip-vit-large-patch14": (1024, 16)}
"""Numbers of a feature, and patches on a side, of published vision towers."""
_T5_SIZES = {
    "google/flan-t5-base": (768, 64, 2048, 12, 12), "google/flan-t5-large": (1024, 64, 2816, 24, 16),
    "google/flan-t5-xl": (2048, 64, 5120, 24, 32), "google/flan-t5-xxl": (4096, 64, 10240, 24, 64),
}  # fmt: skip
"""d_model, d_kv, d_ff, layers and heads of published Flan-T5 models, from their config.json."""
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class FeaturesPlan:
    """What features would take."""

    rows: int
    """Pictures."""
    features_per_row: int
    """At most."""
    width: int
    gigabytes: float
    """Of the features, float16, 10^9 bytes; texts that end early take less."""
    hours: float | None
    """Of all actors together at the given rate."""


@dataclass(frozen=True)
class AlignerPlan:
    """What a training would take."""

    steps: int
    captions: int
    """Of all steps."""
    aligner_parameters: int
    language_gigabytes: float
    """Of the frozen weights on every worker, 10^9 bytes."""
    aligner_gigabytes: float
    """Of the aligner: values, gradients and both moments in float32."""
    batch_gigabytes: float
    """Of a micro-batch: an estimate of activations, logits and features."""
    total_gigabytes: float
    """On every worker."""


@dataclass(frozen=True)
class ReasoningPlan:
    """What an evaluation of reasoning would take."""

    episodes: int
    rows: tuple[str, ...]
    """Of the table."""
    texts: int
    """Written by the vision-language model."""
    pictures: int
    """Drawn by the painter."""
    denoising_steps: int
    out: str


def plan_features(config: ThinkFeaturesConfig, rows: int | None, per_s: float | None) -> FeaturesPlan:
    """Return what features of pictures would take.

    Args:
        config: The configuration; a published model need not be on this machine.
        rows: Pictures; None: those of the data.
        per_s: Pictures a second of all actors; None: no hours.

    Raises:
        CovrayError: The data cannot be read, or the model is neither on this machine nor a known one.
    """
    rows = len(read_samples(config).rows) if rows is None else rows
    width, count = _features_of(config)
    size = rows * count * width * 2
    hours = None if per_s is None else rows / per_s / 3600
    return FeaturesPlan(rows, count, width, size / 1e9, hours)


def plan_aligner(config: ThinkTrainConfig, width: int, features: int, *, encoder: bool) -> AlignerPlan:
    """Return what a training would take.

    Args:
        config: The configuration, without an ``auto``; a published T5 need not be on this machine.
        width: Numbers of a feature.
        features: Features of a caption, at most.
        encoder: Whether the encoder reads words, as beside a vision tower.

    Raises:
        CovrayError: The language model is neither on this machine nor a known one.
    """
    t5 = _t5_config(config)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(t5)
    # Nothing calls the encoder where no words are read, so that it is not kept.
    kept: list[Any] = [model.decoder, model.lm_head, *([model.encoder] if encoder else [])]
    # By identity: a tied weight is a parameter of several parts, and stored once.
    frozen = {id(value): value.numel() for part in kept for value in part.parameters()}
    # Two linear layers with their biases, and the weight of the norm.
    trained = t5.d_model * (width + t5.d_model + 2) + (t5.d_model if config.aligner.norm != "none" else 0)
    number_bytes = _BYTES["bfloat16" if config.compute.dtype == "auto" else config.compute.dtype]
    captions = min(config.optimizer.micro_batch, config.optimizer.batch)
    tokens = config.language_model.max_tokens
    # A layer of the decoder keeps about 16 states and 3 inner states of its gated feed-forward network a token, keys
    # and values of the features, and its attention weights; logits are kept as they are and in float32, with gradient.
    layer = tokens * (16 * t5.d_model + 3 * t5.d_ff) + features * 2 * t5.num_heads * t5.d_kv
    attention = t5.num_heads * tokens * (tokens + features)
    states = captions * t5.num_decoder_layers * (layer + attention) * number_bytes
    logits = captions * tokens * t5.vocab_size * (number_bytes + 8)
    read = captions * features * (width + 5 * t5.d_model) * 4
    weights, own, batch = sum(frozen.values()) * number_bytes, trained * 16, states + logits + read
    return AlignerPlan(
        steps=config.optimizer.steps,
        captions=config.optimizer.steps * config.optimizer.batch,
        aligner_parameters=trained,
        language_gigabytes=weights / 1e9,
        aligner_gigabytes=own / 1e9,
        batch_gigabytes=batch / 1e9,
        total_gigabytes=(weights + own + batch) / 1e9,
    )


def _features_of(config: ThinkFeaturesConfig) -> tuple[int, int]:
    """Return the numbers of a feature, and the features of a picture at most."""
    name = config.vlm.path
    if not is_here(name) and name in _WIDTHS and config.variant == "lvlm":
        width = _WIDTHS[name]
    elif not is_here(name) and name in _TOWERS and config.variant == "clip":
        width, side = _TOWERS[name]
        return width, pooled_count(side, config.patches)
    else:
        facts = facts_of(config)
        width = feature_width(facts)
        if isinstance(facts, TowerFacts):
            return width, facts.count(config.patches)
    if config.places == "prompt":
        raise ConfigError("places: prompt has as many features as a prompt has tokens, which no plan knows; give text")
    return width, config.thought.max_tokens


def _t5_config(config: ThinkTrainConfig) -> Any:
    name = config.language_model.path
    if not is_here(name) and name in _T5_SIZES:
        width, head, inner, layers, heads = _T5_SIZES[name]
        return T5Config(
            vocab_size=32_128, d_model=width, d_kv=head, d_ff=inner, num_layers=layers, num_heads=heads,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        )  # fmt: skip
    if not is_here(name):
        return language_facts(config.language_model).config
    # Its sizes are enough: a folder here may be a configuration without weights.
    folder = resolve_folder(name, config.language_model.revision, "text", ())
    try:
        loaded = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{folder}: cannot be read ({one_line(error)}); get the folder again") from error
    if loaded.model_type != "t5":
        raise WeightsError(f"{folder}: is of type {loaded.model_type}; give a T5, such as google/flan-t5-xxl")
    return loaded
