"""Decoding: the tokens of transformers' ``generate``, the distribution of the model, and no influence of the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats
from torch import Tensor
from transformers import LlamaForCausalLM

from covray.config import LoraConfig, SamplingConfig
from covray.errors import ConfigError
from covray.models.lvm.adapter import save_adapter
from covray.models.lvm.decoding.decoder import LvmDecoder
from covray.models.lvm.model import Lvm
from tests.support.backbones import CODES, load, write_llama
from tests.support.decoding import IMAGES, PROMPT, QUERIES, STEPS, TOKENS, ids

LORA = LoraConfig(rank=3, alpha=5)


@pytest.fixture(scope="module")
def model(llama_folder: Path) -> Lvm:
    return load(llama_folder, LORA)


@pytest.fixture(scope="module")
def decoder(model: Lvm) -> LvmDecoder:
    return LvmDecoder(model, CODES, TOKENS, batch=4)


def sentences(prompt: np.ndarray, queries: np.ndarray, *written: np.ndarray) -> Tensor:
    """Prompt, query and what was written, int64 [B, T]."""
    parts = [np.repeat(prompt[None], len(queries), 0), queries, *(part.reshape(len(queries), -1) for part in written)]
    return torch.from_numpy(np.concatenate(parts, 1).astype(np.int64))


def log_p(model: Lvm, prompt: np.ndarray, queries: np.ndarray, written: np.ndarray) -> Tensor:
    """log p of every written token by one forward pass over whole sentences, over the codes alone: [B, steps]."""
    whole = sentences(prompt, queries, written)
    steps = written[0].size
    with torch.inference_mode():
        logits = model.logits(whole.flatten(), (whole.shape[1],) * len(whole)).view(*whole.shape, -1)
    over_codes = logits[:, -steps - 1 : -1, :CODES].log_softmax(-1)
    return over_codes.gather(-1, whole[:, -steps:, None])[..., 0]


# --- greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("biases", [False, True])
def test_greedy_is_transformers_generate(tmp_path: Path, lora: LoraConfig | None, biases: bool) -> None:
    folder = write_llama(tmp_path / "llama", attention_bias=biases, mlp_bias=biases)
    model = load(folder, lora)
    reference: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if lora is not None:
        from peft import PeftModel

        save_adapter(model, str(tmp_path / "adapter"), str(folder))
        reference = PeftModel.from_pretrained(reference, str(tmp_path / "adapter"))
    whole = sentences(PROMPT, QUERIES)
    expected = reference.generate(
        input_ids=whole, attention_mask=torch.ones_like(whole), do_sample=False, eos_token_id=None, pad_token_id=CODES,
        max_new_tokens=STEPS, suppress_tokens=list(range(CODES, CODES + 100)),
    )[:, whole.shape[1] :]  # fmt: skip
    written = LvmDecoder(model, CODES, TOKENS, batch=4).decode(PROMPT, QUERIES, IMAGES)
    assert written.ids.dtype == np.uint16
    assert written.ids.shape == (5, IMAGES, TOKENS)
    assert np.array_equal(written.ids.reshape(5, -1), expected.numpy())
    assert len(np.unique(written.ids)) > 10  # the comparison is of something


def test_an_adapter_changes_what_is_written(llama_folder: Path, decoder: LvmDecoder) -> None:
    plain = LvmDecoder(load(llama_folder), CODES, TOKENS, batch=4).decode(PROMPT, QUERIES, IMAGES)
    assert not np.array_equal(plain.ids, decoder.decode(PROMPT, QUERIES, IMAGES).ids)


def test_decoding_leaves_the_model_as_it_was(model: Lvm) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    LvmDecoder(model, CODES, TOKENS, batch=2).decode(PROMPT, QUERIES, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(decoder="jacobi", window=2)])
def test_a_check_is_made_before_each_pass_of_its_block(decoder: LvmDecoder, sampling: SamplingConfig) -> None:
    expected = decoder.decode(PROMPT, QUERIES, IMAGES, sampling)
    begun, calls = decoder.passes, 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError), decoder.checked(check):
        decoder.decode(PROMPT, QUERIES, IMAGES, sampling)
    assert decoder.passes == begun + 3
    assert np.array_equal(decoder.decode(PROMPT, QUERIES, IMAGES, sampling).ids, expected.ids)
    assert calls == 4


def test_bfloat16_keeps_the_adapter_beside_the_weights(llama_folder: Path) -> None:
    """Every token is the likeliest of a forward pass with the adapter apart, or within bfloat16's rounding of it."""
    model = load(llama_folder, LORA, dtype=torch.bfloat16)
    written = LvmDecoder(model, CODES, TOKENS, batch=4).decode(PROMPT, QUERIES, IMAGES)
    whole = sentences(PROMPT, QUERIES, written.ids)
    with torch.inference_mode():
        logits = model.logits(whole.flatten(), (whole.shape[1],) * 5).view(*whole.shape, -1).float()
    logits = logits[:, -STEPS - 1 : -1, :CODES]
    lost = logits.amax(-1) - logits.gather(-1, whole[:, -STEPS:, None])[..., 0]
    assert lost.max() < 0.1 * logits.std()


# --- the prompt and the batch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(temperature=1.0, top_k=30, top_p=0.9)])
def test_a_query_is_answered_alike_alone_and_among_others(decoder: LvmDecoder, sampling: SamplingConfig) -> None:
    seeds = [7, 8, 9, 10, 11]
    together = decoder.decode(PROMPT, QUERIES, IMAGES, sampling, seeds)
    for order in ([3], [4, 1], [2, 0, 4, 3, 1]):
        found = decoder.decode(PROMPT, QUERIES[order], IMAGES, sampling, [seeds[row] for row in order])
        assert np.array_equal(found.ids, together.ids[order])
        assert np.array_equal(found.image_log_likelihood, together.image_log_likelihood[order])


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(temperature=1.0)])
def test_a_shared_prompt_is_the_prompt_in_every_row(decoder: LvmDecoder, sampling: SamplingConfig) -> None:
    shared = decoder.decode(PROMPT, QUERIES, IMAGES, sampling, range(5))
    repeated = sentences(PROMPT, QUERIES).numpy()
    apart = decoder.decode(np.empty(0, np.uint16), repeated, IMAGES, sampling, range(5))
    assert np.array_equal(shared.ids, apart.ids)
    np.testing.assert_allclose(shared.log_likelihood, apart.log_likelihood, rtol=1e-4)


def test_what_was_written_before_leaves_no_trace(decoder: LvmDecoder) -> None:
    first = decoder.decode(PROMPT, QUERIES, IMAGES)
    decoder.decode(ids(40, seed=5), ids(3, TOKENS, seed=6), IMAGES)  # the same shapes: the same memory
    decoder.decode(ids(9, seed=5), ids(3, 2, seed=6), 1)
    again = decoder.decode(PROMPT, QUERIES, IMAGES)
    assert np.array_equal(first.ids, again.ids)
    assert np.array_equal(first.image_log_likelihood, again.image_log_likelihood)


def test_no_queries_and_no_images_are_nothing(decoder: LvmDecoder) -> None:
    assert decoder.decode(PROMPT, QUERIES[:0], IMAGES).ids.shape == (0, IMAGES, TOKENS)
    assert decoder.decode(PROMPT, QUERIES, 0).log_likelihood.tolist() == [0.0] * 5


def test_a_sentence_beyond_the_context_is_refused_with_the_arithmetic(decoder: LvmDecoder) -> None:
    room = 256 - len(PROMPT) - TOKENS
    decoder.decode(PROMPT, QUERIES[:1], room // TOKENS)
    with pytest.raises(ConfigError, match=r"33 pictures x 8 tokens = 264 tokens exceed the context of 256 \(32"):
        decoder.decode(PROMPT, QUERIES[:1], room // TOKENS + 1)


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_tokens_follow_the_models_distribution(decoder: LvmDecoder, model: Lvm, temperature: float) -> None:
    draws = 4000
    with torch.inference_mode():
        whole = sentences(PROMPT, QUERIES[:1])
        logits = model.logits(whole[0], (whole.shape[1],))[-1, :CODES]
    expected = (logits.double() / temperature).softmax(-1).numpy() * draws
    wide = LvmDecoder(model, CODES, 1, batch=100)
    sampling = SamplingConfig(temperature=temperature)
    found = wide.decode(PROMPT, np.repeat(QUERIES[:1], draws, 0), 1, sampling, range(draws)).ids
    counts = np.bincount(found.ravel(), minlength=CODES)
    often = expected >= 5  # the chi-square approximation's condition; the others are one bin
    observed = [*counts[often], counts[~often].sum()]
    due = [*expected[often], expected[~often].sum()]
    assert len(due) > 5
    assert stats.chisquare(observed, due).pvalue > 1e-3


def test_later_tokens_follow_it_too(decoder: LvmDecoder, model: Lvm) -> None:
    """Given its past, the share of the distribution below a sampled token is uniform: one test for all positions."""
    rows = 60
    queries = ids(rows, TOKENS, seed=3)
    written = decoder.decode(PROMPT, queries, IMAGES, SamplingConfig(temperature=1.0), range(rows)).ids
    whole = sentences(PROMPT, queries, written)
    with torch.inference_mode():
        logits = model.logits(whole.flatten(), (whole.shape[1],) * rows).view(*whole.shape, -1)
    p = logits[:, -STEPS - 1 : -1, :CODES].double().softmax(-1)
    chosen = whole[:, -STEPS:, None]
    at = p.gather(-1, chosen)[..., 0]
    below = p.cumsum(-1).gather(-1, chosen)[..., 0] - at
    uniform = below + at * torch.rand(at.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert stats.kstest(uniform.flatten().numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (None, 0.5), (5, 0.6), (CODES + 1, 1e-9)])
def test_only_the_allowed_tokens_are_written(decoder: LvmDecoder, model: Lvm, top_k: int | None, top_p: float) -> None:
    temperature, rows = 2.0, 40
    queries = ids(rows, TOKENS, seed=4)
    sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    written = decoder.decode(PROMPT, queries, 1, sampling, range(rows)).ids
    whole = sentences(PROMPT, queries, written)
    with torch.inference_mode():
        logits = model.logits(whole.flatten(), (whole.shape[1],) * rows).view(*whole.shape, -1)
    scaled = logits[:, -TOKENS - 1 : -1, :CODES].double() / temperature
    order = scaled.argsort(-1, descending=True)
    rank = (order == whole[:, -TOKENS:, None]).int().argmax(-1)
    p = scaled.gather(-1, order)[..., : top_k or CODES].softmax(-1)
    allowed = (p.cumsum(-1) - p < top_p).sum(-1)
    assert (rank < allowed).all()
    if top_p > 0.1:  # and each of them is: not only the likeliest
        assert (rank == allowed - 1).any()
        assert (rank == 0).any()


def test_special_ids_are_never_written(tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    model = load(folder)
    model.head.weight.data[CODES:] *= 50  # the likeliest of all, where they count
    for sampling in (SamplingConfig(), SamplingConfig(temperature=5.0)):
        written = LvmDecoder(model, CODES, TOKENS, batch=4).decode(PROMPT, QUERIES, IMAGES, sampling)
        assert written.ids.max() < CODES


def test_a_seed_decides_all_and_another_seed_decides_otherwise(decoder: LvmDecoder) -> None:
    sampling = SamplingConfig(temperature=1.0)
    same = [decoder.decode(PROMPT, QUERIES[[0, 0]], IMAGES, sampling, seeds).ids for seeds in ([1, 1], [1, 2])]
    assert np.array_equal(same[0][0], same[0][1])
    assert np.array_equal(same[0][0], same[1][0])
    assert not np.array_equal(same[1][0], same[1][1])


# --- likelihood ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(temperature=0.7, top_k=9)])
def test_likelihood_is_that_of_a_forward_pass(decoder: LvmDecoder, model: Lvm, sampling: SamplingConfig) -> None:
    written = decoder.decode(PROMPT, QUERIES, IMAGES, sampling, range(5))
    expected = log_p(model, PROMPT, QUERIES, written.ids).double().view(5, IMAGES, TOKENS).sum(-1).numpy()
    np.testing.assert_allclose(written.image_log_likelihood, expected, rtol=1e-4)
    np.testing.assert_allclose(written.log_likelihood, expected.sum(1), rtol=1e-4)


@pytest.mark.parametrize("choose_by", ["answer", "chain"])
def test_the_likeliest_of_the_candidates_is_given(decoder: LvmDecoder, model: Lvm, choose_by: str) -> None:
    options = {"temperature": 1.0, "top_k": 20, "choose_by": choose_by}
    best = decoder.decode(PROMPT, QUERIES, IMAGES, SamplingConfig.model_validate(options | {"best_of": 6}), range(5))
    fewer = decoder.decode(PROMPT, QUERIES, IMAGES, SamplingConfig.model_validate(options | {"best_of": 2}), range(5))
    single = decoder.decode(PROMPT, QUERIES, IMAGES, SamplingConfig.model_validate(options), range(5))

    def score(written: Any) -> np.ndarray:
        likelihood = log_p(model, PROMPT, QUERIES, written.ids).double().view(5, IMAGES, TOKENS).sum(-1)
        return (likelihood[:, -1] if choose_by == "answer" else likelihood.sum(1)).numpy()

    assert (score(best) >= score(fewer) - 1e-4).all()  # the first candidates are the same, whatever their number
    assert (score(fewer) >= score(single) - 1e-4).all()
    assert (score(best) > score(single) + 1e-3).any()
    unchanged = best.candidate == 0
    assert np.array_equal(best.ids[unchanged], single.ids[unchanged])
    assert not unchanged.all()


@pytest.mark.parametrize("way", [{}, {"decoder": "jacobi", "window": 4}, {"frames": {"temperature": 2.0}}])
def test_unlikely_candidates_are_given_up_early_and_the_others_stay_as_they_are(
    decoder: LvmDecoder, way: dict[str, Any]
) -> None:
    options = {"temperature": 1.0, "best_of": 6, **way}
    all_written = decoder.decode(PROMPT, QUERIES, IMAGES, SamplingConfig.model_validate(options), range(5))
    early = decoder.decode(PROMPT, QUERIES, IMAGES, SamplingConfig.model_validate(options | {"keep": 0.5}), range(5))
    log_p, whole = early.candidate_log_likelihood, all_written.candidate_log_likelihood
    assert np.isfinite(log_p).sum(1).tolist() == [[6, 3, 2]] * 5
    written = np.isfinite(log_p)
    assert np.array_equal(early.candidate_ids[written], all_written.candidate_ids[written])
    assert log_p[written] == pytest.approx(whole[written], abs=1e-4)
    for query in range(5):
        so_far = whole[query].cumsum(1)
        first = set(np.argsort(-so_far[:, 0])[:3])
        assert set(np.flatnonzero(written[query, :, 1])) == first
        assert set(np.flatnonzero(written[query, :, 2])) == set(sorted(first, key=lambda row: -so_far[row, 1])[:2])
    assert np.array_equal(early.candidate, log_p[..., -1].argmax(1))


def test_a_share_of_one_candidate_is_refused() -> None:
    with pytest.raises(ValidationError, match="keep: is a share of the candidates of best_of"):
        SamplingConfig(temperature=1.0, keep=0.5)


def test_greedy_candidates_are_refused() -> None:
    with pytest.raises(ValidationError, match="set a temperature"):
        SamplingConfig(best_of=2)


# --- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_yields_each_picture_as_it_is_finished(decoder: LvmDecoder) -> None:
    sampling = SamplingConfig(temperature=1.0)
    whole = decoder.decode(PROMPT, QUERIES, IMAGES, sampling, range(5))
    order = []
    for each in decoder.stream(PROMPT, QUERIES, IMAGES, sampling, range(5)):
        order.append((each.query, each.image))
        assert np.array_equal(each.ids, whole.ids[each.query, each.image])
        assert float(each.token_log_p.sum()) == pytest.approx(whole.image_log_likelihood[each.query, each.image])
    first = [(query, image) for image in range(IMAGES) for query in range(4)]
    assert order == [*first, (4, 0), (4, 1), (4, 2)], "a batch of 4 rows, picture by picture, then the fifth"


def test_a_stream_that_is_interrupted_or_interleaved_changes_nothing(decoder: LvmDecoder) -> None:
    expected = decoder.decode(PROMPT, QUERIES, IMAGES).ids
    stream = decoder.stream(PROMPT, QUERIES, IMAGES)
    first = next(stream)
    assert np.array_equal(decoder.decode(PROMPT, QUERIES, IMAGES).ids, expected)
    for each in [first, *stream]:
        assert np.array_equal(each.ids, expected[each.query, each.image])
    next(decoder.stream(PROMPT, QUERIES, IMAGES))
    assert np.array_equal(decoder.decode(PROMPT, QUERIES, IMAGES).ids, expected)


# --- frames and answer apart ------------------------------------------------------------------------------------------

JACOBI = {"decoder": "jacobi", "window": 4}


def write_pictures(lvm: LvmDecoder, **options: Any) -> np.ndarray:
    """Three pictures after two queries: two frames and the answer, [2, 3, tokens]."""
    sampling = SamplingConfig.model_validate(options)
    return lvm.decode(ids(5), ids(2, 4, seed=1), 3, sampling, (7, 8)).ids


@pytest.mark.parametrize("way", [{}, JACOBI], ids=["sequential", "jacobi"])
def test_frames_are_sampled_and_the_answer_is_the_likeliest_after_them(
    decoder: LvmDecoder, way: dict[str, Any]
) -> None:
    sampled = write_pictures(decoder, temperature=1.0, **way)
    mixed = write_pictures(decoder, frames={"temperature": 1.0}, **way)
    assert (mixed[:, :2] == sampled[:, :2]).all()
    after = np.concatenate([ids(2, 4, seed=1), mixed[:, :2].reshape(2, -1)], axis=1)
    assert (mixed[:, 2] == decoder.decode(ids(5), after, 1).ids[:, 0]).all()


@pytest.mark.parametrize("way", [{}, JACOBI], ids=["sequential", "jacobi"])
def test_frames_are_the_likeliest_and_the_answer_is_sampled(decoder: LvmDecoder, way: dict[str, Any]) -> None:
    greedy, mixed = write_pictures(decoder, **way), write_pictures(decoder, answer={"temperature": 50.0}, **way)
    assert (mixed[:, :2] == greedy[:, :2]).all()
    assert (mixed[:, 2] != greedy[:, 2]).any()
    only = write_pictures(decoder, answer={"temperature": 50.0, "top_k": 1}, **way)
    assert (only == greedy).all()


def test_pictures_without_settings_of_their_own_are_as_before(decoder: LvmDecoder) -> None:
    same = {"temperature": 0.8, "top_k": 5, "top_p": 0.9}
    apart = write_pictures(decoder, temperature=3.0, frames=same, answer=same)
    assert (apart == write_pictures(decoder, **same)).all()
    assert SamplingConfig().model_dump() == SamplingConfig(frames={}, answer={}).model_dump()
    assert not {"frames", "answer"} & SamplingConfig(temperature=1.0).model_dump().keys()
    SamplingConfig(frames={"temperature": 1.0}, best_of=2)
    with pytest.raises(ValidationError, match="greedy"):
        SamplingConfig(temperature=1.0, frames={"temperature": 0.0}, answer={"temperature": 0.0}, best_of=2)
