"""``covray evaluate``: chains and adapters to scores, on a Ray Data actor pool, continued by the same command.

    episodes -> repartition -> Runner (actor pool) -> rows by task -> table, page, MLflow

An episode is a subject of the table and a query. What was computed before a kill is not computed again.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import ray
import torch
from ray.data import Dataset

from covray.chains.compatibility import require_same_tokens
from covray.chains.dataset import ChainDataset
from covray.config import BuildConfig, EvaluateConfig, load_config, named_run
from covray.distributed.metrics import EPISODES
from covray.distributed.plugin_checks import require_on_nodes, used_plugins
from covray.distributed.pool import (
    CHECKPOINT,
    RowsIn,
    RowsOut,
    absolute,
    choose_rows_per_block,
    delete_checkpoint,
    gpus_of,
    map_exactly_once,
    most_actors,
    on,
    one_line_errors,
    pool_of,
)
from covray.distributed.progress import BlockReport, rows_by_task, start_progress_actor
from covray.distributed.resumable import Output, run_ids
from covray.distributed.session import ray_session
from covray.distributed.trackers.base import require_trackers
from covray.distributed.trackers.together import RunTrackers
from covray.errors import ConfigError, DatasetError
from covray.evaluation.answers import EPISODE_SCHEMA, RESULT_SCHEMA
from covray.evaluation.lpips import find_alexnet, load_lpips
from covray.evaluation.pair_files import choose_pairs, require_pairs, write_pairs
from covray.evaluation.records import EvaluationRecord, EvaluationResults, EvaluationTable, SubjectScore
from covray.evaluation.results import Rank, choose_episodes, tabulate, to_csv
from covray.evaluation.runner import Runner
from covray.evaluation.subjects import Subject, adapter_weights, subjects_of
from covray.io import storage
from covray.io.storage import Folder
from covray.models.tokenizer.vqgan import load_tokenizer
from covray.plugins import require_packages
from covray.progress import stage
from covray.report.evaluation import Strip, write_evaluation_page
from covray.seeds import seed_of

RESULTS, TABLE, PAGE = EvaluationResults.FILE, "table.csv", "index.html"
_EPISODES, _QUERIES, _EXAMPLES, _ROWS = "_episodes.parquet", "_queries.parquet", "_examples.parquet", "rows"


def evaluate(config: EvaluateConfig, patience_s: float = 0.0) -> EvaluationResults:
    """Evaluate everyone that ``config`` names.

    Called again on an unfinished evaluation it continues it; on a finished one it returns the results at once.

    Args:
        config: The configuration; what it leaves open is decided here, and recorded.
        patience_s: Seconds to wait for another command that is at work in the folder.

    Returns:
        What is written to ``results.json``.

    Raises:
        CovrayError: A dataset, run, backbone, manifest or configuration cannot be used; nothing has been computed.
    """
    config = _absolute(config)
    with Output(config.out, EvaluationRecord, "covray evaluate", result=RESULTS, patience_s=patience_s) as output:
        if output.begun is not None:
            require_packages(output.begun.plugins, config.out)
        with stage("reading the dataset, the runs and the manifest"):
            work = _prepare(config)
        begun = output.begun
        if begun is not None:
            output.require_same(_without_places(begun.identity), _without_places(work.config.identity()))
            output.require_same(begun.fingerprints, work.fingerprints)
            if output.finished:
                return _finished(work.config, output.folder, begun)
        require_trackers(work.config)
        with ray_session() as cores, one_line_errors(config.out, "evaluation"):
            require_on_nodes(_plugins(work.config))
            gpus = gpus_of(config.actors, config.engine)
            with stage("loading the tokenizer, to check it"):
                _load_once(work.config, gpus)
            actors = most_actors(config.actors, config.engine, cores, gpus)
            pool = pool_of(config.actors, config.engine, cores, gpus)
            results = _evaluate(_with_block_size(work, actors), output, pool)
    return results


def report(out: str) -> EvaluationResults:
    """Write table and page of the finished evaluation ``out`` again; return its results. Raises ConfigError."""
    folder = Folder(absolute(out))
    record = EvaluationRecord.read_if_present(folder)
    if record is None or not folder.exists(RESULTS):
        raise ConfigError(f"{out}: holds no finished evaluation; run its covray evaluate again to continue it")
    config = load_config(EvaluateConfig, None, record.config).model_copy(update={"out": folder.path})
    results = EvaluationResults.read(folder)
    _write_results(config, [Subject(**subject) for subject in record.subjects], results)
    return results


@dataclass(frozen=True)
class _Work:
    """What an evaluation is about to do."""

    config: EvaluateConfig
    """Resolved."""
    subjects: tuple[Subject, ...]
    fingerprints: dict[str, str]
    queries: pa.Table
    examples: pa.Table
    root: str | None
    """The folder of the manifest's pictures."""
    episodes: pa.Table
    """``EPISODE_SCHEMA``."""


def _evaluate(work: _Work, output: Output[EvaluationRecord], pool: dict[str, Any]) -> EvaluationResults:
    """Evaluate in a Ray session on ``pool``, the arguments of ``map_batches``; return the results."""
    config, folder = work.config, output.folder
    assert config.manifest is not None
    record = EvaluationRecord(
        config=config.model_dump(mode="json"),
        identity=config.identity(),
        fingerprints=work.fingerprints,
        subjects=[subject.as_json() for subject in work.subjects],
        mlflow_run_id=None if output.begun is None else output.begun.mlflow_run_id,
    )
    plugins = _plugins(config)
    if plugins:  # else the key is absent, as in the files of earlier versions
        record = record.model_copy(update={"plugins": plugins})
    with output.tracked(config, record) as (tracker, record):
        with stage("writing the list of episodes"):
            for name, pairs in ((_QUERIES, work.queries), (_EXAMPLES, work.examples)):
                if not folder.exists(name):
                    write_pairs(folder.join(name), config.manifest, work.root, pairs)
            if not folder.exists(_EPISODES):
                folder.write_bytes(_EPISODES, _parquet_bytes(work.episodes))
        started = time.monotonic()
        table = _run(work, folder, pool)
        results = EvaluationResults(
            **{name: getattr(table, name) for name in table.model_fields_set},
            seconds=round(time.monotonic() - started, 1),
            config=record.config,
            fingerprints=work.fingerprints,
        )
        with stage("writing the table and the page"):
            _write_results(config, work.subjects, results)
        _track(tracker, config, results)
    delete_checkpoint(folder)
    return results


def _finished(config: EvaluateConfig, folder: Folder, record: EvaluationRecord) -> EvaluationResults:
    """Return the results of a finished evaluation, and log them where it was killed before MLflow had all of them."""
    results = EvaluationResults.read(folder)
    if folder.exists(CHECKPOINT):
        tracker = RunTrackers(config, run_ids(record), "covray evaluate")
        tracker.start()
        _track(tracker, config, results)
        tracker.finish("FINISHED")
        delete_checkpoint(folder)
    return results


class EpisodeActor:
    """One worker of the pool: holds tokenizer and model, answers and scores."""

    def __init__(self, config: EvaluateConfig, subjects: Sequence[Subject], progress: Any):
        """Load the tokenizer; models are loaded when an episode asks for them."""
        torch.set_num_threads(config.engine.threads)
        self.runner = _runner(config, subjects)
        self.progress = progress
        self.name = ray.get_runtime_context().get_actor_id()
        progress.join.remote(self.name)

    def __call__(self, episodes: pa.Table) -> pa.Table:
        """Return the rows (``RESULT_SCHEMA``) of a block of episodes."""
        started = time.time()
        rows = self.runner.run(episodes)
        failed = len(rows) - rows["error"].null_count
        self.progress.report.remote(
            BlockReport(self.name, started, time.time(), len(rows), failed, by_task=rows_by_task(rows))
        )
        return rows


def _run(work: _Work, folder: Folder, pool: dict[str, Any]) -> EvaluationTable:
    """Answer and score every episode that the checkpoint does not have; return the table of all."""
    config = work.config
    progress = start_progress_actor(config.out, EPISODES)

    def answers(blocks: Dataset) -> Dataset:
        return blocks.map_batches(
            EpisodeActor,
            fn_constructor_kwargs={"config": config, "subjects": work.subjects, "progress": progress},
            batch_format="pyarrow",
            batch_size=config.rows_per_block,
            **pool,
        )

    rows_in = RowsIn(
        filesystem=folder.filesystem,
        files=[folder.inner_path(_EPISODES)],
        columns=EPISODE_SCHEMA.names,
        id_column="episode",
        total=len(work.episodes),
        unit="episodes",
    )
    assert config.rows_per_block is not None
    rows_out = RowsOut(folder, _ROWS, RESULT_SCHEMA, partition="task")
    map_exactly_once(rows_in, rows_out, answers, config.rows_per_block, progress)
    rows = read_rows(config.out)
    if sorted(row["episode"] for row in rows) != sorted(work.episodes["episode"].to_pylist()):
        raise DatasetError(
            f"{config.out}: has {len(rows)} rows, not one for each of {len(work.episodes)} episodes; give another --out"
        )
    return tabulate(rows, work.subjects, config.seed)


def read_rows(out: str, pair_ids: Collection[int] | None = None) -> list[dict[str, Any]]:
    """Return the rows (``RESULT_SCHEMA``) of the evaluation ``out``, by task, subject and pair.

    Without ``pair_ids`` all of them, but not their ``images``, which are most of their size; else those of these pairs,
    with ``images``.
    """
    folder = Folder(out)
    partitioning = ds.partitioning(pa.schema([("task", pa.string())]), flavor="hive")
    dataset = ds.dataset(folder.inner_path(_ROWS), RESULT_SCHEMA, "parquet", folder.filesystem, partitioning)
    if pair_ids is None:
        table = dataset.to_table(columns=[name for name in RESULT_SCHEMA.names if name != "images"])
    else:
        table = dataset.to_table(columns=RESULT_SCHEMA.names, filter=ds.field("pair_id").isin(list(pair_ids)))
    ordered = table.sort_by([("task", "ascending"), ("subject", "ascending"), ("pair_id", "ascending")])
    rows: list[dict[str, Any]] = ordered.to_pylist()
    return rows


def _write_results(config: EvaluateConfig, subjects: Sequence[Subject], results: EvaluationResults) -> None:
    """Write table and page, then ``results.json``, which says that all is there."""
    folder = Folder(config.out)
    strips = _strips(config, subjects, results)
    write_evaluation_page(results, strips, folder.join(PAGE))
    folder.write_bytes(TABLE, to_csv(results).encode())
    results.write(folder)


def _strips(config: EvaluateConfig, subjects: Sequence[Subject], results: EvaluationResults) -> list[Strip]:
    """Decode what each subject answered in the best, the median and the worst episode of each task."""
    return _pictures(config, subjects, results, choose_episodes(read_rows(config.out), results))


def pictures_of(out: str, pair_ids: Mapping[str, int]) -> list[Strip]:
    """Decode what the subjects of a finished evaluation answered to one query a task.

    Args:
        out: The folder of the evaluation.
        pair_ids: The query by task; a task without one, or whose pictures are gone, is left out.

    Raises:
        CovrayError: The folder holds no finished evaluation, or its tokenizer is gone.
    """
    record, results = EvaluationRecord.read(absolute(out)), EvaluationResults.read(absolute(out))
    config = load_config(EvaluateConfig, None, record.config).model_copy(update={"out": absolute(out)})
    chosen: dict[str, dict[Rank, int]] = {task: {"median": pair_id} for task, pair_id in pair_ids.items()}
    return _pictures(config, [Subject(**subject) for subject in record.subjects], results, chosen)


def _pictures(
    config: EvaluateConfig,
    subjects: Sequence[Subject],
    results: EvaluationResults,
    chosen: Mapping[str, Mapping[Rank, int]],
) -> list[Strip]:
    """Decode what each subject answered to the ``chosen`` queries, by task and rank."""
    pair_ids: set[int] = set()
    for ranks in chosen.values():
        pair_ids.update(ranks.values())
    rows: dict[tuple[str, int, str], dict[str, Any]] = {}
    for row in read_rows(config.out, pair_ids):
        if row["error"] is None:
            rows[row["task"], row["pair_id"], row["subject"]] = row
    engine = config.engine.model_copy(update={"device": "cpu"})  # the driver's machine may have no GPU
    runner = _runner(config.model_copy(update={"engine": engine}), subjects)
    shown: list[tuple[str, Rank, dict[str, Any]]] = []  # task, rank and row
    for task, ranks in chosen.items():
        for rank, pair_id in ranks.items():
            for subject in subjects:
                if (task, pair_id, subject.name) in rows:
                    shown.append((task, rank, rows[task, pair_id, subject.name]))
    strips = []
    for (task, rank, row), pictures in zip(shown, runner.pictures_of([row for *_, row in shown]), strict=True):
        if pictures is None:  # a model read tokens, and the query's picture is gone since
            continue
        primary = results.tasks[task].primary
        value = next(entry["value"] for entry in row["values"] if entry["metric"] == primary)
        query, frames, answer, label = pictures
        strips.append(Strip(task, row["subject"], rank, row["pair_id"], value, query, list(frames), answer, label))
    return strips


def _runner(config: EvaluateConfig, subjects: Sequence[Subject]) -> Runner:
    folder = Folder(config.out)
    return Runner(config, subjects, folder.join(_QUERIES), folder.join(_EXAMPLES))


def _track(tracker: RunTrackers, config: EvaluateConfig, results: EvaluationResults) -> None:
    """Log figures and files to MLflow; figures that it has already stay as they are."""
    tracker.log(0, {_metric(score): score.mean for score in results.scores})
    tracker.artefacts(config.out, (RESULTS, TABLE, PAGE))


# --- before anything expensive ---------------------------------------------------------------------------------------


def _plugins(config: EvaluateConfig) -> dict[str, str]:
    """Return the plug-ins that the evaluation uses, each with package and version."""
    return used_plugins(config.tasks or (), metrics=config.metrics)


def _absolute(config: EvaluateConfig) -> EvaluateConfig:
    """Return ``config`` with paths that mean the same in a worker's folder, and with a name for every run."""
    adapters = []
    for entry in config.adapters:
        name, run = named_run(entry)
        adapters.append(f"{name}={absolute(run)}")
    update: dict[str, Any] = {"data": absolute(config.data), "out": absolute(config.out), "adapters": tuple(adapters)}
    if config.manifest is not None:
        update["manifest"] = absolute(config.manifest)
    return config.model_copy(update=update)


def _without_places(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``identity`` without where things are: folders move, and what is in them is compared by fingerprints.

    A manifest has none, but the ids of its pairs say which pictures they are, and pairs that it lacks are refused.
    """
    kept = {key: value for key, value in identity.items() if key not in ("data", "manifest")}
    kept["adapters"] = [named_run(entry)[0] for entry in identity.get("adapters", ())]
    for key in ("tokenizer", "backbone"):
        if isinstance(identity.get(key), dict):
            kept[key] = {name: value for name, value in identity[key].items() if name not in ("path", "revision")}
    return kept


def _prepare(config: EvaluateConfig) -> _Work:
    """Check all that can be wrong with the data and the runs, and list the episodes. Raises CovrayError."""
    dataset = ChainDataset(config.data)
    require_packages(dataset.record.plugins, config.data)
    config = _resolve(config, dataset)
    subjects = subjects_of(config, dataset)
    fingerprints = _fingerprints(dataset, subjects)
    queries, examples = _pairs(config, dataset, subjects)
    assert config.manifest is not None
    root = require_pairs(config.manifest, pa.concat_tables([queries, examples]))
    return _Work(config, subjects, fingerprints, queries, examples, root, _episodes(subjects, queries))


def _resolve(config: EvaluateConfig, dataset: ChainDataset) -> EvaluateConfig:
    """Return ``config`` with what the dataset decides."""
    try:
        keys = ("prior", "tokenizer", "pairs", "out")
        built = BuildConfig.model_validate({key: dataset.config[key] for key in keys if key in dataset.config})
    except ValueError as error:
        raise DatasetError(f"{dataset.path}/_dataset.json: is no description of a build; build it again") from error
    update: dict[str, Any] = {"manifest": config.manifest or absolute(built.pairs)}
    if config.manifest is None and not storage.exists(update["manifest"]):
        raise DatasetError(
            f"{dataset.path}: was built from {built.pairs}, which is not there any more; give it as --manifest"
        )
    if config.tokenizer is None:
        update["tokenizer"] = built.tokenizer
    if config.lpips is None:
        alexnet = find_alexnet()
        update["lpips"] = None if alexnet is None else str(alexnet)
    else:
        load_lpips(Path(config.lpips))
    if config.tasks is None:
        tasks = dataset.table(["task"], None, config.split)["task"].to_pylist()
        update["tasks"] = tuple(sorted(set(tasks))) or None
    return config.model_copy(update=update)


def _pairs(config: EvaluateConfig, dataset: ChainDataset, subjects: Sequence[Subject]) -> tuple[pa.Table, pa.Table]:
    """Return the queries, and the examples for the baselines. Raises DatasetError where there are not enough."""
    queries = choose_pairs(dataset, config.tasks, config.split, config.episodes, config.seed, "split")
    examples = choose_pairs(
        dataset, config.tasks, config.example_split, config.baseline_examples, config.seed, "example_split"
    )
    needed = max((subject.pairs or 0) for subject in subjects) + (config.split == config.example_split)
    present = dataset.table(["task"], config.tasks, config.example_split)["task"].to_pylist()
    for task in config.tasks or ():
        if present.count(task) < needed:
            raise DatasetError(
                f"{dataset.path}: {task} has {present.count(task)} good pairs in split {config.example_split}, an "
                f"episode needs {needed}; lower --example-pairs, set example_split, or name the other tasks"
            )
    return queries, examples


def _with_block_size(work: _Work, actors: int) -> _Work:
    """Return ``work`` with the rows of a block decided for a pool of ``actors``. No score depends on them."""
    config = work.config
    rows = choose_rows_per_block(config.rows_per_block, len(work.episodes), actors, fewest=config.batch)
    return replace(work, config=config.model_copy(update={"rows_per_block": rows}))


def _load_once(config: EvaluateConfig, gpus: float) -> None:
    """Load the tokenizer where an actor will, so that what is wrong with it is one line before the pool starts."""

    @ray.remote(num_cpus=0 if gpus else 1, num_gpus=gpus, resources=on(config.actors.node_type), max_retries=2)
    def load(config: EvaluateConfig) -> None:
        assert config.tokenizer is not None
        tokenizer = load_tokenizer(config.tokenizer, config.engine)
        require_same_tokens(ChainDataset(config.data), tokenizer, config.tokenizer.path)

    ray.get(load.remote(config))


def _episodes(subjects: Sequence[Subject], queries: pa.Table) -> pa.Table:
    """List every subject with every query (``EPISODE_SCHEMA``), sorted so that an actor seldom changes its model."""
    pairs = queries.to_pylist()
    rows = []
    for subject in subjects:
        for pair in pairs:
            rows.append({"episode": seed_of(subject.name, pair["pair_id"]), "subject": subject.name} | pair)
    return pa.Table.from_pylist(rows, EPISODE_SCHEMA)


def _parquet_bytes(table: pa.Table) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    data: bytes = buffer.getvalue().to_pybytes()
    return data


def _fingerprints(dataset: ChainDataset, subjects: Sequence[Subject]) -> dict[str, str]:
    """Return the SHA-256 (hex) of all that decides the scores beside the configuration."""
    fingerprints = {f"dataset.{key}": value for key, value in dataset.fingerprints.items()}
    pairs = dataset.record.pairs
    contents = json.dumps([dataset.identity, pairs and pairs.to_json(), dataset.count()], sort_keys=True)
    fingerprints["dataset.pairs"] = hashlib.sha256(contents.encode()).hexdigest()
    for subject in subjects:
        if subject.fingerprint:
            fingerprints[f"{subject.name}.backbone"] = subject.fingerprint
        if subject.adapter is not None:
            weights = storage.read_bytes(adapter_weights(subject))
            fingerprints[f"{subject.name}.adapter"] = hashlib.sha256(weights).hexdigest()
    return fingerprints


def _metric(score: SubjectScore) -> str:
    """Return the name of a score in MLflow, which takes only some characters."""
    name = f"{score.task}/{score.metric}/{score.subject}"
    return re.sub(r"[^\w\-. :/]", "_", name)
