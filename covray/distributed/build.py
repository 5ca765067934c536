"""``covray build``: a manifest to token shards, on a Ray Data actor pool, exactly once.

    manifest -> repartition -> decode and check (tasks) -> BlockBuilder (actor pool) -> Parquet shards by task

Ray Data's checkpoint commits a block when its shard is written, so a build that was killed anywhere is continued by the
same command. The audit at the end counts every pair; readers trust no dataset without it.

``--append`` adds a version of a larger manifest: the pairs that the dataset has count as committed, and the others are
written to a folder of their own. Until the new audit replaces the old one, readers see the version before.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import torch
from ray.data import Dataset

from covray.chains.audit import audit_dataset
from covray.chains.dataset import ChainDataset, shard_folder
from covray.chains.kept_noise import KeptNoise
from covray.chains.model_checks import require_models
from covray.chains.prepare import BuildModels, needs_prior, reads_captions
from covray.chains.records import Audit, DatasetRecord
from covray.chains.shard_rows import shard_schema, union_alphas
from covray.chains.spacing import PROBES
from covray.config import BuildConfig, recorded_section
from covray.config.build import solver_text, with_solver
from covray.distributed.metrics import DATASET_PAIRS, PAIRS, Recorder
from covray.distributed.plugin_checks import require_on_nodes, used_plugins
from covray.distributed.pool import (
    TASK_CPUS,
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
    map_exactly_once,
    most_actors,
    one_line_errors,
    pool_of,
)
from covray.distributed.prepare import prepare
from covray.distributed.progress import PoolUsage, rows_by_task, start_progress_actor
from covray.distributed.resumable import Output
from covray.distributed.session import ray_session
from covray.distributed.trackers.base import require_trackers
from covray.distributed.versions import (
    Version,
    asked_before,
    choose_version,
    classes_of,
    earlier_counts,
    grows,
    pair_set,
    with_version,
)
from covray.errors import DatasetError
from covray.io import storage
from covray.io.storage import absolute
from covray.pairs.manifest_reading import ManifestInfo, check_manifest
from covray.plugins import require_packages
from covray.progress import stage
from covray.tasks.base import Meta

if TYPE_CHECKING:
    from covray.chains.build import BlockBuilder


@dataclass(frozen=True)
class Plan:
    """What a build would do, before anything is started."""

    pairs: int
    per_task: dict[str, int]
    methods: tuple[str, ...]
    alphas: tuple[float, ...]
    unet_evaluations: int
    """An upper bound: a picture that several pairs of a block share is inverted once."""
    out: str
    solver: str
    """How the prior inverts and denoises."""


def plan_build(config: BuildConfig, append: bool = False) -> Plan:
    """Check what ``build`` checks before it starts Ray, and count the work; nothing is started or written.

    Args:
        config: The configuration.
        append: Whether a larger manifest may add pairs to a finished dataset; only those are counted.

    Raises:
        CovrayError: A manifest, model folder, configuration or output folder cannot be used.
    """
    _require_packages(config.out)
    config = config.model_copy(update={"pairs": absolute(config.pairs)})
    info = check_manifest(config.pairs)
    output = Output(config.out, DatasetRecord, "covray build", result=Audit.FILE)
    output.inspect()
    # Of a dataset that is there, only what a new version adds is work.
    version = choose_version(config, output, info, append)
    pairs, per_task = info.rows, info.per_task
    if output.begun is None:
        classes_of(config, info)
    else:
        _require_same_identity(config, output.begun, output)
        if version.is_new:
            with_version(config, output.begun, info)
            before = ChainDataset(config.out)
            pairs -= before.count(errors=True)
            assert before.audit is not None
            added = {}
            for task, rows in per_task.items():
                added[task] = rows - asked_before(before.audit, task)
            per_task = added
    require_models(config)
    _require_contexts(config, info)
    if config.noise_from is not None:
        ChainDataset(config.noise_from)
    alphas = union_alphas(config.lengths, config.alphas)
    solver, passes = "none needed", 0.0  # passes: inversions and denoisings of one pair, in the mean
    if needs_prior(config):
        solver = solver_text(config.prior.model_dump())
        passes += 2  # both ends are inverted
        passes += 2 * config.check_endpoints  # of this share of the pairs they are also denoised again
    if "diffusion" in config.methods:
        passes += len(alphas)
        if config.spacing == "path":
            passes += PROBES
    evaluations = round(pairs * passes * config.prior.evaluations_each_way)
    return Plan(pairs, per_task, config.methods, alphas, evaluations, config.out, solver)


def build(config: BuildConfig, patience_s: float = 0.0, append: bool = False) -> Audit:
    """Build the dataset ``config.out`` from the manifest ``config.pairs``.

    Called again on an unfinished dataset it continues it; on a finished one it returns the audit at once.

    Args:
        config: The configuration; what it leaves open is decided here, and recorded.
        patience_s: Seconds to wait for another command that is at work in the folder.
        append: Whether a larger manifest may add pairs to a finished dataset.

    Returns:
        The audit, as it is written.

    Raises:
        CovrayError: A manifest, model, configuration or storage cannot be used; nothing has been computed.
    """
    # A relative path means nothing in a worker's folder, nor to a later command in another folder.
    config = config.model_copy(update={"pairs": absolute(config.pairs)})
    _require_packages(config.out)
    with stage(f"reading {config.pairs}"):
        info = check_manifest(config.pairs)
    # A finished dataset is only read; one that grows is locked like one that is begun.
    result: str | None = Audit.FILE
    if grows(config, info, append):
        result = None
    with Output(config.out, DatasetRecord, "covray build", result=result, patience_s=patience_s) as output:
        version = choose_version(config, output, info, append)
        classes = None
        if output.begun is None:
            classes = classes_of(config, info)
        else:  # a dataset that has begun goes on, whatever an earlier version let into it
            _require_same_identity(config, output.begun, output)
            config = _as_recorded(config, output.begun)
        if version.number <= version.finished:
            return Audit.read(output.folder).of_version(version.number)
        if version.is_new:
            assert output.begun is not None
            version = replace(version, record=_with_plugins(with_version(config, output.begun, info), config, info))
        require_trackers(config)
        _require_contexts(config, info)
        with ray_session() as cores:
            audit = _build(config, info, classes, output, version, cores)
    return audit


def _build(
    config: BuildConfig,
    info: ManifestInfo,
    classes: Meta | None,
    output: Output[DatasetRecord],
    version: Version,
    cores: int,
) -> Audit:
    """Build a version in a Ray session with ``cores`` cores."""
    require_on_nodes(_plugins(config, info))
    gpus = gpus_of(config.actors, config.engine)
    with stage("loading the models, to check them"):
        config, models = _load_once(config, gpus)
    config = _with_block_size(config, info.rows, most_actors(config.actors, config.engine, cores, gpus))
    record = version.record or output.begun or _description(config, info, models, classes)
    if output.begun is not None:
        output.require_same(output.begun.identity, config.identity())
        output.require_same(output.begun.fingerprints, models.fingerprints)
    if version.is_new:
        # The version before is finished, but a kill may have left a part of its checkpoint: its other pairs would be
        # built again. Before the description names the new version, after which the checkpoint is that one's.
        delete_checkpoint(output.folder)
    with output.tracked(config, record) as (tracker, _):
        # A checkpoint that is gone is made again from the shards, so that no pair is written twice.
        if output.begun is not None:
            commit_again(output.folder, "pair_id", lambda: _written_ids(config.out, version.number))
        audit = _write_version(config, info, models, version, cores)
        _record(config.out, audit)
        tracker.log(0, _figures(audit))
        tracker.artefacts(config.out, (DatasetRecord.FILE, Audit.FILE))
    # By us and not by Ray Data at its success: a kill before the audit would else start the build afresh.
    delete_checkpoint(output.folder)
    return audit


def _write_version(config: BuildConfig, info: ManifestInfo, models: BuildModels, version: Version, cores: int) -> Audit:
    """Compute and write what a version lacks, and audit it; return the audit, as it is written.

    Args:
        config: Resolved.
        info: The manifest.
        models: What the actors must load.
        version: What is written.
        cores: Cores of the cluster.
    """
    folder = storage.Folder(config.out)
    noise = None
    if config.noise_from:
        noise = KeptNoise.of(config.noise_from, config, models.fingerprints["prior"])
    started = time.monotonic()
    pool = pool_of(config.actors, config.engine, cores, gpus_of(config.actors, config.engine))
    usage, before = _run(config, info, models, noise, pool, version)
    seconds = round(time.monotonic() - started, 1)
    with stage("counting what was written"):
        audit = audit_dataset(config.out, info.pair_ids, info.per_task, version.number)
    figures = asdict(usage) | {"seconds": seconds, "rows_of_earlier_runs": before}
    if version.number > 1:
        figures["versions"] = [*earlier_counts(folder, version.number), audit.counts()]
    audit = audit.model_copy(update=figures)
    audit.write(folder)
    return audit


def _record(out: str, audit: Audit) -> None:
    """Set the gauges of a finished dataset."""
    recorder = Recorder(out)
    for task, counts in audit.per_task.items():
        for status in ("written", "rejected"):
            recorder.set(DATASET_PAIRS, getattr(counts, status), task=task, status=status)


def _figures(audit: Audit) -> dict[str, float | None]:
    """Return the figures of an audit, those of a task as ``task/figure``, for trackers."""
    figures: dict[str, float | None] = {}
    for name, value in audit.to_json().items():
        if isinstance(value, int | float) and name != "version":
            figures[name] = value
    for task, counts in audit.per_task.items():
        for name in ("asked", "written", "rejected"):
            figures[f"{task}/{name}"] = getattr(counts, name)
    return figures


def _written_ids(out: str, version: int) -> pa.ChunkedArray:
    """Return the pair ids of the rows that a version has. Raises DatasetError for a shard that cannot be read."""
    dataset = ChainDataset(out, unfinished=True, version=version)
    ids = dataset.table(["pair_id"], errors=True)["pair_id"]
    if dataset.unreadable:
        raise DatasetError(f"{out}/{dataset.unreadable[0]}: cannot be read; delete it, and run the same command again")
    return ids


def _run(
    config: BuildConfig,
    info: ManifestInfo,
    models: BuildModels,
    noise: KeptNoise | None,
    pool: PoolOptions,
    version: Version,
) -> tuple[PoolUsage, int]:
    """Compute and write every pair that the checkpoint does not have.

    Args:
        config: Resolved.
        info: The manifest.
        models: What the actors must load.
        noise: The index of an earlier build's noise.
        pool: The pool's arguments of ``map_batches``.
        version: What is written.

    Returns:
        How the actors spent their time, and the rows that earlier runs had written.
    """
    assert config.rows_per_block is not None
    rows_per_block = config.rows_per_block
    progress = start_progress_actor(config.out, PAIRS)
    shared = {"config": config, "models": models}

    def chains(blocks: Dataset) -> Dataset:
        prepared = blocks.map_batches(
            prepare,
            batch_format="pyarrow",
            batch_size=rows_per_block,
            num_cpus=TASK_CPUS,
            fn_kwargs=shared | {"root": info.root, "noise": ray.put(noise)},
        )
        return Pool(ChainActor, shared, pool, rows_per_block).map(prepared, progress)

    columns = ["pair_id", "task", "split", "image", "label", "meta"]
    if reads_captions(config):
        columns.append("caption")
    rows_in = RowsIn(
        filesystem=storage.resolve(config.pairs)[0],
        files=info.files,
        columns=columns,
        id_column="pair_id",
        total=info.rows,
        unit="pairs",
    )
    schema = shard_schema(config.keep_noise).with_metadata(_file_metadata(config, models, _plugins(config, info)))
    rows_out = RowsOut(storage.Folder(config.out), shard_folder(version.number), schema, partition="task")
    with one_line_errors(config.out, "build"):
        before = map_exactly_once(rows_in, rows_out, chains, rows_per_block, progress)
    usage: PoolUsage = ray.get(progress.usage.remote())
    return usage, before


class ChainActor(PoolActor):
    """One worker of the pool: holds the models, turns prepared blocks into shard rows, reports what it did."""

    def __init__(self, config: BuildConfig, models: BuildModels, progress: Any):
        """Load the models. Raises DatasetError when they are not those of the driver, ``models``."""
        self.builder = _builder(config)
        loaded = self.builder.models()
        if loaded != models:
            raise DatasetError(f"this node's weights differ from the driver's: {loaded}, not {models}")
        super().__init__(progress)

    def __call__(self, prepared: pa.Table) -> pa.Table:
        """Return the shard rows of a prepared block."""
        started = time.time()
        rows, stats = self.builder.build(prepared)
        counts = {"evaluations": stats.evaluations, "padded": stats.padded, "by_task": rows_by_task(rows)}
        self.report(started, stats.rows, stats.rejected, **counts)
        return rows


def _builder(config: BuildConfig) -> BlockBuilder:
    # Here, not above: they load transformers, for which the driver, that computes nothing, need not wait.
    from covray.chains.build import BlockBuilder
    from covray.thinking.chain_contexts import load_context_reader

    torch.set_num_threads(config.engine.threads)
    return BlockBuilder(config, load_context_reader(config))


# --- before anything expensive -------------------------------------------------------------------------------------


def _load_once(config: BuildConfig, gpus: float) -> tuple[BuildConfig, BuildModels]:
    """Load the models once where an actor will, so that what is wrong with them is one line before the pool starts.

    Returns:
        The configuration with what the models decide, and what they are.
    """

    def load(config: BuildConfig) -> tuple[BuildConfig, BuildModels]:
        builder = _builder(config)
        return builder.config, builder.models()

    check = ray.remote(**like_an_actor(gpus, config.actors.node_type))(load)
    with one_line_errors(config.out, "build"):
        loaded: tuple[BuildConfig, BuildModels] = ray.get(check.remote(config))
    return loaded


def _with_block_size(config: BuildConfig, pairs: int, actors: int) -> BuildConfig:
    """Return ``config`` with the rows of a block decided. No token depends on them."""
    fewest = 1
    if config.engine.batch is not None:
        # Two waves of the engine: in a block all but the last two have full batches.
        passes_per_pair = 2 + len(union_alphas(config.lengths, config.alphas)) * ("diffusion" in config.methods)
        fewest = -(-2 * config.engine.batch // passes_per_pair)
    rows = choose_rows_per_block(config.rows_per_block, pairs, actors, fewest)
    return config.model_copy(update={"rows_per_block": rows})


def _description(config: BuildConfig, info: ManifestInfo, models: BuildModels, classes: Meta | None) -> DatasetRecord:
    record = DatasetRecord(
        config=config.model_dump(mode="json"),
        identity=config.identity(),
        fingerprints=models.fingerprints,
        latent_shape=models.latent_shape,
        tokenizer_size_px=models.tokenizer_px,
        tokens_per_image=models.tokens_per_image,
        codes=models.codes,
        pairs=pair_set(info),
    )
    if classes is not None:
        record = record.model_copy(update={"classes": classes})
    return _with_plugins(record, config, info)


def _plugins(config: BuildConfig, info: ManifestInfo) -> dict[str, str]:
    """Return the plug-ins that the build uses, each with package and version."""
    return used_plugins(info.per_task, config.methods)


def _with_plugins(record: DatasetRecord, config: BuildConfig, info: ManifestInfo) -> DatasetRecord:
    """Return a description with the plug-ins in use; without any the key is absent, as in files of earlier versions."""
    plugins = (record.plugins or {}) | _plugins(config, info)
    if not plugins:
        return record
    return record.model_copy(update={"plugins": plugins})


def _require_contexts(config: BuildConfig, info: ManifestInfo) -> None:
    """Refuse contexts that the manifest or the models cannot give. Raises ManifestError, WeightsError."""
    if config.prior.context != "empty":
        from covray.thinking.chain_contexts import require_contexts  # here, for PyTorch as in _builder

        require_contexts(config, info)


def _require_packages(out: str) -> None:
    """Refuse a dataset begun with plug-ins that are not installed, before the manifest's tasks are unknown."""
    begun = DatasetRecord.read_if_present(out)
    if begun is not None:
        require_packages(begun.plugins, out)


def _require_same_identity(config: BuildConfig, begun: DatasetRecord, output: Output[DatasetRecord]) -> None:
    """Refuse to continue a dataset of another configuration. Raises DatasetError."""
    output.require_same(with_solver(begun.identity), with_solver(config.identity()), open_matches=True)


def _as_recorded(config: BuildConfig, begun: DatasetRecord) -> BuildConfig:
    """Return ``config`` with what the begun build decided: a probe of today might propose another batch."""
    batch = recorded_section(begun.config, "engine")["batch"]
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"batch": batch})})
    if config.rows_per_block is not None:
        return config
    return config.model_copy(update={"rows_per_block": begun.config["rows_per_block"]})


def _file_metadata(config: BuildConfig, models: BuildModels, plugins: dict[str, str]) -> dict[str, str]:
    """Return what every shard says of itself, should it be separated from its folder."""
    described = {"version": 1, "identity": config.identity(), "fingerprints": models.fingerprints}
    if plugins:
        described["plugins"] = plugins
    return {"covray": json.dumps(described)}
