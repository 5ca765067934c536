"""What all decoders do with the model: read a prompt, a token or a window of tokens a row, and keep keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from covray.models.lvm.cache import LayerCache, Window
from covray.models.lvm.draft import MaskRows
from covray.models.lvm.model import Lvm, attend, rotary


@dataclass(frozen=True)
class WindowMasks:
    """The masks of a draft behind the tokens of a window, the same in all rows."""

    offsets: Tensor
    """Places of all tokens and masks of the window from its first one, int64 [W]."""
    first: int
    """The first mask."""


KeysValues = tuple[Tensor, Tensor]
"""Of one layer and n tokens, each [heads, n, head width]."""


class MergedWeights:
    """Memory for the weights of a backbone with an adapter merged in, which several readers use in turn."""

    def __init__(self) -> None:
        """Take no memory yet: the first reader does."""
        self.parameters: dict[str, Tensor] = {}
        self.reader: Reader | None = None
        """Whose adapter is merged in."""


class Reader:
    """A model with its rotations and a buffer for ``batch`` rows.

    ``batch`` is part of what decides the bits, as the shape of the arithmetic does. An adapter is merged into a copy of
    the weights where they are float32 (W + (alpha / rank) B A: equal up to rounding); in bfloat16, where rounding would
    change the model, it is computed beside them.
    """

    def __init__(self, model: Lvm, codes: int, batch: int, weights: MergedWeights | None = None):
        """Take the model; nothing of it is changed.

        Args:
            model: The backbone, with or without an adapter.
            codes: Image codes of the vocabulary.
            batch: Rows of a pass.
            weights: For a merged copy, shared with readers of other adapters of the backbone; None: an own one. A
                reader that finds another's adapter there merges its own again before it reads.
        """
        self.batch = batch
        self.context_tokens = int(model.config.max_position_embeddings)
        weight = model.embed.weight
        self.device, self._dtype = weight.device, weight.dtype
        self._adapted = model
        self._weights: MergedWeights | None = None
        if model.lora is not None and weight.dtype == torch.float32:
            self._weights = weights or MergedWeights()
        self._model = model if self._weights is None else _plain(model, self._weights)
        self._merge()
        self._layers: list[Any] = list(self._model.layers)
        # Without the rows of special ids, which are never written: no mask has to forbid them.
        self._head = self._model.head.weight[:codes].detach().to(weight.dtype)
        # Of all places of the context, once: a step only looks them up.
        self._rotation = rotary(model.config, (self.context_tokens,), self.device, self._dtype)
        self._buffer: Tensor | None = None
        self.passes = 0
        """Calls of ``read_token`` and ``read_window``."""
        self.check: Callable[[], None] | None = None
        """Called before each of them; what it raises ends the writing."""

    def _begin_pass(self) -> None:
        if self.check is not None:
            self.check()
        self.passes += 1
        self._merge()  # the merged weights are shared: they may be those of another adapter

    def _merge(self) -> None:
        """Make the shared weights those of this reader's adapter, where they are another's."""
        if self._weights is not None and self._weights.reader is not self:
            _fill_merged(self._model, self._adapted)
            self._weights.reader = self

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of the image codes after ``hidden`` [..., width], float32 [..., codes]."""
        return F.linear(hidden, self._head).float()

    # --- the cache ---------------------------------------------------------------------------------------------------

    def take_buffer(self, own_tokens: int) -> Tensor:
        """Return memory for ``own_tokens`` a row, [layers, 2, heads, batch, tokens, head width].

        A stream that another one interrupts must not share its memory with it, so nobody else gets the buffer before it
        is given back.
        """
        buffer, self._buffer = self._buffer, None
        size = self._model.config.hidden_size // self._layers[0].heads
        shape = (len(self._layers), 2, self._layers[0].heads, self.batch, own_tokens, size)
        if buffer is not None and buffer.shape == shape:
            return buffer
        del buffer  # freed before the new one is allocated
        return torch.zeros(shape, dtype=self._dtype, device=self.device)

    def give_back(self, buffer: Tensor) -> None:
        """Keep ``buffer`` for the next ``take_buffer``."""
        self._buffer = buffer

    def read_prompt(self, prompt: np.ndarray, buffer: Tensor) -> list[LayerCache]:
        """Return caches with the ids ``prompt`` [P] read, whose rows have ``buffer`` for tokens of their own."""
        shared = self.read_alone(prompt, 0, None)[1]
        return [LayerCache(*known, *own) for known, own in zip(shared, buffer, strict=True)]

    def read_alone(
        self, ids: np.ndarray, position: int, caches: list[LayerCache] | None
    ) -> tuple[Tensor, list[KeysValues]]:
        """Read one row of tokens, causally, without storing anything.

        Args:
            ids: [n].
            position: Of the first token, from the start of the sentence.
            caches: Of the prompt before it; None where there is none.

        Returns:
            The hidden state after the last token, [width], and every layer's keys and values.
        """
        if not len(ids):
            nothing = self._head.new_empty(self._layers[0].heads, 0, self._head.shape[1] // self._layers[0].heads)
            return self._head.new_empty(0), [(nothing, nothing)] * len(self._layers)
        shared = None if caches is None else [(cache.shared_keys, cache.shared_values) for cache in caches]
        x, kept = self._read(ids, position, shared)
        return self._model.norm(x[-1]), kept

    def read_states(self, ids: np.ndarray, position: int, before: list[KeysValues]) -> Tensor:
        """Read one row of tokens as ``read_alone`` does, and return the hidden states after all of them, [n, width].

        Args:
            ids: [n], n >= 1.
            position: Of the first token, from the start of the sentence.
            before: Every layer's keys and values of the tokens before it.
        """
        hidden: Tensor = self._model.norm(self._read(ids, position, before)[0])
        return hidden

    def _read(self, ids: np.ndarray, position: int, before: list[KeysValues] | None) -> tuple[Tensor, list[KeysValues]]:
        """Return what the last layer makes of a row of tokens, [n, width], and every layer's keys and values.

        Args:
            ids: [n].
            position: Of the first token, from the start of the sentence.
            before: Every layer's keys and values of the tokens before it; None where there are none.
        """
        count = len(ids)
        self._merge()
        x = self._model.embed_ids(torch.from_numpy(ids.astype(np.int64)).to(self.device))
        rotation = self._rotation[0][position : position + count], self._rotation[1][position : position + count]
        # Row i sees all that stands before, and of its own tokens those up to i.
        mask = torch.ones((count, position + count), dtype=torch.bool, device=self.device).tril(position)
        kept = []
        for number, layer in enumerate(self._layers):
            query, key, value = layer.project(x, rotation)
            own = key.transpose(0, 1), value.transpose(0, 1)
            if before is None:
                mixed = attend(query, key, value, (count,))
            else:
                keys = torch.cat((before[number][0], own[0]), 1)
                values = torch.cat((before[number][1], own[1]), 1)
                mixed = F.scaled_dot_product_attention(query.transpose(0, 1), keys, values, attn_mask=mask)
                mixed = mixed.transpose(0, 1).reshape(count, -1)
            x = layer.finish(x, mixed)
            kept.append((own[0].contiguous(), own[1].contiguous()))
        return x, kept

    # --- passes over all rows ----------------------------------------------------------------------------------------

    def read_token(self, caches: list[LayerCache], ids: Tensor, position: int, own: int) -> Tensor:
        """Read one token a row, all at the same place.

        Args:
            caches: Which get the token's keys and values.
            ids: [batch].
            position: Of the token, from the start of the sentence.
            own: Its slot in the row's own part, that is, its position from the end of the prompt.

        Returns:
            Hidden states [batch, width].
        """
        self._begin_pass()
        x = self._model.embed_ids(ids)
        rotation = self._rotation[0][position : position + 1], self._rotation[1][position : position + 1]
        for layer, cache in zip(self._layers, caches, strict=True):
            query, key, value = layer.project(x, rotation)  # [batch, heads, head width]
            cache.keys[:, :, own] = key.transpose(0, 1)
            cache.values[:, :, own] = value.transpose(0, 1)
            x = layer.finish(x, cache.attend(query, own + 1))
        hidden: Tensor = self._model.norm(x)
        return hidden

    def read_window(
        self, caches: list[LayerCache], ids: Tensor, own: Tensor, visible: Tensor, masks: WindowMasks | None = None
    ) -> Tensor:
        """Read W tokens a row in one pass, each row at a place of its own.

        Every token sees the prompt, the first ``own`` tokens of its row's own part, and what ``visible`` says of its
        window. Keys and values are written behind ``own`` and count only if a later read says so by a larger ``own``.

        Args:
            caches: Which get the window's keys and values.
            ids: int64 [batch, W].
            own: Tokens of each row's own part that count, int64 [batch].
            visible: Which tokens of the window (columns) each of its tokens (rows) sees, bool [W, W].
            masks: The masks of a draft at the window's end, if there are any.

        Returns:
            Hidden states [batch, W, width].
        """
        prompt, length = caches[0].shared_keys.shape[1], caches[0].keys.shape[2]
        window = Window.at(own, visible, length)
        # Drafts of a window may lie behind the context's end; they are never accepted.
        places = window.slots if masks is None else own[:, None] + masks.offsets
        positions = (prompt + places).clamp(max=self.context_tokens - 1).flatten()
        gate = None if masks is None else MaskRows(self.batch, masks.first)
        rotation = self._rotation[0][positions], self._rotation[1][positions]
        self._begin_pass()
        x = self._model.embed_ids(ids.flatten())
        for layer, cache in zip(self._layers, caches, strict=True):
            query, key, value = layer.project(x, rotation, gate)  # [batch * W, heads, head width]
            x = layer.finish(x, cache.attend_window(query, key, value, window), gate)
        hidden: Tensor = self._model.norm(x)
        return hidden.view(*ids.shape, -1)

    def padded(self, rows: Tensor) -> Tensor:
        """Return ``rows`` [n, ...] on the device, with rows of zeros up to the batch."""
        padded = torch.zeros((self.batch, *rows.shape[1:]), dtype=rows.dtype, device=self.device)
        padded[: len(rows)] = rows
        return padded


def _plain(model: Lvm, memory: MergedWeights) -> Lvm:
    """Return a model for a copy of ``model`` with its adapter merged, whose weights lie in ``memory``."""
    assert model.lora is not None
    # A draft's update cannot be merged: it is added where masks are read, and nowhere else.
    kept = None if model.lora.draft is None else replace(model.lora, targets=())
    with torch.device("meta"):
        plain = Lvm(model.config, kept).to(model.embed.weight.dtype)
    plain.allocate(model.embed.weight.device, memory.parameters)
    memory.parameters = plain.frozen_parameters()
    return plain.requires_grad_(False)


@torch.no_grad()
def _fill_merged(plain: Lvm, model: Lvm) -> None:
    """Fill ``plain`` with the weights of ``model``, to which its adapter's update is added; a draft adapter stays."""
    assert model.lora is not None
    weights = plain.backbone_tensors()
    for name, tensor in model.backbone_tensors().items():
        # From the frozen weights every time: to take one adapter off and add another would round twice.
        weights[name].copy_(tensor)
    updates = model.lora_tensors()
    for name, low in updates.items():
        if name.endswith(".lora_A"):
            projection = name.removesuffix(".lora_A")
            high = updates[f"{projection}.lora_B"]
            weights[f"{projection}.weight"].addmm_(high, low, alpha=model.lora.alpha / model.lora.rank)
    for name, tensor in plain.draft_tensors().items():
        tensor.copy_(model.draft_tensors()[name])
    if plain.mask_row is not None and model.mask_row is not None:
        plain.mask_row.copy_(model.mask_row)
    elif model.mask_row is not None and model.lora.diffusion is not None:
        plain.embed.weight[model.lora.diffusion.mask_id] = model.mask_row
