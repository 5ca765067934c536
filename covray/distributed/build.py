"""``covray build``: a manifest to token shards, on a Ray Data actor pool, exactly once.

    manifest -> repartition -> decode and check (tasks) -> BlockBuilder (actor pool) -> Parquet shards by task

Ray Data's checkpoint commits a block when its shard is written, so a build that was killed anywhere is continued by the
same command. The audit at the end counts every pair; readers trust no dataset without it.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
from ray.data import Dataset

from covray.chains.audit import audit_dataset
from covray.chains.dataset import ChainDataset, shard_schema, union_alphas
from covray.chains.prepare import Facts, KeptNoise, needs_prior
from covray.chains.records import Audit, DatasetRecord, PairSet
from covray.config import BuildConfig, differences
from covray.distributed.pool import (
    TASK_CPUS,
    absolute,
    commit_again,
    delete_checkpoint,
    gpus_of,
    map_exactly_once,
    on,
    one_line_errors,
    pool_of,
    require_fresh,
)
from covray.distributed.prepare import prepare
from covray.distributed.progress import Meter
from covray.distributed.session import here, ray_session
from covray.errors import DatasetError
from covray.io import storage
from covray.pairs.manifest import ManifestInfo, check_manifest

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


def plan_build(config: BuildConfig) -> Plan:
    """Check the manifest and count the work. Raises ManifestError."""
    info = check_manifest(config.pairs)
    alphas = union_alphas(config.lengths, config.alphas)
    jobs = (2 + 2 * config.check_endpoints) if needs_prior(config) else 0
    jobs += len(alphas) if "diffusion" in config.methods else 0
    return Plan(
        info.rows, info.per_task, config.methods, alphas, round(info.rows * jobs * config.prior.steps), config.out
    )


def build(config: BuildConfig) -> Audit:
    """Build the dataset ``config.out`` from the manifest ``config.pairs``; returns the audit.

    Called again on an unfinished dataset it continues it; on a finished one it returns the audit at once. Raises
    CovrayError: a manifest, model, configuration or storage that cannot be used, before any actor is started.
    """
    # A relative path means nothing to those who come later, and elsewhere.
    config = config.model_copy(update={"pairs": absolute(config.pairs)})
    info = check_manifest(config.pairs)
    described = DatasetRecord.read_if_present(config.out)
    if described is not None:
        _require_same_pairs(config, described, info)
        _require_same(config, described.identity, config.identity(), open_matches=True)
        config = _as_recorded(config, described.config)
        audit = Audit.read_if_present(config.out)
        if audit is not None:
            return audit
    else:
        require_fresh(config.out, "dataset")
    with ray_session() as cores:
        gpus = gpus_of(config.actors, config.engine)
        config, facts = _probe(config, gpus)
        if described is None:
            _write_description(config, info, facts)
        else:
            _require_same(config, described.identity, config.identity())
            _require_same(config, described.fingerprints, facts.fingerprints)
            commit_again(config.out, "pair_id", lambda: _standing(config.out))
        noise = KeptNoise.of(config.noise_from, config, facts) if config.noise_from else None
        usage = _run(config, info, facts, noise, pool_of(config.actors, config.engine, cores, gpus))
    audit = audit_dataset(config.out, info.pair_ids, info.per_task).model_copy(update=usage)
    audit.write(config.out)
    delete_checkpoint(config.out)
    return audit


def _standing(out: str) -> pa.ChunkedArray:
    """Pair ids of the rows that ``out`` has. Raises DatasetError for a shard that cannot be read."""
    dataset = ChainDataset(out, unfinished=True)
    ids = dataset.table(["pair_id"], errors=True)["pair_id"]
    if dataset.unreadable:
        raise DatasetError(f"{out}/{dataset.unreadable[0]}: cannot be read; delete it, and run the same command again")
    return ids


def _run(
    config: BuildConfig, info: ManifestInfo, facts: Facts, noise: KeptNoise | None, pool: dict[str, Any]
) -> dict[str, Any]:
    """Compute and write every pair that the checkpoint does not have."""
    started = time.monotonic()
    meter = Meter.options(scheduling_strategy=here()).remote()
    shared = {"config": config, "facts": facts}

    def chains(blocks: Dataset) -> Dataset:
        prepared = blocks.map_batches(
            prepare,
            batch_format="pyarrow",
            batch_size=config.rows_per_block,
            num_cpus=TASK_CPUS,
            fn_kwargs=shared | {"root": info.root, "noise": ray.put(noise)},
        )
        return prepared.map_batches(
            ChainActor,
            fn_constructor_kwargs=shared | {"meter": meter},
            batch_format="pyarrow",
            batch_size=config.rows_per_block,
            **pool,
        )

    with one_line_errors(config.out, "build"):
        before = map_exactly_once(
            (storage.resolve(config.pairs)[0], info.files),
            config.out,
            "shards",
            chains,
            columns=["pair_id", "task", "split", "image", "label", "meta"],
            id_column="pair_id",
            rows_per_block=config.rows_per_block,
            schema=shard_schema(config.keep_noise).with_metadata(_file_metadata(config, facts)),
            partition="task",
            total=info.rows,
            unit="pairs",
            meter=meter,
        )
    usage: dict[str, Any] = ray.get(meter.usage.remote())
    return usage | {"seconds": round(time.monotonic() - started, 1), "rows_of_earlier_runs": before}


class ChainActor:
    """One worker of the pool: holds the models, turns prepared blocks into shard rows, reports what it did."""

    def __init__(self, config: BuildConfig, facts: Facts, meter: Any):
        self.builder = _builder(config)
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


def _builder(config: BuildConfig) -> BlockBuilder:
    # Here, not above: the driver computes nothing, and need not wait for PyTorch.
    import torch

    from covray.chains.build import BlockBuilder

    torch.set_num_threads(config.engine.threads)
    return BlockBuilder(config)


# --- before anything expensive -------------------------------------------------------------------------------------


def _probe(config: BuildConfig, gpus: float) -> tuple[BuildConfig, Facts]:
    """Load the models once where an actor will, so that what is wrong with them is one line before the pool starts."""

    def load(config: BuildConfig) -> tuple[BuildConfig, Facts]:
        builder = _builder(config)
        return builder.config, builder.facts()

    where = {"num_cpus": 0 if gpus else 1, "num_gpus": gpus, "resources": on(config.actors.node_type)}
    with one_line_errors(config.out, "build"):
        found: tuple[BuildConfig, Facts] = ray.get(ray.remote(max_retries=2, **where)(load).remote(config))
    return found


def _write_description(config: BuildConfig, info: ManifestInfo, facts: Facts) -> None:
    DatasetRecord(
        config=config.model_dump(mode="json"),
        identity=config.identity(),
        fingerprints=facts.fingerprints,
        latent_shape=facts.latent_shape,
        tokenizer_size_px=facts.tokenizer_px,
        tokens_per_image=facts.tokens_per_image,
        codes=facts.codes,
        pairs=_digest(info),
    ).write(config.out)


def _digest(info: ManifestInfo) -> PairSet:
    """The manifest's set of pairs, whatever their order."""
    ids = info.pair_ids.copy()
    ids.sort()
    return PairSet(rows=info.rows, sha256=hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest())


def _require_same_pairs(config: BuildConfig, described: DatasetRecord, info: ManifestInfo) -> None:
    if described.pairs != _digest(info):
        rows = described.pairs.rows if described.pairs else "unknown"
        raise DatasetError(
            f"{config.out}: was begun with another manifest ({rows} pairs, {config.pairs} has "
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


def _file_metadata(config: BuildConfig, facts: Facts) -> dict[str, str]:
    """What every shard says of itself, should it be separated from its folder."""
    return {
        "covray": json.dumps({"version": 1, "identity": config.identity(), "fingerprints": facts.fingerprints}),
    }
