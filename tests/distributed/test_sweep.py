"""What ``covray sweep`` decides before a trial starts, and what it says of trials that are not done."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from covray.config import SweepConfig, TrackingConfig, load_config
from covray.distributed import sweep as sweeps
from covray.distributed import trials as running
from covray.distributed.sweep import report, resumed, sweep
from covray.distributed.tracking import MlflowTracker, store_of
from covray.errors import ConfigError, WeightsError
from covray.evaluation.records import EvaluationResults, SubjectScore
from covray.io import storage
from covray.sweeps.grid import Trial, grid_of
from covray.sweeps.records import SweepRecord
from covray.training.records import RunRecord
from tests.support.commands import Done

Run = Callable[..., Done]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here needs Ray."""

    def started() -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("covray.distributed.sweep.ray_session", started)


@pytest.fixture
def config(tmp_path: Path, write_dataset: Callable[..., Any], llama_folder: Path) -> SweepConfig:
    """Three trials."""
    data, _ = write_dataset({"depth": 24, "edges": 24}, lengths=(3,))
    return load_config(
        SweepConfig,
        None,
        {
            "out": str(tmp_path / "sweep"),
            "data": data,
            "grid.lengths": [3],
            "grid.pairs": [1],
            "train.backbone": {"scale": "custom", "path": str(llama_folder)},
            "evaluate.split": "val",
        },
    )


def begun(config: SweepConfig) -> None:
    """What a sweep leaves that was killed before its first trial."""
    SweepRecord(
        config=config.model_dump(mode="json"), identity=config.identity(), mlflow_run_id=None, seconds=0.0
    ).write(config.out)


def test_mistakes_are_one_line_before_anything_starts(config: SweepConfig, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "letter.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    mistakes: list[tuple[tuple[object, ...], str]] = [
        (("--config", file, "--set", "grid.length=[4]"), "grid.length: no such key"),
        (("--config", file, "--set", "train.lora.rank=0"), "train: lora.rank"),
        (("--config", file, "--set", "grid.lengths=[7]"), "a chain of 7 needs alpha"),
        (("--config", file, "--manifest", "pairs"), "give data, a dataset of chains, or manifest"),
        (("--config", file, "--data", tmp_path / "nothing"), str(tmp_path / "nothing")),
        (("--config", file, "--out", occupied), "holds files that covray sweep did not write"),
        (("--config", file, "--tokens-per-s", 5), "--tokens-per-s: is for --plan"),
        (("--config", file, "--plan", "--tokens-per-s", 0), "--tokens-per-s"),
        (("--resume",), "--resume: takes --out SWEEP alone"),
        (("--resume", "--out", occupied, "--config", file), "--resume: takes --out SWEEP alone"),
        (("--resume", "--out", occupied), "holds no sweep to continue"),
        (("--resume", "--out", tmp_path / "nothing"), "holds no sweep to continue"),
    ]
    for arguments, said in mistakes:
        code, out, err = run("sweep", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), (arguments, out, err)
        assert said in err, arguments
    code, out, err = run("report", occupied)
    assert (code, err.count("\n")) == (2, 1)
    assert sorted(tmp_path.rglob("*")) == before, "and nothing is written"


def test_a_plan_starts_nothing_and_writes_nothing(config: SweepConfig, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    code, out, _ = run("sweep", "--config", file, "--plan", "--json", "--tokens-per-s", 100)
    planned = json.loads(out)
    assert code == 0
    assert [line["name"] for line in planned["trials"]] == [trial.name for trial in grid_of(config).trials]
    code, out, _ = run("sweep", "--config", file, "--plan", "--tokens-per-s", 100)
    assert code == 0
    assert f"{planned['total']['train_tokens']:,}" in out
    assert not Path(config.out).exists()


def test_a_sweep_is_resumed_as_it_was_configured_wherever_it_lies_now(config: SweepConfig, tmp_path: Path) -> None:
    begun(config)
    assert resumed(config.out) == config
    moved = tmp_path / "moved"
    Path(config.out).rename(moved)
    assert resumed(str(moved)) == config.model_copy(update={"out": str(moved)})


def test_another_training_in_the_same_folder_is_refused_and_a_larger_grid_is_not(config: SweepConfig) -> None:
    begun(config)
    other = config.model_copy(update={"train": config.train | {"lora": {"rank": 4}}})
    with pytest.raises(ConfigError, match=r"train\.lora\.rank was None, is 4"):
        sweep(other)
    larger = config.model_copy(update={"grid": config.grid.model_copy(update={"seeds": (0, 1)})})
    with pytest.raises(AssertionError, match="Ray was started"):
        sweep(larger)


def test_a_report_is_made_of_the_trials_that_ended_whatever_became_of_them(config: SweepConfig) -> None:
    begun(config)
    names = [trial.name for trial in grid_of(config).trials]
    assert [trial.status for trial in report(config.out).trials] == ["waiting"] * 3
    score = {"task": "depth", "subject": names[0], "metric": "abs_rel", "mean": 0.25, "low": 0.2, "high": 0.3}
    table = {
        "tasks": {"depth": {"episodes": 4, "primary": "abs_rel", "metrics": ["abs_rel"]}},
        "lower_is_better": ["abs_rel"],
        "scores": [score | {"episodes": 4}],
    }
    finished = {
        "status": "finished", "train_seconds": 2.0, "evaluate_seconds": 1.0, "steps": 3, "tokens": 300, "gpus": 0.0,
        "gpu_hours": 0.0, "validation": [{"tokens": 0, "answer_perplexity": 9.0}], "table": table,
    }  # fmt: skip
    failed = {"status": "failed", "error": "<b>no weights</b>", "validation": []}
    for name, record in zip(names, (finished, failed), strict=False):
        storage.write_json(f"{config.out}/trials/{name}.json", record)
    results = report(config.out).to_json()
    assert {trial["name"]: trial["status"] for trial in results["trials"]} == dict(
        zip(names, ("finished", "failed", "waiting"), strict=True)
    )
    (cell,) = results["cells"]
    assert cell["scores"][0]["mean"] == 0.25
    assert cell["trials"] == [names[0]]
    page = Path(config.out, sweeps.PAGE).read_text()
    assert "&lt;b&gt;no weights&lt;/b&gt;" in page
    assert "<b>no weights" not in page
    assert json.loads(Path(config.out, "results.json").read_text()) == results


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Traceback\ncovray.errors.WeightsError: a: b is missing; complete it\n", "a: b is missing; complete it"),
        ("ValueError: first\n  File x\nray.exceptions.RayTaskError(OSError): last: of all\nmore", "last: of all"),
        ("the actor died", "a worker was lost"),
    ],
)
def test_why_a_trial_failed_is_its_last_error(tmp_path: Path, text: str, line: str) -> None:
    class Ended:
        error_file = str(tmp_path / "error.txt")

    Path(Ended.error_file).write_text(text)
    assert running._failure(Ended()) == line  # type: ignore[arg-type]


class Ended:
    """A trial of Tune that is over, as far as a callback looks at it."""

    error_file: str | None = None

    def __init__(self, name: str):
        self.config = {"trial": name}
        self.trial_id = name


def test_a_trial_that_was_stopped_or_lost_is_written_down_with_what_it_was_compared_by(config: SweepConfig) -> None:
    begun(config)
    trials = {trial.name: trial for trial in grid_of(config).trials}
    stopped, lost, waiting = trials
    progress = running._Progress(config.out, trials, 0)
    for tokens, perplexity in ((0, 9.0), (100, 8.0)):
        seen: Any = Ended(stopped)
        progress.on_trial_result(0, [], seen, {"tokens": tokens, "answer_perplexity": perplexity, "pid": 1})
    one: Any
    for one, ends in ((Ended(stopped), progress.on_trial_complete), (Ended(lost), progress.on_trial_error)):
        ends(0, [], one)
    found = {trial["name"]: trial for trial in report(config.out).to_json()["trials"]}
    assert [found[name]["status"] for name in (stopped, lost, waiting)] == ["stopped", "failed", "waiting"]
    assert found[stopped]["validation"] == [
        {"tokens": 0, "answer_perplexity": 9.0},
        {"tokens": 100, "answer_perplexity": 8.0},
    ]
    assert found[lost]["error"] == "a worker was lost"


def away(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> Trial:
    """``trial``, trained and evaluated, with a run in an MLflow that does not answer."""
    RunRecord(config={}, identity={}, fingerprints={}, mlflow_run_id="0" * 32).write(trial.train.out)
    score = SubjectScore(task="depth", subject="tuned", metric="abs_rel", mean=0.25, low=None, high=None, episodes=4)
    results = EvaluationResults(
        subjects=(), tasks={}, lower_is_better=(), scores=(score,), differences=(), failed=(), seconds=1.0, config={},
        fingerprints={},
    )  # fmt: skip
    result = SimpleNamespace(steps=7, seconds=1.0, tokens=70)
    monkeypatch.setattr(running, "train", lambda config, watch, patience_s: result)
    monkeypatch.setattr(running, "evaluate", lambda config, patience_s: results)
    tracking = trial.train.tracking.model_copy(update={"uri": "http://127.0.0.1:9", "log_every_steps": 4})
    return replace(trial, train=trial.train.model_copy(update={"tracking": tracking}))


def test_an_mlflow_that_is_away_costs_no_trial_and_ends_no_sweep(
    config: SweepConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = {trial.name: away(trial, monkeypatch) for trial in grid_of(config).trials}
    finished, stopped, lost = trials
    running.TrialDriver().run(trials[finished], config.out)
    progress = running._Progress(config.out, trials, 0)
    one: Any
    for one, ends in ((Ended(stopped), progress.on_trial_complete), (Ended(lost), progress.on_trial_error)):
        ends(0, [], one)
    found = [storage.read_json(f"{config.out}/trials/{name}.json")["status"] for name in trials]
    assert found == ["finished", "stopped", "failed"]
    said = capsys.readouterr().err.splitlines()
    assert [line for name in trials for line in said if line.startswith(f"covray: {name}: MLflow at http://")] == [
        line for line in said if "MLflow" in line
    ]
    assert sum("MLflow" in line for line in said) == 3


def test_a_trial_s_scores_reach_mlflow_however_seldom_steps_are_logged_and_before_it_is_done(
    config: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = away(grid_of(config).trials[0], monkeypatch)
    logged: dict[str, float] = {}

    class Store:
        def log_batch(self, run_id: str, metrics: Any) -> None:
            assert running.read_trial(config.out, trial.name) is None, (
                "a kill here would leave MLflow without the scores"
            )
            logged.update({metric.key: metric.value for metric in metrics})

        def set_terminated(self, run_id: str, status: str) -> None:
            assert status == "FINISHED"

    monkeypatch.setattr(MlflowTracker, "start", lambda tracker: setattr(tracker, "_client", Store()))
    running.TrialDriver().run(trial, config.out)
    assert logged == {"depth/abs_rel": 0.25}


@pytest.mark.parametrize("rule", ["median", "asha"])
def test_a_rule_stops_who_is_worse_at_equal_tokens_and_nobody_before_the_grace(config: SweepConfig, rule: str) -> None:
    given = config.model_dump(mode="json")
    given["train"]["optimizer"] = {"batch_tokens": 512, "epochs": 8.0}
    chosen = load_config(SweepConfig, None, given | {"stopping": rule, "grace": 0.5})
    scheduler = running._scheduler(chosen)
    assert scheduler is not None
    tokens = min(line.train_tokens for line in running.plan_sweep(chosen).trials)
    controller: Any = None
    good = [Ended(f"good {number}") for number in range(4)]
    bad: Any = Ended("bad")
    for trial in (*good, bad):
        scheduler.on_trial_add(controller, trial)  # type: ignore[arg-type]

    def decide(trial: Any, share: float, perplexity: float) -> str:
        result = {"tokens": int(share * tokens), "answer_perplexity": perplexity, "training_iteration": 1}
        return scheduler.on_trial_result(controller, trial, result | {"time_total_s": 1.0})

    assert {decide(trial, share, 10.0) for trial in good for share in (0.1, 0.4)} == {"CONTINUE"}
    assert decide(bad, 0.4, 99.0) == "CONTINUE"
    assert {decide(trial, 0.6, 8.0) for trial in good} == {"CONTINUE"}
    assert decide(bad, 0.6, 99.0) == "STOP"
    assert running._scheduler(config) is None


def test_scores_of_a_trial_that_ended_while_mlflow_was_away_are_logged_later(
    config: SweepConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = {trial.name: trial for trial in grid_of(config).trials}
    name, trial = next(iter(trials.items()))
    run_id = MlflowTracker(trial.train, None).start()
    RunRecord(config={}, identity={}, fingerprints={}, mlflow_run_id=run_id).write(trial.train.out)
    entry = {"task": "depth", "metric": "AbsRel", "subject": "tuned", "mean": 0.25, "low": None, "high": None}
    table = {"tasks": {}, "lower_is_better": [], "scores": [entry | {"episodes": 4}]}
    path = storage.join(config.out, "trials", f"{name}.json")
    storage.write_json(path, {"status": "finished", "table": table, "tracked": False})
    away = replace(trial, train=trial.train.model_copy(update={"tracking": TrackingConfig(uri="http://127.0.0.1:9")}))

    running._track_trials(config.out, trials | {name: away})
    assert "the sweep goes on" in capsys.readouterr().err
    assert not storage.read_json(path)["tracked"]
    running._track_trials(config.out, trials)
    assert storage.read_json(path)["tracked"]
    run = MlflowClient(store_of(trial.train)).get_run(run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"depth/AbsRel": 0.25})


class FakeTuner:
    """Runs trials one after another in this process, as Tune would: reports validations, and tells the callback."""

    def __init__(self, trials: dict[str, Trial], names: list[str], progress: Any, out: str):
        self._trials, self._names, self._progress, self._out = trials, names, progress, out

    def fit(self) -> None:
        for name in self._names:
            ended: Any = Ended(name)
            self._progress.on_trial_start(0, [], ended)
            driver = running.TrialDriver()
            try:
                driver.run(self._trials[name], self._out)
            except WeightsError as error:
                ended.error_file = f"{self._out}.error.txt"
                Path(ended.error_file).write_text(f"covray.errors.WeightsError: {error}\n")
                self._progress.on_trial_error(0, [], ended)
                continue
            for validation in driver.take():
                self._progress.on_trial_result(0, [], ended, validation.to_json())
            self._progress.on_trial_complete(0, [], ended)


def test_a_killed_sweep_continues_with_the_trials_that_are_not_done_or_failed(
    config: SweepConfig, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainings and evaluations are quick fakes, and so are Ray and Tune; all the rest is the command's own."""
    score = {"task": "depth", "metric": "abs_rel", "mean": 0.25, "low": 0.2, "high": 0.3, "episodes": 4}
    tasks = {"depth": {"episodes": 4, "primary": "abs_rel", "metrics": ["abs_rel"]}}
    trained: list[str] = []
    kill_after = 1
    without_weights = ""

    def fake_train(config: Any, watch: Any, patience_s: float) -> Any:
        assert patience_s > 0
        if len(trained) == kill_after:
            raise KeyboardInterrupt
        if config.out == without_weights:
            raise WeightsError(f"{config.out}: has no weights")
        trained.append(config.out)
        RunRecord(config={}, identity={}, fingerprints={}, mlflow_run_id=None).write(config.out)
        watch({"step": 0, "validation_loss": 1.0, "answer_perplexity": 9.0})
        watch({"step": 1, "loss": 1.0, "tokens": 70})
        return SimpleNamespace(steps=1, seconds=1.0, tokens=70)

    def fake_evaluate(config: Any, patience_s: float = 0.0) -> EvaluationResults:
        values = {"scores": [score | {"subject": "tuned"}], "seconds": 1.0, "tasks": tasks, "lower_is_better": []}
        empty = {"subjects": [], "differences": [], "failed": [], "config": {}, "fingerprints": {}}
        return EvaluationResults.model_validate(values | empty)

    @contextmanager
    def two_cores() -> Iterator[int]:
        yield 2

    def tuner(config: SweepConfig, trials: Any, names: Any, progress: Any, concurrency: int) -> FakeTuner:
        assert concurrency == 2
        return FakeTuner(trials, list(names), progress, config.out)

    monkeypatch.setattr(sweeps, "ray_session", two_cores)
    monkeypatch.setattr(running.ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(running, "_tuner", tuner)
    monkeypatch.setattr(running, "train", fake_train)
    monkeypatch.setattr(running, "evaluate", fake_evaluate)
    monkeypatch.setattr(sweeps, "evaluate", fake_evaluate)
    config = config.model_copy(update={"tracking": TrackingConfig(uri="none")})
    trials = grid_of(config).trials

    with pytest.raises(KeyboardInterrupt):
        sweep(config)
    assert [trial.status for trial in report(config.out).trials] == ["finished", "waiting", "waiting"]
    seconds = SweepRecord.read(config.out).seconds
    kill_after, without_weights = 99, trials[1].train.out
    code, printed, message = run("sweep", "--resume", "--out", config.out, "--json")
    assert code == 0, "a trial that failed ends no sweep"
    assert "Traceback" not in message
    results = json.loads(printed)
    assert results == json.loads(Path(config.out, "results.json").read_text())
    assert [trial["status"] for trial in results["trials"]] == ["finished", "failed", "finished"]
    assert results["trials"][1]["error"] == f"{without_weights}: has no weights"
    without_weights = ""
    results = sweep(config)
    assert len(trained) == len(set(trained)) == len(trials) == 3, "no trial is trained twice"
    assert [trial["status"] for trial in results["trials"]] == ["finished"] * 3
    assert results["trials"][0]["validation"] == [{"tokens": 0, "answer_perplexity": 9.0}]
    assert results["seconds"] > seconds > 0
    assert sweep(config)["trials"] == results["trials"], "and a finished sweep trains nothing"
    assert len(trained) == 3
    folder = sorted(path.name for path in Path(config.out).iterdir() if path.name.startswith("_"))
    assert folder == ["_sweep.json"], "neither a lock nor Ray's folder is left"
