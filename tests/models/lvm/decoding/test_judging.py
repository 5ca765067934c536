"""A verifier ranks candidates: at the end, or after each picture; it never changes what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from covray.config import SamplingConfig
from covray.models.lvm.decoding.decoder import LvmDecoder
from covray.models.lvm.lora import Lora
from covray.models.lvm.model import Lvm
from covray.models.lvm.records import VerifierRecord
from covray.models.lvm.verifier import Verifier
from tests.support.backbones import CODES, load

TOKENS, IMAGES = 8, 3
QUERY_COUNT, CANDIDATES = 5, 6


def ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CODES, shape, dtype=np.uint16)


PROMPT, QUERIES = ids(40), ids(QUERY_COUNT, TOKENS, seed=1)
WAYS: list[dict[str, Any]] = [{}, {"decoder": "jacobi", "window": 4}, {"frames": {"temperature": 2.0}}]


@pytest.fixture(scope="module")
def model(llama_folder: Path) -> Lvm:
    verifier = Verifier(VerifierRecord(width=64, hidden=16, adapter="", backbone=""))
    verifier.last.weight.data.normal_(generator=torch.Generator().manual_seed(4))
    return load(llama_folder, Lora(3, 5.0, verifier=verifier.requires_grad_(False)))


@pytest.fixture(scope="module")
def decoder(model: Lvm) -> LvmDecoder:
    return LvmDecoder(model, CODES, TOKENS, batch=4)


def sampling(**options: Any) -> SamplingConfig:
    base = {"temperature": 1.0, "best_of": CANDIDATES, "choose_by": "verifier"}
    return SamplingConfig.model_validate(base | options)


def verdicts(model: Lvm, prompt: np.ndarray, candidate_ids: np.ndarray) -> np.ndarray:
    """What the verifier says of every picture, by one forward pass over whole sentences, [queries, N, images]."""
    assert model.lora is not None
    assert model.lora.verifier is not None
    whole = []
    for query, candidates in zip(QUERIES, candidate_ids, strict=True):
        for candidate in candidates:
            whole.append(np.concatenate((prompt, query, candidate.ravel())).astype(np.int64))
    flat = torch.from_numpy(np.stack(whole))
    lengths = (flat.shape[1],) * len(flat)
    steps = IMAGES * TOKENS
    with torch.inference_mode():
        states = model.hidden(flat.flatten(), lengths).view(*flat.shape, -1)[:, -steps:]
        logits = model.logits(flat.flatten(), lengths).view(*flat.shape, -1)[:, -steps - 1 : -1, :CODES]
        log_p = logits.log_softmax(-1).gather(-1, flat[:, -steps:, None])[..., 0].view(-1, IMAGES, TOKENS).mean(-1)
        so_far = torch.stack([log_p[:, : count + 1].mean(1) for count in range(IMAGES)], 1)
        pooled = states.view(len(flat), IMAGES, TOKENS, -1).mean(2)
        features = torch.cat((pooled, log_p[..., None], so_far[..., None]), -1)
        said = model.lora.verifier(features)
    return said.view(*candidate_ids.shape[:2], IMAGES).numpy()


@pytest.mark.parametrize("way", WAYS)
def test_it_chooses_by_verdicts_and_changes_nothing_that_is_written(
    decoder: LvmDecoder, model: Lvm, way: dict[str, Any]
) -> None:
    judged = decoder.decode(PROMPT, QUERIES, IMAGES, sampling(**way), range(QUERY_COUNT))
    plain = decoder.decode(PROMPT, QUERIES, IMAGES, sampling(choose_by="answer", **way), range(QUERY_COUNT))
    assert np.array_equal(judged.candidate_ids, plain.candidate_ids)
    assert np.array_equal(judged.candidate_log_likelihood, plain.candidate_log_likelihood)
    assert plain.candidate_verdict is None
    assert judged.candidate_verdict is not None
    expected = verdicts(model, PROMPT, judged.candidate_ids)[..., -1]
    assert judged.candidate_verdict == pytest.approx(expected, abs=1e-4)
    assert np.array_equal(judged.candidate, judged.candidate_verdict.argmax(1))
    assert not np.array_equal(judged.candidate, plain.candidate)


@pytest.mark.parametrize("way", WAYS)
def test_the_weak_are_given_up_after_each_picture(decoder: LvmDecoder, model: Lvm, way: dict[str, Any]) -> None:
    whole = decoder.decode(PROMPT, QUERIES, IMAGES, sampling(**way), range(QUERY_COUNT))
    early = decoder.decode(PROMPT, QUERIES, IMAGES, sampling(keep=0.5, **way), range(QUERY_COUNT))
    written = np.isfinite(early.candidate_log_likelihood)
    assert written.sum(1).tolist() == [[6, 3, 2]] * QUERY_COUNT
    assert np.array_equal(early.candidate_ids[written], whole.candidate_ids[written])
    said = verdicts(model, PROMPT, whole.candidate_ids)
    for query in range(QUERY_COUNT):
        first = np.argsort(-said[query, :, 0])[:3]
        second = sorted(first, key=lambda row: -said[query, row, 1])[:2]
        assert set(np.flatnonzero(written[query, :, 1])) == set(first)
        assert set(np.flatnonzero(written[query, :, 2])) == set(second)
        assert early.candidate[query] == max(second, key=lambda row: said[query, row, 2])
    assert early.candidate_verdict is not None
    assert np.array_equal(np.isfinite(early.candidate_verdict), written[..., -1])


@pytest.mark.parametrize("choose_by", ["verifier", "answer", "chain"])
def test_where_nobody_is_given_up_the_answer_stays(decoder: LvmDecoder, choose_by: str) -> None:
    options = {"choose_by": choose_by}
    late = decoder.decode(PROMPT, QUERIES, IMAGES, sampling(**options), range(QUERY_COUNT))
    early = decoder.decode(PROMPT, QUERIES, IMAGES, sampling(keep=0.99, **options), range(QUERY_COUNT))
    assert np.array_equal(early.candidate_ids, late.candidate_ids)
    assert np.array_equal(early.candidate, late.candidate)


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:0]], ids=["prompt", "no prompt"])
def test_a_query_is_judged_alike_alone_and_among_others(decoder: LvmDecoder, keep: float, prompt: np.ndarray) -> None:
    together = decoder.decode(prompt, QUERIES, IMAGES, sampling(keep=keep), range(QUERY_COUNT))
    assert together.candidate_verdict is not None
    for query in (0, 3):
        alone = decoder.decode(prompt, QUERIES[query : query + 1], IMAGES, sampling(keep=keep), [query])
        assert alone.candidate_verdict is not None
        assert np.array_equal(alone.candidate_verdict[0], together.candidate_verdict[query]), "to the bit"
        assert np.array_equal(alone.ids[0], together.ids[query])


def test_one_candidate_is_nothing_to_rank() -> None:
    with pytest.raises(ValidationError, match="verifier ranks the candidates of best_of"):
        SamplingConfig(temperature=1.0, choose_by="verifier")
