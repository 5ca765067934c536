"""``covray sweep``: a grid of trainings and evaluations on Ray Tune, continued by the same command after any kill.

    driver: checks, builds the chains, evaluates what all trials share -> trials: train, then evaluate -> report

A trial that is done is one file, ``trials/NAME.json``; the report is made of those files alone.
"""

from __future__ import annotations

import time
from typing import Any

from covray.config import SweepConfig, load_config
from covray.distributed.build import build
from covray.distributed.evaluate import RESULTS, evaluate
from covray.distributed.pool import one_line_errors
from covray.distributed.resumable import Output, mlflow_run_of
from covray.distributed.session import ray_session
from covray.distributed.sweep_checks import absolute_paths
from covray.distributed.trackers.together import RunTrackers
from covray.distributed.trials import Session, read_trial, run_trials
from covray.errors import ConfigError
from covray.evaluation.records import EvaluationResults, SubjectEntry, SubjectScore, TaskSummary
from covray.io.storage import Folder, absolute
from covray.progress import stage
from covray.report.sweep import write_sweep_page
from covray.sweeps.grid import Grid, Trial, grid_of
from covray.sweeps.records import Reference, SweepRecord, SweepResults, TrialEntry, TrialRecord, TrialScore, TrialTable
from covray.sweeps.results import tabulate, to_csv

TABLE, PAGE = "table.csv", "index.html"
_OF_TRIAL = ("name", "label", "method", "length", "pairs", "tasks", "scale", "fields", "seed", "context_tokens")
_OF_REFERENCE = ("name", "kind", "method", "length", "pairs", "about")
_OF_RECORD = (
    "status", "error", "train_seconds", "evaluate_seconds", "steps", "tokens", "gpu_hours", "gpus", "validation",
)  # fmt: skip


def sweep(config: SweepConfig) -> dict[str, Any]:
    """Train and evaluate every trial of ``config``.

    Called again it continues: trials that are done are not repeated, those that failed are tried once more. The grid
    may have changed meanwhile.

    Returns:
        What is written to ``results.json``, in which a trial that failed says why.

    Raises:
        CovrayError: A configuration, dataset, manifest, model or storage cannot be used; no trial has been started.
    """
    return run_sweep(config).to_json()


def run_sweep(config: SweepConfig) -> SweepResults:
    """Train and evaluate every trial of ``config``, as ``sweep`` does; return the results as a record."""
    config = absolute_paths(config)
    with Output(config.out, SweepRecord, "covray sweep") as output:
        if output.begun is not None:
            output.require_same(output.begun.identity, config.identity())
        with stage("reading the dataset and the models, to list the trials"):
            grid = grid_of(config)
        with ray_session() as cores, one_line_errors(config.out, "sweep"):
            results = _sweep(config, grid, output, cores)
    return results


def _sweep(config: SweepConfig, grid: Grid, output: Output[SweepRecord], cores: int) -> SweepResults:
    """Run the sweep in a Ray session with ``cores`` cores."""
    begun = output.begun
    seconds = 0.0  # of all commands that were at work in this folder
    if begun is not None:
        seconds = begun.seconds
    record = SweepRecord(
        config=config.model_dump(mode="json"),
        identity=config.identity(),
        mlflow_run_id=mlflow_run_of(begun),
        seconds=seconds,
    )
    with output.tracked(config, record) as (tracker, record):
        started = time.monotonic()

        def count() -> None:
            """Write down how long it took so far: a killed sweep took its time, too."""
            seconds = record.seconds + time.monotonic() - started
            record.model_copy(update={"seconds": seconds}).write(output.folder)

        try:
            if grid.build is not None:
                build(grid.build)
                grid = grid_of(config)  # of the pairs that are good there may be too few
            for reference in grid.references:
                evaluate(reference)
            count()
            run_trials(Session(config, cores, record.mlflow_run_id), grid, count)
            count()
            with stage("writing the table and the page"):
                results = report(config.out)
            _track(tracker, config, results)
        finally:
            count()
    return results


def resumed(out: str) -> SweepConfig:
    """Return the configuration of the sweep in the folder ``out``, as it was started. Raises ConfigError."""
    record = _record(out)
    return load_config(SweepConfig, None, record.config).model_copy(update={"out": out})


def report(out: str) -> SweepResults:
    """Write table and page of the sweep ``out`` from the trials that are done so far; return its results."""
    record = _record(out)
    config = absolute_paths(resumed(out))
    folder = Folder(config.out)
    grid = grid_of(config)
    evaluations = []  # of what all trials share; those that are done
    for reference in grid.references:
        results = EvaluationResults.read_if_present(reference.out)
        if results is not None:
            evaluations.append(results)
    tables: list[EvaluationResults | TrialTable] = [*evaluations]
    trials = []
    for trial in grid.trials:
        done = read_trial(config.out, trial.name)
        trials.append(_trial_entry(trial, done))
        if done is not None and done.table is not None:
            tables.append(done.table)
    references = []
    for results in evaluations:
        references += [_reference(subject, results) for subject in results.subjects]
    lower_is_better: set[str] = set()
    for table in tables:
        lower_is_better.update(table.lower_is_better)
    sweep_results = tabulate(
        trials, references, _tasks(tables), sorted(lower_is_better), grid.left_out, record.config, record.seconds
    )
    write_sweep_page(sweep_results, folder.join(PAGE))
    folder.write_bytes(TABLE, to_csv(sweep_results).encode())
    sweep_results.write(folder)
    return sweep_results


def _record(out: str) -> SweepRecord:
    record = SweepRecord.read_if_present(absolute(out))
    if record is None:
        raise ConfigError(f"{out}: holds no sweep to continue; give the --out of a covray sweep")
    return record


def _tasks(tables: list[EvaluationResults | TrialTable]) -> dict[str, TaskSummary]:
    """Return what the first of ``tables`` says of each task, with the metrics of all of them."""
    tasks: dict[str, TaskSummary] = {}
    for table in tables:
        for task, summary in table.tasks.items():
            known = tasks.setdefault(task, summary)
            metrics = dict.fromkeys((*known.metrics, *summary.metrics))
            tasks[task] = known.model_copy(update={"metrics": tuple(metrics)})
    return tasks


def _trial_entry(trial: Trial, record: TrialRecord | None) -> TrialEntry:
    """Return what ``results.json`` says of a trial, which is not done where ``record`` is None."""
    values = {key: getattr(trial, key) for key in _OF_TRIAL}
    if record is None:
        record = TrialRecord(status="waiting")
    values |= {key: getattr(record, key) for key in _OF_RECORD}
    scores = []
    if record.table is not None:
        scores = [_score(score) for score in record.table.scores]
    return TrialEntry(**values, scores=tuple(scores))


def _reference(subject: SubjectEntry, results: EvaluationResults) -> Reference:
    """Return what ``results.json`` says of a subject that all trials are compared with."""
    scores = [_score(score) for score in results.scores if score.subject == subject.name]
    values = {key: getattr(subject, key) for key in _OF_REFERENCE}
    return Reference(**values, scores=tuple(scores))


def _score(score: SubjectScore) -> TrialScore:
    return TrialScore.model_validate(score.model_dump(exclude={"subject"}))


def _track(tracker: RunTrackers, config: SweepConfig, results: SweepResults) -> None:
    """Log the claims' figures and the files to MLflow."""
    gains = {}
    for claim in results.claims:
        if claim.overall is not None:
            gains[f"claims/{claim.key}"] = claim.overall.gain_percent
    tracker.log(0, gains)
    tracker.artefacts(config.out, (RESULTS, TABLE, PAGE))
