"""What a training would take, before anything is started: steps, tokens, memory of a GPU, hours.

Memory of one worker is the sum of four terms, in bytes, for T tokens of a micro-batch, hidden and intermediate widths h
and f, H heads, L layers, V ids, P adapter parameters, N workers, and s bytes of a number of the backbone:

    weights      s x parameters of the backbone; over N in stage 3, beside the largest module, which is gathered
    adapter      stage 0: 16 P (float32 value, gradient, Adam's two moments); from stage 1 the moments and a second
                 value are spread over N, from stage 2 the gradients, in stage 3 the value too
    activations  T (L layer + s (h + 2 h/H)), where a layer keeps for its backward pass
                     layer = s (6 h + 3 f + h [qkv adapted] + h [gate or up] + f [down] + rank x targets) + 4 (H + 2)
                 With recompute a layer keeps its input, s h, and the last norm its own: T s h (L + 2 + 2/H)
    working      the larger of the loss, 2 s T h + min(T, 2048) V x (4 or, beside its copy, 4 + s), and of a layer's
                 backward pass, s T (f + 2 h); with recompute that is T layer + s T (f + h)

The kernels' own workspace, the allocator's gaps and the buffers of communication come on top: some 10 to 20%.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from transformers import LlamaConfig

from covray.chains.dataset import ChainDataset
from covray.chains.sentences import count_pairs, require_context
from covray.config import LoraConfig, TrainConfig
from covray.errors import ConfigError
from covray.models.lvm.backbone import backbone_facts
from covray.models.lvm.scales import parameters

STAGES = (0, 1, 2, 3)
"""Of ZeRO; 0 is every worker with a whole copy, with or without DeepSpeed."""
_CHUNK = 2048  # positions whose logits exist at a time, see covray.models.lvm.model


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker's GPU at a ZeRO stage; see the formula above."""

    stage: int
    weights: int
    adapter: int
    activations: int
    working: int
    recompute: bool

    @property
    def total(self) -> int:
        """All terms."""
        return self.weights + self.adapter + self.activations + self.working


@dataclass(frozen=True)
class TrainPlan:
    """What a training would take."""

    parameters: int
    """Of the backbone."""
    trainable: int
    """Of the adapter."""
    pairs: int
    """Queries of an epoch."""
    tokens_per_sentence: float
    """The mean, where lengths or pairs are drawn."""
    epochs: float
    steps: int
    """Exact where all sentences are of one length."""
    sentences: int
    tokens: int
    workers: int
    micro_batch_tokens: int
    """Of the largest micro-batch of a worker."""
    memory: tuple[Memory, ...]
    """Of a worker, by stage, each without and with recompute."""
    hours: float | None
    gpu_hours: float | None

    @property
    def trainable_share(self) -> float:
        """Adapter over backbone."""
        return self.trainable / self.parameters


def plan(config: TrainConfig, tokens_per_s: float | None = None) -> TrainPlan:
    """The plan of ``config`` for its dataset; reads no tokens and no weights.

    ``tokens_per_s``: of one worker, for the hours. Raises CovrayError where the training would.
    """
    dataset = ChainDataset(config.data)
    backbone = config.backbone
    # A plan needs the architecture, not the weights: without the folder at hand the scale says it.
    local = backbone.path in (None, "nano") or os.path.isdir(os.path.expanduser(str(backbone.path)))
    known = backbone.path if local or backbone.scale == "custom" else None
    llama = backbone_facts(backbone.model_copy(update={"path": known, "init": "random"})).llama
    require_context(config.sentences, dataset.tokens_per_image, llama.max_position_embeddings)
    pairs = sum(count_pairs(dataset, config.sentences, config.sentences.split).values())
    if config.sentences.validation_split is not None:
        count_pairs(dataset, config.sentences, config.sentences.validation_split)
    return plan_training(config, llama, pairs, dataset.tokens_per_image, tokens_per_s)


def plan_training(
    config: TrainConfig, llama: LlamaConfig, pairs: int, tokens_per_image: int, tokens_per_s: float | None = None
) -> TrainPlan:
    """The plan of ``config`` for an architecture and a split of ``pairs``; see ``plan``."""
    if tokens_per_s is not None and tokens_per_s <= 0:
        raise ConfigError(f"--tokens-per-s {tokens_per_s:g}: must be more than 0")
    optimizer, workers = config.optimizer, config.workers.count
    chosen = config.sentences
    lengths = (2,) if chosen.method == "none" else chosen.lengths
    every = [length * (examples + 1) * tokens_per_image for length in lengths for examples in chosen.pairs]
    mean = sum(every) / len(every)
    per_step = max(1, int(optimizer.batch_tokens / mean))
    if optimizer.steps is not None:
        steps, sentences = optimizer.steps, optimizer.steps * per_step
    else:
        sentences = max(1, round(optimizer.epochs * pairs))
        steps = -(-sentences // per_step)
    tokens = round(sentences * mean)
    share = -(-per_step // workers) * max(every)
    micro = max(max(every), min(optimizer.micro_batch_tokens, share))
    hours = None if tokens_per_s is None else tokens / (tokens_per_s * workers) / 3600
    return TrainPlan(
        parameters=parameters(llama),
        trainable=adapter_parameters(llama, config.lora),
        pairs=pairs,
        tokens_per_sentence=mean,
        epochs=sentences / pairs,
        steps=steps,
        sentences=sentences,
        tokens=tokens,
        workers=workers,
        micro_batch_tokens=micro,
        memory=tuple(memory(config, llama, stage, micro, recompute) for stage in STAGES for recompute in (False, True)),
        hours=hours,
        gpu_hours=None if hours is None else hours * workers,
    )


def adapter_parameters(llama: LlamaConfig, lora: LoraConfig) -> int:
    """Parameters of the adapter: rank x (inputs + outputs) of every target in every layer."""
    h, f = llama.hidden_size, llama.intermediate_size
    ends = {"q_proj": 2 * h, "k_proj": 2 * h, "v_proj": 2 * h, "o_proj": 2 * h}
    ends |= {"gate_proj": h + f, "up_proj": h + f, "down_proj": h + f}
    return int(llama.num_hidden_layers * lora.rank * sum(ends[target] for target in lora.targets))


def memory(config: TrainConfig, llama: LlamaConfig, stage: int, tokens: int, recompute: bool) -> Memory:
    """Bytes of one of ``config.workers.count`` workers at ZeRO ``stage``, for micro-batches of ``tokens``."""
    h, f, heads, layers = (
        llama.hidden_size, llama.intermediate_size, llama.num_attention_heads, llama.num_hidden_layers,
    )  # fmt: skip
    compute, lora, workers = config.compute, config.lora, config.workers.count
    # What "auto" becomes on a GPU; a CPU has it in bfloat16 only where it has matrix units.
    s = 4 if compute.dtype == "float32" or (compute.dtype == "auto" and compute.device == "cpu") else 2

    weights = s * parameters(llama)
    if stage == 3:
        largest = max(llama.vocab_size * h, 2 * h * f, 3 * h * h)
        weights = weights // workers + s * largest
    each = adapter_parameters(llama, lora)
    kept = 16 * each
    if stage > 0:
        value, gradient, spread = 4 * each, 4 * each, 12 * each // workers
        kept = (value // workers if stage == 3 else value) + (gradient // workers if stage > 1 else gradient) + spread

    targets = set(lora.targets)
    numbers = 6 * h + 3 * f + lora.rank * len(targets)
    numbers += h * bool(targets & {"q_proj", "k_proj", "v_proj"}) + h * bool(targets & {"gate_proj", "up_proj"})
    numbers += f * ("down_proj" in targets)
    layer = s * numbers + 4 * (heads + 2)
    ends = s * (h + 2 * h // heads)
    activations = tokens * (s * h * (layers + 1) + ends if recompute else layers * layer + ends)
    loss = 2 * s * tokens * h + min(tokens, _CHUNK) * llama.vocab_size * (4 if s == 4 else 4 + s)
    backward = tokens * (layer + s * (f + h)) if recompute else s * tokens * (f + 2 * h)
    return Memory(stage, weights, kept, activations, max(loss, backward), recompute)
