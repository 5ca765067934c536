"""A draft adapter as an objective: the same losses however it is run, and the adapter drafted for stays as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from covray.config import SamplingConfig, TrainConfig
from covray.errors import ConfigError, WeightsError
from covray.models.lvm.adapter import read_run_adapter
from covray.models.lvm.draft_files import DRAFT_WEIGHTS
from covray.models.lvm.records import DraftRecord
from covray.training.objectives.drafts import Drafts, draft_places
from covray.training.run import train
from covray.training.worker import WorkerContext
from tests.support.datasets import CODES, TOKENS
from tests.support.trainings import curve, decoder_of, require_same_after_a_stop

CPU = torch.device("cpu")
Configure = Callable[..., TrainConfig]
DRAFT = {"objective": "draft", "draft__tokens": 3, "draft__rank": 4, "draft__share": 0.5}


@pytest.fixture
def draft_config(tiny_config: Configure) -> Configure:
    return lambda out="run", **changes: tiny_config(out, **DRAFT | changes)


def test_it_learns_drafts_for_an_adapter_that_stays_as_it_is(tiny_config: Configure, draft_config: Configure) -> None:
    first = tiny_config("first")
    result = train(first)
    assert result is not None
    config = draft_config(lora__path=f"{first.out}/adapter", optimizer__steps=25)
    drafts = train(config)
    assert drafts is not None
    assert drafts.answer_perplexity == pytest.approx(result.answer_perplexity, rel=1e-4), "that of the first run"
    losses = [record["loss"] for record in curve(config) if "loss" in record]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.05
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert Path(config.out, "adapter", name).read_bytes() == Path(first.out, "adapter", name).read_bytes()
    plain, drafted = decoder_of(first), decoder_of(config)
    queries = np.arange(2 * TOKENS, dtype=np.uint16).reshape(2, TOKENS) % CODES
    for options in ({}, {"temperature": 1.0}):
        expected = plain.decode(queries[0], queries, 2, SamplingConfig.model_validate(options))
        sampling = SamplingConfig.model_validate({"decoder": "speculative", **options})
        assert np.array_equal(drafted.decode(queries[0], queries, 2, sampling).ids, expected.ids)


def test_a_stopped_run_takes_up_the_same_losses(draft_config: Configure, poll_every_step: None) -> None:
    require_same_after_a_stop(draft_config("whole"), draft_config("stopped"), DRAFT_WEIGHTS)


def test_masks_belong_to_the_sentence_not_to_the_worker(draft_config: Configure) -> None:
    objective = Drafts(draft_config(sentences__loss="chain"), CPU)
    alone = objective.batches(0, WorkerContext())
    shares = [objective.batches(0, WorkerContext(rank=rank, world_size=2)) for rank in (0, 1)]
    groups = []
    for step in (alone, *shares):
        places = set()
        for batch in step.batches:
            if batch is None:
                continue
            assert batch.noisy is not None
            assert not len(batch.positions), "nothing is learned of clean tokens"
            starts = np.cumsum((0, *batch.lengths))
            clean, noisy = batch.ids.split(batch.lengths), batch.noisy.places.split(batch.noisy.counts)
            for start, ids, own in zip(starts, clean, noisy, strict=False):
                places.add((tuple(ids.tolist()), tuple((own - start).tolist())))
        groups.append(places)
    assert groups[1] | groups[2] == groups[0]
    assert alone.loss_tokens == shares[0].loss_tokens == sum(len(own) for _, own in groups[0])
    allowed = draft_places(objective.training, 0, 3)
    length = objective.training.tokens(0)
    assert allowed.tolist() == list(range(length - 2 * TOKENS, length - 3)), "the query's frame and answer"
    for _, own in groups[0]:
        first = np.array(own).reshape(-1, 3)
        assert set(first[:, 0]) <= set(allowed)
        assert len(first) == np.ceil(0.5 * len(allowed))
        assert (np.diff(first) == 1).all()


def test_what_does_not_fit_is_refused(tiny_config: Configure, draft_config: Configure) -> None:
    with pytest.raises(ConfigError, match=rf"draft.tokens: {TOKENS} are not fewer than the {TOKENS} tokens"):
        Drafts(draft_config(draft__tokens=TOKENS), CPU)
    config = draft_config("damaged")
    train(config)
    record = {"version": 1, "config": config.model_dump(mode="json"), "fingerprints": {}}
    Path(config.out, "_run.json").write_text(json.dumps(record))
    assert read_run_adapter(config.out)[0].draft is not None
    file = Path(config.out, "adapter", DraftRecord.FILE)
    about = json.loads(file.read_text())
    for change, message in (
        ({"alpha": 3.0}, r"is not what the run trained: alpha is 3\.0, was 64\.0"),
        ({"tokens": 0}, "tokens: input should be greater than 0; get the adapter again"),
        ({"version": 2}, "is of version 2, not 1"),
    ):
        file.write_text(json.dumps(about | change))
        with pytest.raises(WeightsError, match=message):
            read_run_adapter(config.out)
    file.write_text(json.dumps(about))
    Path(config.out, "adapter", DRAFT_WEIGHTS).unlink()
    with pytest.raises(WeightsError, match=f"{DRAFT_WEIGHTS}: is missing"):
        read_run_adapter(config.out)


def test_training_goes_on_from_the_adapter_without_its_drafts(tiny_config: Configure, draft_config: Configure) -> None:
    drafted = draft_config("drafted")
    train(drafted)
    plain = tiny_config("plain", lora__path=f"{drafted.out}/adapter", optimizer__steps=1)
    train(plain)
    assert not Path(plain.out, "adapter", DraftRecord.FILE).exists()


def test_runs_without_it_keep_their_identity(tiny_config: Configure, draft_config: Configure) -> None:
    assert not {"objective", "draft", "block_diffusion"} & set(tiny_config().identity())
    chosen = draft_config().identity()["draft"]
    assert isinstance(chosen, dict)
    assert chosen["tokens"] == 3
    assert "block_diffusion" not in draft_config().identity()
    blocks = tiny_config(objective="block_diffusion").identity()
    assert "draft" not in blocks
    assert "block_diffusion" in blocks
