"""The trials of a sweep on Ray Tune: what runs when, and what is stopped early.

    Tuner -> a trial of Tune (waits) -> TrialDriver (an actor): train, evaluate, write trials/NAME.json

What is done and what is not is in the folders, not in Tune's own state: training and evaluation continue by themselves,
so a trial that is begun again goes on where it was.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import ray
import ray.exceptions
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from covray.config import SweepConfig
from covray.distributed.evaluate import evaluate
from covray.distributed.lock import STALE_S
from covray.distributed.progress import LINE_EVERY_S, time_left
from covray.distributed.resumable import run_ids
from covray.distributed.trackers.together import RunTrackers
from covray.distributed.tracking import store_of
from covray.distributed.train import train
from covray.errors import ConfigError
from covray.evaluation.records import SubjectScore
from covray.io.storage import Folder
from covray.progress import own_display
from covray.sweeps.grid import Grid, Trial
from covray.sweeps.plan import plan_sweep
from covray.sweeps.records import TRIALS, TrialRecord, TrialTable, Validation
from covray.training.metrics_log import Metrics
from covray.training.records import RunRecord

_RAY = "_ray"
_TRIAL_CPUS = 0.01  # a trial of Tune only waits for its driver, but Tune wants something to reserve
_POLL_S = 1.0
_COUNT_EVERY_S = 30.0


@dataclass(frozen=True)
class Session:
    """What the trials of one call of a sweep have in common."""

    config: SweepConfig
    cores: int
    """CPUs that may compute."""
    mlflow_run_id: str | None
    """The run of the sweep; None without tracking."""


def run_trials(session: Session, grid: Grid, count: Callable[[], None]) -> None:
    """Run the trials of ``grid`` that are not done, and once more those that failed.

    Args:
        session: What they have in common.
        grid: The trials.
        count: Called now and then.
    """
    config = session.config
    folder = Folder(config.out)
    concurrency = _concurrency(config, grid, session.cores)
    trials = {trial.name: _placed(session, trial, concurrency) for trial in grid.trials}
    # A failed trial is tried again by the same command; its record would make it count as done.
    waiting = []
    for name in trials:
        record = read_trial(config.out, name)
        if record is None or record.status == "failed":
            waiting.append(name)
        if record is not None and record.status == "failed":
            folder.delete_file(_file_of(name))
    if waiting:
        reported = waiting
        if config.stopping != "none":  # the rule compares trials: those that are done are reported again, first
            done = [name for name in trials if name not in waiting]
            reported = done + waiting
        # Tune's own state of an earlier command: what is done stands in covray's files.
        ray_folder = folder / _RAY
        if ray_folder.exists():
            ray_folder.delete()
        ray_folder.create()
        progress = _Progress(config.out, trials, len(trials) - len(reported))
        with progress:
            _fit(_tuner(config, trials, reported, progress, concurrency), progress, count)
        for name in waiting:  # whatever became of a trial, it is written down
            if read_trial(config.out, name) is None:
                _write_end(config.out, name, "failed", "ended without a result; run the same command again", [])
        ray_folder.delete()
    # Trials whose tracker was away when they ended are logged now.
    _track_trials(config.out, trials)


def read_trial(out: str, name: str) -> TrialRecord | None:
    """Return how the trial ``name`` of the sweep ``out`` ended; None where it is not done."""
    return TrialRecord.read_if_present(out, _file_of(name))


def _file_of(name: str) -> str:
    return f"{TRIALS}/{name}.json"


class TrialDriver:
    """Runs one trial.

    An actor of its own: what a trial of Tune starts must fit into the resources reserved for that trial, and training
    and evaluation reserve their own.
    """

    def __init__(self) -> None:
        """Begin with nothing to report."""
        self._new: list[Validation] = []

    def run(self, trial: Trial, out: str) -> None:
        """Train, evaluate, and write the trial's file below the sweep ``out``."""
        validations: list[Validation] = []
        tokens = 0

        def watch(record: Metrics) -> None:
            nonlocal tokens  # summed over the steps: a validation is reported by the tokens trained so far
            tokens += int(record.get("tokens", 0))
            if "validation_loss" in record:
                validation = Validation(tokens=tokens, answer_perplexity=record["answer_perplexity"])
                validations.append(validation)
                self._new.append(validation)

        # Patient: what a killed sweep has started may work for a moment longer.
        result = train(trial.train, watch, patience_s=STALE_S)
        results = evaluate(trial.evaluate, patience_s=STALE_S)
        table = TrialTable(tasks=results.tasks, lower_is_better=results.lower_is_better, scores=results.scores)
        # Before the record, after which nobody comes back here: a kill in between must not cost MLflow the scores.
        tracked = _close_run(trial, "FINISHED", _means(table.scores))
        gpus = trial.train.workers.count * (trial.train.workers.gpus or 0.0)
        TrialRecord(
            status="finished",
            train_seconds=result.seconds,
            evaluate_seconds=results.seconds,
            steps=result.steps,
            tokens=result.tokens,
            gpus=gpus,
            gpu_hours=gpus * (result.seconds + results.seconds) / 3600,
            validation=tuple(validations),
            table=table,
            tracked=tracked,
        ).write(out, _file_of(trial.name))

    def take(self) -> list[Validation]:
        """Return the validations since the last call."""
        taken, self._new = self._new, []
        return taken


def _follow(parameters: dict[str, str], trials: Mapping[str, Trial], out: str) -> None:
    """Be a trial of Tune: start the driver, and report what it validates."""
    trial = trials[parameters["trial"]]
    record = read_trial(out, trial.name)
    if record is not None:  # of an earlier call: Tune needs to know what the others are compared with
        for validation in record.validation:
            tune.report(validation.to_json())
        return
    # Anywhere in the cluster but in the bundle of this trial, where nothing else fits.
    # Two calls at a time: ``take`` answers while ``run`` works.
    driver = ray.remote(TrialDriver).options(num_cpus=0, max_concurrency=2, scheduling_strategy="SPREAD").remote()
    running = driver.run.remote(trial, out)
    while True:
        ended, _ = ray.wait([running], timeout=_POLL_S)  # before ``take``, so that the last validation is not lost
        for validation in ray.get(driver.take.remote()):
            tune.report(validation.to_json())
        if ended:
            ray.get(running)
            return


def _tuner(
    config: SweepConfig, trials: Mapping[str, Trial], names: Sequence[str], progress: _Progress, concurrency: int
) -> tune.Tuner:
    """Return what runs the trials ``names`` of ``trials``, ``concurrency`` at a time, and tells ``progress``."""
    # Tune's own loggers and output would stand between covray's lines.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # covray itself says that a trial failed
    folder = Folder(config.out) / _RAY
    return tune.Tuner(
        # A trial of Tune waits for its driver; what computes asks Ray for resources of its own.
        tune.with_resources(tune.with_parameters(_follow, trials=trials, out=config.out), {"CPU": _TRIAL_CPUS}),
        param_space={"trial": tune.grid_search(list(names))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=concurrency, scheduler=_scheduler(config), trial_name_creator=_name_of
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=folder.inner,
            storage_filesystem=folder.filesystem,
            failure_config=tune.FailureConfig(max_failures=config.retries),
            callbacks=[progress],
            verbose=0,
        ),
    )


def _fit(tuner: tune.Tuner, progress: _Progress, count: Callable[[], None]) -> None:
    """Run ``tuner`` to its end, show ``progress``, and call ``count`` now and then."""
    threads = ThreadPoolExecutor(1)  # not this thread: Tune would take the signals for itself
    try:
        fitting: Future[Any] = threads.submit(tuner.fit)
        count_due = 0.0
        while True:
            try:
                fitting.result(timeout=_POLL_S)
                return
            except NotYet:
                progress.show()
                if time.monotonic() > count_due:
                    count_due = time.monotonic() + _COUNT_EVERY_S
                    count()
    finally:
        threads.shutdown(wait=False)  # after a signal Tune would be waited for to its end


def _scheduler(config: SweepConfig) -> TrialScheduler | None:
    """Return the rule that stops trials early; None for none."""
    if config.stopping == "none":
        return None
    # The shortest training says when the first trial can be judged.
    tokens = [line.train_tokens for line in plan_sweep(config).trials]
    rule = {"time_attr": "tokens", "metric": "answer_perplexity", "mode": "min"}
    grace = max(1, int(config.grace * min(tokens)))
    if config.stopping == "median":
        # It would pause trials to wait for others; a paused one loses its workers, and gains nothing.
        never: Any = float("inf")
        return MedianStoppingRule(**rule, grace_period=grace, min_samples_required=2, min_time_slice=never)
    # At its last step a trial is not stopped by the rule: it would miss its evaluation.
    return ASHAScheduler(**rule, grace_period=grace, max_t=max(*tokens, grace + 1), stop_last_trials=False)


def _concurrency(config: SweepConfig, grid: Grid, cores: int) -> int:
    """Return how many trials run at a time: as many as are asked for, or fit now."""
    if config.concurrency is not None:
        return config.concurrency
    gpus = ray.cluster_resources().get("GPU", 0)
    fits = [len(grid.trials)]
    for workers in {trial.train.workers for trial in grid.trials}:
        gpus_each = workers.gpus
        if gpus_each is None:
            # Left open, a worker takes a GPU where there are any.
            gpus_each = 0.0
            if gpus:
                gpus_each = 1.0
        if gpus_each:
            fits.append(int(gpus / (workers.count * gpus_each)))
        else:
            fits.append(int(cores / (workers.count * workers.cpus)))
    return max(1, min(fits))


def _placed(session: Session, trial: Trial, concurrency: int) -> Trial:
    """Return ``trial`` with its share of the machine, of ``concurrency`` trials, and with its place in MLflow."""
    resources = ray.cluster_resources()
    compute, workers = trial.train.compute, trial.train.workers
    # On CPUs the trials share the cores, and each its share among its workers.
    if compute.threads is None and not resources.get("GPU", 0):
        threads = max(1, session.cores // (concurrency * workers.count))
        compute = compute.model_copy(update={"threads": threads})
    parent = session.mlflow_run_id
    uri: str | None = "none"
    if parent is not None:
        uri = store_of(session.config)
    tracking = session.config.tracking.model_copy(update={"uri": uri, "parent_run_id": parent})
    evaluation = trial.evaluate
    actors = evaluation.actors
    # The evaluation of a trial may take what the trial's share of the machine is.
    if actors.max is None:
        fit = int(resources.get("GPU", 0) or session.cores // evaluation.engine.threads) // concurrency
        actors = actors.model_copy(update={"max": max(actors.min, fit)})
    return replace(
        trial,
        train=trial.train.model_copy(update={"compute": compute, "tracking": tracking}),
        evaluate=evaluation.model_copy(update={"actors": actors}),
    )


def _name_of(trial: TuneTrial) -> str:
    """Return our name of a trial of Tune."""
    return str(trial.config["trial"])


class _Progress(tune.Callback):
    """Counts the trials, writes down how those ended that could not do it themselves, and shows both."""

    def __init__(self, out: str, trials: Mapping[str, Trial], before: int):
        """Begin to count ``trials`` of the sweep ``out``, of which ``before`` are done already."""
        self._out, self._trials = out, trials
        self._before, self._ended, self._running = before, dict[str, str](), set[str]()
        self._validations: dict[str, list[Validation]] = {}
        self._console = Console(stderr=True, emoji=False)
        self._own_display = own_display()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(*columns, TimeElapsedColumn(), console=self._console, disable=not sys.stderr.isatty())
        self._task = self._progress.add_task("starting trials", total=len(trials), completed=before)
        self._started = self._line_due = time.monotonic()  # the first line comes at once

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune writes itself down, and with it this, but nobody reads it."""
        return {}

    def __enter__(self) -> _Progress:
        """Show the bar."""
        self._own_display.__enter__()
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away."""
        self._progress.stop()
        self._own_display.__exit__(kind, error, trace)

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Note that a trial runs."""
        self._running.add(_name_of(trial))

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        """Note a validation."""
        if "answer_perplexity" in result:
            validation = Validation(tokens=result["tokens"], answer_perplexity=result["answer_perplexity"])
            self._validations.setdefault(_name_of(trial), []).append(validation)

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Note that a trial is done, or was stopped by the rule."""
        name = _name_of(trial)
        record = read_trial(self._out, name)
        if record is None:
            _write_end(self._out, name, "stopped", None, self._validations.get(name, []))
            _close_run(self._trials[name], "KILLED")
            self._end(name, "stopped")
        else:
            self._end(name, record.status)

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Note that a trial failed for the last time."""
        name = _name_of(trial)
        error = _failure(trial)
        _write_end(self._out, name, "failed", error, self._validations.get(name, []))
        _close_run(self._trials[name], "FAILED")
        self._end(name, "failed")
        self._console.print(f"{name} failed: {error}", highlight=False, soft_wrap=True, markup=False)

    def _end(self, name: str, status: str) -> None:
        self._running.discard(name)
        self._ended[name] = status

    def show(self) -> None:
        """Show how many trials run and how many have ended."""
        ended, total = len(self._ended), len(self._trials)
        counts = [f"{len(self._running)} running"]
        for status in ("failed", "stopped"):
            number = list(self._ended.values()).count(status)
            if number:
                counts.append(f"{number} {status}")
        # The mean of the trials that ended in this call says how long the others take.
        if ended:
            seconds = (time.monotonic() - self._started) / ended
            counts.append(f"{seconds / 60:.1f} min a trial, {time_left(seconds * (total - self._before - ended))}")
        text = "trials: " + ", ".join(counts)
        self._progress.update(self._task, completed=min(total, self._before + ended), description=text)
        if not sys.stderr.isatty() and time.monotonic() > self._line_due:
            self._line_due = time.monotonic() + LINE_EVERY_S
            self._console.print(f"{self._before + ended}/{total} {text}", highlight=False, soft_wrap=True)


def _failure(trial: TuneTrial) -> str:
    """Return in one line why a trial failed: the last line that names an error, without the error's class."""
    text = ""
    if trial.error_file:
        text = Path(trial.error_file).read_text(encoding="utf-8")
    named = re.findall(r"^[\w.]*(?:Error|Exception)[^:\s]*: (.+)$", text, re.MULTILINE)
    if not named:
        return "a worker was lost"
    return str(named[-1]).strip()


def _write_end(
    out: str, name: str, status: Literal["stopped", "failed"], error: str | None, validations: list[Validation]
) -> None:
    """Record that the trial ``name`` of the sweep ``out`` ended without scores: stopped early, or failed."""
    TrialRecord(status=status, error=error, validation=tuple(validations)).write(out, _file_of(name))


# --- MLflow ----------------------------------------------------------------------------------------------------------


def _close_run(
    trial: Trial, status: Literal["FINISHED", "FAILED", "KILLED"], means: Mapping[str, float | None] | None = None
) -> bool:
    """Log how the run of a trial ended to its trackers; a store that is away is one line, and no more.

    Args:
        trial: The trial.
        status: How it ended.
        means: Its scores.

    Returns:
        Whether the store has all of it, or is not asked to.
    """
    run = RunRecord.read_if_present(trial.train.out)
    # A run that never started, or that no tracker knows, has nothing to close.
    if run is None or not any(run_ids(run).values()):
        return True
    try:
        tracker = RunTrackers(trial.train, run_ids(run), "covray train")
        tracker.start()
    except ConfigError as error:
        Console(stderr=True, emoji=False).print(
            f"covray: {trial.name}: {error}; the sweep goes on, and its folder has what MLflow lacks",
            highlight=False, soft_wrap=True, markup=False,
        )  # fmt: skip
        return False
    tracker.log(0, means or {})
    return tracker.finish(status)


def _means(scores: Iterable[SubjectScore]) -> dict[str, float | None]:
    """Return the means of an evaluation by their names in MLflow."""
    return {f"{score.task}/{score.metric}": score.mean for score in scores}


def _track_trials(out: str, trials: Mapping[str, Trial]) -> None:
    """Log the scores of trials that ended while MLflow was away."""
    for name, trial in trials.items():
        record = read_trial(out, name)
        if record is not None and record.table is not None and not record.tracked:
            tracked = _close_run(trial, "FINISHED", _means(record.table.scores))
            record.model_copy(update={"tracked": tracked}).write(out, _file_of(name))
