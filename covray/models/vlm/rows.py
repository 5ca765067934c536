"""The rows of a batch of prompts while their answers are written: what they have read, and where they stand.

Rows are padded on the left, so that all blocks begin at one slot of the cache; a row sees no padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from covray.models.vlm.batch import Blocks, clean_mask
from covray.models.vlm.model import Vlm
from covray.models.vlm.prompts import Prompt


@dataclass(frozen=True)
class Known:
    """Tokens of the prompts that stand in the first block of answers."""

    ids: Tensor
    """int64 [B, D]."""
    embeddings: Tensor
    """[B, D, width]."""
    is_known: Tensor
    """bool [B, D]."""

    @classmethod
    def of(cls, ids: Tensor, embeddings: Tensor, starts: Sequence[int], lengths: Sequence[int], size: int) -> Known:
        """Cut them from the prompts; see ``Rows``."""
        known_ids = ids.new_zeros(len(starts), size)
        known = embeddings.new_zeros(len(starts), size, embeddings.shape[2])
        is_known = torch.zeros(len(starts), size, dtype=torch.bool, device=ids.device)
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            count = length - start
            known_ids[row, :count] = ids[row, start:length]
            known[row, :count] = embeddings[row, start:length]
            is_known[row, :count] = True
        return cls(known_ids, known, is_known)


class Rows:
    """The rows at work: their cache, and the places that come next."""

    def __init__(self, model: Vlm, prompts: Sequence[Prompt], blocks: Blocks, tokens: int):
        """Read the prompts up to their first blocks.

        Args:
            model: The model.
            prompts: The prompts.
            blocks: Where the first block begins, and what the tokens before it see.
            tokens: Tokens of the longest answer.
        """
        device = model.device
        self.numbers = list(range(len(prompts)))
        """Of the prompts that the rows answer."""
        self.cache = DynamicCache()
        self._model, self._blocks = model, blocks
        lengths = [len(prompt.ids) for prompt in prompts]
        starts = [blocks.first(length) for length in lengths]
        # Padded with an id that is never a picture's placeholder, as all placeholders are given features.
        ids = torch.full((len(prompts), max(lengths)), model.mask_id, dtype=torch.int64, device=device)
        for row, prompt in enumerate(prompts):
            ids[row, : lengths[row]] = torch.from_numpy(prompt.ids)
        images = _join_images(prompts, device)
        embeddings = model.embed(ids, images)
        positions = model.positions(ids, torch.tensor(lengths, device=device), images)
        self._slots = max(starts)
        self.known = Known.of(ids, embeddings, starts, lengths, blocks.size)
        # A first block may begin almost a whole block before its prompt ends.
        self._positions = _positions_from(positions, starts, lengths, blocks.size + tokens)
        slots = torch.arange(self._slots, device=device)
        self._is_token = slots >= self._slots - torch.tensor(starts, device=device)[:, None]  # [B, slots]
        self.last = embeddings.new_zeros(len(prompts), model.width)
        """Hidden states of the last tokens that were read, [B, width]."""
        self._read_prompts(embeddings, positions, starts)

    def __len__(self) -> int:
        """Return the rows at work."""
        return len(self.numbers)

    def read(self, embeddings: Tensor, own: Tensor, keep: bool) -> Tensor:
        """Return the hidden states of the next n tokens of every row, [B, n, width].

        Args:
            embeddings: [B, n, width].
            own: Which of each other they see, bool [n, n]; they see all tokens before.
            keep: Whether they stay, and later tokens see them; else all is as if they had not been read.
        """
        cached, count = self.cache.get_seq_length(), embeddings.shape[1]
        first = cached - self._slots
        positions = self._positions[..., first : first + count]
        hidden = self._model.read(embeddings, positions, self._sight(cached, own)[:, None], self.cache)
        if keep:
            self.last = hidden[:, -1]
        else:
            self.cache.crop(-count)
        return hidden

    def predicting(self, hidden: Tensor) -> Tensor:
        """Return the hidden states that predict the tokens of a block, [B, D, width].

        Args:
            hidden: Of the block itself, as ``read`` returns them.
        """
        if not self._blocks.shift:
            return hidden
        return torch.cat((self.last[:, None], hidden[:, :-1]), 1)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but ``rows``, which are those whose answers go on."""
        if len(rows) == len(self):
            return
        # Whatever is kept by row is reduced to the same rows, in the same order: keys and values (none before the
        # first read), which tokens are no padding [B, n], the last hidden states [B, width], positions [..., B, n].
        index = torch.tensor(rows, dtype=torch.int64, device=self.last.device)
        self.numbers = [self.numbers[row] for row in rows]
        if self.cache.get_seq_length():
            self.cache.batch_select_indices(index)
        self._is_token, self.last = self._is_token[index], self.last[index]
        self._positions = self._positions.index_select(-2, index)

    def _sight(self, cached: int, own: Tensor) -> Tensor:
        """Return which of ``cached`` tokens and of each other new ones see, bool [B, n, cached + n]."""
        is_token = torch.ones(len(self), cached, dtype=torch.bool, device=own.device)
        is_token[:, : self._slots] = self._is_token
        before = is_token[:, None].expand(-1, len(own), -1)
        return torch.cat((before, own.expand(len(self), -1, -1)), 2)

    def _read_prompts(self, embeddings: Tensor, positions: Tensor, starts: Sequence[int]) -> None:
        """Read the prompts up to ``starts``, padded on the left."""
        if not self._slots:
            return
        padded = embeddings.new_zeros(len(starts), self._slots, embeddings.shape[2])
        padded_positions = positions.new_zeros(*positions.shape[:-1], self._slots)
        for row, start in enumerate(starts):
            padded[row, self._slots - start :] = embeddings[row, :start]
            padded_positions[..., row, self._slots - start :] = positions[..., row, :start]
        places = torch.arange(self._slots, device=embeddings.device) - self._slots
        mask = clean_mask(places, self._blocks.size, self._blocks.context) & self._is_token[:, None]
        # Padding, too, must see something: softmax over no key is NaN, which the next layer would hand on.
        mask = mask | torch.eye(self._slots, dtype=torch.bool, device=mask.device)
        self.last = self._read_first(padded, padded_positions, mask)[:, -1]

    def _read_first(self, embeddings: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Return the hidden states of the prompts, [B, n, width], which stay; ``mask``: bool [B, n, n]."""
        return self._model.read(embeddings, positions, mask[:, None], self.cache)


class UncachedRows(Rows):
    """Rows that keep no keys and values: every pass reads the prompt and all that was written again.

    So do models that write all of an answer at once by full-sequence diffusion (LLaDA-V, arXiv:2505.16933). The hidden
    states are those of ``Rows``, up to the rounding of sums.
    """

    _kept: Tensor
    """Embeddings of prompts and finished blocks, [B, n, width]."""
    _kept_positions: Tensor
    _kept_mask: Tensor
    """What they see of each other, bool [B, n, n]."""

    def read(self, embeddings: Tensor, own: Tensor, keep: bool) -> Tensor:
        """See ``Rows``."""
        kept, count = self._kept.shape[1], embeddings.shape[1]
        first = kept - self._slots
        every = torch.cat((self._kept, embeddings), 1)
        positions = torch.cat((self._kept_positions, self._positions[..., first : first + count]), -1)
        never = torch.zeros(len(self), kept, count, dtype=torch.bool, device=own.device)
        mask = torch.cat((torch.cat((self._kept_mask, never), 2), self._sight(kept, own)), 1)
        hidden = self._model.read(every, positions, mask[:, None])[:, kept:]
        if keep:
            self._kept, self._kept_positions, self._kept_mask = every, positions, mask
            self.last = hidden[:, -1]
        return hidden

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but ``rows``."""
        if len(rows) < len(self):
            index = torch.tensor(rows, dtype=torch.int64, device=self.last.device)
            self._kept, self._kept_mask = self._kept[index], self._kept_mask[index]
            self._kept_positions = self._kept_positions.index_select(-2, index)
        super().keep(rows)

    def _read_prompts(self, embeddings: Tensor, positions: Tensor, starts: Sequence[int]) -> None:
        self._kept, self._kept_positions = embeddings[:, :0], positions[..., :0]
        self._kept_mask = torch.zeros(len(starts), 0, 0, dtype=torch.bool, device=embeddings.device)
        super()._read_prompts(embeddings, positions, starts)

    def _read_first(self, embeddings: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        self._kept, self._kept_positions, self._kept_mask = embeddings, positions, mask
        return self._model.read(embeddings, positions, mask[:, None])


def _positions_from(positions: Tensor, starts: Sequence[int], lengths: Sequence[int], count: int) -> Tensor:
    """Return the positions of ``count`` places from each row's start on, [..., B, count].

    Behind the prompt they go up by one, from one more than the largest of the prompt, as transformers counts them.
    """
    after = torch.arange(count, device=positions.device)
    result = positions.new_zeros(*positions.shape[:-1], count)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        own = positions[..., row, :length]
        result[..., row, :] = own.max() + 1 + after - (length - start)
        result[..., row, : length - start] = own[..., start:]
    return result


def _join_images(prompts: Sequence[Prompt], device: torch.device) -> dict[str, Tensor]:
    with_images = [prompt.images for prompt in prompts if prompt.images]
    images: dict[str, Tensor] = {}
    for name in with_images[0] if with_images else ():
        images[name] = torch.cat([own[name] for own in with_images]).to(device)
    return images
