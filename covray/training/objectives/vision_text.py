"""Answers to pictures and prompts: a vision-language model learns them token by token, or by blocks of masked tokens.

    objective: autoregressive    next-token cross-entropy of the answers
    objective: block_diffusion   NELBO of the noisy blocks + ``autoregressive`` x next-token cross-entropy

A step is a fixed number of samples, in an order that follows from the seed and the epoch. A sample's noise follows from
the seed and its number alone, so that neither workers nor a restart change a step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from covray.config.vlm import VlmTextsConfig, VlmTrainConfig
from covray.errors import ManifestError, PairError
from covray.io.images import Picture, decode, load_picture
from covray.models.vlm.adapter import adapter_files, add_adapter, model_files
from covray.models.vlm.batch import Blocks, NoiseLevels, VlmBatch, add_noise, collate
from covray.models.vlm.checkpoint import load_vlm, vlm_facts
from covray.models.vlm.prompts import Prompter, Sample, pad_to_block, require_proportions
from covray.pairs.exchanges import Exchange, Exchanges, read_exchanges
from covray.seeds import seed_of
from covray.training.objectives.base import Loss, StepBatches, perplexity
from covray.training.worker import WorkerContext

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class VisionText:
    """The objective of ``covray vlm train``."""

    def __init__(self, config: VlmTrainConfig, device: torch.device):
        """Read the data and load the model.

        Args:
            config: The configuration, without an ``auto``.
            device: The device of this worker.

        Raises:
            CovrayError: Data or model cannot be used.
        """
        self.config = config
        self._facts = vlm_facts(config.checkpoint())
        self._blocks = blocks_of(config)
        data = read_data(config.data, config.texts)
        self._training = data.of_split(config.texts.split)
        self._validation: tuple[Exchange, ...] = ()
        if config.texts.validation_split is not None:
            self._validation = data.of_split(config.texts.validation_split)[: config.validation_samples]
        self._root = data.root
        loaded = load_vlm(self._facts, _DTYPES[config.compute.dtype], device)
        self._model, self._prompter = loaded.model, loaded.prompter
        self._choose_parameters()
        self.steps = count_steps(len(self._training), config)
        self._lengths: dict[str, int] = {}
        # A batch that a worker without a share computes for the collectives.
        sample = self._sample(self._training[0], self._blocks)
        idle = self._batch([sample], [0], "idle", 0.0, self._blocks)
        self.idle_batch = idle.to(device)
        self.flops_per_token = self._flops_per_token(sample)

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self._model

    @property
    def rewriter(self) -> None:
        """The model writes no data."""
        return None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name."""
        return {name: value for name, value in self._model.named_parameters() if value.requires_grad}

    def batches(self, cursor: int, worker: WorkerContext) -> StepBatches[VlmBatch]:
        """Return the share of ``worker`` in the step that begins at sample ``cursor``."""
        chosen, count = self.config.optimizer, len(self._training)
        end = cursor + chosen.batch_samples
        if chosen.steps is None:
            end = min(end, _end_of_epochs(count, self.config))
        numbers = range(cursor, end)
        exchanges, tokens = [], 0
        # Which sample a number is follows from the seed and the number.
        for number in numbers:
            exchange = self._training[sample_at(self.config.seed, count, number)]
            exchanges.append(exchange)
            tokens += self._answer_tokens(exchange)
        # The loss of a step is divided by what it is the mean over.
        loss_tokens = tokens
        if self._uses_blocks and self.config.blocks.mean == "samples":
            loss_tokens = len(exchanges)
        return StepBatches(
            next_cursor=end,
            batches=self._share(exchanges, numbers, worker, "training", self._blocks_at(cursor)),
            loss_tokens=loss_tokens,
            sentences=len(exchanges),
            tokens=tokens,
            epoch=end / count,
        )

    def loss(self, forward: Callable[[VlmBatch], Any], batch: VlmBatch) -> Loss:
        """Return the loss of a batch."""
        total, each = forward(batch)
        return Loss(total, each)

    def validate(self, evaluate: Callable[[VlmBatch | None], Tensor], worker: WorkerContext) -> dict[str, float] | None:
        """Return the mean loss of the answers of the first validation samples, under noise that is always the same.

        ``answer_perplexity`` is the next-token loss's; ``answer_nelbo_perplexity`` the exponent of the blocks' NELBO.
        """
        if not self._validation:
            return None
        # loss of clean and of masked tokens
        sums = torch.zeros(2, device=worker.device, dtype=torch.float64)
        numbers = range(len(self._validation))
        for batch in self._share(self._validation, numbers, worker, "validation", self._blocks):
            if batch is None:
                evaluate(None)
                continue
            on_device = batch.to(worker.device)
            each = evaluate(on_device).double()
            masked = 0
            if on_device.noise is not None:
                weights = on_device.noise.weights[on_device.noise.masked]
                masked = len(weights)
                sums[1] += (each[len(each) - masked :] * weights).sum()
            sums[0] += each[: len(each) - masked].sum()
        clean, nelbo = worker.sum(sums)
        tokens = sum(self._answer_tokens(exchange) for exchange in self._validation)
        if not self._uses_blocks:
            return {"validation_loss": clean / tokens, "answer_perplexity": perplexity(clean / tokens)}
        weight = self.config.blocks.autoregressive
        metrics = {
            "validation_loss": (nelbo + weight * clean) / tokens,
            "answer_nelbo_perplexity": perplexity(nelbo / tokens),
        }
        if weight:
            metrics["answer_perplexity"] = perplexity(clean / tokens)
        return metrics

    def export(self, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
        """Return the adapter in PEFT's format, or the files of the whole model."""
        trained = {name: tensors[name] for name in self.parameters()}
        blocks = None
        if self._uses_blocks:
            blocks = self._blocks
        if self.config.train == "lora":
            return adapter_files(self._model, trained, self._facts, blocks)
        return model_files(self._model, trained, self._facts, blocks)

    def _blocks_at(self, cursor: int) -> Blocks:
        """Return the blocks of the step that begins at sample ``cursor``."""
        sizes = (*self.config.blocks.anneal, self.config.blocks.size)
        samples = self.steps * self.config.optimizer.batch_samples
        return replace(self._blocks, size=sizes[min(cursor * len(sizes) // samples, len(sizes) - 1)])

    @property
    def _uses_blocks(self) -> bool:
        return self.config.objective == "block_diffusion"

    def _choose_parameters(self) -> None:
        """Decide what is trained."""
        config = self.config
        if config.train == "lora":
            lora = config.lora
            add_adapter(self._model, lora.rank, lora.alpha, lora.targets, self._uses_blocks, config.seed)
        else:
            for name, parameter in self._model.named_parameters():
                is_vision = ".visual." in name or ".vision_tower." in name
                parameter.requires_grad_(config.train == "full" or not is_vision)
        if config.compute.recompute:
            # transformers recomputes in training mode only.
            self._model.train()
            self._model.model.activation_checkpointing_enable({"use_reentrant": False})

    def _share(
        self, exchanges: Sequence[Exchange], numbers: Sequence[int], worker: WorkerContext, purpose: str, blocks: Blocks
    ) -> list[VlmBatch | None]:
        """Return the micro-batches of ``worker``, as many as every other worker has; None: nothing to compute.

        Samples of like lengths are read together, as every row of a batch is padded to its longest: captions of one
        picture beside questions about four were nearly half padding.
        """
        size = self.config.optimizer.micro_batch_samples
        most = math.ceil(math.ceil(len(exchanges) / worker.world_size) / size)
        samples = []
        for exchange, number in list(zip(exchanges, numbers, strict=True))[worker.rank :: worker.world_size]:
            samples.append((self._sample(exchange, blocks), number))
        # Samples of one length keep the order of the step: batches and sums follow from the step alone.
        samples.sort(key=lambda numbered: len(numbered[0].ids))
        batches: list[VlmBatch | None] = []
        for first in range(0, most * size, size):
            part = samples[first : first + size]
            if not part:
                batches.append(None)
                continue
            own_samples, own_numbers = [], []
            for sample, number in part:
                own_samples.append(sample)
                own_numbers.append(number)
            batches.append(self._batch(own_samples, own_numbers, purpose, self._next_weight(purpose), blocks))
        return batches

    def _next_weight(self, purpose: str) -> float:
        """Return the weight of the autoregressive loss of next tokens, beside the loss of blocks if there is one."""
        if not self._uses_blocks:
            return 1.0
        weight = self.config.blocks.autoregressive
        # A validation reports both losses apart, each unweighted; with weight 0 next tokens are not read at all.
        if purpose == "validation" and weight:
            return 1.0
        return weight

    def _batch(
        self, samples: Sequence[Sample], numbers: Sequence[int], purpose: str, next_weight: float, blocks: Blocks
    ) -> VlmBatch:
        """Return a batch with the noise of the samples ``numbers`` of ``purpose``."""
        if not self._uses_blocks:
            return collate(samples, None, blocks, next_weight)
        chosen = self.config.blocks
        levels = NoiseLevels(chosen.low, chosen.high, chosen.weight)
        noisy = []
        for sample, number in zip(samples, numbers, strict=True):
            generator = np.random.default_rng(seed_of(self.config.seed, purpose, number))
            noisy.append(add_noise(sample, blocks, levels, generator))
        scales = None
        if chosen.mean == "samples" and purpose == "training":
            scales = [1 / (len(sample.ids) - sample.prompt) for sample in samples]
        return collate(samples, noisy, blocks, next_weight, scales)

    def _sample(self, exchange: Exchange, blocks: Blocks) -> Sample:
        """Return the tokens of an exchange, in whole blocks where blocks are learned.

        Raises:
            ManifestError: The picture cannot be used.
        """
        prompt = self._prompter.turn(parts_of(exchange, self._root, self.config.texts.instruction))
        sample = self._prompter.sample(prompt, exchange.answer)
        if not self._uses_blocks:
            return sample
        return pad_to_block(sample, blocks.padding(sample.prompt, len(sample.ids)))

    def _answer_tokens(self, exchange: Exchange) -> int:
        """Return the tokens of an answer with its end, without padding."""
        # Every worker counts all answers of a step, and the answers to questions repeat.
        known = self._lengths.get(exchange.answer)
        if known is None:
            known = self._lengths[exchange.answer] = answer_tokens(self._prompter, exchange.answer)
        return known

    def _flops_per_token(self, sample: Sample) -> float:
        """Return the FLOPs of a token of an answer, by the first sample: its prompt is computed for its answer.

        Forward 2N and backward 4N a token, 2N where the weights are frozen; attention is left out.
        """
        parameters = sum(parameter.numel() for parameter in self._model.parameters())
        tokens = len(sample.ids)
        if self._uses_blocks:  # a noisy copy stands beside the clean one
            tokens *= 2
        each = 6.0
        if self.config.train == "lora":
            each = 4.0
        return each * parameters * tokens / (sample.end - sample.prompt)


def blocks_of(config: VlmTrainConfig) -> Blocks:
    """Return the blocks of a training."""
    chosen = config.blocks
    return Blocks(chosen.size, chosen.context, chosen.start, chosen.shift)


def read_data(path: str, texts: VlmTextsConfig) -> Exchanges:
    """Read the data of a configuration. Raises ManifestError."""
    return read_exchanges(path, texts.root, captions=texts.captions, questions=texts.questions)


def pictures_of(exchange: Exchange, root: str | None) -> list[np.ndarray]:
    """Return the picture of an exchange, uint8 [h, w, 3], if it has one.

    Raises:
        ManifestError: The picture cannot be used.
    """
    if exchange.picture == Picture():
        return []
    return [_pixels(exchange.picture, root)]


def parts_of(exchange: Exchange, root: str | None, instruction: str) -> list[str | np.ndarray]:
    """Return the pictures, uint8 [h, w, 3], and texts of an exchange's prompt, in order.

    Args:
        exchange: The exchange.
        root: Folder that URIs of pictures are below.
        instruction: The prompt of captions.

    Raises:
        ManifestError: A picture cannot be used.
    """
    if exchange.turn:
        parts: list[str | np.ndarray] = []
        for part in exchange.turn:
            if isinstance(part, str):
                parts.append(part)
            else:
                parts.append(_pixels(part, root))
        return parts
    text = exchange.prompt
    if text is None:
        text = instruction
    return [*pictures_of(exchange, root), text]


def _pixels(picture: Picture, root: str | None) -> np.ndarray:
    try:
        pixels = decode(load_picture(picture, root))
        require_proportions(pixels)
        return pixels
    except PairError as error:
        raise ManifestError(f"a picture of the data cannot be used: {error}; correct or remove its row") from error


def answer_tokens(prompter: Prompter, answer: str) -> int:
    """Return the tokens of an answer with its end."""
    return len(prompter.tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1


def sample_at(seed: int, count: int, number: int) -> int:
    """Return which of ``count`` samples is the ``number``-th of the training, counted through all epochs."""
    epoch, place = divmod(number, count)
    return int(_order(seed, count, epoch)[place])


def count_steps(count: int, config: VlmTrainConfig) -> int:
    """Return the steps of a training on ``count`` samples: as configured, or as many as its epochs take."""
    if config.optimizer.steps is not None:
        return config.optimizer.steps
    # The last step takes what is left of the epochs.
    return math.ceil(_end_of_epochs(count, config) / config.optimizer.batch_samples)


def _end_of_epochs(count: int, config: VlmTrainConfig) -> int:
    return max(1, round(config.optimizer.epochs * count))


@functools.lru_cache(maxsize=4)
def _order(seed: int, count: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(seed_of(seed, "order", epoch)).permutation(count)
