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

from dataclasses import dataclass

from transformers import LlamaConfig

from covray.chains.mapped import count_queries
from covray.chains.sentences import require_context
from covray.config import BackboneConfig, LoraConfig, TrainConfig
from covray.errors import ConfigError
from covray.io.model_folders import is_here
from covray.models.lvm.backbone import BackboneFacts, backbone_facts
from covray.models.lvm.functions import CHUNK
from covray.models.lvm.scales import parameters
from covray.models.lvm.verifier import LIKELIHOODS
from covray.training.data import sources_of
from covray.training.objectives.verdicts import count_steps, require_answers, split_queries, step_end

STAGES = (0, 1, 2, 3)
"""The stages of ZeRO; in stage 0 every worker has a whole copy, with or without DeepSpeed."""


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
        """The sum of all terms."""
        return self.weights + self.adapter + self.activations + self.working


@dataclass(frozen=True)
class TrainPlan:
    """What a training would take."""

    parameters: int
    """Parameters of the backbone."""
    trainable: int
    """Parameters of the adapter."""
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
    """Tokens of the largest micro-batch of a worker."""
    memory: tuple[Memory, ...]
    """Memory of a worker by stage, each without and with recompute."""
    hours: float | None
    gpu_hours: float | None

    @property
    def trainable_share(self) -> float:
        """Parameters of the adapter over those of the backbone."""
        return self.trainable / self.parameters


def plan(config: TrainConfig, tokens_per_s: float | None = None) -> TrainPlan:
    """Return the plan of ``config`` for its dataset; no weights are read, and of tokens only a verifier's answers.

    Args:
        config: The configuration.
        tokens_per_s: Speed of one worker, for the hours.

    Raises:
        CovrayError: The dataset does not allow the training.
    """
    llama = architecture(config.backbone).llama
    if config.objective == "verifier":
        return _plan_verifier(config, llama, tokens_per_s)
    sources = sources_of(config)
    dataset = sources[0].dataset
    require_context(config.sentences, dataset.tokens_per_image, llama.max_position_embeddings)
    pairs = count_queries(sources, config.sentences, config.sentences.split)
    if config.sentences.validation_split is not None:
        count_queries(sources, config.sentences, config.sentences.validation_split)
    return plan_training(config, llama, pairs, dataset.tokens_per_image, tokens_per_s)


def architecture(backbone: BackboneConfig) -> BackboneFacts:
    """Return what is known of a backbone without its weights; where its folder is not on disk, the scale says it.

    Raises:
        ConfigError: The folder is of another scale.
        WeightsError: The folder is not one of an LVM.
    """
    path = backbone.path
    if path is not None and not is_here(path) and backbone.scale != "custom":
        path = None
    # "random" so that no weights are looked for, which a hub id would have to download.
    return backbone_facts(backbone.model_copy(update={"path": path, "init": "random"}))


def plan_training(
    config: TrainConfig, llama: LlamaConfig, pairs: int, tokens_per_image: int, tokens_per_s: float | None = None
) -> TrainPlan:
    """Return the plan of ``config`` for an architecture and a dataset that need not exist.

    Args:
        config: The configuration.
        llama: The architecture of the backbone.
        pairs: Pairs of the training split.
        tokens_per_image: Tokens of a picture.
        tokens_per_s: Speed of one worker, for the hours.

    Raises:
        ConfigError: The speed is not positive.
    """
    _require_speed(tokens_per_s)
    optimizer, workers, chosen = config.optimizer, config.workers.count, config.sentences
    lengths: tuple[int, ...] = (2,)  # the two pictures of a pair, without frames
    if chosen.method != "none":
        lengths = chosen.lengths
    sizes = []
    for length in lengths:
        for examples in chosen.pairs:
            chains = examples + 1  # those of the examples, and the query's
            sizes.append(length * chains * tokens_per_image)
    mean_tokens = sum(sizes) / len(sizes)
    sentences_per_step = max(1, int(optimizer.batch_tokens / mean_tokens))
    if optimizer.steps is not None:
        steps, sentences = optimizer.steps, optimizer.steps * sentences_per_step
    else:
        sentences = max(1, round(optimizer.epochs * pairs))
        steps = -(-sentences // sentences_per_step)
    tokens = round(sentences * mean_tokens)
    share = -(-sentences_per_step // workers) * max(sizes)  # tokens of a step on the busiest worker
    # The longest sentence fits in a micro-batch in any case.
    micro_batch = max(max(sizes), min(optimizer.micro_batch_tokens, share))
    figures = []
    for stage in STAGES:
        for recompute in (False, True):
            figures.append(memory(config, llama, stage, micro_batch, recompute))
    hours: float | None = None
    gpu_hours: float | None = None
    if tokens_per_s is not None:
        hours = tokens / (tokens_per_s * workers) / 3600
        gpu_hours = hours * workers
    return TrainPlan(
        parameters=parameters(llama),
        trainable=adapter_parameters(llama, config.trained_lora),
        pairs=pairs,
        tokens_per_sentence=mean_tokens,
        epochs=sentences / pairs,
        steps=steps,
        sentences=sentences,
        tokens=tokens,
        workers=workers,
        micro_batch_tokens=micro_batch,
        memory=tuple(figures),
        hours=hours,
        gpu_hours=gpu_hours,
    )


def _require_speed(tokens_per_s: float | None) -> None:
    if tokens_per_s is not None and tokens_per_s <= 0:
        raise ConfigError(f"--tokens-per-s {tokens_per_s:g}: must be more than 0")


def _plan_verifier(config: TrainConfig, llama: LlamaConfig, tokens_per_s: float | None) -> TrainPlan:
    """Return the plan of a verifier: the frozen model reads every answer once, and little is trained.

    Args:
        config: The configuration.
        llama: The architecture of the backbone.
        tokens_per_s: Speed of reading of one worker, for the hours.

    Raises:
        ConfigError: The answers cannot be used, or the speed is not positive.
    """
    _require_speed(tokens_per_s)
    training, validation = split_queries(require_answers(config), config)
    steps = count_steps(training, config)
    cursor = 0
    for _ in range(steps):
        cursor = step_end(training, cursor, config)
    # Every answer is read once, whatever the number of epochs.
    read = [*training, *validation]
    tokens = sum(query.tokens for query in read)
    longest = max(len(query.before) + query.written[0].size for query in read)
    trainable = (llama.hidden_size + LIKELIHOODS + 2) * config.verifier.hidden
    # Bytes of a number: float32 on a CPU, else bfloat16.
    s = 4 if config.compute.dtype == "float32" or config.compute.device == "cpu" else 2
    kept = 2 * s * llama.num_hidden_layers * llama.hidden_size * longest  # keys and values
    working = longest * (s * (2 * llama.intermediate_size + 2 * llama.hidden_size) + 4 * llama.vocab_size)
    hours = None if tokens_per_s is None else tokens / (tokens_per_s * config.workers.count) / 3600
    return TrainPlan(
        parameters=parameters(llama),
        trainable=trainable,
        pairs=len(training),
        tokens_per_sentence=tokens / len(read),
        epochs=cursor / len(training),
        steps=steps,
        sentences=cursor,
        tokens=tokens,
        workers=config.workers.count,
        micro_batch_tokens=longest,
        memory=(Memory(0, s * parameters(llama), 16 * trainable, kept, working, recompute=False),),
        hours=hours,
        gpu_hours=None if hours is None else hours * config.workers.count,
    )


def adapter_parameters(llama: LlamaConfig, lora: LoraConfig) -> int:
    """Return the parameters of the adapter: rank x (inputs + outputs) of every target in every layer."""
    h, f = llama.hidden_size, llama.intermediate_size
    ends = {"q_proj": 2 * h, "k_proj": 2 * h, "v_proj": 2 * h, "o_proj": 2 * h}
    ends |= {"gate_proj": h + f, "up_proj": h + f, "down_proj": h + f}
    numbers = sum(ends[target] for target in lora.targets)
    return int(llama.num_hidden_layers * lora.rank * numbers)


def memory(config: TrainConfig, llama: LlamaConfig, stage: int, tokens: int, recompute: bool) -> Memory:
    """Return the memory of one worker, by the formula of this module.

    Args:
        config: The configuration.
        llama: The architecture of the backbone.
        stage: The ZeRO stage, 0 to 3.
        tokens: Tokens of a micro-batch.
        recompute: Whether activations are computed again in the backward pass.
    """
    h, f, heads, layers = (
        llama.hidden_size, llama.intermediate_size, llama.num_attention_heads, llama.num_hidden_layers,
    )  # fmt: skip
    compute, lora, workers = config.compute, config.lora, config.workers.count
    # On a GPU "auto" becomes bfloat16; on a CPU only where it has matrix units.
    is_float32 = compute.dtype == "float32" or (compute.dtype == "auto" and compute.device == "cpu")
    s = 2  # bytes of a number of the arithmetic
    if is_float32:
        s = 4

    weights = s * parameters(llama)
    # ZeRO-3 shares the weights out and gathers one matrix at a time.
    if stage == 3:
        largest = max(llama.vocab_size * h, 2 * h * f, 3 * h * h)
        weights = weights // workers + s * largest

    # Numbers that are kept of a token in a layer for the backward pass; see the module.
    targets = set(lora.targets)
    numbers = 6 * h + 3 * f + lora.rank * len(targets)
    numbers += h * bool(targets & {"q_proj", "k_proj", "v_proj"}) + h * bool(targets & {"gate_proj", "up_proj"})
    numbers += f * ("down_proj" in targets)
    layer = s * numbers + 4 * (heads + 2)
    ends = s * (h + 2 * h // heads)
    # The loss computes logits in float32: in bfloat16 it keeps both.
    logit = 4
    if not is_float32:
        logit += s
    loss = 2 * s * tokens * h + min(tokens, CHUNK) * llama.vocab_size * logit
    # Computed again in the backward pass: only the inputs of the layers are kept.
    if recompute:
        activations = tokens * (s * h * (layers + 1) + ends)
        backward = tokens * (layer + s * (f + h))
    else:
        activations = tokens * (layers * layer + ends)
        backward = s * tokens * (f + 2 * h)
    adapter = _adapter_bytes(adapter_parameters(llama, config.trained_lora), stage, workers)
    return Memory(stage, weights, adapter, activations, max(loss, backward), recompute)


def _adapter_bytes(count: int, stage: int, workers: int) -> int:
    """Return the bytes of ``count`` adapter parameters on one worker: value, gradient, Adam's moments, in float32."""
    value, gradient = 4 * count, 4 * count
    if stage == 0:
        return value + gradient + 8 * count
    if stage > 1:
        gradient //= workers
    if stage == 3:
        value //= workers
    return value + gradient + 12 * count // workers  # the moments, and a second value
