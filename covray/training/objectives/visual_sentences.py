"""Next-token prediction over visual sentences: a LoRA adapter teaches the frozen backbone to write chains.

The paper's objective: one cross-entropy over the tokens of examples, frames and answer (``sentences.loss`` says which).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from covray.chains.dataset import ChainDataset
from covray.chains.mapped import MappedChains, Source
from covray.chains.sentences import Sentences, loss_tokens, micro_batches, step_bounds
from covray.config import TrainConfig, require_compiler
from covray.models.lvm.adapter import MASK_ROW, adapter_files, adapter_tensors, load_adapter_tensors, read_start
from covray.models.lvm.backbone import BackboneFacts, backbone_facts, load_backbone
from covray.models.lvm.draft import Draft
from covray.models.lvm.draft_files import DRAFT_PREFIX
from covray.models.lvm.lora import Diffusion, Lora
from covray.models.lvm.model import Batch, Lvm
from covray.models.lvm.scales import parameters
from covray.training.data import sources_of
from covray.training.objectives.base import Loss, Rewriter, StepBatches, perplexity
from covray.training.objectives.frame_noise import FrameNoise
from covray.training.objectives.own_frames import OwnFrames
from covray.training.worker import WorkerContext

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class VisualSentences:
    """The objective of ``covray train``."""

    def __init__(self, config: TrainConfig, device: torch.device):
        """Read the chains and load the model.

        Args:
            config: The configuration, without an ``auto``.
            device: The device of this worker.

        Raises:
            CovrayError: The dataset, the backbone or the adapter cannot be used, or nothing can be compiled here.
        """
        if config.compute.compile:
            require_compiler("compute.compile", device.type)
        self.config = config
        self._facts = backbone_facts(config.backbone)
        sources, chosen = sources_of(config), config.sentences
        dataset = sources[0].dataset
        self.training = _sentences(sources, config, self._facts, chosen.split)
        self.validation: Sentences | None = None
        if chosen.validation_split is not None:
            unweighted = [Source(source.dataset) for source in sources]
            self.validation = _sentences(unweighted, config, self._facts, chosen.validation_split)
        self.steps = count_steps(self.training, config)
        self.flops_per_token = _flops_per_token(self._facts.llama, self.training)
        chosen_lora = Lora(config.lora.rank, config.lora.alpha, config.lora.targets, self._diffusion(), self._draft())
        self.model = _load_model(config, self._facts, chosen_lora, device)
        self._noise = self._frame_noise(dataset)
        no_ids = torch.zeros(2, dtype=torch.int64, device=device)
        self.idle_batch = Batch(no_ids, (2,), no_ids[:1])  # one sentence of two tokens

    def _diffusion(self) -> Diffusion | None:
        """Return what the adapter knows of masks; None where it knows nothing."""
        return None

    def _draft(self) -> Draft | None:
        """Return the draft adapter that is trained; None where the adapter itself is."""
        return None

    def _frame_noise(self, dataset: ChainDataset) -> FrameNoise | None:
        """Return the noise in the query's frames; None where there is none."""
        config, chosen = self.config, self.config.sentences.frame_noise
        if chosen.kind == "none":
            return None
        codes = dataset.record.codes or self._facts.codes
        noise = FrameNoise(config, self.training, codes)
        if chosen.kind == "own":
            noise.own = OwnFrames(
                chosen,
                self.training,
                self.model,
                codes,
                step_end=self._step_end,
                end=end_of_training(self.training, config),
                seed=config.seed,
            )
        return noise

    def _step_end(self, cursor: int) -> int:
        """Return the cursor after the step that begins at ``cursor``."""
        end = step_bounds(self.training, cursor, self.config.optimizer.batch_tokens)
        if self.config.optimizer.steps is None:
            end = min(end, _end_of_epochs(self.training, self.config))
        return end

    @property
    def rewriter(self) -> Rewriter | None:
        """What writes the frames of ``sentences.frame_noise.kind: own``."""
        if self._noise is None:
            return None
        return self._noise.own

    @property
    def module(self) -> nn.Module:
        """The backbone with its adapter."""
        return self.model

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the adapter by name."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def batches(self, cursor: int, worker: WorkerContext) -> StepBatches[Batch]:
        """Return the share of ``worker`` in the step that begins at sentence ``cursor``."""
        sentences, micro_tokens = self.training, self.config.optimizer.micro_batch_tokens
        end = self._step_end(cursor)
        add_noise = None
        if self._noise is not None:
            add_noise = self._noise.add
        share = micro_batches(sentences, cursor, end, worker.rank, worker.world_size, micro_tokens, add_noise)
        return StepBatches(
            next_cursor=end,
            batches=share,
            loss_tokens=loss_tokens(sentences, cursor, end),
            sentences=end - cursor,
            tokens=sum(sentences.tokens(index) for index in range(cursor, end)),
            epoch=end / len(sentences),
        )

    def loss(self, forward: Callable[[Batch], Any], batch: Batch) -> Loss:
        """Return the cross-entropy of the tokens that carry loss."""
        if self._noise is not None:
            batch = self._noise.fill_guesses(self.model, batch)
        total, each = forward(batch)
        return Loss(total, each)

    def validate(self, evaluate: Callable[[Batch | None], Tensor], worker: WorkerContext) -> dict[str, float] | None:
        """Return the loss of the first validation sentences, and the perplexity of their answers."""
        sentences = self.validation
        if sentences is None:
            return None
        count = min(self.config.validation_sentences, len(sentences))
        micro_tokens = self.config.optimizer.micro_batch_tokens
        sums = torch.zeros(3, device=worker.device, dtype=torch.float64)  # loss, loss of answers, tokens of answers
        for batch in micro_batches(sentences, 0, count, worker.rank, worker.world_size, micro_tokens):
            if batch is None:
                evaluate(None)
                continue
            on_device = batch.to(worker.device)
            each = evaluate(on_device).double()
            answer = answer_positions(on_device, sentences.chains.tokens_per_image)
            sums += torch.stack((each.sum(), each[answer].sum(), answer.sum().double()))
        loss, answer_loss, answer_tokens = worker.sum(sums)
        return {
            "validation_loss": loss / loss_tokens(sentences, 0, count),
            "answer_perplexity": perplexity(answer_loss / answer_tokens),
        }

    def export(self, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
        """Return the adapter in PEFT's format."""
        with torch.device("meta"):  # the names and shapes of the model, without its memory
            model = Lvm(self._facts.llama, self.model.lora)
        model.load_state_dict(dict(tensors), strict=False, assign=True)
        return adapter_files(model, self._base_model_name)

    @property
    def _base_model_name(self) -> str:
        """The folder or hub id by which PEFT finds the backbone."""
        return self.config.backbone.path or "nano"


def count_steps(sentences: Sentences, config: TrainConfig) -> int:
    """Return the steps of a training: as configured, or as many as its epochs take."""
    if config.optimizer.steps is not None:
        return config.optimizer.steps
    cursor, steps, end = 0, 0, _end_of_epochs(sentences, config)
    while cursor < end:
        cursor = step_bounds(sentences, cursor, config.optimizer.batch_tokens)
        steps += 1
    return steps


def end_of_training(sentences: Sentences, config: TrainConfig) -> int:
    """Return the cursor at the end of a training."""
    if config.optimizer.steps is None:
        return _end_of_epochs(sentences, config)
    cursor = 0
    for _ in range(config.optimizer.steps):
        cursor = step_bounds(sentences, cursor, config.optimizer.batch_tokens)
    return cursor


def answer_positions(batch: Batch, tokens_per_image: int) -> Tensor:
    """Return which of ``batch.positions`` predict a token of an answer, the last picture of a sentence: bool [P]."""
    # The sentence of a position is the first that ends behind it.
    ends = torch.tensor(batch.lengths, device=batch.ids.device).cumsum(0)
    end = ends[torch.searchsorted(ends, batch.positions, right=True)]
    return batch.positions + 1 >= end - tokens_per_image


def _sentences(sources: Sequence[Source], config: TrainConfig, facts: BackboneFacts, split: str) -> Sentences:
    """Return the sentences of a split."""
    chains = MappedChains(sources, config.sentences, split)
    return Sentences(chains, config.sentences, facts.llama.max_position_embeddings, config.seed)


def _load_model(config: TrainConfig, facts: BackboneFacts, lora: Lora, device: torch.device) -> Lvm:
    """Return the backbone with a new adapter, or with the one that training starts from.

    Args:
        config: The configuration.
        facts: Of the backbone.
        lora: The adapter.
        device: Where the model is put.
    """
    model = load_backbone(
        facts,
        config.backbone,
        lora,
        dtype=_DTYPES[config.compute.dtype],
        device=device,
        seed=config.seed,
        recompute=config.compute.recompute,
    )
    if config.lora.path is not None:
        start = read_start(config.lora, facts.llama)
        for name, tensor in adapter_tensors(model).items():
            if name == MASK_ROW or name.startswith(DRAFT_PREFIX):  # an autoregressive adapter gets masks
                start.setdefault(name, tensor)
        load_adapter_tensors(model, start)
    if config.compute.compile:
        # Layer by layer: one graph serves all of them, and names of parameters stay as they are.
        for layer in model.layers:
            layer.compile()
    return model


def _flops_per_token(llama: LlamaConfig, sentences: Sentences) -> float:
    """Return the FLOPs of a token: forward 2N, backward through frozen weights 2N more, and causal attention.

    PaLM (Chowdhery et al. 2022), appendix B, halved, as half of the attention scores are masked.
    """
    used = parameters(llama) - llama.vocab_size * llama.hidden_size  # looking up an embedding costs nothing
    mean_tokens = sum(sentences.tokens(index) for index in range(len(sentences))) / len(sentences)
    attention = 2 * llama.num_hidden_layers * llama.hidden_size * mean_tokens  # scores and mixing
    return 4.0 * used + 3.0 * attention


def _end_of_epochs(sentences: Sentences, config: TrainConfig) -> int:
    """Return the sentences of a training that is as long as its epochs; at least one."""
    return max(1, round(config.optimizer.epochs * len(sentences)))
