"""From a grid to its trials."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from transformers import LlamaConfig

from covray.chains.dataset import ChainDataset
from covray.chains.loading import count_pairs
from covray.chains.sentences import require_context
from covray.chains.shard_rows import union_alphas
from covray.config import (
    BackboneConfig,
    BuildConfig,
    EvaluateConfig,
    JsonObject,
    Section,
    SweepConfig,
    TrainConfig,
    leaves,
    load_config,
)
from covray.errors import ConfigError
from covray.io import storage
from covray.io.model_folders import is_here
from covray.models.tokenizer.vqgan import load_tokenizer
from covray.sweeps.naming import Combination, reference_name, scale_label, trial_label, trial_name
from covray.sweeps.records import LeftOut
from covray.sweeps.requirements import Evaluation, Training, require_pairs
from covray.training.memory import architecture

CHAINS, RUNS, EVALUATIONS = "chains", "runs", "evaluations"
"""Folders of a sweep: its dataset, and one run and one evaluation a trial."""
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
    """What tells the trial from others, but for the seed, in words."""
    method: str
    length: int
    """Pictures of a chain, both ends counted; 2 for the method ``none``."""
    pairs: int
    tasks: tuple[str, ...] | None
    scale: str
    seed: int
    fields: dict[str, Any]
    context_tokens: int
    """Tokens of a sentence: example chains, query, frames and answer."""
    train: TrainConfig
    evaluate: EvaluateConfig


@dataclass(frozen=True)
class Grid:
    """The trials of a sweep, in the order they are started."""

    trials: tuple[Trial, ...]
    left_out: tuple[LeftOut, ...]
    """The combinations that are no trial."""
    build: BuildConfig | None
    """The dataset to build first; None where there is one."""
    references: tuple[EvaluateConfig, ...]
    """Evaluations that all trials share, one a backbone: baselines, and the untuned backbone for every form."""


def grid_of(config: SweepConfig) -> Grid:
    """Return the trials of a sweep; reads no tokens and no weights.

    The name of a trial follows from what it is, so that a grid that grows, shrinks or is reordered finds the trials
    that are done.

    Raises:
        CovrayError: A key does not exist or is decided by the grid, a value is out of bounds, the dataset lacks the
            frames that a trial needs, a split lacks pairs, or no combination fits.
    """
    build = _build(config)
    data = str(config.data)
    if build is not None:
        data = build.out
    trials, left_out = _trials(config, data, tokens_per_image(config, build))
    if not trials:
        raise ConfigError(f"grid: none of {len(left_out)} combinations fits; the first: {left_out[0].reason}")
    references = tuple(_references(config, data, trials))
    # A dataset that exists is never extended; one that the sweep builds gets all frames of the grid at once.
    if build is None:
        _require_frames(data, trials)
    else:
        build = _with_frames(build, trials)

    # What trials and references read must be there before the first hour of work.
    evaluations, trainings = [], []
    # A trial is evaluated after as many pairs as it was trained with; references after the most of their forms.
    for trial in trials:
        evaluations.append(Evaluation(trial.evaluate, trial.pairs, "grid.tasks"))
        trainings.append(_training(trial))
    for reference in references:
        pairs = max((form.pairs for form in reference.forms), default=0)
        evaluations.append(Evaluation(reference, pairs, "evaluate.tasks"))
    require_pairs(config, build, trainings, evaluations)
    return Grid(tuple(trials), tuple(left_out), build, references)


def _trials(config: SweepConfig, data: str, picture_tokens: int) -> tuple[list[Trial], list[LeftOut]]:
    """Return the combinations that are trials, and those that are not, each with its reason."""

    @functools.cache
    def context(backbone: BackboneConfig) -> int:
        return int(backbone_architecture(backbone).max_position_embeddings)

    # A field that equals its default is not named: the name must not depend on how the default was said.
    defaults = _training_defaults(config, data)
    trials: dict[str, Trial] = {}
    left_out = []
    # Names are unique, and a name follows from the combination: two of one name are the same trial.
    for asked in _combinations(config):
        # Length 2 and the method `none` mean the same: nothing lies between image and label.
        plain = asked.method == "none" or asked.length == 2
        combination = asked
        if plain:
            combination = replace(asked, method="none", length=2)
        name = trial_name(combination, defaults)
        if name in trials:
            reason = f"repeats {name}"
            if plain:
                reason += ": there is nothing between image and label"
            left_out.append(LeftOut(name=trial_name(asked, defaults), reason=reason))
            continue
        train, evaluate = _configs(config, data, name, combination)
        # A sentence that exceeds the context leaves out its trial, not the sweep.
        try:
            context_tokens = require_context(train.sentences, picture_tokens, context(train.backbone))
        except ConfigError as error:
            reason = str(error).removeprefix("sentences: ").partition(";")[0]
            left_out.append(LeftOut(name=name, reason=reason))
            continue
        trials[name] = Trial(
            name=name,
            label=trial_label(combination, config.grid),
            method=combination.method,
            length=combination.length,
            pairs=combination.pairs,
            tasks=combination.tasks,
            scale=scale_label(train.backbone, config.grid.scales),
            seed=combination.seed,
            fields=combination.fields,
            context_tokens=context_tokens,
            train=train,
            evaluate=evaluate,
        )
    return list(trials.values()), left_out


def _combinations(config: SweepConfig) -> Iterator[Combination]:
    """Yield all of the grid; the seeds last, so that every form is tried once before one is repeated."""
    grid = config.grid
    # One set of fields, which is empty, where the grid has none.
    fields = []
    for values in itertools.product(*grid.fields.values()):
        fields.append(dict(zip(grid.fields, values, strict=True)))
    task_sets: dict[tuple[str, ...] | None, None] = {}
    for names in grid.tasks:
        if names is None:
            task_sets[None] = None
        else:
            task_sets[tuple(sorted(names))] = None  # a set has no order
    forms = itertools.product(grid.methods, grid.lengths, grid.pairs, task_sets, grid.scales or (None,), fields)
    # The product is listed, because it is walked once a seed.
    for seed, form in itertools.product(grid.seeds, list(forms)):
        method, length, pairs, tasks, scale, of_fields = form
        yield Combination(method, length, pairs, tasks, scale, of_fields, seed)


def _configs(config: SweepConfig, data: str, name: str, combination: Combination) -> tuple[TrainConfig, EvaluateConfig]:
    """Return the training and the evaluation of a trial."""
    tasks, scale, fields = combination.tasks, combination.scale, combination.fields
    run = storage.join(config.out, RUNS, name)
    options = {
        **_given(config, "train"),
        "data": data,
        "out": run,
        "seed": combination.seed,
        "sentences.method": combination.method,
        "sentences.lengths": [combination.length],
        "sentences.pairs": [combination.pairs],
        "sentences.tasks": None if tasks is None else list(tasks),
    }
    if scale is not None:
        options["backbone"] = scale.model_dump(mode="json")
    # A field of the grid and an entry of the grid may not say the same twice.
    for key in fields:
        if _is_decided(key, "train"):
            raise ConfigError(f"grid.fields.{key}: the grid has an entry for it, or the sweep decides it")
    # Both of them at once would leave open which one decides.
    train_keys = (*fields, *options)
    if config.grid.scales and any(key.startswith("backbone.") for key in train_keys):
        raise ConfigError("train.backbone: is what grid.scales says; leave one of them")
    train = _load("train", TrainConfig, options | fields)
    # A trial evaluates its adapter alone: baselines and the untuned backbone are shared by all trials.
    evaluate_options = _given(config, "evaluate")
    evaluate = _load(
        "evaluate",
        EvaluateConfig,
        {
            **evaluate_options,
            "data": data,
            "out": storage.join(config.out, EVALUATIONS, name),
            "adapters": [run],
            "tasks": evaluate_options.get("tasks") if tasks is None else list(tasks),
            "untuned": False,
            "baselines": [],
            "baseline_examples": 1,
            "tracking.uri": "none",
        },
    )
    return train, evaluate


def _references(config: SweepConfig, data: str, trials: Sequence[Trial]) -> Iterator[EvaluateConfig]:
    """Yield an evaluation without adapters for every backbone; the first has the baselines.

    A grid with other forms has other references: a hash of the forms in the names of their folders tells them apart.
    """
    # One evaluation a backbone, however many trials share it.
    by_backbone: dict[BackboneConfig, list[Trial]] = {}
    for trial in trials:
        by_backbone.setdefault(trial.train.backbone, []).append(trial)
    for number, (backbone, of_backbone) in enumerate(by_backbone.items()):
        forms = sorted({(trial.method, trial.length, trial.pairs) for trial in of_backbone})
        # The repr of this tuple is part of the names of sweeps that have begun: it must stay as it is.
        name = reference_name((number == 0, forms, backbone.model_dump()))
        form_options = []
        for method, length, pairs in forms:
            form_options.append({"method": method, "length": length, "pairs": pairs})
        options = {
            **_given(config, "evaluate"),
            "data": data,
            "out": storage.join(config.out, EVALUATIONS, name),
            "forms": form_options,
            "backbone": backbone.model_dump(mode="json"),
            "tracking.uri": "none",
        }
        # Answers without a model do not depend on the backbone: the first evaluation has them for all.
        if number > 0:
            options["baselines"] = []
        evaluate = _load("evaluate", EvaluateConfig, options)
        # There may be nothing to compare with, by the configuration.
        if evaluate.untuned or evaluate.baselines:
            yield evaluate


def _require_frames(data: str, trials: Sequence[Trial]) -> None:
    """Check that the dataset has the frames, and pairs, for every form of sentence. Raises CovrayError."""
    dataset = ChainDataset(data)
    # Many trials make the same sentences; each form is checked once.
    for sentences in dict.fromkeys(trial.train.sentences for trial in trials):
        for split in (sentences.split, sentences.validation_split):
            if split is not None:
                count_pairs(dataset, sentences, split)


def _training(trial: Trial) -> Training:
    """Return what a trial reads while it trains."""
    sentences = trial.train.sentences
    splits = []
    for key in ("split", "validation_split"):
        split = getattr(sentences, key)
        if split is not None:
            splits.append((key, split))
    return Training(tuple(splits), tuple(sentences.tasks or ()), trial.pairs)


def _given(config: SweepConfig, section: str) -> JsonObject:
    """Return the dotted keys of a section of the sweep. Raises ConfigError for those that the sweep decides."""
    given = dict(leaves(getattr(config, section)))
    for key in given:
        if _is_decided(key, section):
            raise ConfigError(f"{section}.{key}: is decided by the sweep; see its grid, data, out and tracking")
    return given


def _is_decided(key: str, section: str) -> bool:
    return any(key == decided or key.startswith(f"{decided}.") for decided in _DECIDED[section])


def _load(section: str, model: type[C], options: dict[str, Any]) -> C:
    try:
        return load_config(model, None, options)
    except ConfigError as error:
        raise ConfigError(f"{section}: {error}") from error


def _training_defaults(config: SweepConfig, data: str) -> JsonObject:
    """Return the training that ``train`` alone describes, dotted; empty where it is none without the grid's fields."""
    # Fields of the grid may be required: without them there is no training, and so no default.
    try:
        train = _load("train", TrainConfig, {**_given(config, "train"), "data": data, "out": config.out})
    except ConfigError:
        return {}
    return dict(leaves(train.model_dump(mode="json")))


def _build(config: SweepConfig) -> BuildConfig | None:
    """Return the dataset to build; None where the sweep is given one."""
    if config.manifest is None:
        if config.build:
            raise ConfigError("build: is for a dataset that the sweep builds; give manifest in place of data")
        return None
    out = storage.join(config.out, CHAINS)
    return _load("build", BuildConfig, {**_given(config, "build"), "pairs": config.manifest, "out": out})


def _with_frames(build: BuildConfig, trials: Sequence[Trial]) -> BuildConfig:
    """Return ``build`` with the frames that ``trials`` need; a build that has begun with more goes on with those.

    Raises ConfigError where it has begun with fewer: the dataset of a sweep is never extended.
    """
    # Chains of length 2 have no frames to build.
    with_frames = [trial for trial in trials if trial.length > 2]
    lengths = sorted({trial.length for trial in with_frames}) or [2]
    methods = sorted({trial.method for trial in with_frames})
    # Shards are written as the build goes: a begun dataset has the frames that it was begun with.
    if storage.exists(storage.join(build.out, "_dataset.json")):
        begun = ChainDataset(build.out, unfinished=True)
        begun_lengths = ", ".join(map(str, begun.config["lengths"]))
        if not (set(methods) <= set(begun.methods) and set(union_alphas(lengths)) <= set(begun.alphas)):
            raise ConfigError(
                f"grid: needs chains of {', '.join(map(str, lengths))} by {', '.join(methods)}, {build.out} was begun "
                f"with {begun_lengths} by {', '.join(begun.methods) or 'no method'}; leave out the others, or give "
                "another --out"
            )
        # More than is needed does no harm: trials read only their own frames.
        lengths, methods = begun.config["lengths"], list(begun.methods)
    return build.model_copy(update={"lengths": tuple(lengths), "methods": tuple(methods)})


def tokens_per_image(config: SweepConfig, build: BuildConfig | None) -> int:
    """Return the tokens of a picture.

    They are those of the dataset; before it is built those of its tokenizer, or by its size where it is not on disk.
    """
    if build is None:
        return ChainDataset(str(config.data)).tokens_per_image
    tokenizer = build.tokenizer
    # A plan needs the number only, not the weights, which may have to be downloaded.
    if tokenizer.size_px is not None and not is_here(tokenizer.path):
        return (tokenizer.size_px // _DOWNSAMPLING) ** 2
    return load_tokenizer(tokenizer, build.engine).tokens_per_image


def backbone_architecture(backbone: BackboneConfig) -> LlamaConfig:
    """Return the architecture of ``backbone`` without its weights, which a plan does not need."""
    return architecture(backbone).llama
