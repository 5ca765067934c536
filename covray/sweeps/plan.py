"""What a sweep would take, before anything is started."""

from __future__ import annotations

import functools

from covray.config import SweepConfig
from covray.errors import ConfigError
from covray.io.records import RecordPart
from covray.sweeps.grid import backbone_architecture, grid_of, tokens_per_image
from covray.sweeps.records import LeftOut
from covray.sweeps.requirements import count_pairs_by_task, pairs_of_tasks
from covray.training.memory import plan_training


class TrialPlan(RecordPart):
    """What one trial would take."""

    name: str
    steps: int
    train_tokens: int
    evaluate_tokens: int
    workers: int
    hours: float = 0.0
    """Of training; absent without a rate."""
    gpu_hours: float = 0.0
    """Hours of all workers together; absent without a rate."""


class PlannedBuild(RecordPart):
    """The dataset that the sweep builds first."""

    lengths: tuple[int, ...]
    methods: tuple[str, ...]


class PlanTotal(RecordPart):
    """Sums over the trials."""

    train_tokens: int
    evaluate_tokens: int
    gpu_hours: float = 0.0
    """Absent without a rate."""


class SweepPlan(RecordPart):
    """What a sweep would take; the keys of ``covray sweep --plan --json``."""

    trials: tuple[TrialPlan, ...]
    left_out: tuple[LeftOut, ...]
    builds: PlannedBuild | None
    """None: there is a dataset."""
    total: PlanTotal


def plan_sweep(config: SweepConfig, tokens_per_s: float | None = None) -> SweepPlan:
    """Plan the trials of a sweep and their sums; nothing is started.

    Args:
        config: The sweep.
        tokens_per_s: The training speed of one worker at the smallest scale of the grid, for the hours. A larger scale
            is assumed to be slower in proportion to its parameters.

    Raises:
        CovrayError: As ``grid_of``.
    """
    if tokens_per_s is not None and tokens_per_s <= 0:
        raise ConfigError(f"--tokens-per-s {tokens_per_s:g}: must be more than 0")
    # All of it comes from configurations and counts: no weights and no pictures are read.
    grid = grid_of(config)
    picture_tokens = tokens_per_image(config, grid.build)
    # Many trials share a backbone, whose configuration is a file to read.
    architecture = functools.cache(backbone_architecture)
    counts = count_pairs_by_task(config, grid.build)

    plans = []
    for trial in grid.trials:
        sentences = trial.train.sentences
        pairs = pairs_of_tasks(counts, sentences.split, sentences.tasks)
        plans.append(plan_training(trial.train, architecture(trial.train.backbone), pairs, picture_tokens))
    # The rate was measured at this scale.
    smallest = min(plan.parameters for plan in plans)

    lines = []
    for trial, plan in zip(grid.trials, plans, strict=True):
        # An evaluation asks so many queries of each task, or all there are.
        episodes = 0
        queries = counts[trial.evaluate.split]
        for task in trial.evaluate.tasks or queries:
            episodes += min(queries[task], trial.evaluate.episodes or queries[task])
        line = TrialPlan(
            name=trial.name,
            steps=plan.steps,
            train_tokens=plan.tokens,
            evaluate_tokens=episodes * trial.context_tokens,
            workers=plan.workers,
        )
        # Time goes with the parameters of the backbone; the rate is that of the smallest one.
        if tokens_per_s is not None:
            # All workers together take these hours; the clock shows their share of one worker.
            hours = plan.tokens / (tokens_per_s * smallest / plan.parameters) / 3600
            line = line.model_copy(update={"hours": hours / plan.workers, "gpu_hours": hours})
        lines.append(line)
    total = PlanTotal(
        train_tokens=sum(line.train_tokens for line in lines),
        evaluate_tokens=sum(line.evaluate_tokens for line in lines),
    )
    if tokens_per_s is not None:
        total = total.model_copy(update={"gpu_hours": sum(line.gpu_hours for line in lines)})
    builds = None
    if grid.build is not None:
        builds = PlannedBuild(lengths=grid.build.lengths, methods=grid.build.methods)
    return SweepPlan(trials=tuple(lines), left_out=grid.left_out, builds=builds, total=total)
