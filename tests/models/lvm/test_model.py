from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from covray.config import LoraConfig
from covray.models.lvm import functions
from covray.models.lvm.model import Batch, Lvm
from tests.support.backbones import load, random_batch, write_llama

LORA = LoraConfig(rank=3, alpha=5)
LENGTHS = (24, 24, 9, 24, 2, 40)  # equal neighbours, which share a kernel, and equal ones that are not neighbours


def stock(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def sentences(batch: Batch) -> list[Tensor]:
    return list(batch.ids.split(batch.lengths))


def gradients(model: Lvm, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, likelihood of each position, and the gradient of every parameter that has one."""
    model.zero_grad()
    loss, each = model(batch)
    (loss / len(each)).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), each, found


@pytest.mark.parametrize("bias", [False, True])
def test_logits_of_flat_sentences_are_those_of_transformers_one_by_one(tmp_path: Path, bias: bool) -> None:
    folder = write_llama(tmp_path, attention_bias=bias, mlp_bias=bias)
    batch = random_batch(*LENGTHS)
    with torch.inference_mode():
        found = load(folder).logits(batch.ids, batch.lengths)
        reference = stock(folder)
        expected = torch.cat([reference(part[None]).logits[0] for part in sentences(batch)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.5  # the comparison is of something


def test_rope_theta_of_the_folder_counts(tmp_path: Path) -> None:
    batch = random_batch(30)
    folder = write_llama(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 50.0})
    with torch.inference_mode():
        found = load(folder).logits(batch.ids, batch.lengths)
        torch.testing.assert_close(found, stock(folder)(batch.ids[None]).logits[0], rtol=0, atol=1e-5)


def test_gradients_of_all_weights_are_those_of_transformers(tmp_path: Path) -> None:
    folder = write_llama(tmp_path, attention_bias=True, mlp_bias=True)
    batch = random_batch(*LENGTHS)
    model, reference = load(folder).requires_grad_(True), stock(folder)
    loss, each, found = gradients(model, batch)
    total = torch.stack(
        [F.cross_entropy(reference(part[None]).logits[0, :-1], part[1:], reduction="sum") for part in sentences(batch)]
    ).sum()
    (total / len(each)).backward()
    torch.testing.assert_close(loss, total.detach(), rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():  # gradients stand where weights do: fused as they are
        parameter.data = found[name]
    for name, gradient in model.backbone_tensors().items():
        torch.testing.assert_close(gradient, reference.get_parameter(name).grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_sentence_never_sees_its_neighbours(llama_folder: Path) -> None:
    model = load(llama_folder, LORA)
    first, second = random_batch(*LENGTHS), random_batch(*LENGTHS, seed=1)
    start = sum(LENGTHS[:3])
    mine = slice(start, start + LENGTHS[3])
    elsewhere = second.ids.clone()
    elsewhere[mine] = first.ids[mine]
    with torch.inference_mode():
        before = model.logits(first.ids, LENGTHS)
        after = model.logits(elsewhere, LENGTHS)
    assert torch.equal(before[mine], after[mine])
    assert not torch.equal(before[:start], after[:start])


def test_a_token_never_sees_what_follows(llama_folder: Path) -> None:
    model = load(llama_folder, LORA)
    batch = random_batch(20, 20)
    changed = batch.ids.clone()
    changed[30] = (changed[30] + 1) % 64
    with torch.inference_mode():
        before, after = (model.logits(ids, batch.lengths) for ids in (batch.ids, changed))
    assert torch.equal(before[:30], after[:30])
    assert not torch.equal(before[30:], after[30:])


def test_the_loss_is_the_same_in_chunks(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(llama_folder, LORA)
    model.head.weight.requires_grad_(True)
    batch = random_batch(*LENGTHS)
    loss, each, found = gradients(model, batch)
    monkeypatch.setattr(functions, "CHUNK", 7)
    loss_in_chunks, each_in_chunks, found_in_chunks = gradients(model, batch)
    torch.testing.assert_close(loss_in_chunks, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(each_in_chunks, each, rtol=1e-5, atol=1e-6)
    assert found.keys() == found_in_chunks.keys() > {"head.weight"}
    for name, gradient in found.items():
        torch.testing.assert_close(found_in_chunks[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_loss_at_some_positions_is_the_loss_with_the_others_masked(llama_folder: Path) -> None:
    model = load(llama_folder, LORA)
    whole = random_batch(*LENGTHS)
    chosen = torch.randperm(len(whole.positions), generator=torch.Generator().manual_seed(0))[:30].sort().values
    some = Batch(whole.ids, whole.lengths, whole.positions[chosen])
    _, each, found = gradients(model, some)

    logits = F.linear(model.hidden(whole.ids, whole.lengths), model.head.weight)
    targets = torch.full_like(whole.ids, -100)
    targets[some.positions] = some.targets
    model.zero_grad()
    masked = F.cross_entropy(logits, targets, reduction="mean")
    masked.backward()
    torch.testing.assert_close(each.mean(), masked.detach(), rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_recomputed_activations_change_no_bit(llama_folder: Path) -> None:
    batch = random_batch(*LENGTHS)
    kept, again = (gradients(load(llama_folder, LORA, recompute=recompute), batch) for recompute in (False, True))
    assert torch.equal(kept[0], again[0])
    assert kept[2].keys() == again[2].keys()
    assert all(torch.equal(kept[2][name], again[2][name]) for name in kept[2])


def test_bfloat16_stays_near_float32(llama_folder: Path) -> None:
    batch = random_batch(*LENGTHS)
    full, half = (load(llama_folder, LORA, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    (loss, each, found), (_, low_each, low_found) = gradients(full, batch), gradients(half, batch)
    assert (low_each - each).abs().mean() < 0.05 * loss / len(each)
    for name, gradient in found.items():  # the adapter is float32, whatever the backbone
        assert low_found[name].dtype == torch.float32
        assert F.cosine_similarity(low_found[name].flatten(), gradient.flatten(), dim=0) > 0.99, name


def test_the_views_cover_every_parameter(llama_folder: Path) -> None:
    model = load(llama_folder, LORA)
    views = model.backbone_tensors() | model.lora_tensors()
    assert sum(view.numel() for view in views.values()) == sum(p.numel() for p in model.parameters())
    for view in views.values():
        view.fill_(3.0)
    assert all((parameter == 3.0).all() for parameter in model.parameters())
