"""``covray plan``: what a build or a training takes in time, GPU hours, money and storage, before it is started."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from covray.config import BuildConfig, NodesConfig, PlanConfig, Section, TrainConfig, leaves, load_config
from covray.errors import ConfigError
from covray.models.lvm.backbone import backbone_facts
from covray.planning.rates import (
    BuildRates,
    Calibration,
    assumed_build,
    assumed_training,
    measured_build,
    measured_training,
    read_calibration,
)
from covray.planning.simulation import BuildWork, Fleet, Outcome, TrainWork, simulate_build, simulate_training
from covray.training.memory import plan_training

_HOUR_S = 3600.0
_MOST_PLAYED = 10_000_000
"""Blocks, and ten times as many as losses of a training, of all replicas together: some 15 s on one core."""
_MOST_LOSSES = 3.0
"""Expected interruptions between two points where work is kept, above which hardly anything ever is."""
_DECIDED = {"build": ("pairs", "out"), "train": ("data", "out", "workers.count")}

C = TypeVar("C", bound=Section)


def plan(config: PlanConfig) -> dict[str, Any]:
    """What each of ``config.steps`` takes; starts nothing, reads no weights and no data.

    A figure that depends on chance is ``{"mean", "low", "high"}`` over the replicas, low and high the 5th and 95th
    percentile. Raises ConfigError: keys and values that the step itself would refuse, rates that are not known or were
    measured with something else, machines that are taken away faster than they get anything done, and more blocks or
    losses than can be played through.
    """
    calibration = None if config.calibration is None else read_calibration(config.calibration)
    build = build_config(config)
    planned: dict[str, Any] = {}
    # Built also for a training alone: its chains say how many tokens a picture is.
    rates, times = _build_rates(config, build, calibration)
    if "build" in config.steps:
        planned["build"] = _plan_build(config, build, rates, times)
    if "train" in config.steps:
        planned["train"] = _plan_training(config, rates.tokens_per_image, calibration)
    source = "assumed" if calibration is None else f"measured on {calibration.hardware}, {calibration.date}"
    return {"rates": source, "replicas": config.replicas, **planned}


def build_config(config: PlanConfig) -> BuildConfig:
    """The build that is planned."""
    return _section(config, "build", BuildConfig, {"pairs": "pairs", "out": "chains"})


def train_config(config: PlanConfig) -> TrainConfig:
    """The training that is planned: a worker for every GPU."""
    decided = {"data": "chains", "out": "run", "workers.count": config.train_on.gpus}
    return _section(config, "train", TrainConfig, decided)


def _section(config: PlanConfig, section: str, model: type[C], decided: dict[str, Any]) -> C:
    given = dict(leaves(getattr(config, section)))
    for key in given:
        if key in decided:
            where = f"{section}_on.gpus" if key == "workers.count" else "pairs"
            raise ConfigError(f"{section}.{key}: is not for a plan; what there is to do and on what: {where}")
    try:
        return load_config(model, None, given | decided)
    except ConfigError as error:
        raise ConfigError(f"{section}: {error}") from error


def _build_rates(config: PlanConfig, build: BuildConfig, calibration: Calibration | None) -> tuple[BuildRates, float]:
    if calibration is not None:
        return measured_build(build, calibration, config.pairs_per_source)
    shared = (config.pairs_per_source, config.tasks_per_block)
    return assumed_build(build, config.assumed, config.build_on.gpu, *shared), 1.0


def _plan_build(config: PlanConfig, build: BuildConfig, rates: BuildRates, times: float) -> dict[str, Any]:
    blocks = -(-config.pairs // build.rows_per_block)
    shards = blocks * min(config.tasks_per_block, build.rows_per_block)
    work = BuildWork(
        rows=config.pairs,
        rows_per_block=build.rows_per_block,
        row_s=rates.row_s,
        start_s=rates.start_s,
        load_s=rates.load_s,
        end_s=shards * rates.audit_shard_s,
        driver_blocks_per_s=config.driver_blocks_per_s,
    )
    fleet = _fleet(config.build_on)
    block_s = build.rows_per_block * rates.row_s
    began_s = fleet.boot_s + max(rates.start_s, rates.load_s + block_s)
    _require_progress(fleet.interruptions_per_s, began_s, "build", "the way to a block", "build.rows_per_block")
    played = config.replicas * blocks * math.exp(fleet.interruptions_per_s * block_s)  # done again when lost
    if played > _MOST_PLAYED:
        raise ConfigError(
            f"build.rows_per_block: {blocks:,} blocks of {build.rows_per_block} pairs, {config.replicas} times, are "
            f"more than can be played through; raise it, or lower replicas"
        )
    outcomes = _replicas(config, lambda generator: simulate_build(work, fleet, generator))
    actors = min(config.build_on.gpus, blocks)
    notes = [] if times == 1 else [f"a row costs {times:.2f} times the measured one, by its UNet evaluations"]
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
    return {
        "pairs": config.pairs,
        "blocks": blocks,
        "unet_evaluations": round(config.pairs * rates.evaluations),
        "seconds_per_pair": rates.row_s,
        "seconds_per_block": block_s,
        **_figures(outcomes, config.build_on, config.head_price),
        "audit_hours": work.end_s / _HOUR_S,
        "shards": shards,
        "shard_bytes": round(config.pairs * rates.row_bytes + shards * rates.shard_bytes),
        "notes": notes,
    }


def _plan_training(config: PlanConfig, tokens_per_image: int, calibration: Calibration | None) -> dict[str, Any]:
    train = train_config(config)
    # A plan needs the architecture, not the weights: without a folder at hand the scale says it.
    path = train.backbone.path if train.backbone.scale == "custom" else None
    llama = backbone_facts(train.backbone.model_copy(update={"path": path, "init": "random"})).llama
    planned = plan_training(train, llama, config.train_pairs or config.pairs, tokens_per_image)
    if calibration is None:
        rates = assumed_training(train, llama, config.assumed, config.train_on.gpu)
    else:
        rates = measured_training(train, calibration)
    validated = train.validation_sentences * planned.tokens_per_sentence / planned.workers
    work = TrainWork(
        steps=planned.steps,
        step_s=planned.tokens / planned.steps / planned.workers * rates.token_s,
        start_s=rates.start_s,
        validation_s=0.0 if train.sentences.validation_split is None else validated * rates.validation_token_s,
        validate_every_steps=train.validate_every_steps,
        checkpoint_s=rates.checkpoint_s,
        checkpoint_every_steps=train.checkpoints.every_steps,
    )
    fleet = _fleet(config.train_on)
    kept_s = work.start_s + min(work.checkpoint_every_steps, work.steps) * work.step_s
    rate = fleet.nodes * fleet.interruptions_per_s
    _require_progress(rate, kept_s, "train", "the way to a checkpoint", "train.checkpoints.every_steps")
    lost = config.replicas * rate * work.seconds_to(work.steps) * math.exp(rate * kept_s)
    if lost > _MOST_PLAYED / 10:
        raise ConfigError(
            f"train_on.interruptions: about {lost / config.replicas:,.0f} nodes would be lost, {config.replicas} "
            "times: more than can be played through; take machines that stay, or lower replicas"
        )
    outcomes = _replicas(config, lambda generator: simulate_training(work, fleet, generator))
    losses = float(np.mean([outcome.interruptions for outcome in outcomes]))
    notes = []
    if 0 <= train.workers.max_failures < losses:
        notes.append(
            f"about {losses:.0f} nodes are lost, workers.max_failures is {train.workers.max_failures}: raise it, or "
            "run the same command again each time"
        )
    return {
        "parameters": planned.parameters,
        "train_steps": planned.steps,
        "tokens": planned.tokens,
        "seconds_per_step": work.step_s,
        "tokens_per_s_per_gpu": 1 / rates.token_s,
        **_figures(outcomes, config.train_on, config.head_price),
        "checkpoint_bytes": round(rates.checkpoint_bytes * (train.checkpoints.keep + 1)),  # the best is kept besides
        "notes": notes,
    }


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
    if rate * seconds > _MOST_LOSSES:
        raise ConfigError(
            f"{section}_on.interruptions: {rate * _HOUR_S:.1f} an hour, and {what} takes {seconds / 60:.0f} min: "
            f"hardly anything would ever be kept; lower {key}, or take machines that stay"
        )


def _replicas(config: PlanConfig, simulate: Callable[[np.random.Generator], Outcome]) -> list[Outcome]:
    return [simulate(np.random.default_rng([config.seed, replica])) for replica in range(config.replicas)]


def _figures(outcomes: list[Outcome], nodes: NodesConfig, head_price: float) -> dict[str, Any]:
    """What chance has a say in. Waiting is what is paid and is no work: boot, start, loading, idling."""
    found = [
        {
            "hours": outcome.seconds / _HOUR_S,
            "gpu_hours": outcome.paid_s / _HOUR_S,
            "useful_gpu_hours": outcome.busy_s / _HOUR_S,
            "lost_gpu_hours": outcome.lost_s / _HOUR_S,
            "waiting_gpu_hours": (outcome.paid_s - outcome.busy_s - outcome.lost_s) / _HOUR_S,
            "lost_share": outcome.lost_s / outcome.paid_s,
            "interruptions": float(outcome.interruptions),
            "money": (outcome.paid_s * nodes.price + outcome.seconds * head_price) / _HOUR_S,
        }
        for outcome in outcomes
    ]
    return {key: _spread([values[key] for values in found]) for key in found[0]}


def _spread(values: list[float]) -> dict[str, float]:
    low, high = np.percentile(values, [5, 95])
    return {"mean": float(np.mean(values)), "low": float(low), "high": float(high)}
