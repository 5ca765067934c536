"""Blocks decoded with caches are those of a model that reads all again; rows do not see each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from covray.config.vlm import VlmDecodingConfig
from covray.errors import ConfigError
from covray.models.masking import choose_unmasked, pass_counts
from covray.models.vlm.batch import Blocks, clean_mask
from covray.models.vlm.checkpoint import LoadedVlm
from covray.models.vlm.decoding import decode, stream
from covray.models.vlm.prompts import Prompt
from covray.models.vlm.rows import Rows
from tests.support.vlms import picture

LAYOUTS = [
    Blocks(4), Blocks(4, "block", "sequence"), Blocks(8, "block"), Blocks(8, "causal", "sequence"),
    Blocks(4, shift=True), Blocks(4, "block", "sequence", shift=True),
]  # fmt: skip
TEXTS = [("what colour is the ball", 1), ("where is it", 2), ("of a box on the right of the ball", 0), ("is", 1)]


def prompts_of(vlm: LoadedVlm) -> list[Prompt]:
    prompts = []
    for number, (text, pictures) in enumerate(TEXTS):
        prompts.append(vlm.prompter.prompt([picture(number + 10 * own, 60) for own in range(pictures)], text))
    return prompts


def uncached(vlm: LoadedVlm, prompt: Prompt, decoding: VlmDecodingConfig, blocks: Blocks) -> list[int]:
    """The greedy answer by blocks, where every pass reads the whole sequence anew."""
    model, size = vlm.model, blocks.size
    length = torch.tensor([len(prompt.ids)])
    prompt_ids = torch.from_numpy(prompt.ids)[None]
    known = model.embed(prompt_ids, prompt.images)[0]
    positions = model.positions(prompt_ids, length, prompt.images)[..., 0, :]
    behind = positions.max() + 1 + torch.arange(size + decoding.max_tokens)
    positions = torch.cat((positions, behind.expand(*positions.shape[:-1], -1)), -1)
    embedding = model.model.get_input_embeddings()
    ids: list[int] = prompt.ids.tolist()
    start = blocks.first(len(ids))
    while True:
        block = torch.tensor([*ids[start:], *[model.mask_id] * (start + size - len(ids))])
        masked = block == model.mask_id
        for count in pass_counts(size, decoding.passes or size, decoding.unmask):
            if not masked.any():
                break
            row = embedding(torch.tensor(ids[:start] + block.tolist()))
            row[: len(known)] = known
            mask = clean_mask(torch.arange(len(row)) - start, size, blocks.context)
            mask[start:, start:] = True
            hidden = model.read(row[None], positions[..., None, : len(row)], mask[None, None])
            logits = model.logits(hidden[:, start - 1 : -1] if blocks.shift else hidden[:, start:])
            chosen = logits.argmax(-1)
            written = choose_unmasked(logits.softmax(-1), chosen, masked[None], count, decoding.unmask, 0.85)[0]
            block = torch.where(written, chosen[0], block)
            masked &= ~written
        ids = ids[:start] + block.tolist()
        answer = ids[len(prompt.ids) :][: decoding.max_tokens]
        for place, token in enumerate(answer):
            if token in vlm.stop_ids:
                return answer[:place]
        if len(answer) == decoding.max_tokens:
            return answer
        start += size


def ids_of(answers: list[Any]) -> list[list[int]]:
    return [answer.ids for answer in answers]


@torch.no_grad()
@pytest.mark.parametrize(("passes", "unmask"), [(None, "even"), (2, "even"), (1, "confidence")])
@pytest.mark.parametrize("blocks", LAYOUTS, ids=str)
def test_cached_answers_are_the_uncached_ones(vlm: LoadedVlm, blocks: Blocks, passes: int | None, unmask: Any) -> None:
    decoding = VlmDecodingConfig(max_tokens=18, passes=passes, unmask=unmask)
    prompts = prompts_of(vlm)
    expected = [uncached(vlm, prompt, decoding, blocks) for prompt in prompts]
    assert ids_of([decode(vlm, [prompt], decoding, blocks)[0] for prompt in prompts]) == expected
    assert ids_of(decode(vlm, prompts, decoding, blocks)) == expected, "a batch of unequal prompts equals singles"
    assert ids_of(decode(vlm, prompts, decoding.model_copy(update={"cache": False}), blocks)) == expected
    assert any(len(answer) > 8 for answer in expected)
    assert not any(vlm.model.mask_id in answer for answer in expected)


@torch.no_grad()
def test_rows_finish_singly(vlm: LoadedVlm) -> None:
    prompts, blocks = prompts_of(vlm), Blocks(4)
    decoding = VlmDecodingConfig(max_tokens=40)
    longest = decode(vlm, prompts, decoding, blocks)
    # A token that one row writes early and another late or never ends them at different blocks.
    stop = longest[0].ids[5]
    stopping = LoadedVlm(vlm.model, vlm.prompter, frozenset({stop}))
    answers = decode(stopping, prompts, decoding, blocks)
    assert answers[0].ids == longest[0].ids[: longest[0].ids.index(stop)]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert decode(stopping, [prompt], decoding, blocks) == [answer]
    pieces = list(stream(stopping, prompts, decoding, blocks))
    assert sum(piece.is_last for piece in pieces) == len(prompts)
    for number, answer in enumerate(answers):
        own = [piece for piece in pieces if piece.row == number]
        assert [token for piece in own for token in piece.ids] == answer.ids
        assert own[-1].is_last


@torch.no_grad()
def test_passes_that_denoise_leave_the_cache_as_it_was(vlm: LoadedVlm) -> None:
    prompts, blocks = prompts_of(vlm), Blocks(4)
    rows = Rows(vlm.model, prompts, blocks, 8)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in rows.cache.layers]
    ids = torch.full((len(prompts), 4), vlm.model.mask_id)
    every = torch.ones(4, 4, dtype=torch.bool)
    for _ in range(3):
        rows.read(vlm.model.model.get_input_embeddings()(ids), every, keep=False)
    for layer, (keys, values) in zip(rows.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys), "to the bit"
        assert torch.equal(layer.values, values)


@torch.no_grad()
def test_kept_blocks_are_a_fresh_reading(vlm: LoadedVlm) -> None:
    """Keys and values of committed blocks equal those of one pass over prompt and answer."""
    blocks = Blocks(4)
    prompt = prompts_of(vlm)[0]
    own = clean_mask(torch.arange(4), 4, blocks.context)
    rows = Rows(vlm.model, [prompt], blocks, 8)
    tokens = torch.tensor([[7, 8, 9, 10, 11, 12, 13, 14]])
    embedding = vlm.model.model.get_input_embeddings()
    rows.read(embedding(tokens[:, :4]), own, keep=True)
    rows.read(embedding(tokens[:, 4:]), own, keep=True)
    longer = Prompt(torch.cat((torch.from_numpy(prompt.ids), tokens[0])).numpy(), prompt.images)
    fresh = Rows(vlm.model, [longer], blocks, 8)
    for layer, expected in zip(rows.cache.layers, fresh.cache.layers, strict=True):
        torch.testing.assert_close(layer.keys, expected.keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.values, expected.values, rtol=1e-5, atol=1e-5)


def generated(vlm: LoadedVlm, prompt: Prompt, tokens: int) -> list[int]:
    """The greedy answer of transformers' generate."""
    ids = torch.from_numpy(prompt.ids)[None]
    kinds = {"mm_token_type_ids": (ids == vlm.model.image_id).int()} if "image_grid_thw" in prompt.images else {}
    if hasattr(vlm.model.model.model, "rope_deltas"):
        vlm.model.model.model.rope_deltas = None
    output: Tensor = vlm.model.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **prompt.images, **kinds, max_new_tokens=tokens,
        do_sample=False, suppress_tokens=[vlm.model.mask_id],
    )  # fmt: skip
    answer = output[0, ids.shape[1] :].tolist()
    return answer[: answer.index(vlm.prompter.end_id)] if vlm.prompter.end_id in answer else answer


@torch.no_grad()
def test_autoregressive_answers_are_those_of_transformers(vlm: LoadedVlm) -> None:
    prompts = prompts_of(vlm)
    decoding = VlmDecodingConfig(decoder="autoregressive", max_tokens=15)
    expected = [generated(vlm, prompt, 15) for prompt in prompts]
    assert ids_of([decode(vlm, [prompt], decoding, None)[0] for prompt in prompts]) == expected
    assert ids_of(decode(vlm, prompts, decoding, Blocks(4))) == expected
    assert ids_of(decode(vlm, prompts, decoding.model_copy(update={"cache": False}), None)) == expected


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("blocks", [Blocks(2), Blocks(8), Blocks(4, shift=True)], ids=str)
def test_verified_drafts_are_the_autoregressive_answer(vlm: LoadedVlm, blocks: Blocks, temperature: float) -> None:
    prompts = prompts_of(vlm)
    sampling = {"max_tokens": 20, "temperature": temperature, "seed": 3}
    slow = decode(vlm, prompts, VlmDecodingConfig(decoder="autoregressive", **sampling), blocks)
    fast = decode(vlm, prompts, VlmDecodingConfig(decoder="speculative", **sampling), blocks)
    assert ids_of(fast) == ids_of(slow)


@torch.no_grad()
def test_samples_are_a_rows_own(vlm: LoadedVlm) -> None:
    prompts, blocks = prompts_of(vlm), Blocks(4)
    decoding = VlmDecodingConfig(max_tokens=12, temperature=1.0, top_k=9, passes=2)
    answers = decode(vlm, prompts, decoding, blocks)
    assert answers == [decode(vlm, [prompt], decoding, blocks)[0] for prompt in prompts]
    assert answers != decode(vlm, prompts, VlmDecodingConfig(max_tokens=12, passes=2), blocks)


@torch.no_grad()
def test_fewer_passes_are_fewer(vlm: LoadedVlm) -> None:
    prompt = prompts_of(vlm)[2:3]
    never = LoadedVlm(vlm.model, vlm.prompter, frozenset())
    for passes in (8, 4, 2, 1):
        (answer,) = decode(never, prompt, VlmDecodingConfig(max_tokens=32, passes=passes), Blocks(8))
        assert answer.passes == 4 * passes + 3, "the last block is not read again"
        assert len(answer.ids) == 32


@torch.no_grad()
def test_an_answer_with_its_end_takes_no_more_passes(vlm: LoadedVlm) -> None:
    decoding, blocks = VlmDecodingConfig(max_tokens=16, passes=8), Blocks(8)
    taken = []
    for prompt in prompts_of(vlm):
        (longest,) = decode(vlm, [prompt], decoding, blocks)
        # Ended by its first token, an answer waits for this token only, whenever it is written.
        ended = LoadedVlm(vlm.model, vlm.prompter, frozenset(longest.ids[:1]))
        (answer,) = decode(ended, [prompt], decoding, blocks)
        assert answer.ids == uncached(ended, prompt, decoding, blocks) == []
        taken.append(answer.passes)
    assert min(taken) < 8
    assert max(taken) <= 8


@pytest.mark.parametrize(
    ("options", "blocks", "message"),
    [
        ({"decoder": "block_diffusion"}, None, "needs a model trained with objective=block_diffusion"),
        ({"passes": 9}, Blocks(8), "9 passes of a block of 8 tokens"),
        ({"decoder": "speculative"}, Blocks(8, "block"), "does not keep"),
        ({"decoder": "speculative", "cache": False}, Blocks(8), "verifies with the cache"),
    ],
)
def test_what_does_not_fit_is_refused(vlm: LoadedVlm, options: Any, blocks: Blocks | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decode(vlm, prompts_of(vlm)[:1], VlmDecodingConfig(**options), blocks)


def test_padding_is_never_a_picture(vlm: LoadedVlm) -> None:
    """Some vocabularies begin with the placeholder of pictures, where others have padding."""
    prompts = []
    for prompt in prompts_of(vlm):
        prompts.append(Prompt(np.where(prompt.ids == vlm.model.image_id, 0, prompt.ids), prompt.images))
    vlm.model.image_id = 0
    decoding = VlmDecodingConfig(max_tokens=6)
    together = decode(vlm, prompts, decoding, None)
    assert together == [decode(vlm, [prompt], decoding, None)[0] for prompt in prompts]
