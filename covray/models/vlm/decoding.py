"""Answers of a vision-language model: token by token, or block by block with the cache of all blocks before.

    prompt, up to the first block                      -> keys and values of transformers' DynamicCache
    a block of D masks, S times:  read, crop(-D)       -> the surest of the masked places are written
    once:                         read, keep           -> keys and values that later blocks see

A row that has written its end, and all that stands before it, takes no more passes and is dropped from the batch. Which
tokens a row gets does not depend on the others, up to the rounding of sums: in float32 only at near ties.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from covray.config.vlm import VlmDecodingConfig
from covray.errors import ConfigError
from covray.models.masking import choose_unmasked, pass_counts
from covray.models.sampling import BatchNoise, RowNoise, allowed, choose_tokens
from covray.models.vlm.batch import Blocks, clean_mask
from covray.models.vlm.checkpoint import LoadedVlm
from covray.models.vlm.prompts import Prompt
from covray.models.vlm.rows import Known, Rows, UncachedRows
from covray.seeds import seed_of

_THRESHOLDS = {"confidence": 0.85, "entropy": 1.0}
"""``threshold`` where it is null: a probability (DiffusionVL's), and nats."""


@dataclass(frozen=True)
class Piece:
    """The next tokens of an answer."""

    row: int
    """Number of the prompt."""
    ids: list[int]
    """Without the end token."""
    is_last: bool
    passes: int
    """Passes of the model that the answer has taken so far, without the prompt's."""


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    ids: list[int]
    passes: int


def decoding_blocks(decoding: VlmDecodingConfig, trained: Blocks | None) -> Blocks | None:
    """Return the blocks that answers are written in; None: token by token.

    Args:
        decoding: How answers are written.
        trained: What the model was trained for.

    Raises:
        ConfigError: The model was not trained for blocks, or the passes do not fit.
    """
    decoder = decoding.decoder or ("autoregressive" if trained is None else "block_diffusion")
    if decoder == "autoregressive":
        return None
    if trained is None:
        raise ConfigError(
            f"decoding.decoder: {decoder} needs a model trained with objective=block_diffusion; take autoregressive"
        )
    blocks = replace(trained, size=decoding.block or trained.size)
    if (decoding.passes or 1) > blocks.size:
        raise ConfigError(
            f"decoding.passes: {decoding.passes} passes of a block of {blocks.size} tokens; give at most {blocks.size}"
        )
    if decoder == "speculative" and not decoding.cache:
        raise ConfigError(
            "decoding.cache: speculative verifies with the cache; set it to true, or take another decoder"
        )
    if decoder == "speculative" and (blocks.context != "causal" or blocks.start != "prompt"):
        raise ConfigError(
            "decoding.decoder: speculative verifies drafts by the autoregressive model, which a training with "
            "blocks.context=block or blocks.start=sequence does not keep; take block_diffusion"
        )
    return blocks


def decode(
    vlm: LoadedVlm, prompts: Sequence[Prompt], decoding: VlmDecodingConfig, trained: Blocks | None
) -> list[Answer]:
    """Return the answers to a batch of prompts; see ``stream``."""
    ids: list[list[int]] = [[] for _ in prompts]
    passes = [0] * len(prompts)
    for piece in stream(vlm, prompts, decoding, trained):
        ids[piece.row] += piece.ids
        passes[piece.row] = piece.passes
    return [Answer(*answer) for answer in zip(ids, passes, strict=True)]


@torch.no_grad()
def stream(
    vlm: LoadedVlm, prompts: Sequence[Prompt], decoding: VlmDecodingConfig, trained: Blocks | None
) -> Iterator[Piece]:
    """Write the answers to a batch of prompts, and yield their tokens as soon as they are final.

    Args:
        vlm: The model.
        prompts: The prompts, in one batch.
        decoding: How answers are written.
        trained: The blocks that the model was trained for; None: next tokens only.

    Raises:
        ConfigError: See ``decoding_blocks``.
    """
    blocks = decoding_blocks(decoding, trained)
    writer = _Writer(vlm, decoding)
    if blocks is None:
        yield from writer.write_tokens(prompts)
    elif decoding.decoder == "speculative":
        for number, prompt in enumerate(prompts):  # their caches grow unequally
            yield from writer.write_verified(prompt, number, blocks)
    else:
        yield from writer.write_blocks(prompts, blocks)


class _Writer:
    """Writes the answers of one batch."""

    def __init__(self, vlm: LoadedVlm, decoding: VlmDecodingConfig):
        self._vlm, self._model, self._decoding = vlm, vlm.model, decoding
        self._embedding = vlm.model.model.get_input_embeddings()
        self._rows = Rows if decoding.cache else UncachedRows
        self._noise: dict[int, RowNoise] = {}
        # Tokens and passes of every answer so far, by the number of its prompt.
        self._written: dict[int, int] = {}
        self._passes: dict[int, int] = {}

    def write_tokens(self, prompts: Sequence[Prompt]) -> Iterator[Piece]:
        """Write one token a pass."""
        self._begin(prompts)
        # With blocks of one token a row's first block begins right behind its prompt.
        rows = self._rows(self._model, prompts, Blocks(1), self._decoding.max_tokens)
        alone = torch.ones(1, 1, dtype=torch.bool, device=self._model.device)
        place = 0
        while True:
            logits = self._model.logits(rows.last[:, None])
            ids = choose_tokens(logits, self._decoding, self._noise_of(rows, place, 1))  # [B, 1]
            unfinished = yield from self._finish(rows, ids)
            if not unfinished:
                return
            rows.read(self._embedding(ids[unfinished]), alone, keep=True)
            self._count_pass(rows.numbers)
            place += 1

    def write_blocks(self, prompts: Sequence[Prompt], blocks: Blocks) -> Iterator[Piece]:
        """Write block by block."""
        self._begin(prompts)
        size, device = blocks.size, self._model.device
        rows = self._rows(self._model, prompts, blocks, self._decoding.max_tokens + size)
        own = clean_mask(torch.arange(size, device=device), size, blocks.context)
        known: Known | None = rows.known
        first = 0
        while True:
            ids = self._denoise(rows, blocks, first, known)
            prompt_tokens = None if known is None else known.is_known.sum(1).tolist()
            unfinished = yield from self._finish(rows, ids, prompt_tokens)
            if not unfinished:
                return
            rows.read(self._embed(ids, known)[unfinished], own, keep=True)
            self._count_pass(rows.numbers)
            known = None
            first += size

    def write_verified(self, prompt: Prompt, number: int, blocks: Blocks) -> Iterator[Piece]:
        """Write what ``write_tokens`` writes, in fewer passes: a block is drafted, then verified by a causal pass.

        The first token of a block is the autoregressive one; the others are drafted from masks in one pass. Of the
        drafts those are kept that the causal pass chooses, too, by the same random numbers.

        Args:
            prompt: The prompt.
            number: Its number, for the pieces.
            blocks: The blocks that are drafted.
        """
        self._begin([prompt])
        device, decoding, size = self._model.device, self._decoding, blocks.size
        rows = Rows(self._model, [prompt], blocks, decoding.max_tokens + size)
        every = torch.ones(size, size, dtype=torch.bool, device=device)
        place = 0
        draft = torch.full((1, size), self._model.mask_id, device=device)
        while True:
            # A place has one noise for its draft and its check, so that both choose alike from like logits.
            noise = self._noise_of(rows, place, size + 1)
            first = choose_tokens(self._model.logits(rows.last[:, None]), decoding, _part(noise, 0, 1))
            draft[:, 0], draft[:, 1:] = first[:, 0], self._model.mask_id
            hidden = rows.predicting(rows.read(self._embedding(draft), every, keep=False))
            drafted = choose_tokens(self._model.logits(hidden), decoding, _part(noise, 0, size))
            ids = torch.cat((first, drafted[:, 1:]), 1)
            hidden = rows.read(self._embedding(ids), every.tril(), keep=True)
            self._passes[0] += 2  # this row is alone in its batch, as number 0
            chosen = choose_tokens(self._model.logits(hidden[:, :-1]), decoding, _part(noise, 1, size))
            agreed = int((chosen == ids[:, 1:])[0].int().cumprod(0).sum()) + 1
            # What was read behind the last agreed token is taken back: it stood on a wrong one.
            if agreed < size:
                rows.cache.crop(agreed - size)
                rows.last = hidden[:, agreed - 1]
            (piece,) = self._finish(rows, ids[:, :agreed])
            yield replace(piece, row=number)
            if piece.is_last:
                return
            place += agreed

    def _begin(self, prompts: Sequence[Prompt]) -> None:
        """Count from nothing, and give every row random numbers of its own, where any are needed."""
        self._written = dict.fromkeys(range(len(prompts)), 0)
        self._passes = dict.fromkeys(range(len(prompts)), 0)
        if not self._decoding.temperature:
            return
        vocabulary = self._model.model.get_output_embeddings().weight.shape[0]
        # Seeded by the prompt's own tokens: an answer is the same in every batch.
        for number, prompt in enumerate(prompts):
            seed = seed_of("covray vlm", self._decoding.seed, *prompt.ids.tolist())
            self._noise[number] = RowNoise(seed, 0, vocabulary)

    def _count_pass(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._passes[number] += 1

    def _noise_of(self, rows: Rows, first: int, count: int) -> Tensor | None:
        """Return the noise of ``count`` places from ``first`` on, float32 [B, count, vocabulary]; None: greedy."""
        if not self._decoding.temperature:
            return None
        own = [self._noise[number] for number in rows.numbers]
        return BatchNoise(own, len(own), self._model.device).read([first] * len(own), count)

    def _denoise(self, rows: Rows, blocks: Blocks, first: int, known: Known | None) -> Tensor:
        """Return the tokens of the block that begins at place ``first``, int64 [B, D]; masks behind an end may be left.

        The cache stays as it is. ``known``: tokens of the prompt in the block.
        """
        decoding, size = self._decoding, blocks.size
        device = self._model.device
        ids = torch.full((len(rows), size), self._model.mask_id, device=device)
        masked = torch.ones_like(ids, dtype=torch.bool)
        if known is not None:
            ids, masked = torch.where(known.is_known, known.ids, ids), ~known.is_known
        every = torch.ones(size, size, dtype=torch.bool, device=device)
        # Drawn once for all passes: a place then changes its choice only with its logits.
        noise = self._noise_of(rows, first, size)
        threshold = decoding.threshold or _THRESHOLDS.get(decoding.unmask, 0.0)
        counts = [1] * size  # by entropy a pass decides by itself, and writes at least one
        if decoding.unmask != "entropy":
            counts = pass_counts(size, min(decoding.passes or size, size), decoding.unmask)
        prompt = torch.zeros_like(masked) if known is None else known.is_known
        stops = torch.tensor(sorted(self._vlm.stop_ids), device=device)
        for count in counts:
            # An end decides an answer once nothing before it is masked. What stands behind it is not looked at.
            ended = (torch.isin(ids, stops) & ~masked & ~prompt).cumsum(1) > 0
            is_open = (masked & ~ended).any(1).tolist()
            if not any(is_open):
                break
            self._count_pass(itertools.compress(rows.numbers, is_open))
            hidden = rows.read(self._embed(ids, known), every, keep=False)
            logits = self._model.logits(rows.predicting(hidden))
            chosen = choose_tokens(logits, decoding, noise)
            # A token is as sure as it was probable in the distribution that it was drawn from.
            scaled = logits if noise is None else allowed(logits, decoding)
            written = choose_unmasked(scaled.softmax(-1), chosen, masked, count, decoding.unmask, threshold)
            ids = torch.where(written, chosen, ids)
            masked &= ~written
        return ids

    def _embed(self, ids: Tensor, known: Known | None) -> Tensor:
        """Return the embeddings of a block, [B, D, width]; tokens of the prompt may be of a picture."""
        embeddings: Tensor = self._embedding(ids)
        if known is None:
            return embeddings
        return torch.where(known.is_known[..., None], known.embeddings, embeddings)

    def _finish(
        self, rows: Rows, ids: Tensor, prompt_tokens: Sequence[int] | None = None
    ) -> Generator[Piece, None, list[int]]:
        """Yield the new tokens of every row, and drop the rows that have ended.

        Args:
            rows: The rows.
            ids: New tokens, int64 [B, n].
            prompt_tokens: Tokens of the prompt at the front of each row of ``ids``.

        Returns:
            The rows, as they were numbered, that have not ended.
        """
        unfinished = []
        for row, tokens in enumerate(ids.tolist()):
            number = rows.numbers[row]
            written = tokens if prompt_tokens is None else tokens[prompt_tokens[row] :]
            # The last block may be longer than what is left to write.
            written = written[: self._decoding.max_tokens - self._written[number]]
            self._written[number] += len(written)
            end = next((place for place, token in enumerate(written) if token in self._vlm.stop_ids), None)
            is_last = end is not None or self._written[number] == self._decoding.max_tokens
            yield Piece(number, written[:end], is_last, self._passes[number])
            if not is_last:
                unfinished.append(row)
        rows.keep(unfinished)
        return unfinished


def _part(noise: Tensor | None, first: int, last: int) -> Tensor | None:
    return None if noise is None else noise[:, first:last]
