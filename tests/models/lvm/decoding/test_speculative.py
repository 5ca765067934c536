"""Speculative decoding is the sequential decoder, token for token; the draft adapter changes nothing but drafts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from covray.config import LoraConfig, SamplingConfig
from covray.errors import ConfigError
from covray.models.lvm.decoding.decoder import LvmDecoder
from covray.models.lvm.decoding.reader import Reader, WindowMasks
from covray.models.lvm.draft import Draft
from covray.models.lvm.lora import TARGETS, Lora
from covray.models.lvm.model import Batch, Lvm
from covray.models.lvm.noisy import NoisyBlocks
from tests.support.backbones import CODES, load, write_llama
from tests.support.decoding import GREEDY, IMAGES, PROMPT, QUERIES, SAMPLED, STEPS, TOKENS, ids

MASK = CODES + 1
DRAFT = Draft(rank=2, alpha=8.0, targets=TARGETS, mask_id=MASK, tokens=3)
LORA = Lora(3, 5.0, draft=DRAFT)


def warmed(model: Lvm) -> Lvm:
    """The model with drafts that differ from what the backbone says."""
    for name, tensor in model.draft_tensors().items():
        if name.endswith("lora_B"):
            tensor.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(2))
    return model


@pytest.fixture(scope="module")
def model(llama_folder: Path) -> Lvm:
    return warmed(load(llama_folder, LORA))


@pytest.fixture(scope="module")
def decoder(model: Lvm) -> LvmDecoder:
    return LvmDecoder(model, CODES, TOKENS, batch=4)


def speculative(options: dict[str, Any], window: int | str = "auto") -> SamplingConfig:
    return SamplingConfig.model_validate({"decoder": "speculative", "window": window, **options})


@pytest.mark.parametrize("options", [GREEDY, *SAMPLED])
@pytest.mark.parametrize("window", ["auto", 2, 3, 9])
def test_tokens_are_those_of_the_sequential_decoder(
    decoder: LvmDecoder, window: int | str, options: dict[str, Any]
) -> None:
    expected = decoder.decode(PROMPT, QUERIES, IMAGES, SamplingConfig.model_validate(options), range(5))
    before = decoder.passes
    written = decoder.decode(PROMPT, QUERIES, IMAGES, speculative(options, window), range(5))
    assert np.array_equal(written.ids, expected.ids)
    np.testing.assert_allclose(written.image_log_likelihood, expected.image_log_likelihood, rtol=1e-4)
    assert decoder.passes - before <= 2 * (STEPS - 1), "two batches, at least one token a pass"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [GREEDY, SAMPLED[0]])
def test_a_query_is_answered_alike_alone_and_among_others(
    llama_folder: Path, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    decoder = LvmDecoder(warmed(load(llama_folder, LORA, dtype=dtype)), CODES, TOKENS, batch=4)
    seeds, sampling = [7, 8, 9, 10, 11], speculative(options)
    together = decoder.decode(PROMPT, QUERIES, IMAGES, sampling, seeds)
    for order in ([3], [2, 0, 4, 3, 1]):
        apart = decoder.decode(PROMPT, QUERIES[order], IMAGES, sampling, [seeds[row] for row in order])
        assert np.array_equal(apart.ids, together.ids[order])
        assert np.array_equal(apart.image_log_likelihood, together.image_log_likelihood[order]), "to the bit"


def test_one_row_no_prompt_candidates_and_a_full_context(model: Lvm, decoder: LvmDecoder) -> None:
    nothing, alone = np.empty(0, np.uint16), LvmDecoder(model, CODES, TOKENS, batch=1)
    for options in (GREEDY, SAMPLED[0]):
        expected = alone.decode(nothing, QUERIES[:2], IMAGES, SamplingConfig.model_validate(options))
        assert np.array_equal(alone.decode(nothing, QUERIES[:2], IMAGES, speculative(options)).ids, expected.ids)
    several = {"temperature": 1.0, "best_of": 4, "keep": 0.5}
    expected = decoder.decode(PROMPT, QUERIES, IMAGES, SamplingConfig.model_validate(several), range(5))
    written = decoder.decode(PROMPT, QUERIES, IMAGES, speculative(several), range(5))
    assert np.array_equal(written.candidate_ids, expected.candidate_ids)
    images = (256 - len(PROMPT) - TOKENS) // TOKENS
    assert np.array_equal(
        decoder.decode(PROMPT, QUERIES[:1], images, speculative({})).ids,
        decoder.decode(PROMPT, QUERIES[:1], images).ids,
    )


def without_draft(model: Lvm) -> Lvm:
    """The same model, whose draft adapter does nothing."""
    for name, tensor in model.draft_tensors().items():
        if name.endswith("lora_B"):
            tensor.zero_()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_tokens_have_the_same_bits_with_and_without_the_draft_adapter(llama_folder: Path, dtype: torch.dtype) -> None:
    drafted, plain = warmed(load(llama_folder, LORA, dtype=dtype)), load(llama_folder, LORA, dtype=dtype)
    with_drafts, clean = (batch_of_drafts(seed=0) for _ in range(2))
    assert with_drafts.noisy is not None
    tokens = len(clean.ids)
    hidden = drafted.hidden(with_drafts.ids, with_drafts.lengths, with_drafts.noisy)
    undrafted = plain.hidden(with_drafts.ids, with_drafts.lengths, with_drafts.noisy)
    assert torch.equal(hidden[:tokens], undrafted[:tokens])
    assert torch.equal(hidden[:tokens], plain.hidden(clean.ids, clean.lengths)), "and without masks"
    assert not torch.allclose(hidden[tokens:], undrafted[tokens:], atol=1e-2)

    def read(model: Lvm) -> Tensor:
        reader = Reader(model, CODES, 2)
        caches = reader.read_prompt(PROMPT, reader.take_buffer(12))
        tokens, visible = torch.tensor([[3, 4, MASK, MASK]]).expand(2, 4), torch.ones(4, 4).tril().bool()
        masks = WindowMasks(torch.arange(4), 2)
        return reader.read_window(caches, tokens, torch.tensor([0, 0]), visible, masks)

    windows = read(drafted), read(plain)
    assert torch.equal(windows[0][:, :2], windows[1][:, :2])
    assert not torch.allclose(windows[0][:, 2:], windows[1][:, 2:], atol=1e-2)


def batch_of_drafts(seed: int) -> Batch:
    """Two sentences with masks behind three places of each."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(CODES, (48,), generator=generator)
    groups = torch.tensor([3, 7, 15, 27, 28, 39])
    places = (groups[:, None] + 1 + torch.arange(DRAFT.tokens)).flatten()
    masks = torch.full_like(places, MASK)
    noisy = NoisyBlocks(
        masks, places, (9, 9), DRAFT.tokens, torch.arange(len(places)), torch.ones(len(places)), 0.0, drafts=True
    )
    return Batch(clean, (24, 24), torch.arange(0), noisy)


@torch.inference_mode()
def test_what_is_learned_is_what_decoding_reads(model: Lvm) -> None:
    """The masks of a window behind each of its tokens, against masks beside a clean sentence."""
    reader = Reader(model, CODES, 1)
    sentence = torch.from_numpy(ids(30, seed=3).astype(np.int64))
    window, before, masks = 4, 20, 3
    group = torch.arange(window).repeat_interleave(masks)
    number = torch.arange(masks).repeat(window)
    caches = reader.read_prompt(sentence[:before].numpy().astype(np.uint16), reader.take_buffer(40))
    visible = torch.zeros(16, 16, dtype=torch.bool)
    visible[:window, :window] = torch.ones(window, window).tril()
    for row in range(window * masks):
        visible[window + row, : group[row] + 1] = True
        first = window + int(group[row]) * masks
        visible[window + row, first : window + row + 1] = True
    offsets = torch.cat((torch.arange(window), group + 1 + number))
    tokens = torch.cat((sentence[before : before + window], torch.full((window * masks,), MASK)))
    read = reader.read_window(caches, tokens[None], torch.tensor([0]), visible, WindowMasks(offsets, window))[0]
    places = before + group + 1 + number
    noisy = NoisyBlocks(tokens[window:], places, (12,), masks, torch.arange(12), torch.ones(12), 0.0, drafts=True)
    learned = model.hidden(sentence, (30,), noisy)[30:]
    torch.testing.assert_close(read[window:], learned, rtol=1e-3, atol=1e-4)
    assert torch.equal(noisy.predicted, places + 1)


def test_only_the_draft_adapter_gets_a_gradient(llama_folder: Path) -> None:
    """And the right one: finite differences of the loss along the gradient."""
    model = warmed(load(llama_folder, LORA)).double()
    batch = batch_of_drafts(seed=1)
    total, each = model(batch)
    assert total.item() == pytest.approx(each.double().sum().item(), rel=1e-5)
    total.backward()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert all(".draft." in name or name == "mask_row" for name in trained)
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in trained.values())
    with torch.no_grad():
        slope = sum(
            (value.grad.square().sum() for value in trained.values() if value.grad is not None), torch.tensor(0)
        )
        moved = []
        for step in (1e-7, -1e-7):
            for value in trained.values():
                value.add_(step * torch.as_tensor(value.grad))
            moved.append(model(batch)[1].double().sum())
            for value in trained.values():
                value.sub_(step * torch.as_tensor(value.grad))
        assert float(moved[0] - moved[1]) / 2e-7 == pytest.approx(float(slope), rel=0.02)


def test_right_drafts_are_taken_a_window_at_a_time(tmp_path: Path) -> None:
    """A model that repeats its last token, and masks that say so: a window a pass."""
    repeating = load(write_llama(tmp_path / "llama"), replace(LORA, draft=replace(DRAFT, tokens=7)), warm=False)
    repeating.head.weight.data.copy_(repeating.embed.weight.data)
    layer: Any
    for layer in repeating.layers:
        layer.out.weight.data.zero_()
        layer.down.weight.data.zero_()
    written = LvmDecoder(repeating, CODES, TOKENS, batch=2).decode(PROMPT, QUERIES[:2], IMAGES).ids
    assert repeating.mask_row is not None
    for row in range(2):
        repeating.mask_row.data.copy_(repeating.embed.weight[int(written[row, 0, 0])])
        decoder = LvmDecoder(repeating, CODES, TOKENS, batch=1)
        one = decoder.decode(PROMPT, QUERIES[row : row + 1], IMAGES, speculative({}))
        assert np.array_equal(one.ids[0], written[row])
        assert decoder.passes == -(-(STEPS - 1) // 8)


def test_a_model_without_drafts_is_refused(llama_folder: Path, decoder: LvmDecoder) -> None:
    plain = LvmDecoder(load(llama_folder, LoraConfig(rank=3)), CODES, TOKENS, batch=4)
    with pytest.raises(ConfigError, match=r"sampling\.decoder: speculative needs a run trained with objective=draft"):
        plain.decode(PROMPT, QUERIES, IMAGES, speculative({}))
    assert np.array_equal(
        decoder.decode(PROMPT, QUERIES, IMAGES, SamplingConfig(decoder="jacobi", window=4)).ids,
        decoder.decode(PROMPT, QUERIES, IMAGES).ids,
    )
