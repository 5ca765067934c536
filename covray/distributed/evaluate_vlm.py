"""``covray vlm evaluate``: prompts to answers and scores, on a Ray Data actor pool, continued by the same command.

    batches of prompts -> repartition -> AnswerActor (actor pool) -> lines of answers -> answers.jsonl, results.json

What was answered before a kill is not answered again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import torch

from covray.config import EngineConfig
from covray.config.section import JsonObject
from covray.config.vlm import VlmEvaluateConfig
from covray.distributed.pool import (
    CHECKPOINT,
    Pool,
    PoolActor,
    RowsIn,
    RowsOut,
    choose_rows_per_block,
    commit_again,
    delete_checkpoint,
    gpus_of,
    most_actors,
    one_line_errors,
    parquet_bytes,
    pool_of,
    run_pool,
)
from covray.distributed.progress import start_progress_actor
from covray.distributed.resumable import Output, mlflow_run_of, run_ids
from covray.distributed.session import ray_session
from covray.distributed.trackers.together import RunTrackers
from covray.errors import DatasetError
from covray.evaluation.records import VlmEvaluationRecord, VlmEvaluationResults
from covray.evaluation.statistics import Mean
from covray.evaluation.vision_text import (
    ANSWERS_FILE,
    BatchAnswerer,
    Row,
    read_rows,
    row_lines,
    summarize_rows,
)
from covray.generation.vision_text import answerer_facts
from covray.io.storage import Folder, absolute
from covray.models.vlm.decoding import decoding_blocks
from covray.progress import stage
from covray.training.objectives.vision_text import read_data

_BATCHES, _ANSWERS = "_batches.parquet", "rows"
_BATCH_SCHEMA = pa.schema([("batch", pa.int64()), ("split", pa.string())])
_ANSWER_SCHEMA = pa.schema([("batch", pa.int64()), ("split", pa.string()), ("lines", pa.list_(pa.string()))])
"""``lines`` are those of ``answers.jsonl``, one a prompt."""


def evaluate_vlm(config: VlmEvaluateConfig) -> VlmEvaluationResults:
    """Answer the prompts of a split and return the scores, which are also written to ``results.json``.

    Called again on an unfinished evaluation it continues it; on a finished one it returns the results at once.

    Raises:
        CovrayError: Data or model cannot be used, or the folder holds another evaluation; nothing has been answered.
    """
    out = absolute(config.out)
    with Output(out, VlmEvaluationRecord, "covray vlm evaluate", result=VlmEvaluationResults.FILE) as output:
        with stage("reading data and model"):
            data = read_data(config.data, config.texts)
            prompts = len(data.of_split(config.split)[: config.samples])
            known = answerer_facts(config)
            decoding_blocks(config.decoding, known.trained)
        identity = config.identity() | {"data": data.fingerprint(), "model": known.fingerprint}
        if output.begun is not None:
            output.require_same(output.begun.identity, identity)
        if output.finished:
            return _finished(config, output)
        with ray_session() as cores, one_line_errors(config.out, "evaluation"):
            return _evaluate(_Work(_absolute(config), identity, prompts), output, cores)


@dataclass(frozen=True)
class _Work:
    """What an evaluation is about to do."""

    config: VlmEvaluateConfig
    """With paths that mean the same in a worker's folder."""
    identity: JsonObject
    prompts: int

    @property
    def batches(self) -> int:
        """Batches of prompts; the last may be smaller."""
        return -(-self.prompts // self.config.batch)


class AnswerActor(PoolActor):
    """One worker of the pool: holds data and model, answers and scores."""

    def __init__(self, config: VlmEvaluateConfig, progress: Any):
        """Read the data and load the model."""
        torch.set_num_threads(config.threads)
        self.answerer = BatchAnswerer(config)
        super().__init__(progress)

    def __call__(self, batches: pa.Table) -> pa.Table:
        """Return the answers (``_ANSWER_SCHEMA``) of a block of batches."""
        started = time.time()
        lines = [row_lines(self.answerer.answer(number)) for number in batches["batch"].to_pylist()]
        self.report(started, len(batches), 0)
        return batches.append_column("lines", pa.array(lines, _ANSWER_SCHEMA.field("lines").type))


def _evaluate(work: _Work, output: Output[VlmEvaluationRecord], cores: int) -> VlmEvaluationResults:
    """Answer what is left in a Ray session; return the results."""
    config, folder = work.config, output.folder
    record = VlmEvaluationRecord(
        identity=work.identity,
        config=config.model_dump(mode="json"),
        mlflow_run_id=mlflow_run_of(output.begun),
    )
    with output.tracked(config, record) as (tracker, _):
        _keep_earlier_answers(folder, config)
        rows = _answer(work, folder, cores)
        results = summarize_rows(rows)
        lines = row_lines(rows)
        folder.write_bytes(ANSWERS_FILE, ("\n".join(lines) + "\n").encode())
        results.write(folder)
        _track(tracker, config, results)
    delete_checkpoint(folder)
    return results


def _finished(config: VlmEvaluateConfig, output: Output[VlmEvaluationRecord]) -> VlmEvaluationResults:
    """Return the results of a finished evaluation, and log them where it was killed before MLflow had all of them."""
    folder, record = output.folder, output.begun
    results = VlmEvaluationResults.read(folder)
    if record is not None and folder.exists(CHECKPOINT):
        absolute_config = _absolute(config)
        tracker = RunTrackers(absolute_config, run_ids(record), "covray vlm evaluate")
        tracker.start()
        _track(tracker, absolute_config, results)
        tracker.finish("FINISHED")
        delete_checkpoint(folder)
    return results


def _answer(work: _Work, folder: Folder, cores: int) -> list[Row]:
    """Answer every batch that the checkpoint does not have; return the rows of all, in the order of the data."""
    config = work.config
    engine = EngineConfig(device=config.device, threads=config.threads)
    gpus = gpus_of(config.actors, engine)
    per_block = choose_rows_per_block(None, work.batches, most_actors(config.actors, engine, cores, gpus), fewest=1)
    pool = pool_of(config.actors, engine, cores, gpus)
    if not folder.exists(_BATCHES):
        numbers = [{"batch": number, "split": config.split} for number in range(work.batches)]
        folder.write_bytes(_BATCHES, parquet_bytes(pa.Table.from_pylist(numbers, _BATCH_SCHEMA)))
    rows_in = RowsIn(
        filesystem=folder.filesystem,
        files=[folder.inner_path(_BATCHES)],
        columns=_BATCH_SCHEMA.names,
        id_column="batch",
        total=work.batches,
        unit=f"batches of {config.batch} prompts",
    )
    rows_out = RowsOut(folder, _ANSWERS, _ANSWER_SCHEMA, "split")
    run_pool(Pool(AnswerActor, {"config": config}, pool, per_block), rows_in, rows_out, start_progress_actor())
    return _read_answers(folder, work)


def _read_answers(folder: Folder, work: _Work) -> list[Row]:
    """Return the rows of all batches.

    Raises:
        DatasetError: A prompt has no answer, or two.
    """
    partitioning = ds.partitioning(pa.schema([("split", pa.string())]), flavor="hive")
    dataset = ds.dataset(folder.inner_path(_ANSWERS), _ANSWER_SCHEMA, "parquet", folder.filesystem, partitioning)
    table = dataset.to_table(columns=["batch", "lines"]).sort_by("batch")
    rows: list[Row] = []
    for lines in table["lines"].to_pylist():
        rows += read_rows(lines)
    if [row.number for row in rows] != list(range(work.prompts)):
        raise DatasetError(
            f"{folder.path}: has {len(rows)} answers, not one for each of {work.prompts} prompts; give another --out"
        )
    return rows


def _keep_earlier_answers(folder: Folder, config: VlmEvaluateConfig) -> None:
    """Commit the whole batches of ``answers.jsonl``, which covray 0.1.0 wrote batch by batch, in one process."""
    if (folder / CHECKPOINT).list_files() or not folder.exists(ANSWERS_FILE):
        return
    rows = read_rows(folder.read_bytes(ANSWERS_FILE).decode().splitlines())
    table = pa.Table.from_pylist(_batches_of(rows, config), _ANSWER_SCHEMA)
    if len(table):
        # Under a name of its own: a kill before the commit leaves a file that is written again.
        (folder / _ANSWERS).write_bytes("earlier.parquet", parquet_bytes(table))
        commit_again(folder, "batch", lambda: table["batch"])


def _batches_of(rows: Sequence[Row], config: VlmEvaluateConfig) -> list[dict[str, Any]]:
    batches = []
    for number in range(len(rows) // config.batch):
        first = number * config.batch
        lines = row_lines(rows[first : first + config.batch])
        batches.append({"batch": number, "split": config.split, "lines": lines})
    return batches


def _track(tracker: RunTrackers, config: VlmEvaluateConfig, results: VlmEvaluationResults) -> None:
    """Log figures and files to MLflow."""
    figures = {}
    for name, value in results:
        if isinstance(value, Mean):
            value = value.mean
        if isinstance(value, int | float):
            figures[name] = float(value)
    tracker.log(0, figures)
    tracker.artefacts(config.out, (VlmEvaluationResults.FILE, ANSWERS_FILE))


def _absolute(config: VlmEvaluateConfig) -> VlmEvaluateConfig:
    """Return ``config`` with paths that mean the same in a worker's folder. A model without a folder is a hub id."""
    update: dict[str, Any] = {"out": absolute(config.out), "data": absolute(config.data)}
    if config.run is not None:
        update["run"] = absolute(config.run)
    if config.model is not None and os.path.isdir(os.path.expanduser(config.model)):
        update["model"] = absolute(config.model)
    if config.texts.root is not None:
        update["texts"] = config.texts.model_copy(update={"root": absolute(config.texts.root)})
    return config.model_copy(update=update)
