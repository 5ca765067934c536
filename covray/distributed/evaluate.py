"""``covray evaluate``: chains and adapters to scores, on a Ray Data actor pool, continued by the same command.

    episodes -> repartition -> Runner (actor pool) -> rows by task -> table, page, MLflow

An episode is a subject of the table and a query. What was computed before a kill is not computed again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import ray
import torch

from covray.chains.compatibility import require_same_tokens
from covray.chains.dataset import ChainDataset
from covray.config import EvaluateConfig, load_config
from covray.distributed.evaluate_checks import Work, plugins_of, prepare, with_absolute_paths, without_places
from covray.distributed.metrics import EPISODES
from covray.distributed.plugin_checks import require_on_nodes
from covray.distributed.pool import (
    CHECKPOINT,
    Pool,
    PoolActor,
    PoolOptions,
    RowsIn,
    RowsOut,
    choose_rows_per_block,
    delete_checkpoint,
    gpus_of,
    like_an_actor,
    most_actors,
    one_line_errors,
    parquet_bytes,
    pool_of,
    run_pool,
)
from covray.distributed.progress import rows_by_task, start_progress_actor
from covray.distributed.resumable import Output, mlflow_run_of, run_ids
from covray.distributed.session import ray_session
from covray.distributed.trackers.base import require_trackers
from covray.distributed.trackers.together import RunTrackers
from covray.errors import ConfigError, DatasetError
from covray.evaluation.answers import EPISODE_SCHEMA, LARGE_COLUMNS, RESULT_SCHEMA, ResultRow
from covray.evaluation.pair_files import write_pairs
from covray.evaluation.records import (
    STRIPS,
    EvaluationRecord,
    EvaluationResults,
    EvaluationTable,
    SubjectEntry,
    SubjectScore,
)
from covray.evaluation.results import Rank, choose_episodes, tabulate, to_csv
from covray.evaluation.runner import Runner
from covray.evaluation.subjects import Subject
from covray.io.storage import Folder, absolute
from covray.models.tokenizer.vqgan import load_tokenizer
from covray.plugins import require_packages
from covray.progress import stage
from covray.report.evaluation import Strip, write_evaluation_page
from covray.report.evaluation_strips import draw_answers
from covray.training.scored_answers import BEFORE, CANDIDATES

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
    config = with_absolute_paths(config)
    with Output(config.out, EvaluationRecord, "covray evaluate", result=RESULTS, patience_s=patience_s) as output:
        # A plug-in's metric or task must be there before anything is read with it.
        if output.begun is not None:
            require_packages(output.begun.plugins, config.out)
        with stage("reading the dataset, the runs and the manifest"):
            work = prepare(config)
        begun = output.begun
        # Compared before anything is computed: other data or other models would mix two evaluations.
        if begun is not None:
            output.require_same(without_places(begun.identity), without_places(work.config.identity()))
            output.require_same(begun.fingerprints, work.fingerprints)
            if output.finished:
                return _finished(work.config, output.folder, begun)
        require_trackers(work.config)
        with ray_session() as cores, one_line_errors(config.out, "evaluation"):
            # Workers on other nodes need the plug-ins, too.
            require_on_nodes(plugins_of(work.config))
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
    # The record may name the folder as it was called on another machine.
    config = load_config(EvaluateConfig, None, record.config).model_copy(update={"out": folder.path})
    results = EvaluationResults.read(folder)
    _write_results(config, [entry.subject() for entry in record.subjects], results)
    return results


def _evaluate(work: Work, output: Output[EvaluationRecord], pool: PoolOptions) -> EvaluationResults:
    """Evaluate in a Ray session on ``pool``, the arguments of ``map_batches``; return the results."""
    config, folder = work.config, output.folder
    assert config.manifest is not None
    record = EvaluationRecord(
        config=config.model_dump(mode="json"),
        identity=config.identity(),
        fingerprints=work.fingerprints,
        subjects=[SubjectEntry.of(subject) for subject in work.subjects],
        mlflow_run_id=mlflow_run_of(output.begun),
    )
    plugins = plugins_of(config)
    if plugins:  # else the key is absent, as in the files of earlier versions
        record = record.model_copy(update={"plugins": plugins})
    with output.tracked(config, record) as (tracker, record):
        # Written once, and read by every worker: the pairs of a resumed evaluation are those it began with.
        with stage("writing the list of episodes"):
            for name, pairs in ((_QUERIES, work.queries), (_EXAMPLES, work.examples)):
                if not folder.exists(name):
                    write_pairs(folder.join(name), config.manifest, work.root, pairs)
            if not folder.exists(_EPISODES):
                folder.write_bytes(_EPISODES, parquet_bytes(work.episodes))
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
    # Last: a kill before this leaves the checkpoint, by which the same command goes on.
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


class EpisodeActor(PoolActor):
    """One worker of the pool: holds tokenizer and model, answers and scores."""

    def __init__(self, config: EvaluateConfig, subjects: Sequence[Subject], progress: Any):
        """Load the tokenizer; models are loaded when an episode asks for them."""
        torch.set_num_threads(config.engine.threads)
        self.runner = _runner(config, subjects)
        super().__init__(progress)

    def __call__(self, episodes: pa.Table) -> pa.Table:
        """Return the rows (``RESULT_SCHEMA``) of a block of episodes."""
        started = time.time()
        rows = self.runner.run(episodes)
        self.report_rows(started, rows, by_task=rows_by_task(rows))
        return rows


def _run(work: Work, folder: Folder, pool: PoolOptions) -> EvaluationTable:
    """Answer and score every episode that the checkpoint does not have; return the table of all."""
    config = work.config
    progress = start_progress_actor(config.out, EPISODES)
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
    arguments = {"config": config, "subjects": work.subjects}
    run_pool(Pool(EpisodeActor, arguments, pool, config.rows_per_block), rows_in, rows_out, progress)
    rows = read_rows(config.out)
    # Exactly once: a row that is missing or doubled would shift every mean.
    if sorted(row["episode"] for row in rows) != sorted(work.episodes["episode"].to_pylist()):
        raise DatasetError(
            f"{config.out}: has {len(rows)} rows, not one for each of {len(work.episodes)} episodes; give another --out"
        )
    return tabulate(rows, work.subjects, config.seed)


def read_rows(out: str, pair_ids: Collection[int] | None = None) -> list[ResultRow]:
    """Return the rows (``RESULT_SCHEMA``) of the evaluation ``out``, by task, subject and pair.

    Without ``pair_ids`` all of them, but not their ``LARGE_COLUMNS``; else those of these pairs, with ``images``.
    """
    folder = Folder(out)
    partitioning = ds.partitioning(pa.schema([("task", pa.string())]), flavor="hive")
    dataset = ds.dataset(folder.inner_path(_ROWS), RESULT_SCHEMA, "parquet", folder.filesystem, partitioning)
    if pair_ids is None:
        # The columns of tokens are most of the size, and a table needs none of them.
        table = dataset.to_table(columns=[name for name in RESULT_SCHEMA.names if name not in LARGE_COLUMNS])
    else:
        columns = [name for name in RESULT_SCHEMA.names if name not in (BEFORE, CANDIDATES)]
        table = dataset.to_table(columns=columns, filter=ds.field("pair_id").isin(list(pair_ids)))
    ordered = table.sort_by([("task", "ascending"), ("subject", "ascending"), ("pair_id", "ascending")])
    rows: list[ResultRow] = ordered.to_pylist()
    return rows


def _write_results(config: EvaluateConfig, subjects: Sequence[Subject], results: EvaluationResults) -> None:
    """Write table and page, then ``results.json``, which says that all is there."""
    folder = Folder(config.out)
    strips = _strips(config, subjects, results)
    write_evaluation_page(results, strips, folder.join(PAGE))
    for task, picture in draw_answers(results, strips).items():
        folder.write_bytes(f"{STRIPS}/{task}.png", picture)
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
    # One query a task, whatever its rank: under a name that the pages know.
    chosen: dict[str, dict[Rank, int]] = {task: {"median": pair_id} for task, pair_id in pair_ids.items()}
    return _pictures(config, [entry.subject() for entry in record.subjects], results, chosen)


def _pictures(
    config: EvaluateConfig,
    subjects: Sequence[Subject],
    results: EvaluationResults,
    chosen: Mapping[str, Mapping[Rank, int]],
) -> list[Strip]:
    """Decode what each subject answered to the ``chosen`` queries, by task and rank."""
    # One read for all strips of a page.
    pair_ids: set[int] = set()
    for ranks in chosen.values():
        pair_ids.update(ranks.values())
    rows: dict[tuple[str, int, str], ResultRow] = {}
    for row in read_rows(config.out, pair_ids):
        if row["error"] is None:
            rows[row["task"], row["pair_id"], row["subject"]] = row
    engine = config.engine.model_copy(update={"device": "cpu"})  # the driver's machine may have no GPU
    runner = _runner(config.model_copy(update={"engine": engine}), subjects)
    shown: list[tuple[str, Rank, ResultRow]] = []  # task, rank and row
    # Task by task and rank by rank, with the subjects in the order of the table.
    for task, ranks in chosen.items():
        for rank, pair_id in ranks.items():
            for subject in subjects:
                if (task, pair_id, subject.name) in rows:
                    shown.append((task, rank, rows[task, pair_id, subject.name]))
    strips = []
    strips_of_rows = runner.pictures_of([row for *_, row in shown])
    for (task, rank, row), pictures in zip(shown, strips_of_rows, strict=True):
        if pictures is None:  # a model read tokens, and the query's picture is gone since
            continue
        primary = results.tasks[task].primary
        value = next(entry["value"] for entry in row["values"] or () if entry["metric"] == primary)
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


def _with_block_size(work: Work, actors: int) -> Work:
    """Return ``work`` with the rows of a block decided for a pool of ``actors``. No score depends on them."""
    config = work.config
    rows = choose_rows_per_block(config.rows_per_block, len(work.episodes), actors, fewest=config.batch)
    return replace(work, config=config.model_copy(update={"rows_per_block": rows}))


def _load_once(config: EvaluateConfig, gpus: float) -> None:
    """Load the tokenizer where an actor will, so that what is wrong with it is one line before the pool starts."""

    @ray.remote(**like_an_actor(gpus, config.actors.node_type))
    def load(config: EvaluateConfig) -> None:
        assert config.tokenizer is not None
        tokenizer = load_tokenizer(config.tokenizer, config.engine)
        require_same_tokens(ChainDataset(config.data), tokenizer, config.tokenizer.path)

    ray.get(load.remote(config))


def _metric(score: SubjectScore) -> str:
    """Return the name of a score in MLflow, which takes only some characters."""
    name = f"{score.task}/{score.metric}/{score.subject}"
    return re.sub(r"[^\w\-. :/]", "_", name)
