"""``covray plan``: what a build or a training takes in time, GPU hours, money and storage, before it is started."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from transformers import LlamaConfig

from covray.config import BuildConfig, NodesConfig, PlanConfig, Section, TrainConfig, leaves, load_config
from covray.config.build import solver_text
from covray.config.vlm import VlmTrainConfig
from covray.errors import ConfigError
from covray.io.model_folders import NANO_NAMES
from covray.models.lvm.backbone import backbone_facts
from covray.planning.flops import (
    assumed_build,
    assumed_training,
    evaluations_per_pair,
    known_peak,
    picture_tokens,
    pictures_per_pair,
)
from covray.planning.rates import (
    MEASURED_NAMES,
    BuildRates,
    Calibration,
    RowCost,
    TrainRates,
    measured_build,
    measured_training,
    nano_build,
    nano_calibration,
    nano_training,
    read_calibration,
)
from covray.planning.records import BuildPlan, Plan, Spread, TrainingPlan, VlmPlan
from covray.planning.simulation import BuildWork, Fleet, Outcome, TrainWork, simulate_build, simulate_training
from covray.planning.vlm import plan_vlm
from covray.training.memory import plan_training

_HOUR_S = 3600.0
_MAX_BLOCKS = 10_000_000
"""Blocks that are simulated for all replicas together, some 15 s on one core."""
_MAX_LOSSES = _MAX_BLOCKS / 10
"""Lost nodes of a training that are simulated for all replicas together."""
_MAX_EXPECTED_LOSSES = 3.0
"""Expected interruptions between two points where work is kept, above which hardly anything ever is."""
_ASSUMED = "assumed"

C = TypeVar("C", bound=Section)


@dataclass(frozen=True)
class _BuildBasis:
    """What the plan of a build rests on."""

    rates: BuildRates
    source: str
    notes: list[str]


@dataclass(frozen=True)
class _TrainBasis:
    """What the plan of a training rests on."""

    rates: TrainRates
    source: str
    notes: list[str]


def plan(config: PlanConfig) -> Plan:
    """Plan each of ``config.steps``; starts nothing, reads no weights and no data.

    Raises:
        ConfigError: A key or value that the step itself would refuse, rates that are not known or were measured with
            something else, machines that are taken away faster than they get anything done, or more blocks or losses
            than can be simulated.
    """
    calibration = None if config.calibration is None else read_calibration(config.calibration)
    build = build_config(config)
    planned: dict[str, Any] = {}
    # Each step may have rates of its own: measured, shipped or assumed.
    sources: dict[str, str] = {}
    if "build" in config.steps:
        build_basis = _build_basis(config, build, calibration)
        planned["build"] = _plan_build(config, build, build_basis)
        sources["build"] = build_basis.source
    if "train" in config.steps:
        train = train_config(config)
        train_basis = _train_basis(config, train, calibration)
        planned["train"] = _plan_training(config, train, train_basis, _tokens_per_image(build, calibration))
        sources["train"] = train_basis.source
    if "vlm" in config.steps:
        planned["vlm"] = _plan_vlm(config)
        sources["vlm"] = _ASSUMED
    source = "; ".join(f"{step}: {of_step}" for step, of_step in sources.items())
    if len(set(sources.values())) == 1:
        source = next(iter(sources.values()))
    return Plan(rates=source, replicas=config.replicas, **planned)


def build_config(config: PlanConfig) -> BuildConfig:
    """Return the build that is planned."""
    return _section(config, "build", BuildConfig, {"pairs": "pairs", "out": "chains"})


def train_config(config: PlanConfig) -> TrainConfig:
    """Return the training that is planned: a worker for every GPU."""
    decided = {"data": "chains", "out": "run", "workers.count": config.train_on.gpus}
    return _section(config, "train", TrainConfig, decided)


def _section(config: PlanConfig, section: str, model: type[C], decided: dict[str, Any]) -> C:
    """Return the configuration of a step that is planned.

    Args:
        config: The plan's, whose ``section`` holds what the user set of the step.
        section: ``build`` or ``train``.
        model: The step's configuration.
        decided: Values that the plan itself sets, by dotted key: the user may not set them.

    Raises:
        ConfigError: A key is the plan's own, or a value is wrong.
    """
    given = dict(leaves(getattr(config, section)))
    for key in given:
        if key in decided:
            where = f"{section}_on.gpus" if key == "workers.count" else "pairs"
            raise ConfigError(f"{section}.{key}: is not for a plan; what there is to do and on what: {where}")
    try:
        return load_config(model, None, given | decided)
    except ConfigError as error:
        raise ConfigError(f"{section}: {error}") from error


# --- rates -----------------------------------------------------------------------------------------------------------


def _build_basis(config: PlanConfig, build: BuildConfig, calibration: Calibration | None) -> _BuildBasis:
    """Return the rates of a calibration, those shipped for the nano family, or assumed ones."""
    # Pairs that share an image share its inversion, so a row of theirs costs less.
    shared = config.pairs_per_source
    cost = RowCost(evaluations_per_pair(build, shared), pictures_per_pair(build))
    notes: list[str] = []
    if calibration is not None:
        source = calibration.source
        rates, times = measured_build(build, calibration, cost)
    elif _has_nano_models(build) and cost.evaluations > 0:  # the shipped rates were measured with a prior
        source = nano_calibration().source
        rates, times, notes = nano_build(build, cost)
    else:
        rates = assumed_build(build, config.assumed, config.build_on.gpu, shared, config.tasks_per_block)
        return _BuildBasis(rates, _ASSUMED, [])
    if times != 1:
        notes = [f"a row costs {times:.2f} times the measured one, by its UNet evaluations", *notes]
    return _BuildBasis(rates, source, notes)


def _train_basis(config: PlanConfig, train: TrainConfig, calibration: Calibration | None) -> _TrainBasis:
    """Return the rates of a calibration, those shipped for the nano backbone, or assumed ones."""
    if calibration is not None:
        return _TrainBasis(measured_training(train, calibration), calibration.source, [])
    if train.backbone.scale == "nano" and train.backbone.path in (None, *MEASURED_NAMES):
        rates, notes = nano_training(train)
        return _TrainBasis(rates, nano_calibration().source, notes)
    return _TrainBasis(assumed_training(train, _architecture(train), config.assumed, config.train_on.gpu), _ASSUMED, [])


def _has_nano_models(build: BuildConfig) -> bool:
    return build.prior.path in NANO_NAMES and build.tokenizer.path in MEASURED_NAMES


def _tokens_per_image(build: BuildConfig, calibration: Calibration | None) -> int:
    """Return the tokens of a picture of the chains that a training reads."""
    if calibration is not None and calibration.build is not None:
        return calibration.build.tokens_per_image
    if _has_nano_models(build):
        nano = nano_calibration().build
        assert nano is not None
        return nano.tokens_per_image
    return picture_tokens(build)


def _architecture(train: TrainConfig) -> LlamaConfig:
    """Return the architecture of the backbone without its weights; where no folder is named, the scale says it."""
    path = train.backbone.path if train.backbone.scale == "custom" else None
    return backbone_facts(train.backbone.model_copy(update={"path": path, "init": "random"})).llama


# --- steps -----------------------------------------------------------------------------------------------------------


def _plan_build(config: PlanConfig, build: BuildConfig, basis: _BuildBasis) -> BuildPlan:
    """Simulate the build, and say what limits it."""
    rates = basis.rates
    blocks = -(-config.pairs // build.most_rows_per_block)
    shards = blocks * min(config.tasks_per_block, build.most_rows_per_block)
    work = BuildWork(
        rows=config.pairs,
        rows_per_block=build.most_rows_per_block,
        row_s=rates.row_s,
        start_s=rates.start_s,
        load_s=rates.load_s,
        end_s=shards * rates.audit_shard_s,
        driver_blocks_per_s=config.driver_blocks_per_s,
    )
    # Refuse what would never end, or take too long to simulate, before the first simulation.
    fleet = _fleet(config.build_on)
    block_s = build.most_rows_per_block * rates.row_s
    first_block_s = fleet.boot_s + max(rates.start_s, rates.load_s + block_s)
    _require_progress(fleet.interruptions_per_s, first_block_s, "build", "the way to a block", "build.rows_per_block")
    repeated = math.exp(fleet.interruptions_per_s * block_s)  # blocks that are lost are done again
    if config.replicas * blocks * repeated > _MAX_BLOCKS:
        raise ConfigError(
            f"build.rows_per_block: {blocks:,} blocks of {build.most_rows_per_block} pairs, {config.replicas} times, "
            "are more than can be simulated; raise it, or lower replicas"
        )
    outcomes = _simulate(config, lambda generator: simulate_build(work, fleet, generator))
    # Notes name what limits the build, where that is not its actors.
    actors = min(config.build_on.gpus, blocks)
    notes = list(basis.notes)
    if actors / block_s > config.driver_blocks_per_s:
        notes.append(
            f"{actors} actors could do {actors / block_s:.1f} blocks/s, the driver hands out "
            f"{config.driver_blocks_per_s:g}: raise build.rows_per_block, or take fewer GPUs"
        )
    if work.end_s > 0.1 * float(np.mean([outcome.seconds for outcome in outcomes])):
        notes.append(
            f"the audit of {shards:,} shards takes {work.end_s / _HOUR_S:.1f} h of one driver: larger blocks, or a "
            "manifest that is sorted by task, make fewer"
        )
    return BuildPlan(
        pairs=config.pairs,
        blocks=blocks,
        unet_evaluations=round(config.pairs * rates.evaluations),
        solver=solver_text(build.prior.model_dump()) if rates.evaluations else "none needed",
        seconds_per_pair=rates.row_s,
        seconds_per_block=block_s,
        **_spreads(outcomes, config.build_on, config.head_price),
        audit_hours=work.end_s / _HOUR_S,
        shards=shards,
        shard_bytes=round(config.pairs * rates.row_bytes + shards * rates.shard_bytes),
        notes=tuple(notes),
    )


def _plan_training(config: PlanConfig, train: TrainConfig, basis: _TrainBasis, tokens_per_image: int) -> TrainingPlan:
    """Simulate the training, and say what could stop it."""
    rates = basis.rates
    planned = plan_training(train, _architecture(train), config.train_pairs or config.pairs, tokens_per_image)
    # A validation reads its sentences once; the workers share them.
    validated_tokens = train.validation_sentences * planned.tokens_per_sentence / planned.workers
    if train.sentences.validation_split is None:
        validated_tokens = 0.0
    work = TrainWork(
        steps=planned.steps,
        step_s=planned.tokens / planned.steps / planned.workers * rates.token_s,
        start_s=rates.start_s,
        validation_s=validated_tokens * rates.validation_token_s,
        validate_every_steps=train.validate_every_steps,
        checkpoint_s=rates.checkpoint_s,
        checkpoint_every_steps=train.checkpoints.every_steps,
    )
    # The loss of any node stops all of them, so a training is as fragile as its nodes together.
    fleet = _fleet(config.train_on)
    rate = fleet.nodes * fleet.interruptions_per_s
    kept_s = work.start_s + min(work.checkpoint_every_steps, work.steps) * work.step_s
    _require_progress(rate, kept_s, "train", "the way to a checkpoint", "train.checkpoints.every_steps")
    _require_few_losses(config, "train", rate * work.seconds_to(work.steps) * math.exp(rate * kept_s))
    outcomes = _simulate(config, lambda generator: simulate_training(work, fleet, generator))
    losses = float(np.mean([outcome.interruptions for outcome in outcomes]))
    notes = list(basis.notes)
    if 0 <= train.workers.max_failures < losses:
        notes.append(
            f"about {losses:.0f} nodes are lost, workers.max_failures is {train.workers.max_failures}: raise it, or "
            "run the same command again each time"
        )
    return TrainingPlan(
        parameters=planned.parameters,
        train_steps=planned.steps,
        tokens=planned.tokens,
        seconds_per_step=work.step_s,
        tokens_per_s_per_gpu=1 / rates.token_s,
        **_spreads(outcomes, config.train_on, config.head_price),
        checkpoint_bytes=round(rates.checkpoint_bytes * (train.checkpoints.keep + 1)),  # the best is kept besides
        notes=tuple(notes),
    )


def _plan_vlm(config: PlanConfig) -> VlmPlan:
    """Simulate the training of a vision-language model."""
    decided = {"data": "words", "out": "run", "workers.count": config.vlm_on.gpus}
    train = _section(config, "vlm", VlmTrainConfig, decided)
    work = plan_vlm(config, train, known_peak(config.vlm_on.gpu, "vlm_on"))
    trained = TrainWork(
        steps=work.steps,
        step_s=work.seconds_per_step,
        start_s=config.assumed.start_s + config.assumed.load_s,
        checkpoint_s=config.assumed.checkpoint_s,
        checkpoint_every_steps=train.checkpoints.every_steps,
    )
    fleet = _fleet(config.vlm_on)
    rate = fleet.nodes * fleet.interruptions_per_s
    kept_s = trained.start_s + min(trained.checkpoint_every_steps, trained.steps) * trained.step_s
    _require_progress(rate, kept_s, "vlm", "the way to a checkpoint", "vlm.checkpoints.every_steps")
    _require_few_losses(config, "vlm", rate * trained.seconds_to(trained.steps) * math.exp(rate * kept_s))
    outcomes = _simulate(config, lambda generator: simulate_training(trained, fleet, generator))
    return VlmPlan(
        parameters=work.parameters,
        train_steps=work.steps,
        tokens=work.steps * work.tokens_per_step,
        seconds_per_step=work.seconds_per_step,
        tokens_per_s_per_gpu=work.tokens_per_step / work.seconds_per_step / config.vlm_on.gpus,
        **_spreads(outcomes, config.vlm_on, config.head_price),
        checkpoint_bytes=work.checkpoint_bytes * (train.checkpoints.keep + 1),  # the best is kept besides
        notes=("memory without the allocator's gaps, kernels' workspace and communication: some 10 to 20% more",),
        memory=work.memory,
        figures=work.figures,
    )


def _fleet(nodes: NodesConfig) -> Fleet:
    return Fleet(
        nodes=nodes.gpus // nodes.gpus_per_node,
        actors=nodes.gpus_per_node,
        boot_s=nodes.boot_s,
        upscaling_speed=nodes.upscaling_speed,
        interruptions_per_s=nodes.interruptions / _HOUR_S,
        idle_timeout_s=nodes.idle_timeout_s,
    )


def _require_progress(rate: float, seconds: float, section: str, what: str, key: str) -> None:
    """Refuse machines that are lost, at ``rate`` (1/s), long before the ``seconds`` after which work is kept."""
    if rate * seconds > _MAX_EXPECTED_LOSSES:
        raise ConfigError(
            f"{section}_on.interruptions: {rate * _HOUR_S:.1f} an hour, and {what} takes {seconds / 60:.0f} min: "
            f"hardly anything would ever be kept; lower {key}, or take machines that stay"
        )


def _require_few_losses(config: PlanConfig, section: str, expected: float) -> None:
    """Refuse a training that is expected to lose more nodes than can be simulated. Raises ConfigError.

    Losses come at random in time, and what they destroy is worked for again: seconds of work without a loss grow by
    about exp(rate * seconds to a checkpoint), which ``expected`` counts.
    """
    if config.replicas * expected > _MAX_LOSSES:
        raise ConfigError(
            f"{section}_on.interruptions: about {expected:,.0f} nodes would be lost, {config.replicas} times: more "
            "than can be simulated; take machines that stay, or lower replicas"
        )


def _simulate(config: PlanConfig, simulate: Callable[[np.random.Generator], Outcome]) -> list[Outcome]:
    """Simulate a step once for every replica, each with random numbers of its own."""
    return [simulate(np.random.default_rng([config.seed, replica])) for replica in range(config.replicas)]


def _spreads(outcomes: Sequence[Outcome], nodes: NodesConfig, head_price: float) -> dict[str, Spread]:
    """Return the figures that depend on chance, by the names they have in the plans."""
    values: dict[str, list[float]] = {}
    for outcome in outcomes:
        waiting_s = outcome.paid_s - outcome.busy_s - outcome.lost_s
        figures = {
            "hours": outcome.seconds / _HOUR_S,
            "gpu_hours": outcome.paid_s / _HOUR_S,
            "useful_gpu_hours": outcome.busy_s / _HOUR_S,
            "lost_gpu_hours": outcome.lost_s / _HOUR_S,
            "waiting_gpu_hours": waiting_s / _HOUR_S,
            "lost_share": outcome.lost_s / outcome.paid_s,
            "interruptions": float(outcome.interruptions),
            "money": (outcome.paid_s * nodes.price + outcome.seconds * head_price) / _HOUR_S,
        }
        for name, figure in figures.items():
            values.setdefault(name, []).append(figure)
    return {name: _spread(of_replicas) for name, of_replicas in values.items()}


def _spread(values: list[float]) -> Spread:
    low, high = np.percentile(values, [5, 95])
    return Spread(mean=float(np.mean(values)), low=float(low), high=float(high))
