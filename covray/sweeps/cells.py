"""Cells: the finished trials of a sweep that differ in nothing but the seed."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import t

from covray.evaluation.metrics import OWN, REFERENCE
from covray.evaluation.statistics import LEVEL, perplexity
from covray.sweeps.records import CellEntry, CellScore, TrialEntry, TrialScore

METHODS = ("none", "linear", "diffusion", "copy", "coarse")
"""In the order of the table."""
_LOGARITHMIC_METRICS = (OWN, REFERENCE)
"""Perplexities are averaged as logarithms."""

ScoresBySeed = dict[int, TrialScore]


@dataclass(frozen=True)
class Cell:
    """Trials that differ in nothing but the seed, in the order of their seeds."""

    method: str
    length: int
    pairs: int
    rest: str
    """Task set, scale and fields as JSON: what no axis of the report varies."""
    trials: tuple[TrialEntry, ...]
    scores: Mapping[tuple[str, str], ScoresBySeed]
    """By task and metric, the scores that have a value."""

    @property
    def label(self) -> str:
        """The name of the cell for people."""
        return self.trials[0].label

    def value(self, task: str, metric: str) -> dict[int, float]:
        """Return the values of a metric by seed."""
        # A seed that diverged has no mean of the metric, and is no part of a comparison.
        values = {}
        for seed, score in self.scores.get((task, metric), {}).items():
            if score.mean is not None:
                values[seed] = score.mean
        return values


def sort_key(trial: TrialEntry) -> tuple[int, str, int, int, str]:
    """Return all that tells a trial's cell from others, in the order of the table; methods of plug-ins come last."""
    # JSON with sorted keys: fields in another order are the same cell.
    rest = json.dumps([trial.tasks, trial.scale, trial.fields], sort_keys=True)
    rank = len(METHODS)
    if trial.method in METHODS:
        rank = METHODS.index(trial.method)
    return rank, trial.method, trial.length, trial.pairs, rest


def group_cells(trials: Iterable[TrialEntry]) -> list[Cell]:
    """Group finished trials into cells, in their order. Raises ValueError where two trials differ in nothing."""
    grouped: dict[tuple[int, str, int, int, str], dict[int, TrialEntry]] = defaultdict(dict)
    for trial in trials:
        other = grouped[sort_key(trial)].setdefault(trial.seed, trial)
        if other is not trial:
            raise ValueError(f"trials {other.name} and {trial.name} differ in nothing that the table shows")

    cells = []
    for (_, method, length, pairs, rest), by_seed in grouped.items():
        cells.append(Cell(method, length, pairs, rest, tuple(by_seed.values()), _group_scores(by_seed)))
    return cells


def vary(cells: Sequence[Cell], axis: Literal["length", "pairs"]) -> list[list[Cell]]:
    """Group cells that differ in ``axis`` alone, each group in the order of that axis."""
    groups: dict[tuple[str, int, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        fixed = cell.length
        # Where length varies the number of pairs is fixed, and the other way round.
        if axis == "length":
            fixed = cell.pairs
        groups[cell.method, fixed, cell.rest].append(cell)
    return [sorted(group, key=lambda cell: getattr(cell, axis)) for group in groups.values()]


def vary_length_from_none(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Group the cells of either method with frames by length, each group after the cell without frames, if any."""
    # Without frames every length is 2, so both methods start from the same cell.
    without_frames, with_frames = {}, []
    for cell in cells:
        if cell.method == "none":
            without_frames[cell.pairs, cell.rest] = cell
        else:
            with_frames.append(cell)
    groups = []
    for group in vary(with_frames, "length"):
        start = without_frames.get((group[0].pairs, group[0].rest))
        if start is not None:
            group = [start, *group]
        groups.append(group)
    return groups


def cell_entry(cell: Cell) -> CellEntry:
    """Return the entry of a cell in ``results.json``."""
    first = cell.trials[0]
    scores = []
    for (task, metric), by_seed in cell.scores.items():
        # A metric that no seed has a value of stands in the table as a dash.
        mean, low, high = _mean_over_seeds(metric, list(by_seed.values()))
        scores.append(CellScore(task=task, metric=metric, mean=mean, low=low, high=high, seeds=len(by_seed)))
    return CellEntry(
        label=first.label,
        method=first.method,
        length=first.length,
        pairs=first.pairs,
        tasks=first.tasks,
        scale=first.scale,
        fields=first.fields,
        context_tokens=first.context_tokens,
        trials=tuple(trial.name for trial in cell.trials),
        seeds=tuple(trial.seed for trial in cell.trials),
        train_seconds=_known_mean(trial.train_seconds for trial in cell.trials),
        tokens=_known_mean(trial.tokens for trial in cell.trials),
        gpu_hours=_known_mean(trial.gpu_hours for trial in cell.trials),
        scores=tuple(scores),
    )


def t_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Return the mean of ``values`` [seeds] and its 95% interval by Student's t; no bounds for a single value.

    A bootstrap needs more than the handful of seeds a sweep has. Student 1908.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None, None
    # Standard error of the mean; ddof=1, as the mean itself is estimated from these values.
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error
    return mean, mean - half, mean + half


def _group_scores(by_seed: Mapping[int, TrialEntry]) -> dict[tuple[str, str], ScoresBySeed]:
    grouped: dict[tuple[str, str], ScoresBySeed] = {}
    for seed, trial in by_seed.items():
        for score in trial.scores:
            # A metric is listed even if no seed has a value of it.
            of_metric = grouped.setdefault((score.task, score.metric), {})
            if score.mean is not None and math.isfinite(score.mean):
                of_metric[seed] = score
    return grouped


def _mean_over_seeds(metric: str, scores: Sequence[TrialScore]) -> tuple[float | None, float | None, float | None]:
    """Return the mean of ``scores`` and its 95% interval; that of a single seed is its own, over episodes."""
    if not scores:
        return None, None, None
    if len(scores) == 1:  # nothing to average: the trial's own interval is all there is
        return scores[0].mean, scores[0].low, scores[0].high
    values = [score.mean for score in scores if score.mean is not None]
    if metric not in _LOGARITHMIC_METRICS:
        return t_interval(values)
    # The mean of perplexities is that of their logarithms, which are likelihoods.
    logarithms = [math.log(value) for value in values]
    mean, low, high = t_interval(logarithms)
    return _exp(mean), _exp(low), _exp(high)


def _exp(nats: float | None) -> float | None:
    if nats is None:
        return None
    return perplexity(nats)  # capped: a bound beside a seed that diverged may be more than a float holds


def _known_mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return float(np.mean(known))
