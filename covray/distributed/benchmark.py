"""``covray benchmark``: rates for ``covray plan``, from small real builds and a small real training on this hardware.

    rendered scenes -> two builds, the second larger -> where their time went -> a training on the chains of the second

A build's wall time is made of its start (Ray, checks, loading the models once), the load of an actor, its rows, and the
audit. A training's start, steps, and pauses for validations and checkpoints follow from the metrics of its steps, and
from the times at which they came.
"""

from __future__ import annotations

import datetime
import itertools
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow.parquet as pq
import torch
from pyarrow import fs

from covray.chains.audit import audit_dataset
from covray.chains.dataset import ChainDataset, shard_files
from covray.chains.loading import count_pairs
from covray.chains.records import Audit
from covray.chains.sentences import require_context
from covray.chains.shard_rows import union_alphas
from covray.config import BuildConfig, PlanConfig, TrainConfig
from covray.distributed.build import build
from covray.distributed.train import train
from covray.errors import ConfigError, one_line
from covray.io import storage
from covray.io.model_folders import NANO_NAMES
from covray.models.lvm.backbone import backbone_facts
from covray.models.tokenizer.vqgan import load_tokenizer
from covray.pairs.manifest import ManifestWriter
from covray.pairs.manifest_reading import check_manifest
from covray.pairs.scenes import scene_pairs
from covray.planning.flops import parquet_bytes, pictures_per_pair
from covray.planning.plan import build_config, train_config
from covray.planning.rates import BuildRates, Calibration, TrainRates, identity_of, write_calibration
from covray.tasks import TASKS
from covray.training.checkpoints import CHECKPOINTS, checkpoint_name
from covray.training.metrics_log import Metrics
from covray.training.zero import read_settings

_SPLITS = {"train": 3.0, "val": 1.0}
_BLOCKS = (4, 12)
_PAUSES = 4  # validations of the training, each with a checkpoint
_FEWEST = 16 * len(TASKS)  # pairs of the larger build: then the validation split has several of every task
_SCENE_PX = 512  # of the pictures, where the prior is not the nano's 64

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class MeasuredBuild:
    """A build of rendered pairs, and what was measured of it from outside."""

    audit: Audit
    wall_s: float
    """Seconds of the whole command."""
    audit_s: float
    """Seconds of the audit alone."""
    rows: int
    shards: int
    row_bytes: int
    """Bytes of all shards that belong to their rows."""
    other_bytes: int
    """Bytes of all shards beside their rows."""
    tokens_per_image: int


@dataclass(frozen=True)
class MeasuredCheckpoint:
    """A checkpoint that was written once more."""

    seconds: float
    size_bytes: int


def calibrate(config: PlanConfig, out: str, pairs: list[int] | None = None, train_steps: int = 24) -> Calibration:
    """Measure what ``config.build`` and, if it is among the steps, ``config.train`` cost on the hardware at hand.

    Args:
        config: The plan's configuration.
        out: The file for the calibration. Builds and run go beside it into ``out``.work, which is absent before and
            after; on a cluster it must be on storage that all nodes share.
        pairs: Pairs of the two builds; by default 4 and 12 blocks.
        train_steps: Steps of the training.

    Raises:
        CovrayError: As builds and trainings raise it; a configuration or an ``out`` that cannot be used is refused
            before the first build.
    """
    chosen, folder = build_config(config), f"{out}.work"
    small, large = _sizes(pairs, chosen)
    # Refused before anything is built: a training that cannot run would waste the builds.
    if "vlm" in config.steps:
        raise ConfigError("steps: vlm is not measured by a benchmark; name build, or build and train")
    training = None
    if "train" in config.steps:
        training = _training(config, chosen, folder, train_steps)
    _require_out(out, folder)
    trained = None
    try:
        builds = [
            # Builds of two sizes separate the cost of starting from the cost of a row.
            _measure_build(chosen, storage.join(folder, "a"), small),
            _measure_build(chosen, storage.join(folder, "b"), large),
        ]
        if training is not None:
            trained = _measure_training(training)
    # Builds and run are only measured; the calibration is all that stays.
    finally:
        filesystem, inner = storage.resolve(folder)
        if storage.exists(folder):
            filesystem.delete_dir(inner)
    calibration = Calibration(
        hardware=hardware(),
        date=datetime.date.today().isoformat(),
        build=build_rates(chosen, builds),
        train=trained,
    )
    write_calibration(out, calibration)
    return calibration


def build_rates(config: BuildConfig, builds: list[MeasuredBuild]) -> BuildRates:
    """Return the rates that follow from what ``_measure_build`` returned; those of a row are the last build's."""
    last = builds[-1]
    audit = last.audit
    starts, loads = [], []
    for measured in builds:
        # What of the time was neither computing nor the audit.
        starts.append(max(0.0, measured.wall_s - _known(measured.audit.last_block_s) - measured.audit_s))
        loads.append(_known(measured.audit.load_s))
    return BuildRates(
        identity=identity_of("build", config.identity()),
        rows_per_block=config.most_rows_per_block,
        actors=_known(audit.actors),
        start_s=_mean(starts),
        load_s=_mean(loads),
        # Seconds of work a row, over the share of the time that the actors work.
        row_s=_known(audit.row_s) / _known(audit.busy_share),
        evaluations=_known(audit.unet_evaluations) / last.rows,
        pictures=pictures_per_pair(config),
        tokens_per_image=last.tokens_per_image,
        row_bytes=last.row_bytes / last.rows,
        shard_bytes=last.other_bytes / last.shards,
        audit_shard_s=last.audit_s / last.shards,
    )


def train_rates(
    config: TrainConfig,
    records: list[tuple[float, Metrics]],
    wall_s: float,
    validation_sentences: int,
    checkpoint: MeasuredCheckpoint,
) -> TrainRates:
    """Return the rates that follow from a training.

    The first step is warm-up. The time between records beyond the steps' own seconds is spent in pauses, each with a
    validation and a checkpoint.

    Args:
        config: The training.
        records: Its metrics, each with the time (s) at which it came.
        wall_s: Seconds of the whole command.
        validation_sentences: Sentences of one validation.
        checkpoint: One checkpoint.
    """
    steps = [(at, record) for at, record in records if "loss" in record]
    warm = [record for _, record in steps[1:]]  # in the first step memory is taken and kernels are chosen
    seconds = sum(record["seconds"] for record in warm)
    tokens = sum(record["tokens"] for record in warm)
    paused = set()
    for _, record in records:
        if "validation_loss" in record and record["step"] > 1:
            paused.add(record["step"])
    pauses = len(paused) or 1
    # What of the time was no step: validations and checkpoints, shared out evenly.
    pause_s = max(0.0, records[-1][0] - steps[0][0] - seconds) / pauses
    workers = config.workers.count
    per_sentence = tokens / sum(record["sentences"] for record in warm)
    checked_tokens = validation_sentences * per_sentence
    # A pause holds a validation and a checkpoint; the checkpoint is measured by itself.
    validation_s = max(0.0, pause_s - checkpoint.seconds)
    validation_token_s = 0.0
    if checked_tokens:
        validation_token_s = validation_s * workers / checked_tokens
    return TrainRates(
        identity=identity_of("train", config.identity()),
        workers=workers,
        start_s=max(0.0, wall_s - len(steps) * seconds / len(warm) - pauses * pause_s),
        token_s=seconds * workers / tokens,
        validation_token_s=validation_token_s,
        checkpoint_s=checkpoint.seconds,
        checkpoint_bytes=checkpoint.size_bytes,
    )


def _sizes(pairs: list[int] | None, config: BuildConfig) -> tuple[int, int]:
    sizes = pairs
    if sizes is None:
        sizes = [blocks * config.most_rows_per_block for blocks in _BLOCKS]
    # Two builds, the larger one with enough blocks to keep actors busy.
    if len(sizes) != 2 or not 0 < sizes[0] < sizes[1] or sizes[1] < _FEWEST:
        raise ConfigError(
            f"--pairs {','.join(map(str, sizes))}: give two numbers, the second the larger and {_FEWEST} at least"
        )
    return sizes[0], sizes[1]


def _measure_build(config: BuildConfig, folder: str, pairs: int) -> MeasuredBuild:
    """Build ``pairs`` pairs of scenes below ``folder``, and measure it."""
    manifest, out = storage.join(folder, "pairs.parquet"), storage.join(folder, "chains")
    size = _SCENE_PX
    if config.prior.path in NANO_NAMES:
        size = 64
    # A scene gives one pair a task. The number of scenes is rounded up, and surplus pairs are not used.
    scenes = scene_pairs(-(-pairs // len(TASKS)), size_px=size, splits=_SPLITS)
    with ManifestWriter(manifest) as writer:
        for pair in itertools.islice(scenes, pairs):
            writer.add(pair)
    started = time.monotonic()
    # Blocks of a large build: a small one would choose smaller ones.
    settings = {"pairs": manifest, "out": out, "rows_per_block": config.most_rows_per_block}
    audit = build(config.model_copy(update=settings))
    wall_s = time.monotonic() - started
    if audit.rejected or audit.row_s is None:
        raise ConfigError(f"build: {audit.rejected} of {pairs} rendered pairs were rejected; see covray build")
    info = check_manifest(manifest)
    started = time.monotonic()
    audit_dataset(out, info.pair_ids, info.per_task)
    audit_s = time.monotonic() - started
    # What rows cost on disk, and what every file costs beside them.
    files = shard_files(storage.Folder(out), 1)
    row_bytes = other_bytes = 0
    for name in files:
        of_rows, others = _file_bytes(storage.join(out, name))
        row_bytes += of_rows
        other_bytes += others
    return MeasuredBuild(
        audit=audit,
        wall_s=wall_s,
        audit_s=audit_s,
        rows=pairs,
        shards=len(files),
        row_bytes=row_bytes,
        other_bytes=other_bytes,
        tokens_per_image=ChainDataset(out).tokens_per_image,
    )


def _training(config: PlanConfig, build: BuildConfig, folder: str, steps: int) -> TrainConfig:
    """Return the training on the chains of the larger build, checked as far as possible without them.

    Args:
        config: The plan's configuration.
        build: The build that makes the chains.
        folder: The folder of builds and run.
        steps: Steps of the training.
    """
    planned = train_config(config)
    # Pauses are frequent enough to be measured in so few steps.
    every = max(2, steps // _PAUSES)
    training = planned.model_copy(
        update={
            "data": storage.join(folder, "b", "chains"),
            "out": storage.join(folder, "run"),
            "optimizer": planned.optimizer.model_copy(update={"steps": steps}),
            "validate_every_steps": every,
            "checkpoints": planned.checkpoints.model_copy(update={"every_steps": every}),
        }
    )
    context = backbone_facts(training.backbone).llama.max_position_embeddings
    require_context(training.sentences, load_tokenizer(build.tokenizer, build.engine).tokens_per_image, context)
    if training.tracking.uri is None and "://" in folder:
        raise ConfigError("train.tracking.uri: beside a remote --out there can be no mlflow.db; give a server, or none")
    if training.compute.deepspeed not in ("auto", "none"):
        read_settings(training.compute.deepspeed)
    sentences = training.sentences
    # The chains do not exist yet: the build's lengths and methods say what there will be.
    needed = set(union_alphas(sentences.lengths))
    if needed and sentences.method != "none":  # else no frames are read
        built = set(union_alphas(build.lengths, build.alphas))
        if sentences.method not in build.methods or not needed <= built:
            raise ConfigError(
                "train.sentences: has lengths or a method that build does not make; set build.lengths, .methods"
            )
    for split in (sentences.split, sentences.validation_split):
        if split not in (*_SPLITS, None):
            raise ConfigError(f"train.sentences: a benchmark has the splits {' and '.join(_SPLITS)}, not {split}")
    return training


def _require_out(out: str, folder: str) -> None:
    """Refuse an ``out`` that could not be written at the end. Raises ConfigError."""
    try:
        filesystem, inner = storage.resolve(out)
        if filesystem.get_file_info(inner).type == fs.FileType.Directory:
            raise ConfigError(f"--out {out}: is a folder; give a file, as calibration.yaml")
        if storage.exists(folder):
            raise ConfigError(f"{folder}: is left of a benchmark that was stopped; delete it, or give another --out")
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({one_line(error)}); give another file") from error
    storage.require_writable(folder)


def _measure_training(config: TrainConfig) -> TrainRates:
    """Run a training as it is configured; return its rates."""
    steps = config.optimizer.steps
    assert steps is not None
    records: list[tuple[float, Metrics]] = []
    started = time.monotonic()
    train(config, lambda record: records.append((time.monotonic(), record)))
    wall_s = time.monotonic() - started
    validated, split = 0, config.sentences.validation_split
    # A split may have fewer pairs than a validation asks for.
    if split is not None:
        pairs = sum(count_pairs(ChainDataset(config.data), config.sentences, split).values())
        validated = min(config.validation_sentences, pairs)
    return train_rates(config, records, wall_s, validated, _measure_checkpoint(config.out, steps))


def _measure_checkpoint(run: str, step: int) -> MeasuredCheckpoint:
    """Write the checkpoint after ``step`` steps once more, and measure it."""
    folder = storage.join(run, CHECKPOINTS, checkpoint_name(step))
    files = {}
    for name in storage.list_files(folder):
        files[name] = storage.read_bytes(storage.join(folder, name))
    started = time.monotonic()
    for name, data in files.items():
        storage.write_bytes(storage.join(run, "again", name), data)
    return MeasuredCheckpoint(time.monotonic() - started, sum(map(len, files.values())))


def _file_bytes(path: str) -> tuple[int, int]:
    filesystem, inner = storage.resolve(path)
    size = filesystem.get_file_info(inner).size
    return parquet_bytes(size, pq.read_metadata(inner, filesystem=filesystem))


def _known(figure: N | None) -> N:
    """Return a figure of an audit, which a build has that computed anything."""
    assert figure is not None
    return figure


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values))


def hardware() -> str:
    """Return processor, cores and GPU of this machine."""
    processor = platform.processor() or platform.machine()
    file = Path("/proc/cpuinfo")  # on Linux; on ARM it has no names, and must not count the cores
    if file.exists():
        for line in file.read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(":")[1].strip()
                break
    text = f"{processor}, {os.cpu_count() or 1} cores"
    if torch.cuda.is_available():
        text += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return text
