"""``covray evaluate``: chains and adapters to scores, on a Ray Data actor pool, continued by the same command.

    episodes -> repartition -> Runner (actor pool) -> rows by task -> table, page, MLflow

An episode is a subject of the table and a query. What was computed before a kill is not computed again.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import ray
import torch
from ray.data import Dataset

from covray.chains.compatibility import require_same_tokens
from covray.chains.dataset import ChainDataset
from covray.config import BuildConfig, EvaluateConfig, load_config
from covray.distributed.pool import (
    CHECKPOINT,
    absolute,
    delete_checkpoint,
    gpus_of,
    map_exactly_once,
    on,
    one_line_errors,
    pool_of,
    read_description,
    require_fresh,
)
from covray.distributed.progress import Meter
from covray.distributed.session import here, ray_session
from covray.distributed.tracking import Tracker
from covray.errors import ConfigError, DatasetError, PairError
from covray.evaluation.lpips import find_alexnet, load_lpips
from covray.evaluation.records import EvaluationResults
from covray.evaluation.results import choose_episodes, tabulate, to_csv
from covray.evaluation.runner import (
    EPISODE_SCHEMA,
    RESULT_SCHEMA,
    Runner,
    choose_pairs,
    require_pairs,
    write_pairs,
)
from covray.evaluation.subjects import Subject, adapter_weights, subjects_of
from covray.io import storage
from covray.models.tokenizer.vqgan import load_tokenizer
from covray.report.evaluation import Strip, write_evaluation_page
from covray.seeds import seed_of
from covray.training.checkpoints import require_same

DESCRIPTION, RESULTS, TABLE, PAGE = "_evaluation.json", "results.json", "table.csv", "index.html"
_EPISODES, _QUERIES, _EXAMPLES, _ROWS = "_episodes.parquet", "_queries.parquet", "_examples.parquet", "rows"
_KEYS = ("config", "identity", "fingerprints", "subjects", "mlflow_run_id")


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate everyone that ``config`` names; returns what is written to ``results.json``.

    Called again on an unfinished evaluation it continues it; on a finished one it returns the results at once. Raises
    CovrayError: a dataset, run, backbone, manifest or configuration that cannot be used, before any actor is started.
    """
    config = _absolute(config)
    described = read_description(storage.join(config.out, DESCRIPTION), _KEYS)
    dataset = ChainDataset(config.data)
    config = _resolve(config, dataset)
    subjects = subjects_of(config, dataset)
    fingerprints = _fingerprints(dataset, subjects)
    queries, examples = _pairs(config, dataset, subjects)
    assert config.manifest is not None
    root = require_pairs(config.manifest, pa.concat_tables([queries, examples]))
    if described is not None:
        require_same(config.out, described["identity"], config.identity())
        require_same(config.out, described["fingerprints"], fingerprints)
        if storage.exists(storage.join(config.out, RESULTS)):
            results = dict(storage.read_json(storage.join(config.out, RESULTS)))
            if storage.exists(storage.join(config.out, CHECKPOINT)):  # killed before MLflow had all of them
                tracker = Tracker(config, described["mlflow_run_id"], "covray evaluate")
                tracker.start()
                _track(tracker, config, results)
                tracker.finish("FINISHED")
                delete_checkpoint(config.out)
            return results
    else:
        require_fresh(config.out, "evaluation")
    with ray_session() as cores, one_line_errors(config.out, "evaluation"):
        gpus = gpus_of(config.actors, config.engine)
        _probe(config, gpus)
        description: dict[str, Any] = {
            "version": 1,
            "config": config.model_dump(mode="json"),
            "identity": config.identity(),
            "fingerprints": fingerprints,
            "subjects": [subject.as_json() for subject in subjects],
            "mlflow_run_id": described["mlflow_run_id"] if described else None,
        }
        storage.write_json(storage.join(config.out, DESCRIPTION), description)
        tracker = Tracker(config, description["mlflow_run_id"], "covray evaluate")
        description["mlflow_run_id"] = tracker.start()
        storage.write_json(storage.join(config.out, DESCRIPTION), description)
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        try:
            for name, wanted in ((_QUERIES, queries), (_EXAMPLES, examples)):
                if not storage.exists(storage.join(config.out, name)):
                    write_pairs(storage.join(config.out, name), config.manifest, root, wanted)
            episodes = _episodes(subjects, queries)
            results = _run(config, subjects, episodes, pool_of(config.actors, config.engine, cores, gpus))
            results |= {"config": description["config"], "fingerprints": fingerprints}
            _write_results(config, subjects, results)
            _track(tracker, config, results)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            tracker.finish(status)
    delete_checkpoint(config.out)
    return results


def report(out: str) -> dict[str, Any]:
    """Write table and page of the finished evaluation ``out`` again; returns its results. Raises ConfigError."""
    path = storage.join(absolute(out), RESULTS)
    described = read_description(storage.join(absolute(out), DESCRIPTION), _KEYS)
    if described is None or not storage.exists(path):
        raise ConfigError(f"{out}: holds no finished evaluation; run its covray evaluate again to continue it")
    config = load_config(EvaluateConfig, None, described["config"]).model_copy(update={"out": absolute(out)})
    results = dict(storage.read_json(path))
    _write_results(config, [Subject(**subject) for subject in described["subjects"]], results)
    return results


class EpisodeActor:
    """One worker of the pool: holds tokenizer and model, answers and scores."""

    def __init__(self, config: EvaluateConfig, subjects: Sequence[Subject], meter: Any):
        torch.set_num_threads(config.engine.threads)
        self.runner = Runner(config, subjects, *(storage.join(config.out, name) for name in (_QUERIES, _EXAMPLES)))
        self.meter = meter
        self.name = ray.get_runtime_context().get_actor_id()
        meter.join.remote(self.name)

    def __call__(self, episodes: pa.Table) -> pa.Table:
        started = time.time()
        rows = self.runner.run(episodes)
        failed = len(rows) - rows["error"].null_count
        self.meter.report.remote(self.name, started, time.time(), len(rows), failed, 0, 0)
        return rows


def _run(
    config: EvaluateConfig,
    subjects: Sequence[Subject],
    episodes: pa.Table,
    pool: dict[str, Any],
) -> dict[str, Any]:
    """Answer and score every episode that the checkpoint does not have; gives the table."""
    started = time.monotonic()
    if not storage.exists(storage.join(config.out, _EPISODES)):
        buffer = pa.BufferOutputStream()
        pq.write_table(episodes, buffer)
        storage.write_bytes(storage.join(config.out, _EPISODES), buffer.getvalue().to_pybytes())
    meter = Meter.options(scheduling_strategy=here()).remote()

    def answers(blocks: Dataset) -> Dataset:
        return blocks.map_batches(
            EpisodeActor,
            fn_constructor_kwargs={"config": config, "subjects": subjects, "meter": meter},
            batch_format="pyarrow",
            batch_size=config.rows_per_block,
            **pool,
        )

    filesystem, asked = storage.resolve(storage.join(config.out, _EPISODES))
    map_exactly_once(
        (filesystem, [asked]),
        config.out,
        _ROWS,
        answers,
        columns=EPISODE_SCHEMA.names,
        id_column="episode",
        rows_per_block=config.rows_per_block,
        schema=RESULT_SCHEMA,
        partition="task",
        total=len(episodes),
        unit="episodes",
        meter=meter,
    )
    rows = read_rows(config.out)
    if sorted(row["episode"] for row in rows) != sorted(episodes["episode"].to_pylist()):
        raise DatasetError(
            f"{config.out}: has {len(rows)} rows, not one for each of {len(episodes)} episodes; give another --out"
        )
    return tabulate(rows, subjects, config.seed) | {"seconds": round(time.monotonic() - started, 1)}


def read_rows(out: str, pair_ids: Collection[int] | None = None) -> list[dict[str, Any]]:
    """The rows (``RESULT_SCHEMA``) of the evaluation ``out``, by task, subject and pair.

    All of them without ``images``, which are most of their size, or with them those of ``pair_ids``.
    """
    filesystem, inner = storage.resolve(storage.join(out, _ROWS))
    found = ds.dataset(
        inner, RESULT_SCHEMA, "parquet", filesystem, ds.partitioning(pa.schema([("task", pa.string())]), flavor="hive")
    )
    if pair_ids is None:
        table = found.to_table(columns=[name for name in RESULT_SCHEMA.names if name != "images"])
    else:
        table = found.to_table(columns=RESULT_SCHEMA.names, filter=ds.field("pair_id").isin(list(pair_ids)))
    rows: list[dict[str, Any]] = table.sort_by(
        [(key, "ascending") for key in ("task", "subject", "pair_id")]
    ).to_pylist()
    return rows


def _write_results(config: EvaluateConfig, subjects: Sequence[Subject], results: dict[str, Any]) -> None:
    """Table and page, then ``results.json``, which says that all is there."""
    chosen = choose_episodes(read_rows(config.out), results)
    shown = read_rows(config.out, {pair_id for ranks in chosen.values() for pair_id in ranks.values()})
    by_key = {(row["task"], row["pair_id"], row["subject"]): row for row in shown if row["error"] is None}
    here = config.model_copy(update={"engine": config.engine.model_copy(update={"device": "cpu"})})  # a head has no GPU
    runner = Runner(here, subjects, *(storage.join(config.out, name) for name in (_QUERIES, _EXAMPLES)))
    strips = []
    for task, ranks in chosen.items():
        primary = results["tasks"][task]["primary"]
        for rank, pair_id in ranks.items():
            for subject in subjects:
                row = by_key.get((task, pair_id, subject.name))
                if row is None:
                    continue
                try:
                    query, frames, answer, label = runner.pictures_of(row)
                except PairError:  # a model read tokens where the query's picture has gone since
                    continue
                value = next(entry["value"] for entry in row["values"] if entry["metric"] == primary)
                strips.append(Strip(task, subject.name, rank, pair_id, value, query, list(frames), answer, label))
    write_evaluation_page(EvaluationResults.model_validate(results), strips, storage.join(config.out, PAGE))
    storage.write_bytes(storage.join(config.out, TABLE), to_csv(results).encode())
    storage.write_json(storage.join(config.out, RESULTS), results)


def _track(tracker: Tracker, config: EvaluateConfig, results: dict[str, Any]) -> None:
    """Figures and files to MLflow; figures that it has already stay as they are."""
    tracker.log(0, {_metric(entry): entry["mean"] for entry in results["scores"]})
    tracker.artefacts(config.out, (RESULTS, TABLE, PAGE))


# --- before anything expensive ---------------------------------------------------------------------------------------


def _absolute(config: EvaluateConfig) -> EvaluateConfig:
    """``config`` with paths that mean the same in a worker's folder, and every run with its name."""
    adapters = []
    for entry in config.adapters:
        name, separator, run = entry.partition("=")
        if not separator or "/" in name:
            name, run = entry.rstrip("/").rpartition("/")[2], entry
        adapters.append(f"{name}={absolute(run)}")
    update: dict[str, Any] = {"data": absolute(config.data), "out": absolute(config.out), "adapters": tuple(adapters)}
    if config.manifest is not None:
        update["manifest"] = absolute(config.manifest)
    return config.model_copy(update=update)


def _resolve(config: EvaluateConfig, dataset: ChainDataset) -> EvaluateConfig:
    """``config`` with what the dataset decides."""
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
        found = find_alexnet()
        update["lpips"] = None if found is None else str(found)
    else:
        load_lpips(Path(config.lpips))
    if config.tasks is None:
        update["tasks"] = tuple(sorted(set(dataset.table(["task"], None, config.split)["task"].to_pylist()))) or None
    return config.model_copy(update=update)


def _pairs(config: EvaluateConfig, dataset: ChainDataset, subjects: Sequence[Subject]) -> tuple[pa.Table, pa.Table]:
    """Queries, and examples for the baselines; DatasetError where there are not enough."""
    queries = choose_pairs(dataset, config.tasks, config.split, config.episodes, config.seed, "split")
    examples = choose_pairs(
        dataset, config.tasks, config.example_split, config.baseline_examples, config.seed, "example_split"
    )
    needed = max((subject.pairs or 0) for subject in subjects) + (config.split == config.example_split)
    there = dataset.table(["task"], config.tasks, config.example_split)["task"].to_pylist()
    for task in config.tasks or ():
        if there.count(task) < needed:
            raise DatasetError(
                f"{dataset.path}: {task} has {there.count(task)} good pairs in split {config.example_split}, an "
                f"episode needs {needed}; lower --pairs, set example_split, or name the other tasks"
            )
    return queries, examples


def _probe(config: EvaluateConfig, gpus: float) -> None:
    """Load the tokenizer where an actor will, so that what is wrong with it is one line before the pool starts."""

    @ray.remote(num_cpus=0 if gpus else 1, num_gpus=gpus, resources=on(config.actors.node_type), max_retries=2)
    def load(config: EvaluateConfig) -> None:
        assert config.tokenizer is not None
        tokenizer = load_tokenizer(config.tokenizer, config.engine)
        require_same_tokens(ChainDataset(config.data), tokenizer, config.tokenizer.path)

    ray.get(load.remote(config))


def _episodes(subjects: Sequence[Subject], queries: pa.Table) -> pa.Table:
    """One row (``EPISODE_SCHEMA``) for every subject and query, sorted so that an actor seldom changes its model."""
    rows = [
        {"episode": seed_of(subject.name, pair["pair_id"]), "subject": subject.name} | pair
        for subject in subjects
        for pair in queries.to_pylist()
    ]
    return pa.Table.from_pylist(rows, EPISODE_SCHEMA)


def _fingerprints(dataset: ChainDataset, subjects: Sequence[Subject]) -> dict[str, str]:
    found = {f"dataset.{key}": value for key, value in dataset.fingerprints.items()}
    pairs = dataset.record.pairs
    what = json.dumps([dataset.identity, pairs and pairs.to_json(), dataset.count()], sort_keys=True)
    found["dataset.pairs"] = hashlib.sha256(what.encode()).hexdigest()
    for subject in subjects:
        if subject.fingerprint:
            found[f"{subject.name}.backbone"] = subject.fingerprint
        if subject.adapter is not None:
            found[f"{subject.name}.adapter"] = hashlib.sha256(storage.read_bytes(adapter_weights(subject))).hexdigest()
    return found


def _metric(entry: dict[str, Any]) -> str:
    """The name of a score in MLflow, which takes only some characters."""
    name = f"{entry['task']}/{entry['metric']}/{entry['subject']}"
    return re.sub(r"[^\w\-. :/]", "_", name)
