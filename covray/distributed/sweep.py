"""``covray sweep``: a grid of trainings and evaluations on Ray Tune, continued by the same command after any kill.

    driver: checks, builds the chains, evaluates what all trials share -> Tuner -> trials: train, then evaluate
    a trial that is done is one file, trials/NAME.json; the report is made of those files alone

Tune decides what runs when, and what is stopped early. What is done and what is not is in the folders, not in Tune's
own state: training and evaluation continue by themselves, so a trial begun again goes on where it was.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import ray
import ray.exceptions
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from covray.config import SweepConfig, load_config
from covray.distributed.build import build
from covray.distributed.evaluate import RESULTS, evaluate
from covray.distributed.pool import absolute, one_line_errors, read_description, require_fresh
from covray.distributed.progress import time_left
from covray.distributed.session import ray_session
from covray.distributed.tracking import Tracker, store_of
from covray.distributed.train import train
from covray.errors import ConfigError
from covray.evaluation.records import TaskSummary
from covray.io import storage
from covray.report.sweep import write_sweep_page
from covray.sweeps.grid import Grid, Trial, grid_of
from covray.sweeps.plan import plan_sweep
from covray.sweeps.records import Reference, TrialEntry
from covray.sweeps.results import tabulate, to_csv
from covray.training.checkpoints import require_same

DESCRIPTION, TRIALS, TABLE, PAGE = "_sweep.json", "trials", "table.csv", "index.html"
_KEYS = ("config", "identity", "mlflow_run_id", "seconds")
_RAY = "_ray"
_TRIAL_CPUS = 0.01  # a trial of Tune only waits for its driver, but Tune wants something to reserve
_POLL_S = 1.0
_LINE_EVERY_S = 30.0


def sweep(config: SweepConfig) -> dict[str, Any]:
    """Train and evaluate every trial of ``config``; returns what is written to ``results.json``.

    Called again it continues: trials that are done are not repeated, those that failed are tried once more. The grid
    may be another meanwhile. Raises CovrayError: a configuration, dataset, manifest, model or storage that cannot be
    used, before any trial is started; a trial that fails is in the results.
    """
    config = _absolute(config)
    described = read_description(storage.join(config.out, DESCRIPTION), _KEYS)
    if described is not None:
        require_same(config.out, described["identity"], config.identity())
    grid = grid_of(config)
    if described is None:
        require_fresh(config.out, "sweep")
    with ray_session() as cores, one_line_errors(config.out, "sweep"):
        description: dict[str, Any] = {
            "version": 1,
            "config": config.model_dump(mode="json"),
            "identity": config.identity(),
            "mlflow_run_id": described["mlflow_run_id"] if described else None,
            "seconds": described["seconds"] if described else 0.0,
        }
        storage.write_json(storage.join(config.out, DESCRIPTION), description)
        tracker = Tracker(config, description["mlflow_run_id"], "covray sweep")
        description["mlflow_run_id"] = tracker.start()
        storage.write_json(storage.join(config.out, DESCRIPTION), description)
        started, before = time.monotonic(), description["seconds"]

        def count() -> None:
            """Write down how long it took so far: a killed sweep took its time, too."""
            description["seconds"] = before + time.monotonic() - started
            storage.write_json(storage.join(config.out, DESCRIPTION), description)

        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        try:
            if grid.build is not None:
                build(grid.build)
                grid = grid_of(config)  # of the pairs that are good there may be too few
            for reference in grid.references:
                evaluate(reference)
            count()
            _run(config, grid, cores, description["mlflow_run_id"], count)
            count()
            results = report(config.out)
            _track(tracker, config, results)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            count()
            tracker.finish(status)
    return results


def resumed(out: str) -> SweepConfig:
    """The configuration of the sweep in the folder ``out``, as it was started. Raises ConfigError."""
    described = read_description(storage.join(absolute(out), DESCRIPTION), _KEYS)
    if described is None:
        raise ConfigError(f"{out}: holds no sweep to continue; give the --out of a covray sweep")
    return load_config(SweepConfig, None, described["config"]).model_copy(update={"out": out})


def report(out: str) -> dict[str, Any]:
    """Write table and page of the sweep ``out`` from the trials that are done so far; returns its results."""
    config = _absolute(resumed(out))
    described = read_description(storage.join(config.out, DESCRIPTION), _KEYS)
    assert described is not None
    grid = grid_of(config)
    references = [
        storage.read_json(path)
        for path in (storage.join(reference.out, RESULTS) for reference in grid.references)
        if storage.exists(path)
    ]
    trials = [_entry(trial, _record(config.out, trial.name)) for trial in grid.trials]
    tables = [*references, *(found for trial in trials if (found := trial.pop("table")) is not None)]
    about: dict[str, Any] = {}
    for table in tables:
        for task, facts in table["tasks"].items():
            known = about.setdefault(task, facts | {"metrics": []})
            known["metrics"] += [metric for metric in facts["metrics"] if metric not in known["metrics"]]
    results = tabulate(
        [TrialEntry.model_validate(trial) for trial in trials],
        [Reference.model_validate(_reference(subject, table)) for table in references for subject in table["subjects"]],
        {task: TaskSummary.model_validate(facts) for task, facts in about.items()},
        sorted({metric for table in tables for metric in table["lower_is_better"]}),
        grid.left_out,
        described["config"],
        described["seconds"],
    )
    write_sweep_page(results, storage.join(config.out, PAGE))
    storage.write_bytes(storage.join(config.out, TABLE), to_csv(results).encode())
    results.write(config.out)
    return results.to_json()


# --- the trials ------------------------------------------------------------------------------------------------------


class _TrialDriver:
    """Runs one trial. An actor of its own: what a trial of Tune starts must fit into the resources reserved for that
    trial, and training and evaluation reserve their own."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []

    def run(self, trial: Trial, out: str) -> None:
        """Train, evaluate, and write the trial's file."""
        validation: list[dict[str, Any]] = []
        tokens = 0

        def watch(record: dict[str, Any]) -> None:
            nonlocal tokens
            tokens += record.get("tokens", 0)
            if "validation_loss" in record:
                validation.append({"tokens": tokens, "answer_perplexity": record["answer_perplexity"]})
                self._records.append(validation[-1])

        result = train(trial.train, watch)
        scores = evaluate(trial.evaluate)
        means = _means(scores)
        # Before the record, after which nobody comes back here: a kill in between must not cost MLflow the scores.
        tracked = _close_run(trial, "FINISHED", means)
        gpus = trial.train.workers.count * (trial.train.workers.gpus or 0.0)
        record = {
            "status": "finished",
            "train_seconds": result["seconds"],
            "evaluate_seconds": scores["seconds"],
            "steps": result["steps"],
            "tokens": result["tokens"],
            "gpus": gpus,
            "gpu_hours": gpus * (result["seconds"] + scores["seconds"]) / 3600,
            "validation": validation,
            "table": {key: scores[key] for key in ("tasks", "lower_is_better", "scores")},
            "tracked": tracked,
        }
        storage.write_json(_path(out, trial.name), record)

    def take(self) -> list[dict[str, Any]]:
        """The validations since the last call."""
        taken, self._records = self._records, []
        return taken


def _follow(parameters: dict[str, str], trials: Mapping[str, Trial], out: str) -> None:
    """A trial of Tune: starts the driver, and reports what it validates."""
    trial = trials[parameters["trial"]]
    done = _record(out, trial.name)
    if done is not None:  # of an earlier session: Tune needs to know what the others are compared with
        for validation in done["validation"]:
            tune.report(validation)
        return
    # Anywhere in the cluster but in the bundle of this trial, where nothing else fits.
    driver = ray.remote(_TrialDriver).options(num_cpus=0, max_concurrency=2, scheduling_strategy="SPREAD").remote()
    running = driver.run.remote(trial, out)
    while True:
        ended, _ = ray.wait([running], timeout=_POLL_S)
        for validation in ray.get(driver.take.remote()):
            tune.report(validation)
        if ended:
            ray.get(running)
            return


def _run(config: SweepConfig, grid: Grid, cores: int, parent: str | None, count: Callable[[], None]) -> None:
    """Run the trials that are not done; ``count`` is called now and then."""
    concurrency = _concurrency(config, grid, cores)
    trials = {trial.name: _placed(config, trial, cores, concurrency, parent) for trial in grid.trials}
    records = {name: _record(config.out, name) for name in trials}
    waiting = [name for name, record in records.items() if record is None or record["status"] == "failed"]
    for name in waiting:
        if records[name] is not None:
            _delete(_path(config.out, name))
    if not waiting:
        _track_trials(config.out, trials)
        return
    # With a rule that compares trials, those that are done are told again.
    told = waiting if config.stopping == "none" else [*(name for name in trials if name not in waiting), *waiting]
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # that a trial failed, covray says
    folder = storage.join(config.out, _RAY)
    filesystem, inner = storage.resolve(folder)
    if storage.exists(folder):
        filesystem.delete_dir(inner)
    filesystem.create_dir(inner, recursive=True)
    board = _Progress(config.out, trials, len(trials) - len(told))
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_follow, trials=trials, out=config.out), {"CPU": _TRIAL_CPUS}),
        param_space={"trial": tune.grid_search(told)},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=concurrency, scheduler=_scheduler(config), trial_name_creator=_tune_name
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=inner,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=config.retries),
            callbacks=[board],
            verbose=0,
        ),
    )
    threads = ThreadPoolExecutor(1)  # not this thread: Tune would take the signals for itself
    try:
        with board:
            fitting: Future[Any] = threads.submit(tuner.fit)
            count_due = 0.0
            while True:
                try:
                    fitting.result(timeout=_POLL_S)
                    break
                except NotYet:
                    board.show()
                    if time.monotonic() > count_due:
                        count_due = time.monotonic() + _LINE_EVERY_S
                        count()
    finally:
        threads.shutdown(wait=False)
    for name in waiting:  # whatever became of it, it is written down
        if _record(config.out, name) is None:
            _write_end(config.out, name, "failed", "ended without a result; run the same command again", [])
    filesystem.delete_dir(inner)
    _track_trials(config.out, trials)


def _scheduler(config: SweepConfig) -> TrialScheduler | None:
    if config.stopping == "none":
        return None
    tokens = [line.train_tokens for line in plan_sweep(config).trials]
    rule = {"time_attr": "tokens", "metric": "answer_perplexity", "mode": "min"}
    grace = max(1, int(config.grace * min(tokens)))
    if config.stopping == "median":
        # It would pause trials to wait for others; a paused one loses its workers, and gains nothing.
        never: Any = float("inf")
        return MedianStoppingRule(**rule, grace_period=grace, min_samples_required=2, min_time_slice=never)
    return ASHAScheduler(**rule, grace_period=grace, max_t=max(*tokens, grace + 1), stop_last_trials=False)


def _concurrency(config: SweepConfig, grid: Grid, cores: int) -> int:
    if config.concurrency is not None:
        return config.concurrency
    gpus = ray.cluster_resources().get("GPU", 0)
    fits = []
    for workers in {trial.train.workers for trial in grid.trials}:
        each = workers.gpus if workers.gpus is not None else 1.0 if gpus else 0.0
        fits.append(int(gpus / (workers.count * each) if each else cores / (workers.count * workers.cpus)))
    return max(1, min(*fits, len(grid.trials)) if fits else 1)


def _placed(config: SweepConfig, trial: Trial, cores: int, concurrency: int, parent: str | None) -> Trial:
    """``trial`` with its share of the machine, and its place in MLflow."""
    compute, workers = trial.train.compute, trial.train.workers
    if compute.threads is None and not ray.cluster_resources().get("GPU", 0):
        compute = compute.model_copy(update={"threads": max(1, cores // (concurrency * workers.count))})
    tracking = config.tracking.model_copy(
        update={"uri": "none" if parent is None else store_of(config), "parent_run_id": parent}
    )
    evaluation = trial.evaluate
    actors = evaluation.actors
    if actors.max is None:
        resources = ray.cluster_resources()
        fit = int(resources.get("GPU", 0) or cores // evaluation.engine.threads) // concurrency
        actors = actors.model_copy(update={"max": max(actors.min, fit)})
    return replace(
        trial,
        train=trial.train.model_copy(update={"compute": compute, "tracking": tracking}),
        evaluate=evaluation.model_copy(update={"actors": actors}),
    )


def _tune_name(trial: TuneTrial) -> str:
    return str(trial.config["trial"])


class _Progress(tune.Callback):
    """Counts the trials, writes down how those ended that could not do it themselves, and shows both."""

    def __init__(self, out: str, trials: Mapping[str, Trial], before: int):
        self._out, self._trials = out, trials
        self._before, self._ended, self._running = before, dict[str, str](), set[str]()
        self._validation: dict[str, list[dict[str, Any]]] = {}
        self._console = Console(stderr=True, emoji=False)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(*columns, TimeElapsedColumn(), console=self._console, disable=not sys.stderr.isatty())
        self._task = self._progress.add_task("starting trials", total=len(trials), completed=before)
        self._started, self._line_due = time.monotonic(), time.monotonic() + _LINE_EVERY_S

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes itself down, and with it this; nobody reads it

    def __enter__(self) -> _Progress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """One more runs."""
        self._running.add(_tune_name(trial))

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        """It was validated."""
        if "answer_perplexity" in result:
            point = {key: result[key] for key in ("tokens", "answer_perplexity")}
            self._validation.setdefault(_tune_name(trial), []).append(point)

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """It is done, or was stopped by the rule."""
        name = _tune_name(trial)
        record = _record(self._out, name)
        if record is None:
            _write_end(self._out, name, "stopped", None, self._validation.get(name, []))
            _close_run(self._trials[name], "KILLED")
        self._end(name, "stopped" if record is None else record["status"])

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """It failed for the last time."""
        name = _tune_name(trial)
        why = _failure(trial)
        _write_end(self._out, name, "failed", why, self._validation.get(name, []))
        _close_run(self._trials[name], "FAILED")
        self._end(name, "failed")
        self._console.print(f"{name} failed: {why}", highlight=False, soft_wrap=True, markup=False)

    def _end(self, name: str, status: str) -> None:
        self._running.discard(name)
        self._ended[name] = status

    def show(self) -> None:
        """How far it is."""
        ended, total = len(self._ended), len(self._trials)
        counts = [f"{len(self._running)} running"]
        for status in ("failed", "stopped"):
            if number := list(self._ended.values()).count(status):
                counts.append(f"{number} {status}")
        if ended:
            seconds = (time.monotonic() - self._started) / ended
            counts.append(f"{seconds / 60:.1f} min a trial, {time_left(seconds * (total - self._before - ended))}")
        text = "trials: " + ", ".join(counts)
        self._progress.update(self._task, completed=min(total, self._before + ended), description=text)
        if not sys.stderr.isatty() and time.monotonic() > self._line_due:
            self._line_due = time.monotonic() + _LINE_EVERY_S
            self._console.print(f"{self._before + ended}/{total} {text}", highlight=False, soft_wrap=True)


def _failure(trial: TuneTrial) -> str:
    """The one line of why it failed: the last that names an error, without the error's class."""
    text = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
    named = re.findall(r"^[\w.]*(?:Error|Exception)[^:\s]*: (.+)$", text, re.MULTILINE)
    return str(named[-1]).strip() if named else "a worker was lost"


def _close_run(
    trial: Trial, status: Literal["FINISHED", "FAILED", "KILLED"], means: Mapping[str, float | None] | None = None
) -> bool:
    """Log ``means`` and how the run of a trial ended, to MLflow; a store that is away is one line, and no more.

    Gives whether the store has them, or is not asked to.
    """
    path = storage.join(trial.train.out, "_run.json")
    run_id = storage.read_json(path)["mlflow_run_id"] if storage.exists(path) else None
    if run_id is None:
        return True
    try:
        tracker = Tracker(trial.train, run_id)
        tracker.start()
    except ConfigError as error:
        Console(stderr=True, emoji=False).print(
            f"covray: {trial.name}: {error}; the sweep goes on, and its folder has what MLflow lacks",
            highlight=False, soft_wrap=True, markup=False,
        )  # fmt: skip
        return False
    tracker.log(0, means or {})
    return tracker.finish(status)


def _means(table: Mapping[str, Any]) -> dict[str, float | None]:
    """The means of an evaluation by their names in MLflow."""
    return {f"{entry['task']}/{entry['metric']}": entry["mean"] for entry in table["scores"]}


def _track_trials(out: str, trials: Mapping[str, Trial]) -> None:
    """Log the scores of trials that ended while MLflow was away."""
    for name, trial in trials.items():
        record = _record(out, name)
        if record is not None and not record.get("tracked", True):
            tracked = _close_run(trial, "FINISHED", _means(record["table"]))
            storage.write_json(_path(out, name), record | {"tracked": tracked})


# --- what is done ----------------------------------------------------------------------------------------------------


def _path(out: str, name: str) -> str:
    return storage.join(out, TRIALS, f"{name}.json")


def _record(out: str, name: str) -> dict[str, Any] | None:
    """The file of a trial; None where it is not done."""
    path = _path(out, name)
    return dict(storage.read_json(path)) if storage.exists(path) else None


def _write_end(out: str, name: str, status: str, error: str | None, validation: list[dict[str, Any]]) -> None:
    storage.write_json(_path(out, name), {"status": status, "error": error, "validation": validation})


def _delete(path: str) -> None:
    filesystem, inner = storage.resolve(path)
    filesystem.delete_file(inner)


def _entry(trial: Trial, record: dict[str, Any] | None) -> dict[str, Any]:
    """A trial of ``results.json``, with the whole ``table`` of its evaluation."""
    keys = ("name", "label", "method", "length", "pairs", "tasks", "scale", "fields", "seed", "context_tokens")
    found = {key: vars(trial)[key] for key in keys} | {
        "status": "waiting",
        "error": None,
        **dict.fromkeys(("train_seconds", "evaluate_seconds", "steps", "tokens", "gpu_hours")),
        "gpus": 0.0,
        "validation": [],
        "table": None,
    }
    found |= record or {}
    found.pop("tracked", None)
    table = found["table"]
    return found | {"scores": [] if table is None else [_score(entry) for entry in table["scores"]]}


def _reference(subject: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    scores = [_score(entry) for entry in table["scores"] if entry["subject"] == subject["name"]]
    return {key: subject[key] for key in ("name", "kind", "method", "length", "pairs", "about")} | {"scores": scores}


def _score(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "subject"}


def _track(tracker: Tracker, config: SweepConfig, results: Mapping[str, Any]) -> None:
    """The claims' figures and the files, to MLflow."""
    gains = {
        f"claims/{claim['key']}": claim["overall"]["gain_percent"] for claim in results["claims"] if claim["overall"]
    }
    tracker.log(0, gains)
    tracker.artefacts(config.out, (RESULTS, TABLE, PAGE))


def _absolute(config: SweepConfig) -> SweepConfig:
    update: dict[str, Any] = {"out": absolute(config.out)}
    for key in ("data", "manifest"):
        path = getattr(config, key)
        if path is not None:
            update[key] = absolute(path)
    return config.model_copy(update=update)
