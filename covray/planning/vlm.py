"""What the training of a vision-language model would take: memory of a GPU and FLOPs of a step, each with its source.

For S tokens of a row (prompt and answer, and with block diffusion the noisy answer beside them), h hidden and f inner
width, L layers and N workers:

    weights etc.  16 P bytes for P trained parameters: bfloat16 weight and gradient, float32 master and two moments;
                  from stage 1 the last 12 P over N, from stage 2 the gradients, in stage 3 all
                  (ZeRO, arXiv:1910.02054); 2 bytes for a parameter that is frozen
    activations   2 S h L with recompute, else a layer's own L times; one layer's own comes on top
    a layer's own 2 S (6 h + 3 f), and 3 S^2 for the mask as booleans and as a bias of attention
    logits        14 bytes a token with loss and row of the vocabulary: bfloat16, float32, its softmax and gradient
    FLOPs         2 N forward and 4 N backward a token for N parameters, 2 N again with recompute, and 4 S h a layer and
                  token for attention, likewise; of the vision tower by patches; of the head by tokens with loss

The allocator's gaps, kernels' own workspace and communication come on top: some 10 to 20%.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from covray.config import PlanConfig
from covray.config.vlm import VlmTrainConfig
from covray.errors import ConfigError, one_line
from covray.planning.records import PlanFigure, StageMemory

STAGES = (0, 1, 2, 3)
_VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
    "spatial_merge_size": 2,
}  # fmt: skip
_QWEN: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152_064, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Sizes of the published models, from their config.json, by hub id: a plan downloads nothing."""


@dataclass(frozen=True)
class VlmWork:
    """What a training takes, without machines that are lost."""

    parameters: int
    steps: int
    tokens_per_step: int
    flops_per_step: float
    seconds_per_step: float
    memory: tuple[StageMemory, ...]
    checkpoint_bytes: int
    figures: tuple[PlanFigure, ...]


@dataclass(frozen=True)
class _Sizes:
    """Parameters of a model's parts, and what its layers are."""

    language: int
    """Of the layers."""
    head: int
    """Rows of the vocabulary times the width."""
    vision: int
    tied: bool
    hidden: int
    inner: int
    layers: int
    vocabulary: int

    @property
    def all(self) -> int:
        """All parameters."""
        heads = 1 if self.tied else 2  # the embedding's table and the output's are one, or two
        return self.language + self.vision + heads * self.head


@dataclass(frozen=True)
class _Row:
    """Tokens of one sample."""

    clean: int
    noisy: int
    with_loss: float
    """The mean."""
    patches: int

    @property
    def tokens(self) -> int:
        """All that the language model reads."""
        return self.clean + self.noisy


def plan_vlm(config: PlanConfig, train: VlmTrainConfig, peak: float) -> VlmWork:
    """Return what a training takes; no weights and no data are read.

    Args:
        config: The plan: samples, their tokens, GPUs and what is assumed of them.
        train: The training.
        peak: FLOP/s of a GPU.

    Raises:
        ConfigError: The model's sizes are not known.
    """
    sizes, source = _sizes(train.model)
    row = _row(config, train)
    workers, chosen = config.vlm_on.gpus, train.optimizer
    samples = chosen.epochs * config.vlm_data.samples
    # A training takes at least one sample, however small a share of an epoch is asked for.
    steps = chosen.steps or -(-max(1, round(samples)) // chosen.batch_samples)
    trained = _trained(train, sizes)
    flops = _sample_flops(train, sizes, row) * chosen.batch_samples
    seconds = flops / workers / (config.assumed.train_utilisation * peak)
    memory = tuple(_memory(train, sizes, row, stage, trained, workers) for stage in STAGES)
    data, assumed = config.vlm_data, "assumed: vlm_data"
    figures = (
        PlanFigure(name="parameters", value=sizes.all, unit="", source=source),
        PlanFigure(name="trained parameters", value=trained, unit="", source=f"train: {train.train}"),
        PlanFigure(name="samples", value=data.samples, unit="", source="vlm_data.samples"),
        PlanFigure(name="prompt", value=data.prompt_tokens, unit="tokens", source=assumed),
        PlanFigure(name="answer", value=data.answer_tokens, unit="tokens", source=assumed),
        PlanFigure(name="noisy tokens beside them", value=row.noisy, unit="tokens", source="blocks of the answer"),
        PlanFigure(name="patches of pictures", value=row.patches, unit="", source=assumed),
        PlanFigure(name="samples a step", value=chosen.batch_samples, unit="", source="optimizer.batch_samples"),
        PlanFigure(name="steps", value=steps, unit="", source="samples x epochs / samples a step"),
        PlanFigure(name="FLOPs of a step", value=flops, unit="", source="parameters x tokens; planning/vlm.py"),
        PlanFigure(name="peak of a GPU", value=peak, unit="FLOP/s", source=f"data sheet of {config.vlm_on.gpu}"),
        PlanFigure(
            name="share of the peak", value=config.assumed.train_utilisation, unit="",
            source="assumed.train_utilisation: LoRA of an 8B LLaMA on an H100, published",
        ),
    )  # fmt: skip
    return VlmWork(
        parameters=sizes.all,
        steps=steps,
        tokens_per_step=row.tokens * chosen.batch_samples,
        flops_per_step=flops,
        seconds_per_step=seconds,
        memory=memory,
        # float32 masters and moments; what is exported comes on top
        checkpoint_bytes=12 * trained + 4 * trained,
        figures=figures,
    )


def _row(config: PlanConfig, train: VlmTrainConfig) -> _Row:
    """Return the mean sample."""
    data = config.vlm_data
    answer = data.answer_tokens
    if train.objective == "autoregressive":
        return _Row(data.prompt_tokens + answer, 0, answer, data.patches)
    blocks = train.blocks
    noisy = -(-answer // blocks.size) * blocks.size  # whole blocks
    if blocks.start == "sequence":  # the first block also holds the prompt's last tokens, half a block in the mean
        noisy += blocks.size // 2
    with_loss = answer * (blocks.low + blocks.high) / 2  # the masked ones
    if blocks.autoregressive:  # and the clean copy predicts all of them
        with_loss += answer
    return _Row(data.prompt_tokens + noisy, noisy, with_loss, data.patches)


def _trained(train: VlmTrainConfig, sizes: _Sizes) -> int:
    """Return the number of parameters that a training changes."""
    if train.train == "full":
        return sizes.all
    if train.train == "language":
        return sizes.all - sizes.vision
    width = 0  # inputs and outputs of the projections; those of keys and values are taken for as wide as of queries
    for target in train.lora.targets:
        if target in ("gate_proj", "up_proj", "down_proj"):
            width += sizes.hidden + sizes.inner
        else:
            width += sizes.hidden + sizes.hidden
    return train.lora.rank * width * sizes.layers


def _sample_flops(train: VlmTrainConfig, sizes: _Sizes, row: _Row) -> float:
    """Return the FLOPs of one sample, forward and backward."""
    # A token takes 2 FLOPs a parameter forward, 2 back to the inputs, 2 for gradients of the parameters themselves.
    again = 2 if train.compute.recompute else 0
    language = 6 + again
    if train.train == "lora":  # the large matrices are frozen
        language -= 2
    vision = 2  # forward only
    if train.train == "full":
        vision = 6 + again
    attention = 2 * 3 + again  # of 2 x two products of S x S x h: forward, and twice back
    total = language * sizes.language * float(row.tokens)
    total += attention * 2.0 * row.tokens**2 * sizes.hidden * sizes.layers
    total += language * sizes.head * row.with_loss
    total += vision * sizes.vision * float(row.patches)
    return total


def _memory(train: VlmTrainConfig, sizes: _Sizes, row: _Row, stage: int, trained: int, workers: int) -> StageMemory:
    """Return the memory of one worker, by the formula of this module."""
    rows = train.optimizer.micro_batch_samples
    shared = {"optimizer": 12 * trained, "gradients": 2 * trained, "weights": 2 * sizes.all}
    # Each stage of ZeRO shares out one more of these among the workers.
    parts = dict(shared)
    for name, first_stage in (("optimizer", 1), ("gradients", 2), ("weights", 3)):
        if stage >= first_stage:
            parts[name] //= workers
    if stage == 3:  # the largest module is gathered
        parts["weights"] += 2 * max(sizes.head, 2 * sizes.hidden * sizes.inner)
    own = 2 * row.tokens * (6 * sizes.hidden + 3 * sizes.inner) + 3 * row.tokens**2
    kept = own  # of each layer until its backward pass
    if train.compute.recompute:
        kept = 2 * row.tokens * sizes.hidden
    return StageMemory(
        stage=stage,
        weights=parts["weights"],
        gradients=parts["gradients"],
        optimizer=parts["optimizer"],
        activations=rows * (kept * sizes.layers + own),
        logits=round(14 * rows * row.with_loss * sizes.vocabulary),
    )


def _sizes(model: str) -> tuple[_Sizes, str]:
    """Return the sizes of a model, and where they are from."""
    if model in _QWEN:
        text = dict(_QWEN[model])
        tied = bool(text.pop("tie_word_embeddings"))
        vision = {**_VISION, "out_hidden_size": text["hidden_size"]}
        loaded = AutoConfig.for_model("qwen2_5_vl", text_config=text, vision_config=vision, tie_word_embeddings=tied)
        return _count(loaded, tied), "counted from its config.json, as published"
    if not os.path.isdir(os.path.expanduser(model)):
        raise ConfigError(f"vlm.model: {model} is no folder here, and not one of {', '.join(_QWEN)}; give one of them")
    try:
        loaded = AutoConfig.from_pretrained(os.path.expanduser(model), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"vlm.model: {model}: config.json cannot be read ({one_line(error)}); correct it") from error
    try:
        counted = _count(loaded, bool(loaded.tie_word_embeddings))
    except ValueError as error:  # its message lists every model that transformers knows
        raise ConfigError(
            f"vlm.model: {model}: its config.json is of a {loaded.model_type}, no vision-language model; give one"
        ) from error
    return counted, f"counted from {model}/config.json"


def _count(config: Any, tied: bool) -> _Sizes:
    text = config.get_text_config()
    # On the meta device parameters have sizes and take no memory.
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    vision = 0
    for name, parameter in model.named_parameters():
        if ".visual." in name or ".vision_tower." in name:
            vision += parameter.numel()
    head = text.vocab_size * text.hidden_size
    everything = sum(parameter.numel() for parameter in model.parameters())
    language = everything - vision - head * (1 if tied else 2)
    return _Sizes(
        language=language,
        head=head,
        vision=vision,
        tied=tied,
        hidden=text.hidden_size,
        inner=text.intermediate_size,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
    )
