"""Noisy tokens beside clean ones: the loss of a naive loop over blocks, and clean tokens that do not notice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from covray.models.lvm.lora import TARGETS, Diffusion, Lora
from covray.models.lvm.model import Batch, Lvm
from covray.models.lvm.noisy import NoisyBlocks, visible
from tests.support.backbones import CODES, load, random_batch

BLOCK = 4
LORA = Lora(3, 5.0, TARGETS, Diffusion(CODES + 1, BLOCK))
LENGTHS = (24, 24, 16, 20, 24)
PLACES = ([8, 16], [12, 16], [4], [], [8, 16])  # of the blocks; neighbours of one shape differ in their places
CLEAN_WEIGHT = 0.7


@pytest.fixture
def model(llama_folder: Path) -> Lvm:
    return load(llama_folder, LORA)


def noisy_batch() -> Batch:
    batch = random_batch(*LENGTHS)
    places, counts = [], []
    start = 0
    for length, firsts in zip(LENGTHS, PLACES, strict=True):
        for first in firsts:
            places.append(torch.arange(start + first, start + first + BLOCK))
        counts.append(BLOCK * len(firsts))
        start += length
    whole = torch.cat(places)
    generator = torch.Generator().manual_seed(3)
    is_masked = torch.rand(len(whole), generator=generator) < 0.6
    masked = is_masked.nonzero()[:, 0]
    noisy = NoisyBlocks(
        ids=torch.where(is_masked, CODES + 1, batch.ids[whole]),
        places=whole,
        counts=tuple(counts),
        block=BLOCK,
        masked=masked,
        weights=torch.rand(len(masked), generator=generator) + 0.5,
        clean_weight=CLEAN_WEIGHT,
    )
    return replace(batch, noisy=noisy)


def naive(model: Lvm, folder: Path, batch: Batch) -> Tensor:
    """Cross-entropy of every masked token by transformers, block by block, with a mask written out."""
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    merged = {name: tensor.clone() for name, tensor in model.backbone_tensors().items()}
    updates = model.lora_tensors()
    for name, low in updates.items():
        if name.endswith("lora_A"):
            projection = name.removesuffix(".lora_A")
            merged[f"{projection}.weight"] += updates[f"{projection}.lora_B"] @ low * (5.0 / 3)
    assert model.mask_row is not None
    merged["model.embed_tokens.weight"][CODES + 1] = model.mask_row.detach()
    reference.load_state_dict(merged)
    noisy = batch.noisy
    assert noisy is not None
    starts = torch.tensor((0, *LENGTHS)).cumsum(0)
    losses = []
    for first in range(0, len(noisy.ids), BLOCK):
        places = noisy.places[first : first + BLOCK]
        sentence = int(torch.searchsorted(starts, places[0], right=True)) - 1
        before = batch.ids[starts[sentence] : places[0]]
        ids = torch.cat((before, noisy.ids[first : first + BLOCK]))
        mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        mask[len(before) :] = True  # the block sees all of itself
        with torch.inference_mode():
            logits = reference(ids[None], attention_mask=mask[None, None]).logits[0, len(before) :]
        each = F.cross_entropy(logits, batch.ids[places], reduction="none")
        chosen = (noisy.masked >= first) & (noisy.masked < first + BLOCK)
        losses.append(each[noisy.masked[chosen] - first])
    return torch.cat(losses)


@torch.no_grad()
def test_losses_are_those_of_a_naive_loop_over_blocks(model: Lvm, llama_folder: Path) -> None:
    batch = noisy_batch()
    noisy = batch.noisy
    assert noisy is not None
    total, each = model(batch)
    clean, masked = each.split((len(batch.positions), len(noisy.masked)))
    torch.testing.assert_close(masked, naive(model, llama_folder, batch), rtol=1e-4, atol=1e-5)
    assert total.item() == pytest.approx(CLEAN_WEIGHT * clean.sum().item() + (masked * noisy.weights).sum().item())


@torch.no_grad()
def test_clean_tokens_do_not_notice_noisy_ones(model: Lvm) -> None:
    batch = noisy_batch()
    noisy = batch.noisy
    assert noisy is not None
    plain = model.hidden(batch.ids, batch.lengths)
    beside = model.hidden(batch.ids, batch.lengths, noisy)[: len(batch.ids)]
    torch.testing.assert_close(beside, plain, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_autograd_on_the_weighed_sum(model: Lvm) -> None:
    batch = noisy_batch()
    noisy = batch.noisy
    assert noisy is not None
    model(batch)[0].backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert "mask_row" in found
    model.zero_grad()
    hidden = model.hidden(batch.ids, batch.lengths, noisy)
    rows = torch.cat((batch.positions, len(batch.ids) + noisy.masked))
    targets = torch.cat((batch.targets, batch.ids[noisy.places[noisy.masked]]))
    weights = torch.cat((torch.full(batch.positions.shape, CLEAN_WEIGHT), noisy.weights))
    each = F.cross_entropy(F.linear(hidden[rows], model.head.weight), targets, reduction="none")
    (each * weights).sum().backward()
    for name, parameter in model.named_parameters():
        if name in found:
            assert parameter.grad is not None
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_recomputed_activations_give_the_same_gradients(llama_folder: Path) -> None:
    gradients = []
    for recompute in (False, True):
        model = load(llama_folder, LORA, recompute=recompute)
        model(noisy_batch())[0].backward()
        assert model.mask_row is not None
        gradients.append(model.mask_row.grad)
    assert torch.equal(gradients[0], gradients[1])  # type: ignore[arg-type]


def test_a_block_sees_itself_and_what_is_before_it() -> None:
    seen = visible(torch.tensor([2, 3, 6, 7]), clean=8, block=2)
    assert seen[:2, :8].tolist() == [[True] * 2 + [False] * 6] * 2
    assert seen[2:, :8].tolist() == [[True] * 6 + [False] * 2] * 2
    assert seen[:, 8:].tolist() == [[True, True, False, False]] * 2 + [[False, False, True, True]] * 2
