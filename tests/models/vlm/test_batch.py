"""The loss by blocks is what a loop over blocks computes, and rows do not see each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from covray.models.vlm.batch import Blocks, NoiseLevels, NoisySample, add_noise, clean_mask, collate
from covray.models.vlm.checkpoint import LoadedVlm
from covray.models.vlm.prompts import Sample, pad_to_block
from tests.support.vlms import picture

CAUSAL = Blocks(4)
DIFFUSIONVL = Blocks(4, "block", "sequence")
LAYOUTS = [
    CAUSAL, Blocks(4, "block"), Blocks(4, "causal", "sequence"), DIFFUSIONVL, Blocks(4, shift=True),
    Blocks(4, "block", "sequence", shift=True),
]  # fmt: skip
TEXTS = [
    ("what colour is the ball", "the ball is red and the box is blue", 1),
    ("where is it", "one ball", 2),
    ("of a box on the right", "blue", 0),
]


def samples_of(vlm: LoadedVlm, blocks: Blocks) -> list[Sample]:
    """Samples with two, one and no picture, of unequal lengths."""
    samples = []
    for number, (text, answer, pictures) in enumerate(TEXTS):
        prompt = vlm.prompter.prompt([picture(number + 10 * own) for own in range(pictures)], text)
        sample = vlm.prompter.sample(prompt, answer)
        samples.append(pad_to_block(sample, blocks.padding(sample.prompt, len(sample.ids))))
    return samples


def noise_of(samples: list[Sample], blocks: Blocks, weight: str = "level") -> list[NoisySample]:
    rng = np.random.default_rng(1)
    return [add_noise(sample, blocks, NoiseLevels(0.3, 1.0, weight), rng) for sample in samples]


def embeddings_and_positions(vlm: LoadedVlm, sample: Sample) -> tuple[Tensor, Tensor]:
    ids = torch.from_numpy(sample.ids)[None]
    length = torch.tensor([ids.shape[1]])
    return vlm.model.embed(ids, sample.images), vlm.model.positions(ids, length, sample.images)


def naive_loss(vlm: LoadedVlm, sample: Sample, noisy: NoisySample, blocks: Blocks) -> Tensor:
    """The weighed loss, block by block: the clean tokens before a block, then the block itself."""
    embeddings, positions = embeddings_and_positions(vlm, sample)
    ids = torch.from_numpy(sample.ids)
    mask_row = vlm.model.model.get_input_embeddings().weight[vlm.model.mask_id]
    first = blocks.first(sample.prompt)
    total = torch.zeros(())
    for offset in range(0, len(noisy.places), blocks.size):
        start = first + offset
        own = slice(offset, offset + blocks.size)
        block = embeddings[0, start : start + blocks.size].clone()
        masked = torch.from_numpy(noisy.masked[own])
        block[masked] = mask_row
        row = torch.cat((embeddings[0, :start], block))[None]
        mask = torch.ones(row.shape[1], row.shape[1], dtype=torch.bool)
        mask[:start, :start] = clean_mask(torch.arange(start) - first, blocks.size, blocks.context)
        mask[:start, start:] = False
        hidden = vlm.model.read(row, positions[..., : row.shape[1]], mask[None, None])[0]
        hidden = hidden[start - 1 : -1] if blocks.shift else hidden[start:]
        targets = ids[start : start + blocks.size]
        each = F.cross_entropy(vlm.model.logits(hidden), targets, reduction="none")
        total = total + (each * torch.from_numpy(noisy.weights[own]) * masked).sum().float()
    return total


@torch.no_grad()
@pytest.mark.parametrize("blocks", LAYOUTS, ids=str)
def test_loss_is_that_of_a_loop_over_blocks(vlm: LoadedVlm, blocks: Blocks) -> None:
    samples = samples_of(vlm, blocks)
    noisy = noise_of(samples, blocks)
    total, each = vlm.model(collate(samples, noisy, blocks, next_weight=0.0))
    expected = sum(naive_loss(vlm, sample, own, blocks) for sample, own in zip(samples, noisy, strict=True))
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    assert len(each) == sum(int(own.masked.sum()) for own in noisy)


@torch.no_grad()
def test_clean_tokens_are_those_of_the_autoregressive_model(vlm: LoadedVlm) -> None:
    """Beside noise, a causal clean half has the next-token loss that transformers computes without any."""
    samples = samples_of(vlm, CAUSAL)
    expected = 0.0
    for sample in samples:
        ids = torch.from_numpy(sample.ids)[None, : sample.end]
        kinds = {"mm_token_type_ids": (ids == vlm.model.image_id).int()} if "image_grid_thw" in sample.images else {}
        logits = vlm.model.model(input_ids=ids, **sample.images, **kinds).logits
        logits[..., vlm.model.mask_id] = -torch.inf
        answer = slice(sample.prompt - 1, sample.end - 1)
        expected += float(F.cross_entropy(logits[0, answer], ids[0, sample.prompt :], reduction="sum"))
    total, _ = vlm.model(collate(samples, None, CAUSAL))
    noisy = noise_of(samples, CAUSAL)
    beside, each = vlm.model(collate(samples, noisy, CAUSAL))
    alone, _ = vlm.model(collate(samples, noisy, CAUSAL, next_weight=0.0))
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert float(beside - alone) == pytest.approx(expected, rel=1e-5)
    assert len(each) == sum(sample.end - sample.prompt for sample in samples) + sum(own.masked.sum() for own in noisy)


@torch.no_grad()
@pytest.mark.parametrize("blocks", [CAUSAL, DIFFUSIONVL], ids=["causal", "diffusionvl"])
def test_a_batch_of_unequal_prompts_equals_singles(vlm: LoadedVlm, blocks: Blocks) -> None:
    samples = samples_of(vlm, blocks)
    noisy = noise_of(samples, blocks)
    scales = [1.0, 0.5, 2.0]
    total, _ = vlm.model(collate(samples, noisy, blocks, 0.7, scales))
    singles = 0.0
    for sample, own, scale in zip(samples, noisy, scales, strict=True):
        singles += scale * float(vlm.model(collate([sample], [own], blocks, 0.7))[0])
    assert float(total) == pytest.approx(singles, rel=1e-5)


@torch.no_grad()
def test_positions_are_those_of_transformers(vlm: LoadedVlm) -> None:
    samples = samples_of(vlm, CAUSAL)
    batch = collate(samples, None, CAUSAL)
    positions = vlm.model.positions(batch.ids, batch.lengths, batch.images)
    for row, sample in enumerate(samples):
        ids = torch.from_numpy(sample.ids)[None]
        if positions.ndim == 2:
            expected = torch.arange(ids.shape[1])
        else:
            model = vlm.model.model.model
            model.rope_deltas = None
            expected = model.compute_3d_position_ids(
                input_ids=ids,
                image_grid_thw=sample.images.get("image_grid_thw"),
                video_grid_thw=None,
                inputs_embeds=None,
                attention_mask=None,
                cache=None,
                mm_token_type_ids=(ids == vlm.model.image_id).int(),
            )
            expected = torch.arange(ids.shape[1]).expand(3, -1) if expected is None else expected[:, 0]
        assert torch.equal(positions[..., row, : ids.shape[1]], expected)


@torch.no_grad()
def test_embeddings_and_positions_give_the_logits_of_transformers(vlm: LoadedVlm) -> None:
    sample = samples_of(vlm, CAUSAL)[1]
    ids = torch.from_numpy(sample.ids)[None]
    kinds = {"mm_token_type_ids": (ids == vlm.model.image_id).int()} if "image_grid_thw" in sample.images else {}
    expected = vlm.model.model(input_ids=ids, **sample.images, **kinds).logits[0]
    embeddings, positions = embeddings_and_positions(vlm, sample)
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None, None]
    logits = vlm.model.logits(vlm.model.read(embeddings, positions, causal))[0]
    known = torch.arange(logits.shape[1]) != vlm.model.mask_id
    torch.testing.assert_close(logits[:, known], expected[:, known], rtol=1e-5, atol=1e-5)
    assert logits[:, vlm.model.mask_id].isinf().all()


def test_noise_leaves_the_prompt_alone_and_weighs_by_the_masked_share(vlm: LoadedVlm) -> None:
    for blocks in LAYOUTS:
        for sample, own in zip(samples_of(vlm, blocks), noise_of(samples_of(vlm, blocks), blocks), strict=True):
            assert not own.masked[own.places < sample.prompt].any()
            assert len(own.places) % blocks.size == 0
            assert own.places[-1] == len(sample.ids) - 1
    sample, own = samples_of(vlm, CAUSAL)[0], noise_of(samples_of(vlm, CAUSAL), CAUSAL, "masked")[0]
    assert sample.end <= len(sample.ids)
    for block, weight in zip(own.masked.reshape(-1, 4), own.weights.reshape(-1, 4), strict=True):
        assert block.sum() * weight[0] == 4


@pytest.mark.parametrize("blocks", [CAUSAL, DIFFUSIONVL], ids=["causal", "diffusionvl"])
def test_the_loss_of_one_batch_falls(vlm: LoadedVlm, blocks: Blocks) -> None:
    samples = samples_of(vlm, blocks)
    batch = collate(samples, noise_of(samples, blocks), blocks)
    optimizer = torch.optim.AdamW(vlm.model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        total, _ = vlm.model(batch)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(float(total.detach()))
    assert losses[-1] < 0.6 * losses[0]
