"""What ``covray train`` checks before it starts anything expensive, and so what ``covray train --plan`` checks too.

Nothing here needs Ray.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from covray.chains.compatibility import require_same_codes
from covray.chains.dataset import ChainDataset
from covray.chains.loading import count_pairs, pictures_of
from covray.chains.sentences import require_context
from covray.config import BackboneConfig, TrainConfig, recorded_section
from covray.config.think import ThinkTrainConfig
from covray.config.vlm import VlmTrainConfig
from covray.distributed.resumable import Output, mlflow_run_of
from covray.distributed.trackers.base import require_trackers
from covray.errors import ConfigError, CovrayError, DatasetError
from covray.io import storage
from covray.io.model_folders import NANO_NAMES, is_here
from covray.io.storage import Folder
from covray.models.lvm.adapter import WEIGHTS_FILE, read_start
from covray.models.lvm.backbone import BackboneFacts, backbone_facts
from covray.models.tokenizer.vqgan import require_same_codebook
from covray.progress import stage
from covray.tasks import segmentation
from covray.tasks.base import Meta
from covray.training.data import sources_of, write_token_files
from covray.training.memory import TrainPlan, architecture, plan
from covray.training.metrics_log import METRICS_FILE
from covray.training.objectives.block_diffusion import require_blocks
from covray.training.objectives.drafts import require_drafts
from covray.training.objectives.frame_noise import load_codebook
from covray.training.objectives.verdicts import require_answers, split_queries
from covray.training.records import RunRecord, TrainResult
from covray.training.scored_answers import fingerprint_of
from covray.training.zero import check_settings, choose, require_whole_weights

C = TypeVar("C", TrainConfig, VlmTrainConfig, ThinkTrainConfig)


@dataclass(frozen=True)
class CheckedRun(Generic[C]):
    """A training that has passed the checks of its command: what the driver of all trainings asks it."""

    config: C
    """The configuration; what the begun run has recorded is filled in, ``auto`` may be left."""
    fingerprints: dict[str, str | None]
    """SHA-256 (hex) of what is trained, and on what."""

    def prepare(self) -> None:
        """Write what all workers read; called once, before Ray starts."""

    def choose_stage(self, config: C, gpu_bytes: int | None) -> str:
        """Return what ``compute.deepspeed: auto`` means for a GPU of so many bytes, or None without GPUs."""
        return "none"

    def settle(self, config: C) -> C:
        """Return ``config``, in which no ``auto`` is left, with what follows from the choices."""
        return config

    def record(self, config: C, begun: RunRecord | None) -> RunRecord:
        """Return the record of the run with the resolved ``config``, which continues ``begun``."""
        return RunRecord(
            config=config.model_dump(mode="json"),
            identity=config.identity(),
            fingerprints=self.fingerprints,
            mlflow_run_id=mlflow_run_of(begun),
        )


@dataclass(frozen=True)
class CheckedTraining(CheckedRun[TrainConfig]):
    """A training of ``covray train`` that has passed the checks."""

    facts: BackboneFacts
    classes: Meta | None
    """The user's own classes of segmentation in the dataset; None for the built-in palette."""
    plugins: dict[str, str] | None
    """The plug-ins that the datasets were built with; None without any."""

    def prepare(self) -> None:
        """Write the token files; a verifier reads none."""
        if self.config.objective == "verifier":
            return
        with stage("writing the token files, once for all trainings"):
            write_token_files(self.config)

    def choose_stage(self, config: TrainConfig, gpu_bytes: int | None) -> str:
        """Return the fastest stage of DeepSpeed that fits; a verifier has nothing to share out."""
        if config.objective == "verifier":
            return "none"
        return choose(config, self.facts.llama, gpu_bytes)

    def settle(self, config: TrainConfig) -> TrainConfig:
        """Refuse a stage that shares out weights which must be whole. Raises ConfigError."""
        require_whole_weights(config)
        return config

    def record(self, config: TrainConfig, begun: RunRecord | None) -> RunRecord:
        """Return the record of the run with the resolved ``config``, which continues ``begun``."""
        record = super().record(config, begun)
        # Without them the keys are absent, as in the files of earlier versions.
        added = {"classes": self.classes, "plugins": self.plugins}
        update = {key: value for key, value in added.items() if value is not None}
        return record.model_copy(update=update)


def open_run(out: str, patience_s: float = 0.0, *, command: str = "covray train") -> Output[RunRecord]:
    """Return the run folder ``out`` as the output of ``command``; nothing is read or written yet.

    ``patience_s``: seconds to wait for another command that is at work in the folder.
    """
    return Output(out, RunRecord, command, result=TrainResult.FILE, patience_s=patience_s)


def plan_train(config: TrainConfig, tokens_per_s: float | None = None) -> TrainPlan:
    """Return what a training would take, after all checks that it makes itself; nothing is started or written.

    Args:
        config: The configuration. The weights of the backbone need not be on this machine: then its scale stands for
            its architecture.
        tokens_per_s: Speed of one worker, for the hours.

    Raises:
        CovrayError: The training would be refused.
    """
    config = absolute_paths(config)
    output = open_run(config.out)
    output.inspect()
    return plan(check(config, output, without_weights=True).config, tokens_per_s)


def check(config: TrainConfig, output: Output[RunRecord], *, without_weights: bool = False) -> CheckedTraining:
    """Check a training against its data, its backbone and the run that it continues.

    Args:
        config: The configuration, with absolute paths.
        output: The run folder, opened.
        without_weights: Whether weights that are not on this machine are left unchecked, not downloaded.

    Raises:
        CovrayError: The dataset, backbone, adapter, DeepSpeed file or MLflow store cannot be used, they do not fit
            together, or the run was begun with others.
    """
    begun = binding_record(output)
    if begun is not None:
        config = config.with_defaults_of_run(begun.config)
        output.require_same(begun.identity, config.identity(), open_matches=True)
        config = with_recorded_dtype(config, begun)
    config = _with_recorded_versions(config, begun)
    datasets = [source.dataset for source in sources_of(config)]
    classes = _common_classes(datasets)
    unchecked = without_weights and not _has_weights_here(config.backbone)
    facts = architecture(config.backbone) if unchecked else backbone_facts(config.backbone)
    _check_data(config, datasets, facts)
    if config.compute.deepspeed not in ("auto", "none"):
        check_settings(config.compute.deepspeed)
        require_whole_weights(config)
    if config.lora.path is not None:
        read_start(config.lora, facts.llama)
    require_trackers(config)
    fingerprints = _fingerprints(config, datasets, facts)
    if config.objective == "verifier":
        fingerprints["answers"] = _check_answers(config)
    if begun is None:
        _require_same_classes(config, classes)
    else:
        recorded = dict(begun.fingerprints)
        if unchecked:
            recorded["backbone"] = fingerprints["backbone"]
        output.require_same(recorded, fingerprints)
    return CheckedTraining(config, fingerprints, facts, classes, _plugins(datasets))


def _check_answers(config: TrainConfig) -> str:
    """Check the answers that a verifier learns from; return their fingerprint.

    Raises:
        ConfigError: They are not answers of the adapter, or DeepSpeed is asked to share out the verifier.
    """
    if config.compute.deepspeed not in ("auto", "none"):
        raise ConfigError("compute.deepspeed: a verifier is too small to share out; set it to none")
    queries = require_answers(config)
    split_queries(queries, config)
    return fingerprint_of(queries)


def binding_record(output: Output[RunRecord]) -> RunRecord | None:
    """Return the record of the run that is continued; None where the run may still become another one.

    Workers write the metrics first. A run without them has learned nothing that another configuration would spoil.
    """
    if not output.folder.exists(METRICS_FILE):
        return None
    return output.begun


def absolute_paths(config: TrainConfig) -> TrainConfig:
    """Return ``config`` with paths that mean the same in a worker's folder. A backbone without a folder is a hub id."""
    update: dict[str, Any] = {"data": storage.absolute(config.data), "out": storage.absolute(config.out)}
    # By repr, which gives the same number back: the weight is part of the identity.
    update["mix"] = tuple(f"{storage.absolute(path)}={weight!r}" for path, weight in config.weighted_data[1:])
    backbone, compute, lora = config.backbone, config.compute, config.lora
    if config.verifier.answers is not None:
        update["verifier"] = config.verifier.model_copy(update={"answers": storage.absolute(config.verifier.answers)})
    if lora.path is not None:
        update["lora"] = lora.model_copy(update={"path": storage.absolute(lora.path)})
    if backbone.path is not None and backbone.path not in NANO_NAMES and is_here(backbone.path):
        update["backbone"] = backbone.model_copy(update={"path": storage.absolute(backbone.path)})
    if compute.deepspeed.endswith(".json"):
        update["compute"] = compute.model_copy(update={"deepspeed": storage.absolute(compute.deepspeed)})
    return config.model_copy(update=update)


def _check_data(config: TrainConfig, datasets: Sequence[ChainDataset], facts: BackboneFacts) -> None:
    """Check that the backbone can read the datasets, and that the sentences can be made and shared out."""
    chosen = config.sentences
    dataset = datasets[0]
    for each in datasets:
        require_same_codes(facts, each)
    _require_alike(config, datasets)
    if config.objective == "block_diffusion":
        require_blocks(config, facts, dataset.tokens_per_image)
    if config.objective == "draft":
        require_drafts(config, facts, dataset.tokens_per_image)
    if chosen.frame_noise.kind == "neighbour":
        load_codebook(dataset)
    tokens = require_context(chosen, dataset.tokens_per_image, facts.llama.max_position_embeddings)
    count_pairs(dataset, chosen, chosen.split, *datasets[1:])
    if chosen.validation_split is not None:
        count_pairs(dataset, chosen, chosen.validation_split, *datasets[1:])
    sentences = max(1, config.optimizer.batch_tokens // tokens)
    if config.workers.count > sentences:
        raise ConfigError(
            f"workers.count: {config.workers.count} workers, but a step of {config.optimizer.batch_tokens} tokens has "
            f"{sentences} sentences of {tokens}; lower --workers, or raise optimizer.batch_tokens"
        )


def _require_alike(config: TrainConfig, datasets: Sequence[ChainDataset]) -> None:
    """Check that several datasets can be trained on as one.

    Raises:
        DatasetError: Their codebooks or sizes differ, one was not built at a length of the sentences or has no pairs of
            the split, or a pair is in two of them.
    """
    if len(datasets) == 1:
        return
    first = datasets[0]
    for dataset in datasets:  # before any rows are read
        require_same_codebook(first.fingerprints["codebook"], dataset.fingerprints["codebook"], dataset.path)
        if dataset.tokens_per_image != first.tokens_per_image:
            raise DatasetError(
                f"{dataset.path}: its pictures have {dataset.tokens_per_image} tokens, those of {first.path} "
                f"{first.tokens_per_image}; build both at one tokenizer.size_px"
            )
        pictures_of(dataset, config.sentences)
    ids: list[np.ndarray] = []
    for dataset in datasets:
        table = dataset.table(["pair_id"], config.sentences.tasks, config.sentences.split)
        if not len(table):
            raise DatasetError(
                f"{dataset.path}: has no good pairs in split {config.sentences.split} of the tasks of the training; "
                "leave it out"
            )
        ids.append(table["pair_id"].to_numpy())
    distinct, counts = np.unique(np.concatenate(ids), return_counts=True)
    twice = distinct[counts > 1]
    if len(twice):
        raise DatasetError(
            f"--data: {len(twice)} pairs are in two of the datasets, such as {twice[0]}: a pair could be its "
            "own example; build one of them without these"
        )


def _plugins(datasets: Sequence[ChainDataset]) -> dict[str, str] | None:
    """Return the plug-ins that any of the datasets was built with; None without any."""
    plugins: dict[str, str] = {}
    for dataset in datasets:
        plugins |= dataset.record.plugins or {}
    return plugins or None


def _common_classes(datasets: Sequence[ChainDataset]) -> Meta | None:
    """Return the classes of segmentation of all datasets.

    Raises:
        DatasetError: One colour would stand for two classes.
    """
    classes = None
    owner = None
    for dataset in datasets:
        if dataset.audit is None or segmentation.name not in dataset.audit.per_task:
            continue
        if owner is not None and dataset.record.classes != classes:
            raise DatasetError(
                f"{dataset.path}: its segmentation has other classes than {owner}, so that one colour would stand for "
                "two things; build both with the same --classes, or train on one"
            )
        owner, classes = dataset.path, dataset.record.classes
    if owner is None:  # none has segmentation
        return datasets[0].record.classes
    return classes


def _with_recorded_versions(config: TrainConfig, begun: RunRecord | None) -> TrainConfig:
    """Return ``config`` with the versions that the begun run was trained on, where datasets have grown since."""
    if begun is None:
        return config
    paths = []
    for number, (path, _) in enumerate(config.weighted_data):
        dataset = ChainDataset(path)
        recorded = begun.fingerprints.get(_data_key(number))
        for version in range(dataset.version, 0, -1):
            earlier = ChainDataset(dataset.path, version=version)
            if _data_fingerprint(earlier) == recorded:
                if version != dataset.version:
                    path = earlier.reference
                break
        paths.append(path)
    mix = []
    for path, (_, weight) in zip(paths[1:], config.weighted_data[1:], strict=True):
        mix.append(f"{path}={weight!r}")
    return config.model_copy(update={"data": paths[0], "mix": tuple(mix)})


def _data_key(number: int) -> str:
    """Return the name of a dataset's fingerprint; that of the first is older than mixtures."""
    if number == 0:
        return "data"
    return f"data.{number + 1}"


def _fingerprints(config: TrainConfig, datasets: Sequence[ChainDataset], facts: BackboneFacts) -> dict[str, str | None]:
    """Return the fingerprints of a run: of all that it is trained from."""
    fingerprints: dict[str, str | None] = {
        "backbone": facts.fingerprint,
        "codebook": datasets[0].fingerprints["codebook"],
    }
    for number, dataset in enumerate(datasets):
        fingerprints[_data_key(number)] = _data_fingerprint(dataset)
    if config.lora.path is not None:
        fingerprints["adapter"] = hashlib.sha256(Folder(config.lora.path).read_bytes(WEIGHTS_FILE)).hexdigest()
    return fingerprints


def _data_fingerprint(dataset: ChainDataset) -> str:
    """Return the SHA-256 (hex) of what decides the chains: configuration, models, pairs and how many were good."""
    pairs = dataset.record.pairs
    parts = [dataset.identity, dataset.fingerprints, pairs and pairs.to_json(), dataset.count()]
    # Only where there are any, so that runs of earlier versions keep their fingerprint.
    if dataset.record.plugins is not None:
        parts.append(dataset.record.plugins)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _require_same_classes(config: TrainConfig, classes: Meta | None) -> None:
    """Refuse to start from an adapter whose run was trained on other classes of segmentation, if it says so.

    Raises:
        ConfigError: One colour would stand for two classes.
    """
    if config.lora.path is None or classes is None:
        return
    run, _, name = config.lora.path.rstrip("/").rpartition("/")
    if not name:
        return  # not the adapter of a run's folder
    try:
        earlier = RunRecord.read_if_present(run)
    except CovrayError:
        return  # an adapter from elsewhere
    if earlier is not None and earlier.classes not in (None, classes):
        raise ConfigError(
            f"--data {config.data}: its segmentation has other classes than the run of --set lora.path="
            f"{config.lora.path}, so that one colour would stand for two things; train a new adapter, or build the "
            "data with the same --classes"
        )


def with_recorded_dtype(config: C, begun: RunRecord) -> C:
    """Return ``config`` with the arithmetic of the run that is continued, where it is left open."""
    if config.compute.dtype != "auto":
        return config
    compute = config.compute.model_copy(update={"dtype": recorded_section(begun.config, "compute")["dtype"]})
    return config.model_copy(update={"compute": compute})


def _has_weights_here(backbone: BackboneConfig) -> bool:
    """Return whether the backbone can be checked without a download."""
    if backbone.path is None:
        return backbone.scale == "nano" or backbone.init == "random"
    return is_here(backbone.path)
