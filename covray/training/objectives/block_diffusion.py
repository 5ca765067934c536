"""Block diffusion over visual sentences: the adapter learns to fill blocks of masked tokens.

An autoregressive backbone, or adapter, is converted: the loss is

    NELBO of the noisy blocks + ``autoregressive`` x next-token cross-entropy of the same tokens, clean

in nats a token of the pictures that carry loss (``sentences.loss``). The second term keeps the clean half what it was:
its keys and values are the cache that blocks are decoded with, and its likelihoods rank the answers (Fast-dVLM,
arXiv:2604.06832, weighs both alike). The first picture of a sentence has nothing before it and is never noised.

The noise of a sentence follows from the seed and the sentence's index alone, so that neither workers nor a restart
change a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from covray.chains.sentences import Sentences, micro_batches
from covray.config import TrainConfig
from covray.errors import ConfigError
from covray.models.lvm.backbone import BackboneFacts
from covray.models.lvm.lora import Diffusion
from covray.models.lvm.model import Batch
from covray.models.lvm.noisy import NoisyBlocks
from covray.models.masking import mask_blocks, noise_levels
from covray.seeds import seed_of
from covray.training.objectives.base import StepBatches, perplexity
from covray.training.objectives.visual_sentences import VisualSentences, answer_positions
from covray.training.worker import WorkerContext


class BlockDiffusion(VisualSentences):
    """The objective of ``covray train`` with ``objective=block_diffusion``."""

    def __init__(self, config: TrainConfig, device: torch.device):
        """Read the chains and load the model; see ``VisualSentences``.

        Raises:
            CovrayError: As there, or blocks do not fit the pictures or the backbone has no id for a mask.
        """
        super().__init__(config, device)
        block = require_blocks(config, self._facts, self.training.chains.tokens_per_image).block
        # One block of masks, which a worker without a share computes for the collectives.
        ids = torch.zeros(block + 1, dtype=torch.int64, device=device)
        places = torch.arange(1, block + 1, device=device)
        noisy = NoisyBlocks(ids[1:], places, (block,), block, places[:1] - 1, torch.ones(1, device=device), 0.0)
        self.idle_batch = Batch(ids, (block + 1,), ids[:1], noisy)

    def _diffusion(self) -> Diffusion:
        return require_blocks(self.config, self._facts, self.training.chains.tokens_per_image)

    def batches(self, cursor: int, worker: WorkerContext) -> StepBatches[Batch]:
        """Return the share of ``worker`` in the step that begins at sentence ``cursor``."""
        plain = super().batches(cursor, worker)
        sentences = self.training
        share = self._noisy_batches(sentences, cursor, plain.next_cursor, worker, "training")
        tokens = self._noised_tokens(sentences, cursor, plain.next_cursor)
        return replace(plain, batches=share, loss_tokens=tokens)

    def validate(self, evaluate: Callable[[Batch | None], Tensor], worker: WorkerContext) -> dict[str, float] | None:
        """Return the loss of the first validation sentences under a noise of their own, always the same.

        ``answer_perplexity`` is the clean half's, as of any run; ``answer_nelbo_perplexity`` is the exponent of the
        answers' NELBO: the larger it is than the other, the more is lost by writing blocks.
        """
        sentences = self.validation
        if sentences is None:
            return None
        count = min(self.config.validation_sentences, len(sentences))
        size = sentences.chains.tokens_per_image
        # loss of all tokens; clean and noisy loss of answers, and their tokens
        sums = torch.zeros(4, device=worker.device, dtype=torch.float64)
        for batch in self._noisy_batches(sentences, 0, count, worker, "validation"):
            # Workers evaluate equally often, with a batch or without.
            if batch is None:
                evaluate(None)
                continue
            on_device = batch.to(worker.device)
            noisy = on_device.noisy
            assert noisy is not None
            clean_each, noisy_each = evaluate(on_device).double().split((len(batch.positions), len(noisy.masked)))
            noisy_each = noisy_each * noisy.weights
            answer = answer_positions(on_device, size)
            # A masked token at a place is predicted there, a clean one at the place before.
            at_masked = replace(on_device, positions=noisy.places[noisy.masked] - 1)
            noisy_answer = answer_positions(at_masked, size)
            parts = (
                clean_each.sum() * noisy.clean_weight + noisy_each.sum(),
                clean_each[answer].sum(),
                noisy_each[noisy_answer].sum(),
                answer.sum().double(),
            )
            sums += torch.stack(parts)
        loss, clean, nelbo, answer_tokens = worker.sum(sums)
        tokens = self._noised_tokens(sentences, 0, count)
        return {
            "validation_loss": loss / tokens,
            "answer_perplexity": perplexity(clean / answer_tokens),
            "answer_nelbo_perplexity": perplexity(nelbo / answer_tokens),
        }

    @staticmethod
    def _noised_tokens(sentences: Sentences, first: int, last: int) -> int:
        """Return the tokens that are masked or not in the sentences ``[first, last)``, over all workers."""
        tokens = 0
        for index in range(first, last):
            tokens += len(noised_places(sentences, index))
        return tokens

    def _noisy_batches(
        self, sentences: Sentences, first: int, last: int, worker: WorkerContext, purpose: str
    ) -> list[Batch | None]:
        """Return the micro-batches of ``worker`` with noisy tokens beside the clean ones.

        Args:
            sentences: The stream.
            first: The first sentence.
            last: The end, which is not contained.
            worker: The worker.
            purpose: Part of the seed of the noise.
        """
        micro_tokens = self.config.optimizer.micro_batch_tokens

        def add_noise(batch: Batch, indices: Sequence[int]) -> Batch:
            return self._with_noise(batch, sentences, indices, purpose)

        return micro_batches(sentences, first, last, worker.rank, worker.world_size, micro_tokens, add_noise)

    def _with_noise(self, batch: Batch, sentences: Sentences, indices: Sequence[int], purpose: str) -> Batch:
        """Return ``batch`` of the sentences ``indices`` with noisy tokens, and loss on the same tokens, clean."""
        chosen, diffusion = self.config.block_diffusion, self._diffusion()
        places, masked, weights = [], [], []
        start = 0
        # Where each sentence begins in the batch, which lays them end to end.
        for index, length in zip(indices, batch.lengths, strict=True):
            own = noised_places(sentences, index)
            # The noise depends on the sentence alone: not on its batch, its worker or a restart.
            generator = np.random.default_rng(seed_of(self.config.seed, purpose, index))
            levels = noise_levels(len(own) // diffusion.block, chosen.low, chosen.high, generator)
            of_block, weight = mask_blocks(levels, diffusion.block, chosen.weight, generator)
            places.append(start + own)
            masked.append(of_block.ravel())
            weights.append(np.broadcast_to(weight[:, None], of_block.shape)[of_block])
            start += length
        all_places = torch.from_numpy(np.concatenate(places))
        is_masked = torch.from_numpy(np.concatenate(masked))
        noisy = NoisyBlocks(
            ids=torch.where(is_masked, diffusion.mask_id, batch.ids[all_places]),
            places=all_places,
            counts=tuple(len(own) for own in places),
            block=diffusion.block,
            masked=is_masked.nonzero()[:, 0],
            weights=torch.from_numpy(np.concatenate(weights)).float(),
            clean_weight=chosen.autoregressive,
        )
        return replace(batch, positions=all_places - 1, noisy=noisy)


def noised_places(sentences: Sentences, index: int) -> np.ndarray:
    """Return the places of a sentence that carry loss, but for its first picture: whole pictures, int64 [n]."""
    places = sentences.loss_at(index)
    return places[places >= sentences.chains.tokens_per_image]


def require_blocks(config: TrainConfig, facts: BackboneFacts, tokens_per_image: int) -> Diffusion:
    """Return the mask and the blocks of a training by block diffusion.

    Args:
        config: The configuration of the training.
        facts: Of the backbone.
        tokens_per_image: Tokens of a picture.

    Raises:
        ConfigError: Blocks would cross pictures, or the backbone has no special id that can be a mask.
    """
    block = config.block_diffusion.block
    if tokens_per_image % block:
        raise ConfigError(
            f"block_diffusion.block: {block} does not divide the {tokens_per_image} tokens of a picture; give a divisor"
        )
    return Diffusion(require_mask(config, facts), block)


def require_mask(config: TrainConfig, facts: BackboneFacts) -> int:
    """Return the special id of a mask. Raises ConfigError where the backbone has none."""
    mask_id = facts.codes + 1  # the first special id is padding
    if mask_id >= facts.llama.vocab_size:
        raise ConfigError(
            f"objective: {config.objective} needs a special id for the mask, the backbone has {facts.codes} codes and "
            f"{facts.llama.vocab_size} ids; give a backbone of LVM's layout"
        )
    return mask_id
