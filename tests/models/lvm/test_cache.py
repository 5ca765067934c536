"""Windowed reads: what a pass over several tokens computes is what single reads compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from covray.models.lvm.cache import LayerCache, Window
from covray.models.lvm.decoding.reader import Reader
from tests.support.backbones import CODES, load

BATCH, OWN = 3, 20


@pytest.fixture(scope="module")
def reader(llama_folder: Path) -> Reader:
    return Reader(load(llama_folder), CODES, BATCH)


def fresh(reader: Reader, prompt: int) -> list[LayerCache]:
    ids = np.random.default_rng(0).integers(0, CODES, prompt, dtype=np.uint16)
    buffer = reader.take_buffer(OWN)
    return reader.read_prompt(ids, buffer.fill_(1e3))  # stale memory must not matter


def tokens(width: int, seed: int = 1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, CODES, (BATCH, width)))


def causal(width: int) -> Tensor:
    return torch.ones(width, width, dtype=torch.bool).tril()


@pytest.mark.parametrize("prompt", [0, 9])
@torch.inference_mode()
def test_a_causal_window_is_its_tokens_one_by_one(reader: Reader, prompt: int) -> None:
    ids = tokens(12)
    caches = fresh(reader, prompt)
    single = [reader.read_token(caches, ids[:, place], prompt + place, place) for place in range(12)]
    expected = torch.stack(single, 1)
    windowed = fresh(reader, prompt)
    read = []
    for start, width in ((0, 5), (5, 1), (6, 6)):
        own = torch.full((BATCH,), start)
        read.append(reader.read_window(windowed, ids[:, start : start + width], own, causal(width)))
    torch.testing.assert_close(torch.cat(read, 1), expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(caches, windowed, strict=True):
        torch.testing.assert_close(one.keys[:, :, :12], other.keys[:, :, :12], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.values[:, :, :12], other.values[:, :, :12], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_rows_stand_at_places_of_their_own_and_forget_by_a_number(reader: Reader) -> None:
    ids, own = tokens(10), torch.tensor([2, 6, 4])
    caches = fresh(reader, 7)
    reader.read_window(caches, ids, torch.zeros(BATCH, dtype=torch.int64), causal(10))
    new = tokens(4, seed=2)
    read = reader.read_window(caches, new, own, causal(4))
    for row in range(BATCH):
        kept = int(own[row])
        whole = torch.cat((ids[:, :kept], new), 1)
        alone = reader.read_window(fresh(reader, 7), whole, torch.zeros(BATCH, dtype=torch.int64), causal(kept + 4))
        torch.testing.assert_close(read[row], alone[row, kept:], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_a_row_does_not_depend_on_its_neighbours_to_the_bit(reader: Reader) -> None:
    ids = tokens(6)
    read = []
    for others in (0, 11):
        caches = fresh(reader, 7)
        changed = ids.clone()
        changed[1:] = (changed[1:] + others) % CODES
        read.append(reader.read_window(caches, changed, torch.tensor([0, others, others // 2]), causal(6))[0])
    assert torch.equal(read[0], read[1])


def test_a_window_sees_what_it_is_told_to_see() -> None:
    visible = torch.tensor([[True, False, True], [True, True, False], [False, False, True]])
    window = Window.at(torch.tensor([0, 2]), visible, 6)
    assert window.slots.tolist() == [[0, 1, 2], [2, 3, 4]]
    for row, own in enumerate((0, 2)):
        seen = ~window.hidden_slots[row]
        assert seen[:, :own].all()
        assert torch.equal(seen[:, own : own + 3], visible)
        assert not seen[:, own + 3 :].any()
