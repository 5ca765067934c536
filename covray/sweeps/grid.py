"""From a grid to its trials, and what they would take, before anything is started."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
from transformers import LlamaConfig

from covray.chains.dataset import ChainDataset, union_alphas
from covray.chains.sentences import count_pairs, require_context
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
from covray.io import storage
from covray.models.lvm.backbone import backbone_facts
from covray.models.tokenizer.vqgan import load_tokenizer
from covray.pairs.manifest import check_manifest, read_manifest
from covray.training.memory import TrainPlan, plan_training

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
    """What is evaluated once for all trials, a backbone each: baselines, and the untuned backbone for every form."""


def grid_of(config: SweepConfig) -> Grid:
    """The trials of ``config``; reads no tokens and no weights.

    The name of a trial follows from what it is, not from what else is in the grid: a grid that grows, shrinks or is
    reordered finds what is done. Raises CovrayError: a key that is not there or that the grid decides, a value out of
    bounds, a dataset without the frames a trial needs, a split without the pairs, or no combination that fits.
    """
    build = _build(config)
    data = str(config.data) if build is None else build.out
    tokens_per_image = _tokens_per_image(config, build)
    context = functools.cache(lambda backbone: int(_architecture(backbone).max_position_embeddings))
    base = _base(config, data)
    usual = {} if base is None else dict(leaves(base.model_dump(mode="json")))
    trials: dict[str, Trial] = {}
    left_out = []
    for combination in _combinations(config):
        method, length, pairs, tasks, scale, fields, seed = combination
        name = _name(usual, *combination)
        plain = method == "none" or length == 2
        if plain:
            method, length = "none", 2
        once = _name(usual, method, length, pairs, tasks, scale, fields, seed)
        if once in trials:
            why = ": there is nothing between image and label" if plain else ""
            left_out.append(LeftOut(name, f"repeats {once}{why}"))
            continue
        name = once
        train, evaluate = _configs(config, data, name, combination, method, length)
        try:
            tokens = require_context(train.sentences, tokens_per_image, context(train.backbone))
        except ConfigError as error:
            left_out.append(LeftOut(name, str(error).removeprefix("sentences: ").partition(";")[0]))
            continue
        label = _label(config, method, length, pairs, tasks, scale, fields)
        shown = _scale(train.backbone, config.grid.scales)
        trials[name] = Trial(name, label, method, length, pairs, tasks, shown, seed, fields, tokens, train, evaluate)
    if not trials:
        raise ConfigError(f"grid: none of {len(left_out)} combinations fits; the first: {left_out[0].reason}")
    found = tuple(trials.values())
    references = tuple(_references(config, data, found))
    if build is None:
        dataset = ChainDataset(data)
        for sentences in {trial.train.sentences: None for trial in found}:
            for split in (sentences.split, sentences.validation_split):
                if split is not None:
                    count_pairs(dataset, sentences, split)
    else:
        build = _with_frames(build, found)
    _require_pairs(config, build, found, references)
    return Grid(found, tuple(left_out), build, references)


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
    by_split = _pairs_by_task(config, grid.build)
    plans: list[tuple[Trial, TrainPlan]] = []
    for trial in grid.trials:
        llama = architecture(trial.train.backbone)
        sentences = trial.train.sentences
        found = by_split[sentences.split]
        pairs = sum(count for task, count in found.items() if sentences.tasks is None or task in sentences.tasks)
        plans.append((trial, plan_training(trial.train, llama, pairs, tokens_per_image)))
    smallest = min(plan.parameters for _, plan in plans)
    lines = []
    for trial, plan in plans:
        queries = by_split[trial.evaluate.split]
        asked = [queries[task] for task in (trial.evaluate.tasks or queries)]
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
    sets = [None if tasks is None else tuple(sorted(tasks)) for tasks in grid.tasks]  # a set has no order
    for seed in grid.seeds:
        for form in itertools.product(grid.methods, grid.lengths, grid.pairs, dict.fromkeys(sets), scales, fields):
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


def _references(config: SweepConfig, data: str, trials: Sequence[Trial]) -> Iterator[EvaluateConfig]:
    """An evaluation without adapters for every backbone; the first has the baselines.

    Another grid has others: a hash of the forms in their folders' names keeps them apart.
    """
    backbones = {trial.train.backbone: None for trial in trials}
    given = _given(config, "evaluate")
    for number, backbone in enumerate(backbones):
        mine = [trial for trial in trials if trial.train.backbone == backbone]
        forms = sorted({(trial.method, trial.length, trial.pairs) for trial in mine})
        exact = repr((number == 0, forms, backbone.model_dump()))
        name = f"_references-{hashlib.sha256(exact.encode()).hexdigest()[:6]}"
        options = {
            **given,
            "data": data,
            "out": storage.join(config.out, EVALUATIONS, name),
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


def _with_frames(build: BuildConfig, trials: Sequence[Trial]) -> BuildConfig:
    """``build`` with the frames that ``trials`` need; one that has begun with more goes on with those.

    Raises ConfigError where it has begun with fewer: the dataset of a sweep does not grow.
    """
    used = [trial for trial in trials if trial.length > 2]
    lengths, methods = sorted({trial.length for trial in used}) or [2], sorted({trial.method for trial in used})
    if storage.exists(storage.join(build.out, "_dataset.json")):
        begun = ChainDataset(build.out, unfinished=True)
        had = ", ".join(map(str, begun.config["lengths"]))
        if not (set(methods) <= set(begun.methods) and set(union_alphas(lengths)) <= set(begun.alphas)):
            raise ConfigError(
                f"grid: needs chains of {', '.join(map(str, lengths))} by {', '.join(methods)}, {build.out} was begun "
                f"with {had} by {', '.join(begun.methods) or 'no method'}; leave out the others, or give another --out"
            )
        lengths, methods = begun.config["lengths"], list(begun.methods)
    return build.model_copy(update={"lengths": tuple(lengths), "methods": tuple(methods)})


def _pairs_by_task(config: SweepConfig, build: BuildConfig | None) -> dict[str, dict[str, int]]:
    """Pairs by split and task: the good ones of the dataset, of a manifest that is not built yet all of them.

    Raises CovrayError where neither can be read.
    """
    columns = ["split", "task"]
    dataset = _dataset(config, build)
    if dataset is not None:
        table = ChainDataset(dataset).table(columns)
    else:
        check_manifest(str(config.manifest))
        table = pa.Table.from_batches(read_manifest(str(config.manifest), columns))
    found: dict[str, dict[str, int]] = {}
    for entry in table.drop_null().group_by(columns).aggregate([([], "count_all")]).sort_by("task").to_pylist():
        found.setdefault(entry["split"], {})[entry["task"]] = entry["count_all"]
    return found


def _dataset(config: SweepConfig, build: BuildConfig | None) -> str | None:
    """The dataset of the trials; None where it is not built yet."""
    if build is None:
        return config.data
    return build.out if storage.exists(storage.join(build.out, "_audit.json")) else None


def _require_pairs(
    config: SweepConfig, build: BuildConfig | None, trials: Sequence[Trial], references: Sequence[EvaluateConfig]
) -> None:
    """Whether every split that is read has pairs enough, of every task that is asked for. Raises DatasetError."""
    found = _pairs_by_task(config, build)
    needs: dict[tuple[str, str, str, tuple[str, ...], int], None] = {}

    def need(key: str, by: str, split: str, tasks: Iterable[str], least: int) -> None:
        needs[key, by, split, tuple(tasks), least] = None

    for trial in trials:
        sentences = trial.train.sentences
        for key in ("split", "validation_split"):
            split = getattr(sentences, key)
            if split is not None:
                need(f"train.sentences.{key}", "grid.tasks", split, sentences.tasks or (), trial.pairs + 1)
    asked = [("grid.tasks", trial.evaluate, trial.pairs) for trial in trials]
    for one in references:
        asked.append(("evaluate.tasks", one, max((form.pairs for form in one.forms), default=0)))
    for by, evaluate, pairs in asked:
        tasks: Iterable[str] = evaluate.tasks or ()
        tasks = tasks or found.get(evaluate.split, {})  # without a choice the queries' tasks need examples
        least = max(1, pairs + (evaluate.split == evaluate.example_split))
        need("evaluate.split", by, evaluate.split, tasks, 1)
        need("evaluate.example_split", by, evaluate.example_split, tasks, least)
    where = _dataset(config, build) or config.manifest
    for key, by, split, wanted, least in needs:
        there = found.get(split, {})
        if not there:
            raise DatasetError(f"{where}: no pairs in split {split}, only in {', '.join(sorted(found))}; set {key}")
        for task in wanted or there:
            if there.get(task, 0) < least:
                raise DatasetError(
                    f"{where}: {task} has {there.get(task, 0)} pairs in split {split}, the grid needs {least}; "
                    f"lower grid.pairs, set {key}, or name the other tasks in {by}"
                )


def _base(config: SweepConfig, data: str) -> TrainConfig | None:
    """The training that ``train`` alone describes; None where it is none without the grid's fields."""
    try:
        return _load("train", TrainConfig, {**_given(config, "train"), "data": data, "out": config.out})
    except ConfigError:
        return None


def _full(backbone: BackboneConfig) -> str:
    """All that tells one backbone from another."""
    random = "random" if backbone.init == "random" else None
    return " ".join(filter(None, (backbone.scale, backbone.path, backbone.revision, random)))


def _scale(backbone: BackboneConfig, among: Iterable[BackboneConfig]) -> str:
    """The scale, and where several backbones ``among`` those of the grid are of that scale also which."""
    return backbone.scale if sum(other.scale == backbone.scale for other in among) < 2 else _full(backbone)


def _name(
    usual: Mapping[str, Any], method: str, length: int, pairs: int, tasks: Any, scale: Any, fields: Mapping[str, Any],
    seed: int,
) -> str:  # fmt: skip
    """A name for folders and for MLflow: what is not by default, or for fields as in ``usual``; the seed last."""
    changed = sorted((key, value) for key, value in fields.items() if key not in usual or usual[key] != value)
    parts = [method, f"L{length}", f"p{pairs}"]
    if scale == BackboneConfig():
        scale = None
    if scale is not None:
        parts.append(_full(scale))
    if tasks is not None:
        parts.append("+".join(tasks))
    parts += [f"{key.rpartition('.')[2]}_{value}" for key, value in changed]
    # Two fields may end alike.
    return f"{_safe(parts, (method, length, pairs, tasks, scale, changed), bool(changed))}-s{seed}"


def _safe(parts: Iterable[str], exact: tuple[Any, ...], ambiguous: bool = False) -> str:
    """``parts`` as the name of a folder; with a hash of ``exact`` where that alone might not tell it from others."""
    whole = "-".join(parts)
    text = re.sub(r"[^\w.+-]", "_", whole)
    if len(text) > _NAME_CHARACTERS or text != whole or ambiguous:
        text = f"{text[:_NAME_CHARACTERS]}-{hashlib.sha256(repr(exact).encode()).hexdigest()[:6]}"
    return text


def _form_label(method: str, length: int, pairs: int) -> str:
    return f"{method if method == 'none' else f'{method} L={length}'}, {pairs} pair{'s' * (pairs != 1)}"


def _label(
    config: SweepConfig, method: str, length: int, pairs: int, tasks: Any, scale: Any, fields: Mapping[str, Any]
) -> str:
    grid = config.grid
    parts = [_form_label(method, length, pairs)]
    if len(grid.scales) > 1:
        parts.append(_scale(scale, grid.scales))
    if len(grid.tasks) > 1:
        parts.append("all tasks" if tasks is None else " + ".join(tasks))
    return ", ".join([*parts, *(f"{key} {value}" for key, value in fields.items())])
