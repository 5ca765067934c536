"""``covray think features``: pictures or episodes to features, on a Ray Data actor pool, exactly once.

    samples -> repartition -> FeatureActor (actor pool) -> Parquet shards by split

What was computed before a kill is not computed again; see ``covray.distributed.pool``.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch

from covray.config.think import ThinkFeaturesConfig
from covray.distributed.paths import absolute_fields, absolute_model
from covray.distributed.pool import (
    Pool,
    PoolActor,
    PoolOptions,
    RowsIn,
    RowsOut,
    choose_rows_per_block,
    commit_again,
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
from covray.distributed.resumable import Output
from covray.distributed.session import ray_session
from covray.errors import DatasetError
from covray.io.storage import Folder
from covray.progress import stage
from covray.thinking.building import FeatureBuilder, Samples, facts_of, feature_width, read_samples
from covray.thinking.dataset import FEATURE_SCHEMA, PARQUET, SHARDS, TOKENIZER, read_table
from covray.thinking.records import FeaturesRecord, FeaturesResult

COMMAND = "covray think features"
_SAMPLES = "_samples.parquet"


def take_features(config: ThinkFeaturesConfig) -> FeaturesResult:
    """Take the features of the pictures of ``config.data``, or of episodes.

    Called again on an unfinished folder it continues it; on a finished one it returns the result at once.

    Args:
        config: The configuration.

    Returns:
        What is written to ``_result.json``.

    Raises:
        CovrayError: Data, model, configuration or storage cannot be used; nothing has been computed.
    """
    config = absolute_paths(config)
    with Output(config.out, FeaturesRecord, COMMAND, result=FeaturesResult.FILE) as output:
        with stage(f"reading {config.data or 'episodes'}"):
            samples, record = check(config, output)
        if output.finished:
            return FeaturesResult.read(output.folder)
        with ray_session() as cores, one_line_errors(config.out, "computation of features"):
            result = _take(config, samples, record, output, cores)
    return result


def check(config: ThinkFeaturesConfig, output: Output[FeaturesRecord]) -> tuple[Samples, FeaturesRecord]:
    """Return the samples and the description of the folder, after all checks that need no weights in memory.

    Raises:
        CovrayError: Data or model cannot be used, or the folder was begun with others.
    """
    facts = facts_of(config)
    samples = read_samples(config)
    record = FeaturesRecord(
        config=config.model_dump(mode="json"),
        identity=config.identity(),
        fingerprints={"vlm": facts.fingerprint, "data": samples.fingerprint},
        width=feature_width(facts),
        samples=len(samples.rows),
    )
    if output.begun is not None:
        output.require_same(output.begun.identity, record.identity)
        output.require_same(output.begun.fingerprints, record.fingerprints)
    return samples, record


def absolute_paths(config: ThinkFeaturesConfig) -> ThinkFeaturesConfig:
    """Return ``config`` with paths that mean the same in a worker's folder. A model without a folder is a hub id."""
    paths = absolute_fields(config, "out", "data", "root", "cobsat")
    return config.model_copy(update=paths | {"vlm": absolute_model(config.vlm)})


def _take(
    config: ThinkFeaturesConfig, samples: Samples, record: FeaturesRecord, output: Output[FeaturesRecord], cores: int
) -> FeaturesResult:
    """Compute in a Ray session with ``cores`` cores."""
    folder = output.folder
    gpus = gpus_of(config.actors, config.engine)
    with stage("loading the model, to check it"):
        tokenizer = _load_once(config, samples.root, gpus)
    actors = most_actors(config.actors, config.engine, cores, gpus)
    rows_per_block = choose_rows_per_block(config.rows_per_block, len(samples.rows), actors, fewest=1)
    if output.begun is None:
        record.write(folder)
    for name, data in tokenizer.items():
        (folder / TOKENIZER).write_bytes(name, data)
    if not folder.exists(_SAMPLES):
        folder.write_bytes(_SAMPLES, parquet_bytes(samples.rows))
    commit_again(folder, "sample", lambda: read_table(config.out, ["sample"])["sample"])
    started = time.monotonic()
    _run(config, samples, rows_per_block, pool_of(config.actors, config.engine, cores, gpus))
    seconds = round(time.monotonic() - started, 1)
    with stage("counting what was written"):
        result = _count(config, samples, seconds)
    # The result first: a kill in between leaves a finished folder, not one that would start afresh.
    result.write(folder)
    delete_checkpoint(folder)
    folder.delete_file(_SAMPLES)
    return result


def _run(config: ThinkFeaturesConfig, samples: Samples, rows_per_block: int, pool: PoolOptions) -> None:
    """Compute and write every row that the checkpoint does not have."""
    folder = Folder(config.out)
    rows_in = RowsIn(
        filesystem=folder.filesystem,
        files=[folder.inner_path(_SAMPLES)],
        columns=samples.rows.column_names,
        id_column="sample",
        total=len(samples.rows),
        unit=config.of,
    )
    rows_out = RowsOut(folder, SHARDS, FEATURE_SCHEMA, partition="split", parquet=PARQUET)
    arguments = {"config": config, "root": samples.root}
    run_pool(Pool(FeatureActor, arguments, pool, rows_per_block), rows_in, rows_out, start_progress_actor())


class FeatureActor(PoolActor):
    """One worker of the pool: holds the model, turns blocks of pictures into rows, reports what it did."""

    def __init__(self, config: ThinkFeaturesConfig, root: str | None, progress: Any):
        """Load the model."""
        torch.set_num_threads(config.engine.threads)
        self.builder = FeatureBuilder(config, root)
        super().__init__(progress)

    def __call__(self, samples: pa.Table) -> pa.Table:
        """Return the rows (``FEATURE_SCHEMA``) of a block of samples."""
        started = time.time()
        rows = self.builder.build(samples)
        self.report_rows(started, rows)
        return rows


def _load_once(config: ThinkFeaturesConfig, root: str | None, gpus: float) -> dict[str, bytes]:
    """Load the model where an actor will, so that what is wrong with it is one line; return its tokenizer's files."""

    @ray.remote(**like_an_actor(gpus, config.actors.node_type))
    def load(config: ThinkFeaturesConfig) -> dict[str, bytes]:
        builder = FeatureBuilder(config, root)
        with tempfile.TemporaryDirectory() as local:
            builder.save_tokenizer(local)
            files = {}
            for file in Path(local).iterdir():
                if file.is_file():
                    files[file.name] = file.read_bytes()
            return files

    files: dict[str, bytes] = ray.get(load.remote(config))
    return files


def _count(config: ThinkFeaturesConfig, samples: Samples, seconds: float) -> FeaturesResult:
    """Compare what was written with what was asked for; return the figures.

    Raises:
        DatasetError: A sample is missing, doubled, or none of the data.
    """
    folder = Folder(config.out)
    rows = read_table(config.out, ["sample", "split", "count", "error"])
    if sorted(rows["sample"].to_pylist()) != sorted(samples.rows["sample"].to_pylist()):
        raise DatasetError(
            f"{config.out}: has {len(rows)} rows, not one for each of {len(samples.rows)} {config.of}; give another "
            "--out"
        )
    reasons: Counter[str] = Counter()
    per_split: Counter[str] = Counter()
    features = 0
    for row in rows.to_pylist():
        if row["error"] is not None:
            reasons[row["error"]] += 1
            continue
        per_split[row["split"]] += 1
        features += row["count"]
    paths = [folder.inner_path(name) for name in folder.list_files(".parquet")]
    size = 0
    for info in folder.filesystem.get_file_info(paths):
        if f"/{SHARDS}/" in info.path:  # the list of samples is a Parquet file, too
            size += info.size
    return FeaturesResult(
        samples=len(rows),
        failed=reasons.total(),
        reasons=dict(sorted(reasons.items())),
        per_split=dict(sorted(per_split.items())),
        features=features,
        bytes=size,
        seconds=seconds,
    )
