"""The programme of claims: one schedule for all arms, nothing done twice, and verdicts that follow from the scores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from markupsafe import escape

from covray.chains.records import Audit
from covray.config import BuildConfig, EvaluateConfig, TrainConfig, named_run
from covray.errors import ConfigError
from covray.evaluation.answers import RESULT_SCHEMA
from covray.evaluation.metrics import OWN, REFERENCE, lower_is_better
from covray.evaluation.records import EvaluationResults, SubjectEntry
from covray.recipes import claims_page
from covray.recipes.claims_page import report_programme, run_programme
from covray.recipes.claims_plan import BUDGETS, Backbone, Budget, arms, claims, steps_of, train_options
from covray.recipes.claims_run import Programme, Steps, open_programme, plan_programme
from covray.tasks import TASKS
from covray.training.records import TrainResult

TINY = Budget(
    scenes={"train": 4, "val": 2, "test": 2}, epochs=2, sentences=4, refreshes=1, seeds=(0, 1), shares=(0.5,),
    lengths=(3,), spacings={"late": (0.6, 0.9)}, votes=(2,), episodes=6, validation_episodes=6,
)  # fmt: skip
BACKBONES = (Backbone("nano", "nano"), Backbone("other", "nano"))
WORTH = {"diffusion": 0.1, "own": 0.3, "copy": -0.1, "best": 0.4}
"""How good an arm is made to be, by the first word of its name that is here; others are as good as nothing."""


class Interrupted(Exception):
    """A kill."""


class FakeSteps:
    """Steps that only write what they would, and count; they return at once where they are done, as the real ones."""

    def __init__(self, dataset: str, kill_after: int | None = None):
        self.dataset, self.kill_after = dataset, kill_after
        self.done: list[str] = []

    def steps(self) -> Steps:
        return Steps(self.build, self.train, self.evaluate, lambda: "a machine")

    def _begin(self, out: str) -> None:
        if self.kill_after is not None and len(self.done) >= self.kill_after:
            raise Interrupted(out)

    def build(self, config: BuildConfig) -> Audit:
        if not Path(config.out).exists():
            self._begin(config.out)
            shutil.copytree(self.dataset, config.out)
            about = json.loads(Path(config.out, "_dataset.json").read_text())
            about["config"]["engine"] = {"batch": 8}
            Path(config.out, "_dataset.json").write_text(json.dumps(about))
            self.done.append(config.out)
        return Audit.read(config.out)

    def train(self, config: TrainConfig) -> TrainResult:
        if not Path(config.out).exists():
            self._begin(config.out)
            Path(config.out).mkdir(parents=True)
            self.done.append(config.out)
        steps = config.optimizer.steps
        assert steps is not None
        return TrainResult(
            adapter="adapter", adapter_step=steps, steps=steps, tokens=steps * config.optimizer.batch_tokens,
            sentences=steps * TINY.sentences, epochs=2.0, loss=1.0, seconds=36.0, tokens_per_s=1.0, memory_bytes=1,
        )  # fmt: skip

    def evaluate(self, config: EvaluateConfig) -> EvaluationResults:
        if not Path(config.out, "results.json").exists():
            self._begin(config.out)
            names = [named_run(entry)[0] for entry in config.adapters] or ["untuned"]
            subjects = list(names)
            for votes in config.votes.samples:
                subjects += [f"{name}, votes of {count}" for name in names for count in (votes, 3 * votes, 2 * votes)]
            self._write(config, subjects)
            self.done.append(config.out)
        return EvaluationResults.read(config.out)

    def _write(self, config: EvaluateConfig, subjects: list[str]) -> None:
        for task in ("segmentation", "depth"):
            rows = [row for subject in dict.fromkeys(subjects) for row in self._rows(config, subject, task)]
            folder = Path(config.out, "rows", f"task={task}")
            folder.mkdir(parents=True)
            table = pa.Table.from_pylist(rows, RESULT_SCHEMA).drop_columns("task")
            pq.write_table(table, folder / "part.parquet")
        EvaluationResults(
            subjects=tuple(SubjectEntry(name=name, kind="untuned", about="") for name in subjects), tasks={},
            lower_is_better=tuple(lower_is_better()), scores=(), differences=(), failed=(), seconds=18.0, config={},
            fingerprints={},
        ).write(config.out)  # fmt: skip

    def _rows(self, config: EvaluateConfig, subject: str, task: str) -> Iterator[dict[str, Any]]:
        seed = int(config.out.rpartition("-s")[2].split("-")[0] or 1)
        generator = np.random.default_rng([abs(seed), len(subject)])
        worth = next((value for name, value in WORTH.items() if subject.startswith(name)), 0.0)
        for pair_id in range(20):
            score = 0.5 + worth * 0.5 + 0.01 * generator.standard_normal()
            if task == "depth":
                score = 1 - score
            metric = TASKS[task].metrics[0].name
            values = {metric: score, OWN: 3 - worth, REFERENCE: 2.8 - worth, "frame_gain_reference": pair_id / 20}
            listed = [{"metric": name, "value": value} for name, value in values.items()]
            yield {"episode": pair_id, "subject": subject, "pair_id": pair_id, "task": task, "values": listed}


@pytest.fixture
def fake(write_dataset: Callable[..., Any]) -> Callable[..., FakeSteps]:
    data, _ = write_dataset({"segmentation": 8, "depth": 8})
    return lambda kill_after=None: FakeSteps(data, kill_after)


@pytest.fixture
def programme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programme:
    monkeypatch.setitem(BUDGETS, "small", TINY)
    monkeypatch.setattr("covray.recipes.claims_page.pictures_of", lambda *_: [])
    return open_programme(str(tmp_path / "claims"), "small", ("nano=nano", "other=nano"), "nano")


def test_all_arms_take_the_same_steps_over_the_same_queries() -> None:
    budget, pairs = BUDGETS["full"], 1000
    plain = train_options(arms(budget, BACKBONES)[0], budget, pairs, 64)
    for arm in arms(budget, BACKBONES):
        options = train_options(arm, budget, pairs, 64)
        config = TrainConfig.model_validate({"data": "chains", "out": "run", **options})
        assert config.sentences.validation_split is None, "no early stopping of one"
        same = {"learning_rate", "warmup", "final", "clip", "weight_decay", "betas"}
        assert config.optimizer.model_dump(include=same) == TrainConfig.model_validate(
            {"data": "chains", "out": "run", **plain}
        ).optimizer.model_dump(include=same)
        queries = config.optimizer.batch_tokens / (2 * arm.pictures * 64)
        assert queries == budget.sentences, "a step has as many queries, whatever their chains are"
        expected = steps_of(arm, budget, pairs)
        assert config.optimizer.steps == expected
        if arm.share == arm.steps_factor == 1:
            assert expected == plain["optimizer"]["steps"]
    by_name = {arm.name: train_options(arm, budget, pairs, 64)["optimizer"] for arm in arms(budget, BACKBONES)}
    tokens = {name: each["steps"] * each["batch_tokens"] for name, each in by_name.items()}
    assert tokens["none-tokens"] == pytest.approx(tokens["diffusion"], rel=0.01)
    assert tokens["diffusion"] == 2 * tokens["none"]


def test_every_claim_is_about_arms_that_there_are() -> None:
    for budget in BUDGETS.values():
        names = [arm.name for arm in arms(budget, BACKBONES)]
        assert len(names) == len(set(names))
        keys = [spec.key for spec in claims(budget, BACKBONES)]
        assert len(keys) == len(set(keys))
        for spec in claims(budget, BACKBONES):
            for name in (spec.first, spec.second):
                assert name in {*names, "best", "adaptive-length"} or "/" in name


def test_a_programme_killed_anywhere_does_nothing_twice_and_ends_alike(
    programme: Programme, fake: Callable[..., FakeSteps], tmp_path: Path
) -> None:
    whole = fake()
    results = run_programme(programme, steps=whole.steps())
    assert len(whole.done) == len(set(whole.done)) > 40
    assert results.arms_done == results.arms_planned
    other = replace(programme, out=str(tmp_path / "again"))
    done: list[str] = []
    for kill_after in (1, 2, 23, None):
        steps = fake(kill_after)
        if kill_after is None:
            again = run_programme(other, steps=steps.steps())
        else:
            with pytest.raises(Interrupted):
                run_programme(other, steps=steps.steps())
        done += steps.done
    assert len(done) == len(set(done)) == len(whole.done)
    assert again == results
    assert run_programme(other, steps=fake(0).steps()) == results, "a finished programme is only read"
    (tmp_path / "again" / "claims.json").unlink()
    assert report_programme(other.out) == results


def test_arms_are_run_one_by_one_and_the_rest_later(
    programme: Programme, fake: Callable[..., FakeSteps], tmp_path: Path
) -> None:
    some = fake()
    results = run_programme(programme, ("none", "own"), some.steps())
    trained = {Path(folder).name for folder in some.done if Path(folder).parent.name == "runs"}
    assert trained == {"none-s0", "none-s1", "own-s0", "own-s1"}
    assert [Path(folder).name for folder in some.done if Path(folder).parent.name == "chains"] == ["main"]
    assert results.arms_done == 4 < results.arms_planned
    claimed = {claim.key for claim in results.claims if claim.gain_percent is not None}
    assert claimed == set(), "no claim is of these two arms alone"
    rest = fake()
    whole = run_programme(programme, steps=rest.steps())
    assert not set(rest.done) & set(some.done)
    assert whole == run_programme(replace(programme, out=str(tmp_path / "again")), steps=fake().steps())
    assert [arm.arm for arm in plan_programme(programme, ("own", "none")).arms] == ["none", "own"]
    with pytest.raises(ConfigError, match="--arm nothing: is not an arm of this programme; give one of none, "):
        run_programme(programme, ("nothing",), fake().steps())


def test_verdicts_follow_from_the_scores(programme: Programme, fake: Callable[..., FakeSteps]) -> None:
    results = run_programme(programme, steps=fake().steps())
    verdicts = {claim.key: claim.verdict for claim in results.claims}
    assert verdicts["diffusion_none"] == verdicts["own_clean"] == verdicts["best_copy"] == "holds"
    assert verdicts["perplexity"] == "holds"
    assert verdicts["votes_2"] == verdicts["votes_2_tokens"] == "holds"
    assert verdicts["linear_none"] == "open"
    assert results.best == "own"
    assert set(results.lengths.values()) == {4}
    assert results.conclusion.startswith("Chains pay here: the best chains (own) against no frames: +")
    seeds = {claim.key: claim.seeds for claim in results.claims}
    assert seeds["best_none"] == 2
    entry = next(arm for arm in results.arms if arm.name == "own")
    assert (entry.seeds, entry.hardware) == ((0, 1), ("a machine",))
    assert entry.train_hours == pytest.approx(2 * 36 / 3600)
    exposure = next(each for each in results.exposure if each.arm == "own")
    assert exposure.exposure == pytest.approx(0.2)
    assert {point.arm for point in results.curves} == {"none", "linear", "diffusion", "own"}
    table = Path(programme.out, "table.md").read_text()
    assert "| Diffused frames beat no frames | equal tokens | " in table
    page = Path(programme.out, "index.html").read_text()
    for claim in results.claims:
        assert str(escape(claim.claim)) in page


def test_another_budget_and_other_files_are_refused(
    programme: Programme, fake: Callable[..., FakeSteps], tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        run_programme(programme, steps=fake(1).steps())
    changed = open_programme(programme.out, "full", ("nano=nano",), "nano")
    with pytest.raises(ConfigError, match="another configuration"):
        run_programme(changed, steps=fake().steps())
    with pytest.raises(ConfigError, match=r"_claims\.json"):
        report_programme(str(tmp_path))
    for entries in (("nano",), ("Nano=nano",), ("a=nano", "a=nano")):
        with pytest.raises(ConfigError, match="--backbone"):
            open_programme("out", "small", entries, "nano")


def test_a_plan_says_steps_and_tokens(programme: Programme) -> None:
    planned = plan_programme(programme)
    assert planned.tokens == sum(arm.tokens for arm in planned.arms)
    assert claims_page.PAGE == "index.html"
