"""``covray think evaluate``: reasoning episodes to scores, on a Ray Data actor pool, continued by the same command.

    episodes -> repartition -> ReasonActor (actor pool) -> rows by task -> table, page, MLflow

An actor holds all models. What was answered before a kill is not answered again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import ray
import torch

from covray.config.evaluate import named_run
from covray.config.think import ThinkEvaluateConfig
from covray.distributed.paths import absolute_fields, absolute_model, absolute_path, absolute_runs
from covray.distributed.pool import (
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
from covray.distributed.progress import start_progress_actor
from covray.distributed.resumable import Output, mlflow_run_of
from covray.distributed.session import ray_session
from covray.distributed.trackers.base import require_trackers
from covray.errors import DatasetError
from covray.io.storage import Folder
from covray.progress import stage
from covray.report.reasoning import write_reasoning_page
from covray.thinking.plan import ReasoningPlan
from covray.thinking.reasoning import Reasoner, require_reasoning, row_names
from covray.thinking.records import ReasoningRecord, ReasoningResults
from covray.thinking.results import CHANCE, tabulate, to_csv
from covray.thinking.rows import RESULT_SCHEMA, EpisodeRow
from covray.thinking.worlds import EPISODE_SCHEMA, list_episodes, open_world

COMMAND = "covray think evaluate"
TABLE, PAGE = "table.csv", "index.html"
_EPISODES, _ROWS = "_episodes.parquet", "rows"


def evaluate_reasoning(config: ThinkEvaluateConfig) -> ReasoningResults:
    """Answer and judge the episodes of ``config``.

    Called again on an unfinished evaluation it continues it; on a finished one it returns the results at once.

    Args:
        config: The configuration.

    Returns:
        What is written to ``results.json``.

    Raises:
        CovrayError: A model, an aligner, the judge, the episodes or storage cannot be used; nothing has been computed.
    """
    config = _absolute_paths(config)
    with Output(config.out, ReasoningRecord, COMMAND, result=ReasoningResults.FILE) as output:
        with stage("checking models and episodes"):
            fingerprints = require_reasoning(config)
            episodes = list_episodes(config, open_world(config))
            require_trackers(config)
        begun = output.begun
        if begun is not None:
            output.require_same(begun.identity, config.identity())
            # Evaluations that were begun by an earlier version have no fingerprint of CoBSAT's pictures.
            unknown = {"cobsat"} - begun.fingerprints.keys()
            output.require_same(begun.fingerprints, _without(fingerprints, unknown))
        if output.finished:
            return ReasoningResults.read(output.folder)
        record = ReasoningRecord(
            config=config.model_dump(mode="json"),
            identity=config.identity(),
            fingerprints=fingerprints,
            mlflow_run_id=mlflow_run_of(begun),
        )
        with ray_session() as cores, one_line_errors(config.out, "evaluation"):
            with stage("loading the models, to check them"):
                _load_once(config)
            with output.tracked(config, record) as (tracker, record):
                results = _evaluate(config, record, episodes, cores)
                tracker.log(0, _metrics(results))
                tracker.artefacts(config.out, (ReasoningResults.FILE, TABLE, PAGE))
            delete_checkpoint(output.folder)
    return results


def plan_reasoning(config: ThinkEvaluateConfig) -> ReasoningPlan:
    """Return what an evaluation would do, after all its checks; nothing is started or written. Raises CovrayError."""
    config = _absolute_paths(config)
    Output(config.out, ReasoningRecord, COMMAND, result=ReasoningResults.FILE).inspect()
    require_reasoning(config)
    episodes = list_episodes(config, open_world(config))
    # The true renders, the texts and the copies of what was shown need no painter.
    drawn = [name for name in row_names(config) if name not in ("truth", "text", "copy")]
    return ReasoningPlan(
        episodes=len(episodes),
        rows=row_names(config),
        texts=len(episodes),
        pictures=len(episodes) * len(drawn),
        denoising_steps=len(episodes) * len(drawn) * config.painter.steps,
        out=config.out,
    )


def _evaluate(config: ThinkEvaluateConfig, record: ReasoningRecord, episodes: pa.Table, cores: int) -> ReasoningResults:
    """Evaluate in a Ray session with ``cores`` cores; return the results."""
    folder = Folder(config.out)
    gpus = gpus_of(config.actors, config.engine)
    actors = most_actors(config.actors, config.engine, cores, gpus)
    rows_per_block = choose_rows_per_block(config.rows_per_block, len(episodes), actors, fewest=1)
    if not folder.exists(_EPISODES):
        folder.write_bytes(_EPISODES, parquet_bytes(episodes))
    started = time.monotonic()
    _run(config, len(episodes), rows_per_block, pool_of(config.actors, config.engine, cores, gpus))
    rows = read_rows(config.out, pictures=False)
    if sorted(row.episode for row in rows) != sorted(episodes["episode"].to_pylist()):
        raise DatasetError(
            f"{config.out}: has {len(rows)} rows, not one for each of {len(episodes)} episodes; give another --out"
        )
    names = row_names(config)
    aligners = [named_run(entry)[0] for entry in config.aligners]
    with stage("writing the table and the page"):
        scores, differences = tabulate(rows, names, aligners, config.seed)
        results = ReasoningResults(
            benchmark=open_world(config).benchmark,
            rows=names,
            chance=CHANCE,
            scores=tuple(scores),
            differences=tuple(differences),
            failed=sum(row.error is not None for row in rows),
            seconds=round(time.monotonic() - started, 1),
            config=record.config,
            fingerprints=record.fingerprints,
        )
        folder.write_bytes(PAGE, write_reasoning_page(results, _shown(config.out, rows), config.out))
        folder.write_bytes(TABLE, to_csv(scores).encode())
        results.write(folder)
    return results


def _run(config: ThinkEvaluateConfig, total: int, rows_per_block: int, pool: PoolOptions) -> None:
    """Answer and judge every episode that the checkpoint does not have."""
    folder = Folder(config.out)
    rows_in = RowsIn(
        filesystem=folder.filesystem,
        files=[folder.inner_path(_EPISODES)],
        columns=EPISODE_SCHEMA.names,
        id_column="episode",
        total=total,
        unit="episodes",
    )
    rows_out = RowsOut(folder, _ROWS, RESULT_SCHEMA, partition="task")
    run_pool(Pool(ReasonActor, {"config": config}, pool, rows_per_block), rows_in, rows_out, start_progress_actor())


class ReasonActor(PoolActor):
    """One worker of the pool: holds the models, answers and judges episodes."""

    def __init__(self, config: ThinkEvaluateConfig, progress: Any):
        """Load the models."""
        torch.set_num_threads(config.engine.threads)
        self.reasoner = Reasoner(config)
        super().__init__(progress)

    def __call__(self, episodes: pa.Table) -> pa.Table:
        """Return the rows (``RESULT_SCHEMA``) of a block of episodes."""
        started = time.time()
        rows = self.reasoner.run(episodes)
        self.report_rows(started, rows)
        return rows


def read_rows(out: str, *, pictures: bool, episodes: list[int] | None = None) -> list[EpisodeRow]:
    """Return the rows of the evaluation ``out``, by shots, task and number.

    Args:
        out: The folder.
        pictures: Whether the pictures of demonstrations and answers are read, most of the size.
        episodes: Ids of the episodes; None: all.
    """
    folder = Folder(out)
    partitioning = ds.partitioning(pa.schema([("task", pa.string())]), flavor="hive")
    dataset = ds.dataset(folder.inner_path(_ROWS), RESULT_SCHEMA, "parquet", folder.filesystem, partitioning)
    chosen = None
    if episodes is not None:
        chosen = ds.field("episode").isin(episodes)
    columns = [name for name in RESULT_SCHEMA.names if pictures or name != "demonstrations"]
    rows = []
    # In small batches: rows hold pictures, also where these are dropped at once.
    for batch in dataset.to_batches(columns=columns, filter=chosen, batch_size=64):
        for values in batch.to_pylist():
            if not pictures:
                for answer in values["answers"] or ():
                    del answer["picture"]
            rows.append(EpisodeRow.of(values))
    return sorted(rows, key=lambda row: (row.shots, row.task, row.number))


_SHOWN = 3
"""Episodes on the page, of each task and number of shots."""


def _shown(out: str, rows: list[EpisodeRow]) -> list[EpisodeRow]:
    """Return the rows of the first episodes of each task, with their pictures."""
    counts: dict[tuple[int, str], int] = {}
    chosen = []
    for row in rows:
        key = (row.shots, row.task)
        counts[key] = counts.get(key, 0) + 1
        if row.error is None and counts[key] <= _SHOWN:
            chosen.append(row.episode)
    return read_rows(out, pictures=True, episodes=chosen)


def _load_once(config: ThinkEvaluateConfig) -> None:
    """Load the models where an actor will, so that what is wrong with them is one line before the pool starts."""
    gpus = gpus_of(config.actors, config.engine)

    @ray.remote(**like_an_actor(gpus, config.actors.node_type))
    def load(config: ThinkEvaluateConfig) -> None:
        Reasoner(config)

    ray.get(load.remote(config))


def _without(fingerprints: Mapping[str, str], names: Collection[str]) -> dict[str, str]:
    return {name: value for name, value in fingerprints.items() if name not in names}


def _metrics(results: ReasoningResults) -> Mapping[str, float | None]:
    """Return the scores by names that MLflow takes."""
    metrics = {}
    for score in results.scores:
        if score.side == "both":
            name = f"{score.task}/{score.shots}-shot/{score.row}"
            metrics[re.sub(r"[^\w\-. :/]", "_", name)] = score.mean
    return metrics


def _absolute_paths(config: ThinkEvaluateConfig) -> ThinkEvaluateConfig:
    """Return ``config`` with paths that mean the same in a worker's folder, and with a name for every aligner."""
    update: dict[str, Any] = {
        **absolute_fields(config, "out", "cobsat", "features"),
        "aligners": absolute_runs(config.aligners),
        "painter": absolute_model(config.painter),
    }
    if config.vlm is not None:
        update["vlm"] = absolute_model(config.vlm)
    if config.language_model is not None:
        update["language_model"] = absolute_model(config.language_model)
    if config.judge.path is not None:
        update["judge"] = config.judge.model_copy(update={"path": absolute_path(config.judge.path)})
    return config.model_copy(update=update)
