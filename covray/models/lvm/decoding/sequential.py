"""Decoding: whole pictures written token by token after a prompt that a batch of queries shares.

The prompt is read once and its keys and values are kept once; every row of the batch attends to them and to a part of
its own, in one softmax over both. So a step multiplies the prompt's keys by the queries of all rows at a time, instead
of reading a copy for each.

Results do not depend on the batch: prompt and queries are read one by one, and steps have one padded shape, so that a
query's tokens are the same to the bit (on one thread of a CPU) alone and among others. A row's random numbers are its
own, too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from covray.config import SamplingConfig
from covray.errors import ConfigError
from covray.models.lvm.model import Lvm, attend, rotary
from covray.seeds import seed_of

GREEDY = SamplingConfig()


@dataclass(frozen=True, eq=False)
class Written:
    """What ``Decoder.write`` wrote, for B queries."""

    ids: np.ndarray
    """uint16 [B, images, tokens per image]."""
    image_log_likelihood: np.ndarray
    """float64 [B, images]: the sum of log p of a picture's tokens given all before it, in nats; p is the model's at
    temperature 1 over the image codes, whatever they were sampled with."""
    candidate: np.ndarray
    """int64 [B]: which candidate it is, of ``best_of``."""

    @property
    def log_likelihood(self) -> np.ndarray:
        """Of all pictures of a query, float64 [B]."""
        total: np.ndarray = self.image_log_likelihood.sum(1)
        return total


@dataclass(frozen=True)
class _Cache:
    """Keys and values of one layer."""

    shared_keys: Tensor  # [heads, P, d]
    shared_values: Tensor
    keys: Tensor  # [heads, batch, N, d]: what each row read and wrote after the prompt
    values: Tensor


class Decoder:
    """Writes pictures with ``model``, ``batch`` rows at a time.

    ``codes``: image codes of the vocabulary; ids from there on are never written. ``batch`` is part of what decides the
    bits, as the shape of the arithmetic does; fewer rows are padded.
    An adapter is merged into a copy of the weights where they are float32 (W + (alpha / rank) B A: equal up to
    rounding); in bfloat16, where rounding would change the model, it is computed beside them.
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
        self._own: Tensor | None = None

    @torch.inference_mode()
    def write(
        self,
        prompt: np.ndarray,
        queries: np.ndarray,
        images: int,
        sampling: SamplingConfig = GREEDY,
        seeds: Sequence[int] | None = None,
    ) -> Written:
        """Write ``images`` pictures after each of ``queries``.

        ``prompt``: ids [P] that precede every query, P >= 0; ``queries``: ids [B, Q], Q >= 1; ``seeds``: one a query,
        of which, and of the candidate's number, all its randomness follows (0 for all where not given).
        Raises ConfigError when prompt, query and pictures exceed the context.
        """
        steps = images * self.tokens_per_image
        require_room(len(prompt) + queries.shape[1] + steps, self.tokens_per_image, self.context_tokens)
        seeds = [0] * len(queries) if seeds is None else seeds
        candidates = sampling.best_of
        rows = [(query, candidate) for query in range(len(queries)) for candidate in range(candidates)]
        ids = torch.empty((len(rows), steps), dtype=torch.int64, device=self._device)
        log_p = torch.empty((len(rows), steps), device=self._device)
        if rows and steps:
            place = len(prompt) + queries.shape[1]
            caches = self._read_prompt(prompt, queries.shape[1] + steps - 1)

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
                luck = None
                if sampling.temperature > 0:
                    luck = self._padded(torch.stack([_luck(seeds[query], which, steps) for query, which in some]))
                here = slice(start, start + len(some))
                found, likelihood = self._write(caches, self._padded(torch.stack(last)), place, steps, sampling, luck)
                ids[here], log_p[here] = found[: len(some)], likelihood[: len(some)]
        shape = (len(queries), candidates, images, self.tokens_per_image)
        by_image = log_p.double().view(shape).sum(-1).cpu().numpy()  # [B, candidates, images]
        scored = by_image[..., -1:] if sampling.choose_by == "answer" else by_image
        best = scored.sum(-1).argmax(1) if images else np.zeros(len(queries), np.int64)
        mine = np.arange(len(queries))
        return Written(ids.view(shape).cpu().numpy().astype(np.uint16)[mine, best], by_image[mine, best], best)

    def _write(
        self,
        caches: list[_Cache],
        hidden: Tensor,
        place: int,
        steps: int,
        sampling: SamplingConfig,
        luck: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Ids and log p, each [batch, steps], from the ``hidden`` states [batch, width] before position ``place``."""
        ids = torch.empty((self.batch, steps), dtype=torch.int64, device=self._device)
        log_p = torch.empty((self.batch, steps), device=self._device)
        first = place - caches[0].shared_keys.shape[1]  # of the own part
        for step in range(steps):
            if step:  # the last token is never read
                hidden = self._step(caches, ids[:, step - 1], place + step - 1, first + step - 1)
            logits = F.linear(hidden, self._head).float()  # [batch, codes]
            chosen = _choose(logits, sampling, None if luck is None else luck[:, step, None])  # [batch, 1]
            ids[:, step] = chosen[:, 0]
            log_p[:, step] = logits.gather(1, chosen)[:, 0] - logits.logsumexp(1)
        return ids, log_p

    def _step(self, caches: list[_Cache], ids: Tensor, place: int, own: int) -> Tensor:
        """Read one token a row, ``ids`` [batch] at position ``place``, into slot ``own``: hidden states [batch, width].

        ``place`` counts from the start of the sentence, ``own`` from the end of the prompt.
        """
        x = F.embedding(ids, self._model.embed.weight)
        rotation = self._rotation[0][place : place + 1], self._rotation[1][place : place + 1]
        for layer, cache in zip(self._layers, caches, strict=True):
            query, key, value = layer.project(x, rotation)  # [batch, heads, d]
            cache.keys[:, :, own] = key.transpose(0, 1)
            cache.values[:, :, own] = value.transpose(0, 1)
            x = layer.finish(x, _attend(query, cache, own + 1))
        hidden: Tensor = self._model.norm(x)
        return hidden

    def _read_prompt(self, prompt: np.ndarray, own_tokens: int) -> list[_Cache]:
        """Caches with the prompt read and room for ``own_tokens`` a row."""
        size = self._model.config.hidden_size // self._layers[0].heads
        shape = (len(self._layers), 2, self._layers[0].heads, self.batch, own_tokens, size)
        if self._own is None or self._own.shape != shape:
            self._own = None  # before the new one is there
            self._own = torch.zeros(shape, dtype=self._dtype, device=self._device)
        shared = self._read(prompt, 0, None)[1]
        return [_Cache(*known, *own) for known, own in zip(shared, self._own, strict=True)]

    def _read(
        self, ids: np.ndarray, place: int, caches: list[_Cache] | None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Read one row of ``ids`` [n] from position ``place``, after the prompt of ``caches`` where there are some.

        Gives the hidden state after the last, [width], and every layer's keys and values, each [heads, n, d].
        """
        count = len(ids)
        if not count:
            nothing = self._head.new_empty(self._layers[0].heads, 0, self._head.shape[1] // self._layers[0].heads)
            return self._head.new_empty(0), [(nothing, nothing)] * len(self._layers)
        x = F.embedding(torch.from_numpy(ids.astype(np.int64)).to(self._device), self._model.embed.weight)
        rotation = self._rotation[0][place : place + count], self._rotation[1][place : place + count]
        mask = torch.ones((count, place + count), dtype=torch.bool, device=self._device).tril(place)
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
        """``rows`` [n, ...] on the device, with rows of zeros up to the batch."""
        padded = torch.zeros((self.batch, *rows.shape[1:]), dtype=rows.dtype, device=self._device)
        padded[: len(rows)] = rows
        return padded


def require_room(tokens: int, tokens_per_image: int, context_tokens: int) -> None:
    """Raise ConfigError, with the arithmetic, when a sentence of ``tokens`` exceeds the model's context."""
    if tokens > context_tokens:
        raise ConfigError(
            f"{tokens // tokens_per_image} pictures x {tokens_per_image} tokens = {tokens} tokens exceed the context "
            f"of {context_tokens} ({context_tokens // tokens_per_image} pictures); "
            "give fewer examples or shorter chains"
        )


def _luck(seed: int, candidate: int, count: int) -> Tensor:
    """``count`` uniform numbers in [0, 1) of a row, float64; drawn on the CPU, so that every device has the same."""
    generator = torch.Generator().manual_seed(seed_of(seed, candidate))
    return torch.rand(count, dtype=torch.float64, generator=generator)


def _choose(logits: Tensor, sampling: SamplingConfig, luck: Tensor | None) -> Tensor:
    """A token a row [B, 1] from ``logits`` [B, codes]: the likeliest, or by ``luck`` [B, 1] the inverse of the CDF.

    First the temperature, then the ``top_k``, then of what they leave the ``top_p``, as transformers does.
    """
    if luck is None:
        return logits.argmax(1, keepdim=True)
    scaled = logits.double() / sampling.temperature
    if sampling.top_k is None and sampling.top_p == 1:
        return _invert(scaled.softmax(1), luck)
    count = min(sampling.top_k or logits.shape[1], logits.shape[1])
    likeliest, ids = scaled.topk(count)  # descending
    p = likeliest.softmax(1)
    before = p.cumsum(1) - p
    p = torch.where(before < sampling.top_p, p, 0)  # the first always stays
    return ids.gather(1, _invert(p, luck))


def _invert(weights: Tensor, luck: Tensor) -> Tensor:
    """The first index [B, 1] at which the running sum of ``weights`` [B, n] exceeds the share ``luck`` of the whole.

    Weights of zero are never met: where the sum does not rise it exceeds nothing that it did not exceed before.
    """
    running = weights.cumsum(1)
    # Below the whole even after rounding, or the search would end behind the last.
    wanted = torch.minimum(luck * running[:, -1:], running[:, -1:] * (1 - 2.0**-50))
    return torch.searchsorted(running, wanted, right=True)


def _attend(query: Tensor, cache: _Cache, count: int) -> Tensor:
    """Attention of one token a row, ``query`` [B, heads, d], to the prompt and to ``count`` own tokens: [B, heads * d].

    Matrix products of all rows with the shared part, of each row with its own; one softmax over both.
    """
    rows, heads, size = query.shape
    query = (query * size**-0.5).transpose(0, 1).contiguous()  # [heads, B, d]
    keys, values = (part[:, :, :count].flatten(0, 1) for part in (cache.keys, cache.values))  # [heads * B, count, d]
    shared = torch.bmm(query, cache.shared_keys.mT)  # [heads, B, P]
    own = torch.bmm(query.view(heads * rows, 1, size), keys.mT).view(heads, rows, count)
    weights = torch.cat((shared, own), -1).softmax(-1, dtype=torch.float32).to(query.dtype)
    mixed = torch.bmm(weights[..., : shared.shape[2]], cache.shared_values)  # [heads, B, d]
    mine = weights[..., shared.shape[2] :].reshape(heads * rows, 1, count)
    mixed += torch.bmm(mine, values).view(heads, rows, size)
    return mixed.transpose(0, 1).reshape(rows, -1)


@torch.no_grad()
def _merged(model: Lvm) -> Lvm:
    """A copy of ``model`` without its adapter, whose update is added to the weights."""
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
