"""A draft adapter over visual sentences: masks learn to predict what the frozen model is going to write.

Masks stand behind some tokens of a sentence, ``draft.tokens`` behind each, and every mask predicts the token after its
place (see ``models.lvm.draft``). The loss is the mean cross-entropy of the masks in nats. Only the draft adapter
learns: the adapter of ``lora.path`` is exported as it is, with the drafts beside it, so that the run is used like the
one that it began from.

Where the masks of a sentence stand follows from the seed and the sentence's index alone, so that neither workers nor a
restart change a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from covray.chains.sentences import Sentences, micro_batches
from covray.config import TrainConfig
from covray.errors import ConfigError
from covray.models.lvm.adapter import adapter_files
from covray.models.lvm.backbone import BackboneFacts
from covray.models.lvm.draft import Draft
from covray.models.lvm.draft_files import DRAFT_WEIGHTS
from covray.models.lvm.model import Batch, Lvm
from covray.models.lvm.noisy import NoisyBlocks
from covray.models.lvm.records import DraftRecord
from covray.seeds import seed_of
from covray.training.objectives.base import StepBatches, perplexity
from covray.training.objectives.block_diffusion import noised_places, require_mask
from covray.training.objectives.visual_sentences import VisualSentences, answer_positions
from covray.training.worker import WorkerContext


class Drafts(VisualSentences):
    """The objective of ``covray train`` with ``objective=draft``."""

    def __init__(self, config: TrainConfig, device: torch.device):
        """Read the chains and load the model; see ``VisualSentences``.

        Raises:
            CovrayError: As there, or drafts do not fit the pictures or the backbone has no id for a mask.
        """
        super().__init__(config, device)
        # Kept: with ZeRO-3 a worker has only its part of the frozen adapter.
        self._verifier = adapter_files(self.model, self._base_model_name)
        # A batch of next to nothing, which a worker without a share computes for the collectives.
        ids = torch.zeros(2, dtype=torch.int64, device=device)
        first = ids[:1]
        noisy = NoisyBlocks(first, first, (1,), 1, first, torch.ones(1, device=device), 0.0, drafts=True)
        self.idle_batch = Batch(ids, (2,), ids[:0], noisy)

    def _draft(self) -> Draft:
        return require_drafts(self.config, self._facts, self.training.chains.tokens_per_image)

    def batches(self, cursor: int, worker: WorkerContext) -> StepBatches[Batch]:
        """Return the share of ``worker`` in the step that begins at sentence ``cursor``."""
        # The step's bounds are those of visual sentences; the loss is of the masks alone, not of the sentences' tokens.
        plain = super().batches(cursor, worker)
        sentences = self.training

        def add_masks(batch: Batch, indices: Sequence[int]) -> Batch:
            # No positions: nothing is learned at the tokens themselves.
            return replace(self._with_masks(batch, sentences, indices, "training"), positions=batch.positions[:0])

        micro_tokens = self.config.optimizer.micro_batch_tokens
        share = micro_batches(
            sentences, cursor, plain.next_cursor, worker.rank, worker.world_size, micro_tokens, add_masks
        )
        masks = sum(self._count(sentences, index) for index in range(cursor, plain.next_cursor))
        return replace(plain, batches=share, loss_tokens=masks)

    def validate(self, evaluate: Callable[[Batch | None], Tensor], worker: WorkerContext) -> dict[str, float] | None:
        """Return the loss of drafts of the first validation sentences, always behind the same tokens.

        ``answer_perplexity`` is that of the model that is drafted for, which does not change.
        """
        sentences = self.validation
        if sentences is None:
            return None
        count = min(self.config.validation_sentences, len(sentences))
        micro_tokens = self.config.optimizer.micro_batch_tokens

        def add_masks(batch: Batch, indices: Sequence[int]) -> Batch:
            return self._with_masks(batch, sentences, indices, "validation")

        sums = torch.zeros(3, device=worker.device, dtype=torch.float64)  # loss of drafts; of answers, and their tokens
        for batch in micro_batches(sentences, 0, count, worker.rank, worker.world_size, micro_tokens, add_masks):
            if batch is None:
                evaluate(None)
                continue
            on_device = batch.to(worker.device)
            each = evaluate(on_device).double()
            # The clean positions come first, then the masks.
            clean, drafts = each[: len(batch.positions)], each[len(batch.positions) :]
            answer = answer_positions(on_device, sentences.chains.tokens_per_image)
            sums += torch.stack((drafts.sum(), clean[answer].sum(), answer.sum().double()))
        loss, answer_loss, answer_tokens = worker.sum(sums)
        masks = sum(self._count(sentences, index) for index in range(count))
        return {"validation_loss": loss / masks, "answer_perplexity": perplexity(answer_loss / answer_tokens)}

    def export(self, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
        """Return the adapter that is drafted for, as it is, with the draft adapter beside it."""
        assert self.model.lora is not None
        # A model without memory, whose draft adapter then is the given tensors: its names are those of the files.
        with torch.device("meta"):
            model = Lvm(self._facts.llama, replace(self.model.lora, targets=()))
        model.load_state_dict(dict(tensors), strict=False, assign=True)
        files = adapter_files(model, self._base_model_name)
        return self._verifier | {name: files[name] for name in (DraftRecord.FILE, DRAFT_WEIGHTS)}

    def _with_masks(self, batch: Batch, sentences: Sentences, indices: Sequence[int], purpose: str) -> Batch:
        """Return ``batch`` with masks behind some tokens of its sentences.

        Args:
            batch: The sentences ``indices``.
            sentences: The stream.
            indices: Of the sentences.
            purpose: Part of the seed of the places.
        """
        draft = self._draft()
        places = []
        start = 0
        for index, length in zip(indices, batch.lengths, strict=True):
            allowed = draft_places(sentences, index, draft.tokens)
            # Which places are drafted depends on the sentence alone: not on its batch, its worker or a restart.
            generator = np.random.default_rng(seed_of(self.config.seed, "drafts", purpose, index))
            chosen = np.sort(generator.permutation(len(allowed))[: self._groups(sentences, index)])
            places.append((start + allowed[chosen, None] + np.arange(draft.tokens)).ravel())
            start += length
        all_places = torch.from_numpy(np.concatenate(places))
        noisy = NoisyBlocks(
            ids=torch.full_like(all_places, draft.mask_id),
            places=all_places,
            counts=tuple(len(own) for own in places),
            block=draft.tokens,
            masked=torch.arange(len(all_places)),
            weights=torch.ones(len(all_places)),
            clean_weight=0.0,
            drafts=True,
        )
        return replace(batch, noisy=noisy)

    def _groups(self, sentences: Sentences, index: int) -> int:
        """Return how many tokens of a sentence have masks behind them."""
        allowed = len(draft_places(sentences, index, self.config.draft.tokens))
        return math.ceil(self.config.draft.share * allowed)

    def _count(self, sentences: Sentences, index: int) -> int:
        """Return the masks of a sentence."""
        return self._groups(sentences, index) * self.config.draft.tokens


def draft_places(sentences: Sentences, index: int, tokens: int) -> np.ndarray:
    """Return where the first of ``tokens`` masks can stand so that all predict a token of the sentence, int64 [n].

    It is the place of a token with loss, as decoding makes drafts while it writes such tokens.
    """
    places = noised_places(sentences, index)
    return places[places + tokens < sentences.tokens(index)]


def require_drafts(config: TrainConfig, facts: BackboneFacts, tokens_per_image: int) -> Draft:
    """Return the draft adapter of a training.

    Args:
        config: The configuration of the training.
        facts: Of the backbone.
        tokens_per_image: Tokens of a picture.

    Raises:
        ConfigError: Drafts are as long as a picture, or the backbone has no special id that can be a mask.
    """
    chosen = config.draft
    if chosen.tokens >= tokens_per_image:
        raise ConfigError(
            f"draft.tokens: {chosen.tokens} are not fewer than the {tokens_per_image} tokens of a picture; give fewer"
        )
    mask_id = require_mask(config, facts)
    return Draft(chosen.rank, chosen.alpha, config.lora.targets, mask_id, chosen.tokens)
