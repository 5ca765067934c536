"""A verifier as an objective: it learns scores that can be read, and stays with the adapter whose answers it judges."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from covray.config import SamplingConfig, TrainConfig
from covray.distributed.train_checks import absolute_paths, check, open_run, plan_train
from covray.errors import ConfigError, CovrayError, WeightsError
from covray.models.lvm.adapter import load_adapter_tensors, read_adapter, read_run_adapter
from covray.models.lvm.backbone import backbone_facts, load_backbone
from covray.models.lvm.decoding.decoder import LvmDecoder
from covray.models.lvm.records import VerifierRecord
from covray.models.lvm.verifier import LIKELIHOODS, VERIFIER_WEIGHTS
from covray.training.objectives.verdicts import (
    Verdicts,
    Weights,
    count_comparisons,
    ordered_pairs,
    query_at,
    step_end,
)
from covray.training.run import train
from covray.training.scored_answers import ScoredQuery, fingerprint_of
from covray.training.worker import Signal, WorkerContext
from tests.support.datasets import CODES, TOKENS
from tests.support.scored_answers import write_answers
from tests.support.trainings import curve

CPU = torch.device("cpu")
Configure = Callable[..., TrainConfig]
PER_TASK = {"depth": 20, "edges": 20}


@pytest.fixture
def verifier_config(tiny_config: Configure, tmp_path: Path) -> Configure:
    """Configurations of a verifier for the adapter of a training of one step."""
    first = tiny_config("first", optimizer__steps=1)
    train(first)
    adapter = f"{first.out}/adapter"
    answers = write_answers(tmp_path / "answers", adapter, PER_TASK)
    options = {
        "objective": "verifier", "verifier__answers": answers, "verifier__validation": 0.25, "lora__path": adapter,
        "optimizer__batch_tokens": 4 * 256,
    }  # fmt: skip
    return lambda out="run", **changes: tiny_config(out, **options | changes)


def decoder_of(config: TrainConfig, adapter: str) -> LvmDecoder:
    lora, tensors = read_adapter(adapter)
    facts = backbone_facts(config.backbone)
    model = load_backbone(facts, config.backbone, lora, dtype=torch.float32, device=CPU, seed=config.seed)
    load_adapter_tensors(model, tensors)
    return LvmDecoder(model, CODES, TOKENS, batch=4)


def test_it_learns_scores_that_can_be_read_and_leaves_the_adapter_as_it_is(verifier_config: Configure) -> None:
    config = verifier_config(optimizer__steps=60, validate_every_steps=20)
    result = train(config)
    assert result is not None
    assert result.validation_loss_before == pytest.approx(math.log(2), abs=0.1), "it begins with no opinion"
    assert result.validation_loss is not None
    assert result.validation_loss < 0.7 * result.validation_loss_before
    last = [record for record in curve(config) if "verifier_right" in record][-1]
    assert last["verifier_right"] > 0.65, "chance is a half"
    assert 0.3 < last["likelihood_right"] < 0.7, "the score has nothing to do with likelihood"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        adapter = Path(str(config.lora.path), name).read_bytes()
        assert Path(config.out, "adapter", name).read_bytes() == adapter
    verifier = read_adapter(f"{config.out}/adapter")[0].verifier
    assert verifier is not None
    objective = Verdicts(config, CPU)
    right = []
    for query in objective.validation:
        said = verifier(objective.features_of(query)).view(-1, 2)[:, 1].numpy()
        better, worse = ordered_pairs(query)
        right += (said[better] > said[worse]).tolist()
    best = next(record for record in curve(config) if record.get("validation_loss") == result.validation_loss)
    assert np.mean(right) == pytest.approx(best["verifier_right"], abs=0.01), "what was exported is the best"


def test_a_stopped_run_takes_up_the_same_losses(verifier_config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("covray.training.trainer._POLL_SIGNAL_EVERY_S", -1.0)
    whole, stopped = verifier_config("whole"), verifier_config("stopped")
    train(whole)
    signals = iter([Signal.CONTINUE, Signal.CONTINUE, Signal.STOP])
    assert train(stopped, WorkerContext(poll_signal=lambda: next(signals))) is None
    train(stopped)
    assert curve(whole) == curve(stopped), "to the bit"
    verifiers = [Path(run.out, "adapter", VERIFIER_WEIGHTS).read_bytes() for run in (whole, stopped)]
    assert verifiers[0] == verifiers[1]


def test_workers_share_the_comparisons_of_a_step(verifier_config: Configure) -> None:
    objective = Verdicts(verifier_config(), CPU)
    alone = objective.batches(3, WorkerContext())
    shares = [objective.batches(3, WorkerContext(rank=rank, world_size=2)) for rank in (0, 1)]

    def losses(batch: Any) -> list[float]:
        return sorted(objective.loss(objective.module, batch).each.tolist())

    torch.nn.init.normal_(objective.verifier.last.weight)
    together = losses(alone.batches[0])
    assert sorted(losses(shares[0].batches[0]) + losses(shares[1].batches[0])) == pytest.approx(together, rel=1e-5)
    assert alone.loss_tokens == shares[0].loss_tokens == shares[1].loss_tokens == len(together)
    assert alone.next_cursor == shares[0].next_cursor
    idle = objective.loss(objective.module, objective.idle_batch)
    assert not len(idle.each)


def test_features_of_a_candidate_do_not_depend_on_the_others(verifier_config: Configure) -> None:
    objective = Verdicts(verifier_config(), CPU)
    query = objective.training[0]
    whole = objective.features_of(query)
    alone = objective.features_of(replace(query, written=query.written[2:3], goodness=query.goodness[2:3]))
    assert torch.equal(whole[4:6], alone), "two pictures a candidate, to the bit"
    first = objective.features_of(replace(query, written=query.written[2:3, :1], goodness=query.goodness[2:3]))
    assert torch.allclose(first, alone[:1], atol=1e-5), "a frame is judged without what comes after it"
    assert whole.shape[1] == 32 + LIKELIHOODS


def test_every_epoch_has_every_query_once(verifier_config: Configure) -> None:
    config = verifier_config(optimizer__steps=None, optimizer__epochs=2.0)
    objective = Verdicts(config, CPU)
    queries = objective.training
    assert not {query.pair_id for query in queries} & {query.pair_id for query in objective.validation}
    assert len(queries) + len(objective.validation) == sum(PER_TASK.values())
    seen, cursor = [], 0
    for _ in range(objective.steps):
        end = step_end(queries, cursor, config)
        tokens = [query_at(queries, number, config.seed).tokens for number in range(cursor, end)]
        assert len(tokens) == 1 or sum(tokens) <= config.optimizer.batch_tokens
        seen += [query_at(queries, number, config.seed).pair_id for number in range(cursor, end)]
        cursor = end
    expected = sorted(query.pair_id for query in queries)
    assert sorted(seen[: len(queries)]) == sorted(seen[len(queries) :]) == expected
    assert seen[: len(queries)] != seen[len(queries) :]


def test_comparisons_weigh_what_lies_between_two_scores() -> None:
    nothing = np.zeros(4, np.uint16)

    def query(task: str, *goodness: float) -> ScoredQuery:
        written = np.zeros((len(goodness), 3, 4), np.uint16)
        return ScoredQuery(task, 0, nothing, written, np.array(goodness))

    first, second, other = query("depth", 1.0, 5.0, 1.0), query("depth", 2.0, 9.0), query("edges", 0.0, 100.0)
    assert [pair.tolist() for pair in ordered_pairs(first)] == [[1, 1], [0, 2]]
    assert count_comparisons(first) == 2 * 3, "for each picture; equal scores are none"
    weights = Weights([first, second, other])
    assert weights.of(first).tolist() == pytest.approx([0.5, 0.5]), "shares 0.7 and 0.2 of five answers"
    assert weights.of(second).tolist() == pytest.approx([0.4])
    assert weights.of(other).tolist() == pytest.approx([0.5])
    assert weights.mean([first, second]) == pytest.approx((0.5 + 0.5 + 0.4) / 3)
    changed = replace(first, goodness=first.goodness + 1e-9)
    assert fingerprint_of([first]) != fingerprint_of([changed])


def test_what_does_not_fit_is_refused(verifier_config: Configure, tmp_path: Path) -> None:
    def refused(message: str, **changes: Any) -> None:
        config = absolute_paths(verifier_config("refused", **changes))
        with pytest.raises(CovrayError, match=message):
            check(config, open_run(config.out))

    config = absolute_paths(verifier_config("checked"))
    assert check(config, open_run(config.out)).fingerprints["answers"]
    planned = plan_train(config)
    objective = Verdicts(config, CPU)
    assert planned.trainable == sum(parameter.numel() for parameter in objective.parameters().values())
    assert (planned.steps, planned.pairs) == (objective.steps, len(objective.training))
    assert planned.tokens == sum(query.tokens for query in (*objective.training, *objective.validation))
    adapter = str(config.lora.path)
    refused("lora.path: objective verifier judges the answers of a run", lora__path=None)
    refused("verifier.answers: objective verifier judges", verifier__answers=None)
    refused("set it to none", compute__deepspeed="zero2")
    refused("writes chains of 3 pictures by diffusion; set sentences.method", sentences__method="linear")
    refused("all 40 queries fall to the validation", verifier__validation=0.9999999)
    unfinished = Path(write_answers(tmp_path / "unfinished", adapter, {"depth": 2}))
    (unfinished / "results.json").unlink()
    refused("is not finished; run its covray evaluate again", verifier__answers=str(unfinished))
    record = unfinished / "_evaluation.json"
    about = json.loads(record.read_text())
    (unfinished / "results.json").write_text("{}")
    record.write_text(json.dumps(about | {"fingerprints": {"tuned.adapter": "0" * 64}}))
    refused("has no answers of the adapter [0-9a-f]{12} of lora.path", verifier__answers=str(unfinished))
    single = write_answers(tmp_path / "single", adapter, {"depth": 2}, candidates=1)
    refused("no query has candidates of different scores", verifier__answers=single)
    plain = write_answers(tmp_path / "plain", adapter, {"depth": 0})
    refused("has no scored candidates; evaluate with score_candidates", verifier__answers=plain)
    refused("_evaluation.json: is not there", verifier__answers=str(tmp_path / "nowhere"))


def test_the_verifier_of_another_adapter_is_refused(verifier_config: Configure, tiny_config: Configure) -> None:
    config = verifier_config()
    train(config)
    facts = backbone_facts(config.backbone)
    record = {"version": 1, "config": config.model_dump(mode="json"), "fingerprints": {"backbone": facts.fingerprint}}
    run = Path(config.out, "_run.json")
    run.write_text(json.dumps(record))
    verifier = read_run_adapter(config.out)[0].verifier
    assert verifier is not None
    assert verifier.facts.backbone == facts.fingerprint
    run.write_text(json.dumps(record | {"fingerprints": {"backbone": "1" * 64}}))
    with pytest.raises(WeightsError, match=r"judges answers of backbone .*the run adapts 111111111111"):
        read_run_adapter(config.out)
    other = tiny_config("other", optimizer__steps=2)
    train(other)
    folder = Path(config.out, "adapter")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(Path(other.out, "adapter", weights.name).read_bytes())
    with pytest.raises(
        WeightsError, match=f"{VerifierRecord.FILE}: judges the answers of adapter .*; train a verifier"
    ):
        read_adapter(str(folder))
    weights.write_bytes(Path(str(config.lora.path), weights.name).read_bytes())
    about = json.loads((folder / VerifierRecord.FILE).read_text())
    for change, message in (
        ({"hidden": 7}, "has not the sizes of verifier.json"),
        ({"width": 0}, "width: input should be greater than 0; get the adapter again"),
        ({"version": 2}, "is of version 2, not 1"),
    ):
        (folder / VerifierRecord.FILE).write_text(json.dumps(about | change))
        with pytest.raises(WeightsError, match=message):
            read_adapter(str(folder))
    (folder / VerifierRecord.FILE).write_text(json.dumps(about))
    (folder / VERIFIER_WEIGHTS).unlink()
    with pytest.raises(WeightsError, match=f"{VERIFIER_WEIGHTS}: is missing"):
        read_adapter(str(folder))


def test_training_goes_on_from_the_adapter_without_its_verifier(
    verifier_config: Configure, tiny_config: Configure
) -> None:
    judged = verifier_config("judged")
    train(judged)
    plain = tiny_config("plain", lora__path=f"{judged.out}/adapter", optimizer__steps=1)
    train(plain)
    assert not Path(plain.out, "adapter", VerifierRecord.FILE).exists()


def test_runs_without_it_keep_their_identity(tiny_config: Configure, verifier_config: Configure) -> None:
    assert "verifier" not in tiny_config().identity()
    identity = verifier_config().identity()
    assert identity["verifier"] == {"hidden": 64, "validation": 0.25}
    assert identity["objective"] == "verifier"


def test_a_sampling_that_needs_it_is_refused_without_it(verifier_config: Configure) -> None:
    config = verifier_config()
    decoder = decoder_of(config, str(config.lora.path))
    queries = np.zeros((1, TOKENS), np.uint16)
    sampling = SamplingConfig(temperature=1.0, best_of=2, choose_by="verifier")
    with pytest.raises(ConfigError, match="choose_by: verifier needs a run trained with objective=verifier"):
        decoder.decode(queries[0], queries, 1, sampling)
