"""What ``covray evaluate`` checks and decides before anything expensive starts: data, runs, episodes, fingerprints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from covray.chains.dataset import ChainDataset
from covray.config import BuildConfig, EvaluateConfig, JsonObject, named_run
from covray.distributed.paths import absolute_fields, absolute_runs
from covray.distributed.plugin_checks import used_plugins
from covray.errors import DatasetError
from covray.evaluation.answers import EPISODE_SCHEMA
from covray.evaluation.lpips import find_alexnet, load_lpips
from covray.evaluation.pair_files import choose_pairs, require_pairs
from covray.evaluation.subjects import Subject, adapter_weights, subjects_of
from covray.io import storage
from covray.io.storage import absolute
from covray.plugins import require_packages
from covray.seeds import seed_of


@dataclass(frozen=True)
class Work:
    """What an evaluation is about to do."""

    config: EvaluateConfig
    """Resolved."""
    subjects: tuple[Subject, ...]
    fingerprints: dict[str, str]
    queries: pa.Table
    examples: pa.Table
    root: str | None
    """The folder of the manifest's pictures."""
    episodes: pa.Table
    """``EPISODE_SCHEMA``."""


def with_absolute_paths(config: EvaluateConfig) -> EvaluateConfig:
    """Return ``config`` with paths that mean the same in a worker's folder, and with a name for every run."""
    paths = absolute_fields(config, "data", "out", "manifest")
    return config.model_copy(update=paths | {"adapters": absolute_runs(config.adapters)})


def without_places(identity: JsonObject) -> JsonObject:
    """Return ``identity`` without where things are: folders move, and what is in them is compared by fingerprints.

    A manifest has none, but the ids of its pairs say which pictures they are, and pairs that it lacks are refused.
    """
    kept = dict(identity)
    for key in ("data", "manifest"):
        kept.pop(key, None)
    # Of NAME=RUN the name alone: the weights of the run are among the fingerprints.
    adapters = identity.get("adapters", [])
    assert isinstance(adapters, list)
    kept["adapters"] = [named_run(str(entry))[0] for entry in adapters]
    for key in ("tokenizer", "backbone"):
        section = identity.get(key)
        if isinstance(section, dict):
            without = dict(section)
            for place in ("path", "revision"):
                without.pop(place, None)
            kept[key] = without
    return kept


def prepare(config: EvaluateConfig) -> Work:
    """Check all that can be wrong with the data and the runs, and list the episodes. Raises CovrayError."""
    dataset = ChainDataset(config.data)
    require_packages(dataset.record.plugins, config.data)
    config = _resolve(config, dataset)
    subjects = subjects_of(config, dataset)
    fingerprints = _fingerprints(dataset, subjects)
    queries, examples = _pairs(config, dataset, subjects)
    assert config.manifest is not None
    root = require_pairs(config.manifest, pa.concat_tables([queries, examples]))
    return Work(config, subjects, fingerprints, queries, examples, root, list_episodes(subjects, queries))


def _resolve(config: EvaluateConfig, dataset: ChainDataset) -> EvaluateConfig:
    """Return ``config`` with what the dataset decides."""
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
        alexnet = find_alexnet()
        if alexnet is not None:
            update["lpips"] = str(alexnet)
    else:
        load_lpips(Path(config.lpips))
    if config.tasks is None:
        tasks = dataset.table(["task"], None, config.split)["task"].to_pylist()
        update["tasks"] = tuple(sorted(set(tasks))) or None
    return config.model_copy(update=update)


def _pairs(config: EvaluateConfig, dataset: ChainDataset, subjects: Sequence[Subject]) -> tuple[pa.Table, pa.Table]:
    """Return the queries, and the examples for the baselines. Raises DatasetError where there are not enough."""
    queries = choose_pairs(dataset, config.tasks, config.split, config.episodes, config.seed, "split")
    examples = choose_pairs(
        dataset, config.tasks, config.example_split, config.baseline_examples, config.seed, "example_split"
    )
    needed = max((subject.pairs or 0) for subject in subjects)
    if config.split == config.example_split:
        needed += 1  # a query is not its own example
    present = dataset.table(["task"], config.tasks, config.example_split)["task"].to_pylist()
    for task in config.tasks or ():
        if present.count(task) < needed:
            raise DatasetError(
                f"{dataset.path}: {task} has {present.count(task)} good pairs in split {config.example_split}, an "
                f"episode needs {needed}; lower --example-pairs, set example_split, or name the other tasks"
            )
    return queries, examples


def list_episodes(subjects: Sequence[Subject], queries: pa.Table) -> pa.Table:
    """List every subject with every query (``EPISODE_SCHEMA``), sorted so that an actor seldom changes its model."""
    pairs = queries.to_pylist()
    rows = []
    for subject in subjects:
        for pair in pairs:
            rows.append({"episode": seed_of(subject.name, pair["pair_id"]), "subject": subject.name} | pair)
    return pa.Table.from_pylist(rows, EPISODE_SCHEMA)


def _fingerprints(dataset: ChainDataset, subjects: Sequence[Subject]) -> dict[str, str]:
    """Return the SHA-256 (hex) of all that decides the scores beside the configuration."""
    fingerprints = {f"dataset.{key}": value for key, value in dataset.fingerprints.items()}
    pairs = dataset.record.pairs
    contents = json.dumps([dataset.identity, pairs and pairs.to_json(), dataset.count()], sort_keys=True)
    fingerprints["dataset.pairs"] = hashlib.sha256(contents.encode()).hexdigest()
    for subject in subjects:
        if subject.fingerprint:
            fingerprints[f"{subject.name}.backbone"] = subject.fingerprint
        if subject.adapter is not None:
            weights = storage.read_bytes(adapter_weights(subject))
            fingerprints[f"{subject.name}.adapter"] = hashlib.sha256(weights).hexdigest()
    return fingerprints


def plugins_of(config: EvaluateConfig) -> dict[str, str]:
    """Return the plug-ins that the evaluation uses, each with package and version."""
    return used_plugins(config.tasks or (), metrics=config.metrics)
