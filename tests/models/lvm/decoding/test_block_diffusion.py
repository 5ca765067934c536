"""Block decoding: the cached passes are those of a model that reads everything again, and no mask is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from covray.config import LoraConfig, SamplingConfig
from covray.errors import ConfigError
from covray.models.lvm.cache import LayerCache
from covray.models.lvm.decoding.decoder import LvmDecoder
from covray.models.lvm.decoding.reader import Reader
from covray.models.lvm.lora import TARGETS, Diffusion, Lora
from covray.models.lvm.model import Lvm
from covray.models.lvm.noisy import NoisyBlocks
from covray.models.masking import choose_unmasked, pass_counts
from covray.models.sampling import RowNoise, allowed, choose_tokens
from tests.support.backbones import CODES, load
from tests.support.decoding import ids

TOKENS, IMAGES, BLOCK = 8, 2, 4
STEPS = TOKENS * IMAGES
MASK = CODES + 1
LORA = Lora(3, 5.0, TARGETS, Diffusion(MASK, BLOCK))


PROMPT, QUERIES = ids(24), ids(5, TOKENS, seed=1)


@pytest.fixture(scope="module")
def model(llama_folder: Path) -> Lvm:
    return load(llama_folder, LORA)


@pytest.fixture(scope="module")
def decoder(model: Lvm) -> LvmDecoder:
    return LvmDecoder(model, CODES, TOKENS, batch=4)


def uncached(model: Lvm, query: np.ndarray, sampling: SamplingConfig, seed: int) -> list[int]:
    """Write by whole forward passes: the clean tokens so far, and the noisy block beside them."""
    clean = torch.from_numpy(np.concatenate([PROMPT, query]).astype(np.int64))
    block = sampling.block or BLOCK
    noise = RowNoise(seed, 0, CODES)
    written: list[int] = []
    while len(written) < STEPS:
        here = torch.full((block,), MASK)
        masked = torch.ones(1, block, dtype=torch.bool)
        counts = pass_counts(block, sampling.passes or block, sampling.unmask)
        for count in counts:
            logits = noisy_logits(model, clean, here)
            gumbel = noise.read(len(written), block) if sampling.temperature else None
            chosen = choose_tokens(logits, sampling, gumbel)
            scaled = allowed(logits, sampling) if sampling.temperature else logits
            new = choose_unmasked(
                scaled.softmax(-1)[None], chosen[None], masked, count, sampling.unmask, sampling.threshold or 0.85
            )
            here = torch.where(new[0], chosen, here)
            masked &= ~new
        assert not masked.any()
        clean = torch.cat((clean, here))
        written += here.tolist()
    return written


@torch.inference_mode()
def noisy_logits(model: Lvm, clean: Tensor, block: Tensor) -> Tensor:
    """Logits over the codes at the places of ``block`` right behind ``clean``, [D, codes]."""
    whole = torch.cat((clean, block))
    places = torch.arange(len(clean), len(whole))
    noisy = NoisyBlocks(block, places, (len(block),), len(block), places[:0], torch.ones(0), 1.0)
    hidden = model.hidden(whole, (len(whole),), noisy)[len(whole) :]
    return (hidden @ model.head.weight.t())[:, :CODES]


@pytest.mark.parametrize(
    "options",
    [
        {}, {"passes": 2}, {"passes": 1}, {"block": 8, "passes": 3, "unmask": "cosine"}, {"block": 2},
        {"unmask": "confidence", "passes": 2, "threshold": 0.3}, {"temperature": 1.0, "passes": 2},
        {"temperature": 0.8, "top_k": 20, "unmask": "confidence", "passes": 1, "threshold": 0.2},
    ],
)  # fmt: skip
def test_cached_passes_write_what_whole_passes_write(decoder: LvmDecoder, model: Lvm, options: dict[str, Any]) -> None:
    sampling = SamplingConfig.model_validate({"decoder": "block_diffusion", **options})
    written = decoder.decode(PROMPT, QUERIES, IMAGES, sampling, range(5)).ids.reshape(5, -1)
    for row in range(5):
        assert written[row].tolist() == uncached(model, QUERIES[row], sampling, row)


@pytest.mark.parametrize("unmask", ["even", "cosine", "confidence", "entropy"])
def test_no_mask_is_left_and_passes_are_as_asked(decoder: LvmDecoder, unmask: str) -> None:
    for passes in range(1, BLOCK + 1):
        sampling = SamplingConfig.model_validate({"unmask": unmask, "passes": passes})
        before = decoder.passes
        written = decoder.decode(PROMPT, QUERIES[:3], IMAGES, sampling)
        assert written.ids.max() < CODES
        taken = (decoder.passes - before) / (STEPS // BLOCK)
        if unmask in ("even", "cosine"):
            assert taken == passes + 1, "and one that commits"
        else:
            assert 2 <= taken <= BLOCK + 1


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "passes": 2}, {"unmask": "entropy", "threshold": 3.0}])
def test_a_query_is_answered_alike_alone_and_among_others(decoder: LvmDecoder, options: dict[str, Any]) -> None:
    seeds, sampling = [7, 8, 9, 10, 11], SamplingConfig.model_validate(options)
    together = decoder.decode(PROMPT, QUERIES, IMAGES, sampling, seeds)
    for order in ([3], [4, 1], [2, 0, 4, 3, 1]):
        apart = decoder.decode(PROMPT, QUERIES[order], IMAGES, sampling, [seeds[row] for row in order])
        assert np.array_equal(apart.ids, together.ids[order])
        assert np.array_equal(apart.image_log_likelihood, together.image_log_likelihood[order]), "to the bit"


def test_likelihood_is_the_autoregressive_one(decoder: LvmDecoder, model: Lvm) -> None:
    written = decoder.decode(PROMPT, QUERIES, IMAGES, SamplingConfig(passes=2))
    for row in range(5):
        sentence = np.concatenate([PROMPT, QUERIES[row], written.ids[row].ravel()]).astype(np.int64)
        whole = torch.from_numpy(sentence)
        with torch.inference_mode():
            logits = model.logits(whole, (len(whole),))[-STEPS - 1 : -1, :CODES].log_softmax(-1)
        expected = logits.gather(1, whole[-STEPS:, None])[:, 0].view(IMAGES, TOKENS).sum(1)
        np.testing.assert_allclose(written.image_log_likelihood[row], expected.numpy(), rtol=1e-4)


@torch.inference_mode()
def test_denoising_leaves_the_cache_and_a_commit_is_a_fresh_prefill(model: Lvm) -> None:
    reader = Reader(model, CODES, 2)
    whole = ids(2, 12, seed=4).astype(np.int64)

    def caches() -> list[LayerCache]:
        return reader.read_prompt(PROMPT, reader.take_buffer(12))

    def causal(width: int) -> Tensor:
        return torch.ones(width, width, dtype=torch.bool).tril()

    fresh, stepwise = caches(), caches()
    reader.read_window(fresh, torch.from_numpy(whole), torch.zeros(2, dtype=torch.int64), causal(12))
    for start in range(0, 12, BLOCK):
        own = torch.full((2,), start)
        before = [cache.keys[:, :, :start].clone() for cache in stepwise]
        for seed in range(3):
            noisy = torch.from_numpy(ids(2, BLOCK, seed=seed).astype(np.int64))
            reader.read_window(stepwise, noisy, own, torch.ones(BLOCK, BLOCK, dtype=torch.bool))
        assert all(torch.equal(cache.keys[:, :, :start], old) for cache, old in zip(stepwise, before, strict=True))
        block = torch.from_numpy(whole[:, start : start + BLOCK])
        reader.read_window(stepwise, block, own, causal(BLOCK))
    for one, other in zip(fresh, stepwise, strict=True):
        torch.testing.assert_close(one.keys, other.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.values, other.values, rtol=1e-4, atol=1e-5)


def test_bfloat16_keeps_the_mask_beside_the_weights(llama_folder: Path) -> None:
    decoder = LvmDecoder(load(llama_folder, LORA, dtype=torch.bfloat16), CODES, TOKENS, batch=4)
    assert decoder.decode(PROMPT, QUERIES, IMAGES).ids.max() < CODES


def test_a_model_of_blocks_also_decodes_one_by_one(decoder: LvmDecoder) -> None:
    one_by_one = decoder.decode(PROMPT, QUERIES, IMAGES, SamplingConfig(decoder="sequential")).ids
    assert np.array_equal(
        decoder.decode(PROMPT, QUERIES, IMAGES, SamplingConfig(decoder="jacobi", window=4)).ids, one_by_one
    )
    assert not np.array_equal(decoder.decode(PROMPT, QUERIES, IMAGES).ids, one_by_one), "blocks are its default"


def test_what_does_not_fit_is_refused(decoder: LvmDecoder, llama_folder: Path) -> None:
    plain = LvmDecoder(load(llama_folder, LoraConfig(rank=3)), CODES, TOKENS, batch=4)
    with pytest.raises(ConfigError, match="needs a run trained with objective=block_diffusion"):
        plain.decode(PROMPT, QUERIES, IMAGES, SamplingConfig(decoder="block_diffusion"))
    with pytest.raises(ConfigError, match=r"sampling.block: 3 does not divide the 8 tokens"):
        decoder.decode(PROMPT, QUERIES, IMAGES, SamplingConfig(block=3))
    with pytest.raises(ConfigError, match=r"sampling.passes: 5 passes of a block of 4 tokens"):
        decoder.decode(PROMPT, QUERIES, IMAGES, SamplingConfig(passes=5))
