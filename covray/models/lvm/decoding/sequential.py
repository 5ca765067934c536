"""The plain decoder: whole pictures written token by token after a prompt that a batch of queries shares.

The prompt is read once and its keys and values are kept once; every row of the batch attends to them and to a part of
its own, in one softmax over both. So a step multiplies the prompt's keys by the queries of all rows at a time, instead
of reading a copy for each.

Results do not depend on the batch: prompt and queries are read one by one, and steps have one padded shape, so that a
query's tokens are the same to the bit (on one thread of a CPU) alone and among others. A row's random numbers are its
own, too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from covray.config import SamplingConfig
from covray.models.lvm.cache import LayerCache
from covray.models.lvm.decoding.base import GREEDY, Decoded, DecodedImage, collect, require_context
from covray.models.lvm.model import Lvm, attend, rotary
from covray.models.lvm.sampling import choose_tokens, noise


class SequentialDecoder:
    """Writes pictures with ``model``, ``batch`` rows at a time; see ``base.Decoder``.

    ``batch`` is part of what decides the bits, as the shape of the arithmetic does; fewer rows are padded. An adapter
    is merged into a copy of the weights where they are float32 (W + (alpha / rank) B A: equal up to rounding); in
    bfloat16, where rounding would change the model, it is computed beside them.
    """

    def __init__(self, model: Lvm, codes: int, tokens_per_image: int, batch: int = 16):
        self.codes, self.tokens_per_image, self.batch = codes, tokens_per_image, batch
        self.context_tokens = int(model.config.max_position_embeddings)
        weight = model.embed.weight
        self._device, self._dtype = weight.device, weight.dtype
        self._model = _merged(model) if model.lora is not None and weight.dtype == torch.float32 else model
        self._layers: list[Any] = list(self._model.layers)
        self._head = self._model.head.weight[:codes].detach().to(weight.dtype)
        self._rotation = rotary(model.config, (self.context_tokens,), self._device, self._dtype)
        self._buffer: Tensor | None = None

    def decode(
        self,
        prompt: np.ndarray,
        queries: np.ndarray,
        images: int,
        sampling: SamplingConfig = GREEDY,
        seeds: Sequence[int] | None = None,
    ) -> Decoded:
        """Write ``images`` pictures after each of ``queries``; see ``base.Decoder.decode``."""
        shape = (len(queries), sampling.candidates, images, self.tokens_per_image)
        return collect(self.stream(prompt, queries, images, sampling, seeds), shape, sampling)

    @torch.inference_mode()
    def stream(
        self,
        prompt: np.ndarray,
        queries: np.ndarray,
        images: int,
        sampling: SamplingConfig = GREEDY,
        seeds: Sequence[int] | None = None,
    ) -> Iterator[DecodedImage]:
        """Yield each picture as soon as it is finished; see ``base.Decoder.stream``."""
        steps = images * self.tokens_per_image
        require_context(len(prompt) + queries.shape[1] + steps, self.tokens_per_image, self.context_tokens)
        seeds = [0] * len(queries) if seeds is None else seeds
        rows = [(query, candidate) for query in range(len(queries)) for candidate in range(sampling.candidates)]
        if not rows or not steps:
            return
        # A stream that another one interrupts must not share its memory with it.
        buffer, self._buffer = self._fitting_buffer(queries.shape[1] + steps - 1), None
        caches = self._read_prompt(prompt, buffer)

        @functools.lru_cache(maxsize=1)  # candidates of a query are neighbours: they share its reading
        def read(query: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
            return self._read(queries[query], len(prompt), caches if len(prompt) else None)

        for start in range(0, len(rows), self.batch):
            some = rows[start : start + self.batch]
            last = []
            for row, (query, _) in enumerate(some):
                hidden, kept = read(query)
                last.append(hidden)
                for cache, (keys, values) in zip(caches, kept, strict=True):
                    cache.keys[:, row, : keys.shape[1]] = keys
                    cache.values[:, row, : values.shape[1]] = values
            uniform = None
            if sampling.temperature > 0:
                uniform = self._padded(
                    torch.stack([noise(seeds[query], candidate, steps) for query, candidate in some])
                )
            before = len(prompt) + queries.shape[1]
            written = self._write(caches, self._padded(torch.stack(last)), before, steps, sampling, uniform)
            for image, (ids, log_p) in enumerate(written):
                for row, (query, candidate) in enumerate(some):
                    yield DecodedImage(query, candidate, image, ids[row], log_p[row])
        self._buffer = buffer

    def _write(
        self,
        caches: list[LayerCache],
        hidden: Tensor,
        before: int,
        steps: int,
        sampling: SamplingConfig,
        uniform: Tensor | None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield ids (uint16) and log p (float32) of one picture a row after another, each [batch, tokens per image].

        Args:
            caches: With prompt and queries read.
            hidden: States after the last token read, [batch, width].
            before: Tokens read so far.
            steps: Tokens to write.
            sampling: How they are chosen.
            uniform: [batch, steps] random numbers; None: greedy.
        """
        size = self.tokens_per_image
        ids = torch.empty((self.batch, steps), dtype=torch.int64, device=self._device)
        log_p = torch.empty((self.batch, steps), device=self._device)
        own = before - caches[0].shared_keys.shape[1]  # tokens of the row's own part
        for step in range(steps):
            if step:  # the last token is never read
                hidden = self._step(caches, ids[:, step - 1], before + step - 1, own + step - 1)
            logits = F.linear(hidden, self._head).float()  # [batch, codes]
            chosen = choose_tokens(logits, sampling, None if uniform is None else uniform[:, step, None])
            ids[:, step] = chosen[:, 0]
            log_p[:, step] = logits.gather(1, chosen)[:, 0] - logits.logsumexp(1)
            if (step + 1) % size == 0:
                image = slice(step + 1 - size, step + 1)
                yield ids[:, image].cpu().numpy().astype(np.uint16), log_p[:, image].cpu().numpy().copy()

    def _step(self, caches: list[LayerCache], ids: Tensor, position: int, own: int) -> Tensor:
        """Read one token a row.

        Args:
            caches: Which get the token's keys and values.
            ids: [batch].
            position: Of the token, from the start of the sentence.
            own: Its slot in the row's own part, that is, its position from the end of the prompt.

        Returns:
            Hidden states [batch, width].
        """
        x = F.embedding(ids, self._model.embed.weight)
        rotation = self._rotation[0][position : position + 1], self._rotation[1][position : position + 1]
        for layer, cache in zip(self._layers, caches, strict=True):
            query, key, value = layer.project(x, rotation)  # [batch, heads, head width]
            cache.keys[:, :, own] = key.transpose(0, 1)
            cache.values[:, :, own] = value.transpose(0, 1)
            x = layer.finish(x, cache.attend(query, own + 1))
        hidden: Tensor = self._model.norm(x)
        return hidden

    def _fitting_buffer(self, own_tokens: int) -> Tensor:
        """Return memory for ``own_tokens`` a row, [layers, 2, heads, batch, tokens, head width]."""
        size = self._model.config.hidden_size // self._layers[0].heads
        shape = (len(self._layers), 2, self._layers[0].heads, self.batch, own_tokens, size)
        if self._buffer is not None and self._buffer.shape == shape:
            return self._buffer
        self._buffer = None  # freed before the new one is allocated
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def _read_prompt(self, prompt: np.ndarray, buffer: Tensor) -> list[LayerCache]:
        """Return caches with the prompt read, whose rows have ``buffer`` for tokens of their own."""
        shared = self._read(prompt, 0, None)[1]
        return [LayerCache(*known, *own) for known, own in zip(shared, buffer, strict=True)]

    def _read(
        self, ids: np.ndarray, position: int, caches: list[LayerCache] | None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Read one row of tokens.

        Args:
            ids: [n].
            position: Of the first token, from the start of the sentence.
            caches: Of the prompt before it; None where there is none.

        Returns:
            The hidden state after the last token, [width], and every layer's keys and values, each [heads, n, head
            width].
        """
        count = len(ids)
        if not count:
            nothing = self._head.new_empty(self._layers[0].heads, 0, self._head.shape[1] // self._layers[0].heads)
            return self._head.new_empty(0), [(nothing, nothing)] * len(self._layers)
        x = F.embedding(torch.from_numpy(ids.astype(np.int64)).to(self._device), self._model.embed.weight)
        rotation = self._rotation[0][position : position + count], self._rotation[1][position : position + count]
        mask = torch.ones((count, position + count), dtype=torch.bool, device=self._device).tril(position)
        kept = []
        for number, layer in enumerate(self._layers):
            query, key, value = layer.project(x, rotation)
            own = key.transpose(0, 1), value.transpose(0, 1)
            if caches is None:
                mixed = attend(query, key, value, (count,))
            else:
                cache = caches[number]
                keys = torch.cat((cache.shared_keys, own[0]), 1)
                values = torch.cat((cache.shared_values, own[1]), 1)
                mixed = F.scaled_dot_product_attention(query.transpose(0, 1), keys, values, attn_mask=mask)
                mixed = mixed.transpose(0, 1).reshape(count, -1)
            x = layer.finish(x, mixed)
            kept.append((own[0].contiguous(), own[1].contiguous()))
        return self._model.norm(x[-1]), kept

    def _padded(self, rows: Tensor) -> Tensor:
        """Return ``rows`` [n, ...] on the device, with rows of zeros up to the batch."""
        padded = torch.zeros((self.batch, *rows.shape[1:]), dtype=rows.dtype, device=self._device)
        padded[: len(rows)] = rows
        return padded


@torch.no_grad()
def _merged(model: Lvm) -> Lvm:
    """Return a copy of ``model`` without its adapter, whose update is added to the weights."""
    assert model.lora is not None
    with torch.device("meta"):
        plain = Lvm(model.config).to(model.embed.weight.dtype)
    plain.to_empty(device=model.embed.weight.device)
    weights = plain.backbone_tensors()
    for name, tensor in model.backbone_tensors().items():
        weights[name].copy_(tensor)
    updates = model.lora_tensors()
    for name, low in updates.items():
        if name.endswith(".lora_A"):
            projection = name.removesuffix(".lora_A")
            high = updates[f"{projection}.lora_B"]
            weights[f"{projection}.weight"].addmm_(high, low, alpha=model.lora.alpha / model.lora.rank)
    return plain.requires_grad_(False)
