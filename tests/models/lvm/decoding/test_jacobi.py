"""Jacobi decoding is the sequential decoder, token for token, in fewer passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from covray.config import BackboneConfig, EvaluateConfig, LoraConfig, SamplingConfig
from covray.errors import ConfigError
from covray.models.lvm.backbone import backbone_facts, load_backbone
from covray.models.lvm.decoding import decoder as decoder_module
from covray.models.lvm.decoding.decoder import LvmDecoder
from covray.models.lvm.decoding.jacobi import Relaxation
from covray.models.lvm.model import Lvm
from tests.support.backbones import CODES, load, write_llama
from tests.support.decoding import GREEDY, IMAGES, PROMPT, QUERIES, SAMPLED, STEPS, TOKENS, ids


@pytest.fixture(scope="module")
def model(llama_folder: Path) -> Lvm:
    return load(llama_folder, LoraConfig(rank=3, alpha=5))


@pytest.fixture(scope="module")
def decoder(model: Lvm) -> LvmDecoder:
    return LvmDecoder(model, CODES, TOKENS, batch=4)


def jacobi(window: int | str, options: dict[str, Any]) -> SamplingConfig:
    return SamplingConfig.model_validate({"decoder": "jacobi", "window": window, **options})


@pytest.mark.parametrize("options", [GREEDY, *SAMPLED])
@pytest.mark.parametrize("window", [2, 4, 16, 40])
def test_tokens_are_those_of_the_sequential_decoder(decoder: LvmDecoder, window: int, options: dict[str, Any]) -> None:
    expected = decoder.decode(PROMPT, QUERIES, IMAGES, SamplingConfig.model_validate(options), range(5))
    before = decoder.passes
    written = decoder.decode(PROMPT, QUERIES, IMAGES, jacobi(window, options), range(5))
    assert np.array_equal(written.ids, expected.ids)
    np.testing.assert_allclose(written.image_log_likelihood, expected.image_log_likelihood, rtol=1e-4)
    assert decoder.passes - before <= 2 * (STEPS - 1), "two batches, at least one token a pass"


def test_no_prompt_one_row_and_pictures_of_one_token(model: Lvm) -> None:
    for tokens, batch in ((1, 1), (5, 2)):
        decoder = LvmDecoder(model, CODES, tokens, batch)
        for options in (GREEDY, SAMPLED[0]):
            queries = ids(3, 7, seed=2)
            nothing = np.empty(0, np.uint16)
            expected = decoder.decode(nothing, queries, 4, SamplingConfig.model_validate(options))
            assert np.array_equal(decoder.decode(nothing, queries, 4, jacobi(8, options)).ids, expected.ids)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED[0]])
def test_the_nano_lvm_writes_the_same_in_fewer_passes(options: dict[str, Any]) -> None:
    config = BackboneConfig()
    facts = backbone_facts(config)
    nano = load_backbone(facts, config, None, dtype=torch.float32, device=torch.device("cpu"), seed=0)
    size = facts.tokens_per_image or 64
    generator = np.random.default_rng(0)
    flat = generator.integers(0, facts.codes, (4, 1), dtype=np.uint16).repeat(size, 1)  # pictures of one colour
    decoder = LvmDecoder(nano, facts.codes, size, batch=2)
    sampling = SamplingConfig.model_validate(options)
    expected = decoder.decode(flat[:2].ravel(), flat[2:], 1, sampling, range(2))
    sequential = decoder.passes
    written = decoder.decode(flat[:2].ravel(), flat[2:], 1, jacobi(8, options), range(2))
    assert np.array_equal(written.ids, expected.ids)
    assert decoder.passes - sequential < 0.9 * sequential


def test_right_drafts_are_taken_a_window_at_a_time(tmp_path: Path) -> None:
    """A model that repeats its last token makes every draft right: ceil((steps - 1) / window) passes."""
    repeating = load(write_llama(tmp_path / "llama"))
    repeating.head.weight.data.copy_(repeating.embed.weight.data)
    for layer in repeating.layers:
        layer.out.weight.data.zero_()
        layer.down.weight.data.zero_()
    decoder = LvmDecoder(repeating, CODES, TOKENS, batch=2)
    repeated = decoder.decode(PROMPT, QUERIES[:2], IMAGES).ids
    assert (repeated == repeated[:, :1, :1]).all()
    before = decoder.passes
    assert np.array_equal(decoder.decode(PROMPT, QUERIES[:2], IMAGES, jacobi(8, {})).ids, repeated)
    assert decoder.passes - before == -(-(STEPS - 1) // 8)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED[0]])
def test_a_query_is_answered_alike_alone_and_among_others(decoder: LvmDecoder, options: dict[str, Any]) -> None:
    seeds, sampling = [7, 8, 9, 10, 11], jacobi(4, options)
    together = decoder.decode(PROMPT, QUERIES, IMAGES, sampling, seeds)
    for order in ([3], [4, 1], [2, 0, 4, 3, 1]):
        apart = decoder.decode(PROMPT, QUERIES[order], IMAGES, sampling, [seeds[row] for row in order])
        assert np.array_equal(apart.ids, together.ids[order])
        assert np.array_equal(apart.image_log_likelihood, together.image_log_likelihood[order]), "to the bit"


def test_candidates_are_those_of_the_sequential_decoder(decoder: LvmDecoder) -> None:
    options = {"temperature": 1.0, "best_of": 3}
    expected = decoder.decode(PROMPT, QUERIES, IMAGES, SamplingConfig.model_validate(options), range(5))
    written = decoder.decode(PROMPT, QUERIES, IMAGES, jacobi(6, options), range(5))
    assert np.array_equal(written.candidate_ids, expected.candidate_ids)


def test_a_sentence_may_fill_the_context(decoder: LvmDecoder) -> None:
    images = (256 - len(PROMPT) - TOKENS) // TOKENS
    expected = decoder.decode(PROMPT, QUERIES[:1], images).ids
    assert np.array_equal(decoder.decode(PROMPT, QUERIES[:1], images, jacobi(16, {})).ids, expected)


def test_each_row_yields_its_pictures_in_order(decoder: LvmDecoder) -> None:
    order: dict[int, list[int]] = {}
    for each in decoder.stream(PROMPT, QUERIES, IMAGES, jacobi(8, {})):
        order.setdefault(each.query, []).append(each.image)
    assert order == {query: [0, 1, 2] for query in range(5)}


@pytest.mark.parametrize("seconds", [{1: 1.0, 4: 5.0, 8: 5.0, 16: 5.0}, {1: 1.0, 4: 1.1, 8: 1.2, 16: 1.3}])
def test_auto_takes_the_fastest_window_and_never_less_than_one_token_a_pass(
    model: Lvm, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float]
) -> None:
    timed = []

    def time_pass(reader: Any, pending: Any, width: int) -> float:
        timed.append(width)
        return seconds[width]

    monkeypatch.setattr("covray.models.lvm.decoding.jacobi._timed_pass", time_pass)
    chosen = []
    write = decoder_module.write_jacobi

    def spy(reader: Any, pending: Any, window: int, relaxation: Any) -> Any:
        chosen.append(window)
        return write(reader, pending, window, relaxation)

    monkeypatch.setattr(decoder_module, "write_jacobi", spy)
    decoder = LvmDecoder(model, CODES, TOKENS, batch=4)
    expected = decoder.decode(PROMPT, QUERIES, IMAGES).ids
    for _ in range(2):
        assert np.array_equal(decoder.decode(PROMPT, QUERIES, IMAGES, jacobi("auto", {})).ids, expected)
    assert len(timed) == len(set(timed)) * 3, "once, three passes of each width"
    assert set(chosen) == ({16} if seconds[16] < 3 else set())


def test_auto_times_real_passes_and_changes_no_token(decoder: LvmDecoder) -> None:
    for options in (GREEDY, SAMPLED[0]):
        expected = decoder.decode(PROMPT, QUERIES, IMAGES, SamplingConfig.model_validate(options), range(5))
        written = decoder.decode(PROMPT, QUERIES, IMAGES, jacobi("auto", options), range(5))
        assert np.array_equal(written.ids, expected.ids)


def test_an_identity_without_a_decoder_is_that_of_earlier_versions() -> None:
    base = {"data": "d", "out": "o"}
    assert not {"decoder", "window"} & set(EvaluateConfig.model_validate(base).identity()["sampling"])
    faster = EvaluateConfig.model_validate(base | {"sampling": {"decoder": "jacobi", "window": 8}})
    assert faster.identity()["sampling"]["decoder"] == "jacobi"
    assert faster.identity()["sampling"]["window"] == 8


CODEBOOK = np.random.default_rng(5).normal(size=(CODES, 4)).astype(np.float32)


@pytest.mark.parametrize("window", [2, 16])
def test_expected_tokens_are_those_of_the_sequential_decoder(model: Lvm, window: int) -> None:
    options = {"expected": 1.0}
    whole = LvmDecoder(model, CODES, TOKENS, 4, CODEBOOK)
    expected = whole.decode(PROMPT, QUERIES, IMAGES, SamplingConfig.model_validate(options))
    assert np.array_equal(whole.decode(PROMPT, QUERIES, IMAGES, jacobi(window, options)).ids, expected.ids)
    assert not np.array_equal(whole.decode(PROMPT, QUERIES, IMAGES).ids, expected.ids)
    with pytest.raises(ConfigError, match="needs the tokenizer's codebook"):
        LvmDecoder(model, CODES, TOKENS, 4).decode(PROMPT, QUERIES, IMAGES, SamplingConfig.model_validate(options))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_relaxed_drafts_cost_fewer_passes_and_take_over_from_near_codes_only(model: Lvm, temperature: float) -> None:
    options = {"temperature": temperature}
    whole = LvmDecoder(model, CODES, TOKENS, 4, CODEBOOK)
    exact = whole.decode(PROMPT, QUERIES, IMAGES, jacobi(4, options))
    of_exact = whole.passes
    nothing = whole.decode(PROMPT, QUERIES, IMAGES, jacobi(4, options | {"relax": 1e-12}))
    assert np.array_equal(nothing.ids, exact.ids), "no code is as unlikely as that"
    before = whole.passes
    relaxed = whole.decode(PROMPT, QUERIES, IMAGES, jacobi(4, options | {"relax": 0.2}))
    assert whole.passes - before < of_exact
    assert not np.array_equal(relaxed.ids, exact.ids)
    again = LvmDecoder(model, CODES, TOKENS, 4, CODEBOOK)
    alone = again.decode(PROMPT, QUERIES[:1], IMAGES, jacobi(4, options | {"relax": 0.2}))
    assert np.array_equal(alone.ids[0], relaxed.ids[0]), "as among others"


def test_a_draft_takes_over_up_to_its_mass() -> None:
    neighbours = torch.tensor([[1, 2, 3], [0, 2, 3], [3, 1, 0], [2, 1, 0]])
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()[None, None].expand(1, 3, 4)
    drafts, chosen = torch.tensor([[0, 0, 0]]), torch.tensor([[1, 2, 3]])
    for mass, accepted in ((0.29, [False] * 3), (0.31, [True, False, False]), (0.51, [True, True, False])):
        assert Relaxation(neighbours, mass).accepts(logits, drafts, chosen)[0].tolist() == accepted


def test_relaxation_is_refused_where_its_tokens_would_depend_on_a_clock() -> None:
    for options in ({}, {"decoder": "jacobi"}, {"window": 8}):
        with pytest.raises(ValidationError, match="relax: is of decoder: jacobi with a window that is set"):
            SamplingConfig.model_validate(options | {"relax": 0.1})
