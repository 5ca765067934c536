"""``covray build``: a manifest to token shards, on a Ray Data actor pool, exactly once.

    manifest -> repartition -> decode and check (tasks) -> BlockBuilder (actor pool) -> Parquet shards by task

Ray Data's checkpoint commits a block when its shard is written, so a build that was killed anywhere is continued by the
same command. The audit at the end counts every pair; readers trust no dataset without it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.exceptions
import torch
from ray.data import ActorPoolStrategy, DataContext
from ray.data.checkpoint import CheckpointConfig

from covray import storage
from covray.building import BlockBuilder, Facts, KeptNoise, needs_prior, prepare_block
from covray.config import BuildConfig, differences
from covray.distributed.progress import BuildProgress, Meter
from covray.distributed.session import READING_CPUS, ray_session
from covray.errors import ConfigError, CovrayError, DatasetError
from covray.pairs.manifest import ManifestInfo, check_manifest
from covray.tokens.audit import audit_dataset
from covray.tokens.shards import shard_schema, union_alphas

TASK_CPUS = 0.5
"""Logical CPUs of a task that reads, decodes or writes: such tasks wait for storage, and must fit beside the actors."""
CHECKPOINT = "_checkpoint"


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


def plan_build(config: BuildConfig) -> Plan:
    """Check the manifest and count the work. Raises ManifestError."""
    info = check_manifest(config.pairs)
    alphas = union_alphas(config.lengths, config.alphas)
    jobs = (2 + 2 * config.check_endpoints) if needs_prior(config) else 0
    jobs += len(alphas) if "diffusion" in config.methods else 0
    return Plan(
        info.rows, info.per_task, config.methods, alphas, round(info.rows * jobs * config.prior.steps), config.out
    )


def build(config: BuildConfig) -> dict[str, Any]:
    """Build the dataset ``config.out`` from the manifest ``config.pairs``; returns the audit.

    Called again on an unfinished dataset it continues it; on a finished one it returns the audit at once. Raises
    CovrayError: a manifest, model, configuration or storage that cannot be used, before any actor is started.
    """
    info = check_manifest(config.pairs)
    described = _read_description(config)
    audit_path = storage.join(config.out, "_audit.json")
    if described is not None:
        _require_same_pairs(config, described, info)
        _require_same(config, described["identity"], config.identity(), open_matches=True)
        config = _as_recorded(config, described["config"])
        if storage.exists(audit_path):
            return dict(storage.read_json(audit_path))
    else:
        _require_fresh(config)
    with ray_session() as cores:
        gpus = _gpus(config)
        config, facts = _probe(config, gpus)
        if described is None:
            _write_description(config, info, facts)
        else:
            _require_same(config, described["identity"], config.identity())
            _require_same(config, described["fingerprints"], facts.fingerprints)
        noise = KeptNoise.of(config.noise_from, config, facts) if config.noise_from else None
        usage = _run(config, info, facts, noise, _pool(config, cores, gpus))
    audit = audit_dataset(config.out, info.pair_ids, info.per_task) | usage
    storage.write_json(audit_path, audit)
    _delete_checkpoint(config)
    return audit


def _run(
    config: BuildConfig, info: ManifestInfo, facts: Facts, noise: KeptNoise | None, pool: dict[str, Any]
) -> dict[str, Any]:
    """Compute and write every pair that the checkpoint does not have."""
    started = time.monotonic()
    context = DataContext.get_current().copy()
    context.checkpoint_config = CheckpointConfig(
        id_column="pair_id",
        checkpoint_path=_absolute(storage.join(config.out, CHECKPOINT)),
        # Deleted once the audit stands: a kill between the two must not start the build afresh.
        delete_checkpoint_on_success=False,
    )
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    context.execution_no_progress_timeout_s = 24 * 3600  # GPU nodes may take long to arrive
    before = _committed_rows(config)
    meter = Meter.remote()
    shared = {"config": config, "facts": facts}
    with DataContext.current(context), BuildProgress(info.rows, before, meter), _one_line_errors(config):
        manifest = ray.data.read_parquet(
            _absolute(config.pairs),
            columns=["pair_id", "task", "split", "image", "label"],
            num_cpus=TASK_CPUS,
        )
        # A small manifest is read as one block: without this, one actor would get it all.
        blocks = manifest.repartition(target_num_rows_per_block=config.rows_per_block)
        prepared = blocks.map_batches(
            _prepare,
            batch_format="pyarrow",
            batch_size=config.rows_per_block,
            num_cpus=TASK_CPUS,
            fn_kwargs=shared | {"root": info.root, "noise": ray.put(noise)},
        )
        chains = prepared.map_batches(
            ChainActor,
            fn_constructor_kwargs=shared | {"meter": meter},
            batch_format="pyarrow",
            batch_size=config.rows_per_block,
            **pool,
        )
        chains.write_parquet(
            _absolute(storage.join(config.out, "shards")),
            partition_cols=["task"],
            ray_remote_args={"num_cpus": TASK_CPUS},
            schema=shard_schema(config.keep_noise).with_metadata(_file_metadata(config, facts)),
        )
    usage: dict[str, Any] = ray.get(meter.usage.remote())
    return usage | {"seconds": round(time.monotonic() - started, 1), "rows_of_earlier_runs": before}


def _prepare(table: pa.Table, config: BuildConfig, facts: Facts, root: str | None, noise: Any) -> pa.Table:
    return prepare_block(table, config, facts, root, ray.get(noise))


class ChainActor:
    """One worker of the pool: holds the models, turns prepared blocks into shard rows, reports what it did."""

    def __init__(self, config: BuildConfig, facts: Facts, meter: Any):
        torch.set_num_threads(config.engine.threads)
        self.builder = BlockBuilder(config)
        if self.builder.facts() != facts:
            raise DatasetError(f"this node's weights differ from the driver's: {self.builder.facts()}, not {facts}")
        self.meter = meter
        self.name = ray.get_runtime_context().get_actor_id()
        meter.join.remote(self.name)

    def __call__(self, prepared: pa.Table) -> pa.Table:
        started = time.time()
        rows, work = self.builder.build(prepared)
        self.meter.report.remote(
            self.name, started, time.time(), work.rows, work.rejected, work.evaluations, work.padded
        )
        return rows


# --- before anything expensive -------------------------------------------------------------------------------------


def _probe(config: BuildConfig, gpus: float) -> tuple[BuildConfig, Facts]:
    """Load the models once where an actor will, so that what is wrong with them is one line before the pool starts."""

    @ray.remote(num_cpus=0 if gpus else 1, num_gpus=gpus, max_retries=2)
    def load(config: BuildConfig) -> tuple[BuildConfig, Facts]:
        torch.set_num_threads(config.engine.threads)
        builder = BlockBuilder(config)
        return builder.config, builder.facts()

    with _one_line_errors(config):
        found: tuple[BuildConfig, Facts] = ray.get(load.remote(config))
    return found


def _gpus(config: BuildConfig) -> float:
    """GPUs of one actor."""
    if config.actors.gpus is not None:
        return config.actors.gpus
    return 1.0 if config.engine.device != "cpu" and ray.cluster_resources().get("GPU", 0) else 0.0


def _pool(config: BuildConfig, cores: int, gpus: float) -> dict[str, Any]:
    """Arguments of ``map_batches`` for the actor pool: as many actors as fit now, as few and as many as configured."""
    actors, threads = config.actors, config.engine.threads
    resources = ray.cluster_resources()
    fit = int(resources.get("GPU", 0) / gpus) if gpus else cores // threads
    maximum = actors.max or max(fit, actors.min, 1)
    if actors.cpus is not None:
        cpus = actors.cpus
    elif gpus:
        cpus = 1.0
    else:  # on a small cluster the actors reserve less than they use, or nothing could be read beside them
        spare = max(0.0, resources.get("CPU", 0) - READING_CPUS)
        cpus = min(float(threads), int(100 * spare / maximum) / 100)
    pool = ActorPoolStrategy(min_size=actors.min, max_size=maximum, initial_size=min(maximum, max(actors.min, fit)))
    return {"compute": pool, "num_cpus": cpus} | ({"num_gpus": gpus} if gpus else {})


def _require_fresh(config: BuildConfig) -> None:
    """Refuse an output that holds something else or cannot be written, before work is put in."""
    try:
        if storage.list_files(config.out):
            raise DatasetError(f"{config.out}: holds files that are no dataset of covray; give another --out")
        existed = storage.exists(config.out)
        storage.write_bytes(storage.join(config.out, ".writable"), b"")
        filesystem, inner = storage.resolve(config.out)
        filesystem.delete_file(f"{inner}/.writable")
        if not existed:  # what is wrong with the models may still end the command: leave nothing behind
            filesystem.delete_dir(inner)
    except OSError as error:
        raise ConfigError(f"{config.out}: cannot be written ({_reason(error)}); give another --out") from error


def _read_description(config: BuildConfig) -> dict[str, Any] | None:
    path = storage.join(config.out, "_dataset.json")
    try:
        description = storage.read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: cannot be read ({_reason(error)}); give another --out") from error
    if not isinstance(description, dict) or description.get("version") != 1:
        raise DatasetError(f"{path}: is no description of this version; give another --out")
    return description


def _write_description(config: BuildConfig, info: ManifestInfo, facts: Facts) -> None:
    description = {
        "version": 1,
        "config": config.model_dump(mode="json"),
        "identity": config.identity(),
        "fingerprints": facts.fingerprints,
        "latent_shape": facts.latent_shape,
        "tokenizer_size_px": facts.tokenizer_px,
        "tokens_per_image": facts.tokens_per_image,
        "codes": facts.codes,
        "pairs": _digest(info),
    }
    storage.write_json(storage.join(config.out, "_dataset.json"), description)


def _digest(info: ManifestInfo) -> dict[str, Any]:
    """The manifest's set of pairs, whatever their order."""
    ids = info.pair_ids.copy()
    ids.sort()
    return {"rows": info.rows, "sha256": hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()}


def _require_same_pairs(config: BuildConfig, described: dict[str, Any], info: ManifestInfo) -> None:
    if described["pairs"] != _digest(info):
        raise DatasetError(
            f"{config.out}: was begun with another manifest ({described['pairs']['rows']} pairs, {config.pairs} has "
            f"{info.rows}, or others); give that one, or another --out"
        )


def _require_same(
    config: BuildConfig, theirs: dict[str, Any], ours: dict[str, Any], open_matches: bool = False
) -> None:
    """Refuse to go on with another configuration. ``open_matches``: what ours leaves open agrees with anything."""
    differing = differences(theirs, ours, open_matches=open_matches)
    if differing:
        raise DatasetError(
            f"{config.out}: was begun with another configuration: {'; '.join(differing)}; "
            "give the same, or another --out"
        )


def _as_recorded(config: BuildConfig, recorded: dict[str, Any]) -> BuildConfig:
    """``config`` with the batch that the begun build recorded: a probe of today might propose another."""
    batch = recorded["engine"]["batch"]
    return config.model_copy(update={"engine": config.engine.model_copy(update={"batch": batch})})


# --- storage and errors --------------------------------------------------------------------------------------------


def _absolute(path: str) -> str:
    return path if "://" in path else storage.resolve(path)[1]


def _committed_rows(config: BuildConfig) -> int:
    """Rows that earlier runs have committed."""
    folder = storage.join(config.out, CHECKPOINT)
    filesystem, inner = storage.resolve(folder)
    names = [name for name in storage.list_files(folder, ".parquet") if not name.endswith(".pending.parquet")]
    return sum(pq.read_metadata(f"{inner}/{name}", filesystem=filesystem).num_rows for name in names)


def _delete_checkpoint(config: BuildConfig) -> None:
    filesystem, inner = storage.resolve(storage.join(config.out, CHECKPOINT))
    filesystem.delete_dir_contents(inner, missing_dir_ok=True)
    filesystem.delete_dir(inner)


def _file_metadata(config: BuildConfig, facts: Facts) -> dict[str, str]:
    """What every shard says of itself, should it be separated from its folder."""
    return {
        "covray": json.dumps({"version": 1, "identity": config.identity(), "fingerprints": facts.fingerprints}),
    }


class _one_line_errors:
    """Whatever Ray wraps a failure in, the user gets our own error, or one line about the storage or the worker."""

    def __init__(self, config: BuildConfig):
        self.config = config

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None or not isinstance(error, Exception):
            return
        causes = [cause for cause in _causes(error) if not isinstance(cause, ray.exceptions.RayError)] or [error]
        for cause in causes:
            if isinstance(cause, CovrayError):
                raise type(cause)(str(cause)) from error
        again = "run the same command again to continue"
        for cause in causes:
            if isinstance(cause, OSError) and not isinstance(cause, ConnectionError):
                raise DatasetError(
                    f"{self.config.out}: storage failed ({_reason(cause)}); mend it and {again}"
                ) from error
        raise DatasetError(f"the build failed in a worker: {_reason(causes[-1])}; mend it and {again}") from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        current = queue.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        queue += [getattr(current, "cause", None), current.__cause__, current.__context__]


def _reason(error: BaseException) -> str:
    """The last telling line: Ray puts whole remote tracebacks into messages."""
    if isinstance(error, OSError) and error.errno in errno.errorcode and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
