"""From a grid to its trials, and what they would take, before anything is started."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import LlamaConfig

from covray import storage
from covray.config import (
    BackboneConfig,
    BuildConfig,
    EvaluateConfig,
    Section,
    SweepConfig,
    TrainConfig,
    leaves,
    load_config,
)
from covray.errors import ConfigError, DatasetError
from covray.lvm.backbone import backbone_facts
from covray.lvm.sentences import count_pairs, require_context
from covray.pairs.manifest import check_manifest
from covray.tokens.shards import ChainDataset
from covray.tokens.tokenizer import load_tokenizer
from covray.training.plan import TrainPlan, plan_training

CHAINS, RUNS, EVALUATIONS = "chains", "runs", "evaluations"
"""Folders of a sweep: its dataset, and one run and one evaluation a trial."""
_NAME_CHARACTERS = 120
_DOWNSAMPLING = 16
"""Of LVM's tokenizer, and of every published one of its kind."""
_DECIDED = {
    "build": ("pairs", "out", "lengths", "methods"),
    "train": (
        "data", "out", "seed", "sentences.method", "sentences.lengths", "sentences.pairs", "sentences.tasks", "tracking"
    ),
    "evaluate": ("data", "out", "adapters", "forms", "pairs", "backbone", "tracking"),
}  # fmt: skip
"""Keys that the grid and the sweep itself decide."""

C = TypeVar("C", bound=Section)


@dataclass(frozen=True)
class Trial:
    """One training and its evaluation."""

    name: str
    label: str
    """For people: what tells it from others, but for the seed."""
    method: str
    length: int
    """Pictures of a chain, both ends counted; 2 for the method ``none``."""
    pairs: int
    tasks: tuple[str, ...] | None
    scale: str
    seed: int
    fields: dict[str, Any]
    context_tokens: int
    """Of a sentence: example chains, query, frames and answer."""
    train: TrainConfig
    evaluate: EvaluateConfig


@dataclass(frozen=True)
class LeftOut:
    """A combination that is no trial."""

    name: str
    reason: str


@dataclass(frozen=True)
class Grid:
    """The trials of a sweep, in the order they are started."""

    trials: tuple[Trial, ...]
    left_out: tuple[LeftOut, ...]
    build: BuildConfig | None
    """The dataset to build first; None where there is one."""
    references: tuple[EvaluateConfig, ...]
    """What is evaluated once for all trials, a scale each: baselines, and the untuned backbone for every form."""


def grid_of(config: SweepConfig) -> Grid:
    """The trials of ``config``; reads no tokens and no weights.

    Raises CovrayError: a key that is not there or that the grid decides, a value out of bounds, a dataset without the
    frames a trial needs, or no combination that fits.
    """
    build = _build(config)
    data = str(config.data) if build is None else build.out
    tokens_per_image = _tokens_per_image(config, build)
    context = functools.cache(lambda backbone: int(_architecture(backbone).max_position_embeddings))
    trials: dict[tuple[Any, ...], Trial] = {}
    left_out = []
    for combination in _combinations(config):
        method, length, pairs, tasks, scale, fields, seed = combination
        plain = method == "none" or length == 2
        key = (*(("none", 2) if plain else (method, length)), pairs, tasks, scale, str(fields), seed)
        name = _name(config, method, length, pairs, tasks, scale, fields, seed)
        if key in trials:
            left_out.append(LeftOut(name, f"repeats {trials[key].name}: there is nothing between image and label"))
            continue
        method, length = key[:2]
        name = _name(config, method, length, pairs, tasks, scale, fields, seed)
        train, evaluate = _configs(config, data, name, combination, method, length)
        try:
            tokens = require_context(train.sentences, tokens_per_image, context(train.backbone))
        except ConfigError as error:
            left_out.append(LeftOut(name, str(error).removeprefix("sentences: ").partition(";")[0]))
            continue
        label = _label(config, method, length, pairs, tasks, scale, fields)
        shown = _scale(config, train.backbone)
        trials[key] = Trial(name, label, method, length, pairs, tasks, shown, seed, fields, tokens, train, evaluate)
    if not trials:
        raise ConfigError(f"grid: none of {len(left_out)} combinations fits; the first: {left_out[0].reason}")
    if build is None:
        dataset = ChainDataset(data)
        for sentences in {trial.train.sentences: None for trial in trials.values()}:
            for split in (sentences.split, sentences.validation_split):
                if split is not None:
                    count_pairs(dataset, sentences, split)
    else:
        used = [trial for trial in trials.values() if trial.length > 2]
        methods = sorted({trial.method for trial in used})
        build = build.model_copy(
            update={"lengths": tuple(sorted({trial.length for trial in used})) or (2,), "methods": tuple(methods)}
        )
    found = tuple(trials.values())
    return Grid(found, tuple(left_out), build, tuple(_references(config, data, found)))


def plan_sweep(config: SweepConfig, tokens_per_s: float | None = None) -> dict[str, Any]:
    """What the sweep would take: ``trials``, each with its figures, and their sums; nothing is started.

    ``tokens_per_s``: of one worker at the smallest scale of the grid, for the hours; at a larger scale it is as much
    smaller as the backbone has more parameters. Raises CovrayError as ``grid_of``.
    """
    if tokens_per_s is not None and tokens_per_s <= 0:
        raise ConfigError(f"--tokens-per-s {tokens_per_s:g}: must be more than 0")
    grid = grid_of(config)
    tokens_per_image = _tokens_per_image(config, grid.build)
    architecture = functools.cache(_architecture)
    by_task = functools.cache(functools.partial(_pairs_by_task, config, grid.build))
    plans: list[tuple[Trial, TrainPlan]] = []
    for trial in grid.trials:
        llama = architecture(trial.train.backbone)
        sentences = trial.train.sentences
        found = by_task(sentences.split)
        pairs = sum(count for task, count in found.items() if sentences.tasks is None or task in sentences.tasks)
        if not pairs:
            raise DatasetError(f"{config.manifest}: no pairs in split {sentences.split}; set train.sentences.split")
        plans.append((trial, plan_training(trial.train, llama, pairs, tokens_per_image)))
    smallest = min(plan.parameters for _, plan in plans)
    lines = []
    for trial, plan in plans:
        queries = by_task(trial.evaluate.split)
        asked = [queries[task] for task in (trial.tasks or queries) if task in queries]
        episodes = sum(min(count, trial.evaluate.episodes or count) for count in asked)
        line: dict[str, Any] = {
            "name": trial.name,
            "steps": plan.steps,
            "train_tokens": plan.tokens,
            "evaluate_tokens": episodes * trial.context_tokens,
            "workers": plan.workers,
        }
        if tokens_per_s is not None:
            hours = plan.tokens / (tokens_per_s * smallest / plan.parameters) / 3600
            line |= {"hours": hours / plan.workers, "gpu_hours": hours}
        lines.append(line)
    sums = [key for key in ("train_tokens", "evaluate_tokens", "gpu_hours") if key in lines[0]]
    return {
        "trials": lines,
        "left_out": [{"name": left.name, "reason": left.reason} for left in grid.left_out],
        "builds": None if grid.build is None else {"lengths": grid.build.lengths, "methods": grid.build.methods},
        "total": {key: sum(line[key] for line in lines) for key in sums},
    }


def _combinations(config: SweepConfig) -> Iterator[tuple[Any, ...]]:
    """All of the grid; the seeds last, so that every form is tried once before one is repeated."""
    grid = config.grid
    fields = [
        dict(zip(grid.fields, values, strict=True)) for values in itertools.product(*grid.fields.values())
    ]  # one, empty, where the grid has no fields
    scales = grid.scales or (None,)
    for seed in grid.seeds:
        for form in itertools.product(grid.methods, grid.lengths, grid.pairs, grid.tasks, scales, fields):
            yield (*form, seed)


def _configs(
    config: SweepConfig, data: str, name: str, combination: tuple[Any, ...], method: str, length: int
) -> tuple[TrainConfig, EvaluateConfig]:
    _, _, pairs, tasks, scale, fields, seed = combination
    run = storage.join(config.out, RUNS, name)
    options = {
        **_given(config, "train"),
        "data": data,
        "out": run,
        "seed": seed,
        "sentences.method": method,
        "sentences.lengths": [length],
        "sentences.pairs": [pairs],
        "sentences.tasks": None if tasks is None else list(tasks),
        **({} if scale is None else {"backbone": scale.model_dump(mode="json")}),
    }
    for key in fields:
        if _decided(key, "train"):
            raise ConfigError(f"grid.fields.{key}: the grid has an entry for it, or the sweep decides it")
    if config.grid.scales and any(key.startswith("backbone.") for key in (*fields, *options)):
        raise ConfigError("train.backbone: is what grid.scales says; leave one of them")
    train = _load("train", TrainConfig, options | fields)
    evaluate = _load(
        "evaluate",
        EvaluateConfig,
        {
            **_given(config, "evaluate"),
            "data": data,
            "out": storage.join(config.out, EVALUATIONS, name),
            "adapters": [run],
            "tasks": _given(config, "evaluate").get("tasks") if tasks is None else list(tasks),
            "untuned": False,
            "baselines": [],
            "baseline_examples": 1,
            "tracking.uri": "none",
        },
    )
    return train, evaluate


def _references(config: SweepConfig, data: str, trials: tuple[Trial, ...]) -> Iterator[EvaluateConfig]:
    """An evaluation without adapters for every backbone; the first has the baselines."""
    backbones = {trial.train.backbone: None for trial in trials}
    given = _given(config, "evaluate")
    for number, backbone in enumerate(backbones):
        mine = [trial for trial in trials if trial.train.backbone == backbone]
        forms = dict.fromkeys((trial.method, trial.length, trial.pairs) for trial in mine)
        options = {
            **given,
            "data": data,
            "out": storage.join(config.out, EVALUATIONS, f"_references{number or ''}"),
            "forms": [{"method": method, "length": length, "pairs": pairs} for method, length, pairs in forms],
            "backbone": backbone.model_dump(mode="json"),
            "tracking.uri": "none",
        }
        evaluate = _load("evaluate", EvaluateConfig, options | ({"baselines": []} if number else {}))
        if evaluate.untuned or evaluate.baselines:
            yield evaluate


def _given(config: SweepConfig, section: str) -> dict[str, Any]:
    """The keys of ``train``, ``evaluate`` or ``build``, dotted; refuses those that are decided elsewhere."""
    given = dict(leaves(getattr(config, section)))
    for key in given:
        if _decided(key, section):
            raise ConfigError(f"{section}.{key}: is decided by the sweep; see its grid, data, out and tracking")
    return given


def _decided(key: str, section: str) -> bool:
    return any(key == decided or key.startswith(f"{decided}.") for decided in _DECIDED[section])


def _load(section: str, model: type[C], options: dict[str, Any]) -> C:
    try:
        return load_config(model, None, options)
    except ConfigError as error:
        raise ConfigError(f"{section}: {error}") from error


def _build(config: SweepConfig) -> BuildConfig | None:
    if config.manifest is None:
        if config.build:
            raise ConfigError("build: is for a dataset that the sweep builds; give manifest in place of data")
        return None
    out = storage.join(config.out, CHAINS)
    return _load("build", BuildConfig, {**_given(config, "build"), "pairs": config.manifest, "out": out})


def _tokens_per_image(config: SweepConfig, build: BuildConfig | None) -> int:
    """Of the dataset; of one that is not built yet by its tokenizer, or where that is not at hand by its size."""
    if build is None:
        return ChainDataset(str(config.data)).tokens_per_image
    if build.tokenizer.size_px is not None and build.tokenizer.path != "nano" and not _at_hand(build.tokenizer.path):
        return (build.tokenizer.size_px // _DOWNSAMPLING) ** 2
    return load_tokenizer(build.tokenizer, build.engine).tokens_per_image


def _architecture(backbone: BackboneConfig) -> LlamaConfig:
    """Of ``backbone``, without its weights, which a plan does not need: the scale says it."""
    known = backbone.path in (None, "nano") or backbone.scale == "custom" or _at_hand(str(backbone.path))
    return backbone_facts(
        backbone.model_copy(update={"path": backbone.path if known else None, "init": "random"})
    ).llama


def _at_hand(path: str) -> bool:
    return os.path.isdir(os.path.expanduser(path))


def _pairs_by_task(config: SweepConfig, build: BuildConfig | None, split: str) -> dict[str, int]:
    """Pairs of ``split`` by task: the good ones of the dataset, of a manifest that is not built yet all of them."""
    if build is None:
        tasks = ChainDataset(str(config.data)).table(["task"], None, split)["task"]
    else:
        check_manifest(build.pairs)
        filesystem, inner = storage.resolve(build.pairs)
        tasks = pq.read_table(inner, columns=["task"], filesystem=filesystem, filters=[("split", "==", split)])["task"]
    counted = pc.value_counts(tasks.combine_chunks()).to_pylist()
    return {str(entry["values"]): int(entry["counts"]) for entry in counted}


def _scale(config: SweepConfig, backbone: BackboneConfig) -> str:
    """The scale, and of several backbones of one scale also which."""
    alike = [other for other in config.grid.scales if other.scale == backbone.scale]
    return backbone.scale if len(alike) < 2 else f"{backbone.scale} {backbone.path} {backbone.revision or ''}".strip()


def _name(
    config: SweepConfig, method: str, length: int, pairs: int, tasks: Any, scale: Any, fields: Mapping[str, Any],
    seed: int,
) -> str:  # fmt: skip
    """A name for folders and for MLflow: what the grid varies, the seed last."""
    grid = config.grid
    parts = [method, f"L{length}", f"p{pairs}"]
    if len(grid.scales) > 1:
        parts.append(_scale(config, scale))
    if len(grid.tasks) > 1:
        parts.append("all" if tasks is None else "+".join(tasks))
    parts += [f"{key.rpartition('.')[2]}_{value}" for key, value in fields.items()]
    whole = "-".join(parts)
    text = re.sub(r"[^\w.+-]", "_", whole)
    exact = repr((method, length, pairs, tasks, scale, sorted(fields.items())))
    if len(text) > _NAME_CHARACTERS or text != whole or fields:  # two fields may end alike, two values look alike
        text = f"{text[:_NAME_CHARACTERS]}-{hashlib.sha256(exact.encode()).hexdigest()[:6]}"
    return f"{text}-s{seed}"


def _label(
    config: SweepConfig, method: str, length: int, pairs: int, tasks: Any, scale: Any, fields: Mapping[str, Any]
) -> str:
    grid = config.grid
    parts = [method if method == "none" else f"{method} L={length}", f"{pairs} pair{'s' * (pairs != 1)}"]
    if len(grid.scales) > 1:
        parts.append(_scale(config, scale))
    if len(grid.tasks) > 1:
        parts.append("all tasks" if tasks is None else " + ".join(tasks))
    return ", ".join([*parts, *(f"{key} {value}" for key, value in fields.items())])
