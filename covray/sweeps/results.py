"""From trials to the report of a sweep: means over seeds, what a frame or a pair gains, and the paper's claims.

    trials --all but the seed equal--> cells --all but one thing equal--> pairs of cells, compared seed by seed

The seed is the unit: an interval says what another training would give, not what other episodes would. None (or NaN) is
a score that is undefined; it is left out.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.stats import t

from covray.evaluation.metrics import OWN, REFERENCE
from covray.evaluation.statistics import LEVEL

VERSION = 1
Verdict = Literal["holds", "does not hold", "not significant"]
_METHODS = ("none", "linear", "diffusion")
_LOGARITHMS = (OWN, REFERENCE)
_MOST_NATS = 700.0  # of a bound; beside a seed that diverged it may be more than a float holds
_COLUMNS = (
    "label", "method", "length", "pairs", "scale", "tasks", "fields", "task", "metric", "mean", "low", "high", "seeds",
    "context_tokens", "tokens", "train_seconds", "gpu_hours",
)  # fmt: skip


@dataclass(frozen=True)
class _Cell:
    """The finished trials that differ in nothing but the seed, by seed."""

    method: str
    length: int
    pairs: int
    rest: str
    """Task set, scale and fields as JSON: what no axis of the report varies."""
    trials: tuple[Mapping[str, Any], ...]
    scores: Mapping[tuple[str, str], Mapping[int, Mapping[str, Any]]]
    """By task and metric the scores that have a value, by seed."""

    @property
    def label(self) -> str:
        return str(self.trials[0]["label"])


Pair = tuple[_Cell, _Cell]


@dataclass(frozen=True)
class _Claim:
    """A conclusion of the paper: which cells are said to be better (first) than which (second)."""

    key: str
    claim: str
    paper: str
    compare: Callable[[Sequence[_Cell]], list[Pair]]


# The figures: Chain-of-Vision (CVPR 2026), main table and ablation.
_CLAIMS = (
    _Claim(
        "diffusion_none",
        "Diffused frames beat no frames",
        "7B, L=4: IoU 0.463 → 0.500, pose LPIPS 0.235 → 0.221, depth A.Rel 0.331 → 0.315, PSNR 18.87 → 20.45",
        lambda cells: _between(cells, "diffusion", "none"),
    ),
    _Claim(
        "linear_none",
        "Linear frames beat no frames",
        "7B, L=4: IoU 0.463 → 0.487, pose LPIPS 0.235 → 0.235, depth A.Rel 0.331 → 0.326, PSNR 18.87 → 19.40",
        lambda cells: _between(cells, "linear", "none"),
    ),
    _Claim(
        "diffusion_linear",
        "Diffused frames beat linear ones",
        "7B, L=4: IoU 0.487 → 0.500, pose LPIPS 0.235 → 0.221, depth A.Rel 0.326 → 0.315, PSNR 19.40 → 20.45",
        lambda cells: _between(cells, "diffusion", "linear"),
    ),
    _Claim(
        "longer",
        "Longer chains are better",
        "7B, one task, diffusion L=4 → L=8: IoU 0.510 → 0.533, depth S.Rel 0.060 → 0.050",
        lambda cells: _extremes([cell for cell in cells if cell.method == "diffusion" and cell.length > 2], "length"),
    ),
    _Claim(
        "pairs",
        "More example pairs are better",
        "7B, one task, diffusion L=4, 1 → 2 → 3 pairs: IoU 0.510 → 0.532 → 0.540, depth S.Rel 0.060 → 0.051 → 0.049",
        lambda cells: _extremes(cells, "pairs"),
    ),
)


def tabulate(
    trials: Iterable[Mapping[str, Any]],
    references: Sequence[Mapping[str, Any]],
    tasks: Mapping[str, Mapping[str, Any]],
    lower_is_better: Iterable[str],
    left_out: Sequence[Mapping[str, str]],
    config: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """What ``results.json`` says of the ``trials`` of a sweep; what it is given, and beside it:

    ``cells``: mean of every score over the seeds, with its 95% interval (``t_interval``); where one seed alone has the
    score, its own interval over episodes. Perplexities are averaged as logarithms.

    ``claims``: each conclusion of the paper at all else equal. ``rows``: the primary metric of a task, first cell minus
    second, over the seeds both have. The claim ``holds`` where the interval excludes 0 on its side, ``does not hold``
    where it excludes 0 on the other. One seed shows nothing of training's luck: no interval, ``not significant``. Every
    row has a level of 95% of its own; one in twenty of many is wrong by chance. ``overall``: the relative gain in
    percent, positive where the claim is right: per seed the geometric mean of the scores' ratios over tasks and pairs
    of cells that this seed has, then over seeds (Fleming & Wallace 1986: an arithmetic mean of ratios would depend on
    which of the two is the reference). Scores that are not above 0 have no ratio and are left out. None: nothing to
    compare.

    ``efficiency``: that gain of every cell with frames over the one without (of as many pairs, else of the fewest),
    beside the tokens of its sentences. ``returns``: the gain from one length, or number of pairs, (``first``, ``from``)
    to the next that was tried (``second``, ``to``); ``method``, ``length``, ``pairs`` are the second's. Chains of both
    methods start at length 2, which is no frames.

    ``trials``: by entries as in ``results.json``; those that are not finished are in no cell. Their order does not
    matter. ``tasks``: by task ``primary``, its metric to compare by. ``seconds``: of the sweep so far. Raises
    ValueError where two finished trials differ in nothing.
    """
    ordered = sorted(trials, key=lambda trial: (*_form(trial), trial["seed"], trial["name"]))
    cells = _cells([trial for trial in ordered if trial["status"] == "finished"])
    lower = set(lower_is_better)
    primary = {task: (str(about["primary"]), -1 if about["primary"] in lower else 1) for task, about in tasks.items()}
    return {
        "version": VERSION,
        "config": dict(config),
        "seconds": seconds,
        "left_out": list(left_out),
        "lower_is_better": sorted(lower),
        "tasks": dict(tasks),
        "references": list(references),
        "trials": ordered,
        "cells": [_cell_entry(cell) for cell in cells],
        "efficiency": _efficiency(cells, primary),
        "returns": _returns(cells, primary),
        "claims": [_claim_entry(claim, claim.compare(cells), primary) for claim in _CLAIMS],
    }


def to_csv(results: Mapping[str, Any]) -> str:
    """``cells`` and ``references`` of ``tabulate`` as CSV, a line a score; ``tasks`` is empty for all, ``fields`` JSON.

    A reference has no method, length and so on of a training: its name is its label.
    """
    lines = io.StringIO()
    writer = csv.DictWriter(lines, _COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for cell in results["cells"]:
        about = cell | {"tasks": "+".join(cell["tasks"] or ()), "fields": json.dumps(cell["fields"], sort_keys=True)}
        writer.writerows(about | score for score in cell["scores"])
    for reference in results["references"]:
        writer.writerows({"label": reference["name"], **score} for score in reference["scores"])
    return lines.getvalue()


def t_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean of ``values`` [seeds] and its 95% interval by Student's t; no bounds for a single value.

    A bootstrap needs more than the handful of seeds a sweep has. Student 1908.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None, None
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error
    return mean, mean - half, mean + half


# --- cells -----------------------------------------------------------------------------------------------------------


def _form(trial: Mapping[str, Any]) -> tuple[int, int, int, str]:
    """All of a trial but its seed, in the order of the table."""
    rest = json.dumps([trial["tasks"], trial["scale"], trial["fields"]], sort_keys=True)
    return _METHODS.index(trial["method"]), trial["length"], trial["pairs"], rest


def _cells(finished: Iterable[Mapping[str, Any]]) -> list[_Cell]:
    grouped: dict[tuple[int, int, int, str], dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for trial in finished:
        other = grouped[_form(trial)].setdefault(trial["seed"], trial)
        if other is not trial:
            raise ValueError(f"trials {other['name']} and {trial['name']} differ in nothing that the table shows")
    return [
        _Cell(_METHODS[method], length, pairs, rest, tuple(by_seed.values()), _scores(by_seed))
        for (method, length, pairs, rest), by_seed in grouped.items()
    ]


def _scores(by_seed: Mapping[int, Mapping[str, Any]]) -> dict[tuple[str, str], dict[int, Mapping[str, Any]]]:
    found: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for seed, trial in by_seed.items():
        for score in trial["scores"]:
            values = found.setdefault((score["task"], score["metric"]), {})  # there, even if no seed has a value
            if score["mean"] is not None and math.isfinite(score["mean"]):
                values[seed] = score
    return found


def _cell_entry(cell: _Cell) -> dict[str, Any]:
    one = cell.trials[0]
    return {
        **{key: one[key] for key in ("label", "method", "length", "pairs")},
        "tasks": None if one["tasks"] is None else list(one["tasks"]),
        **{key: one[key] for key in ("scale", "fields", "context_tokens")},
        "trials": [trial["name"] for trial in cell.trials],
        "seeds": [trial["seed"] for trial in cell.trials],
        **{key: _mean([trial[key] for trial in cell.trials]) for key in ("train_seconds", "tokens", "gpu_hours")},
        "scores": [
            {"task": task, "metric": metric, **_score_figures(metric, list(by_seed.values()))}
            for (task, metric), by_seed in cell.scores.items()
        ],
    }


def _score_figures(metric: str, scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    mean = low = high = None
    if len(scores) == 1:
        mean, low, high = (scores[0][key] for key in ("mean", "low", "high"))
    elif scores and metric in _LOGARITHMS:
        logarithms = t_interval([math.log(score["mean"]) for score in scores])
        mean, low, high = (None if value is None else math.exp(min(value, _MOST_NATS)) for value in logarithms)
    elif scores:
        mean, low, high = t_interval([score["mean"] for score in scores])
    return {"mean": mean, "low": low, "high": high, "seeds": len(scores)}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


# --- pairs of cells --------------------------------------------------------------------------------------------------


def _between(cells: Sequence[_Cell], first: str, second: str) -> list[Pair]:
    """Every cell of one method with those of the other, all else equal; no frames are the same at every length."""
    return [
        (one, other)
        for one in cells
        for other in cells
        if (one.method, other.method) == (first, second)
        and (one.pairs, one.rest) == (other.pairs, other.rest)
        and (one.length == other.length or second == "none")
    ]


def _extremes(cells: Sequence[_Cell], axis: Literal["length", "pairs"]) -> list[Pair]:
    """The most with the fewest, all else equal."""
    return [(group[-1], group[0]) for group in _along(cells, axis) if len(group) > 1]


def _along(cells: Sequence[_Cell], axis: Literal["length", "pairs"]) -> list[list[_Cell]]:
    """Cells that differ in ``axis`` alone, in its order."""
    groups: dict[tuple[str, int, str], list[_Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.method, cell.pairs if axis == "length" else cell.length, cell.rest].append(cell)
    return [sorted(group, key=lambda cell: getattr(cell, axis)) for group in groups.values()]


# --- comparisons -----------------------------------------------------------------------------------------------------

Primary = Mapping[str, tuple[str, int]]
"""By task the metric to compare by, and 1 where more of it is better, else -1."""


def _gain(pairs: Iterable[Pair], primary: Primary) -> dict[str, Any] | None:
    """How much better the first cells are, in percent of the second ones' scores: geometric means of their ratios."""
    by_seed: dict[int, list[float]] = defaultdict(list)
    for first, second in pairs:
        for task, (metric, sign) in primary.items():
            for seed, ours, theirs in _common(first, second, task, metric):
                if ours > 0 and theirs > 0:
                    by_seed[seed].append(sign * math.log(ours / theirs))
    if not by_seed:
        return None
    interval = t_interval([float(np.mean(logarithms)) for _, logarithms in sorted(by_seed.items())])
    mean, low, high = (None if value is None else 100 * math.expm1(min(value, _MOST_NATS)) for value in interval)
    return {"gain_percent": mean, "low": low, "high": high, "seeds": len(by_seed)}


def _common(first: _Cell, second: _Cell, task: str, metric: str) -> list[tuple[int, float, float]]:
    """Seed, first and second score of the seeds that have both."""
    ours, theirs = first.scores.get((task, metric), {}), second.scores.get((task, metric), {})
    return [(seed, ours[seed]["mean"], theirs[seed]["mean"]) for seed in sorted(ours.keys() & theirs.keys())]


def _verdict(low: float | None, high: float | None, sign: int = 1) -> Verdict:
    """What an interval of differences says of a claim that they are above 0 (``sign`` 1) or below it (-1)."""
    if low is None or high is None or low <= 0 <= high:
        return "not significant"
    return "holds" if sign * low > 0 else "does not hold"


def _claim_entry(claim: _Claim, pairs: Sequence[Pair], primary: Primary) -> dict[str, Any]:
    rows = []
    for first, second in pairs:
        for task, (metric, sign) in primary.items():
            differences = [ours - theirs for _, ours, theirs in _common(first, second, task, metric)]
            if differences:
                mean, low, high = t_interval(differences)
                key = {"first": first.label, "second": second.label, "task": task, "metric": metric}
                figures = {"mean": mean, "low": low, "high": high, "seeds": len(differences)}
                rows.append(key | figures | {"verdict": _verdict(low, high, sign)})
    overall = _gain(pairs, primary)
    if overall is not None:
        overall["verdict"] = _verdict(overall["low"], overall["high"])
    return {"key": claim.key, "claim": claim.claim, "paper": claim.paper, "rows": rows, "overall": overall}


def _efficiency(cells: Sequence[_Cell], primary: Primary) -> list[dict[str, Any]]:
    found = []
    for cell in cells:
        without = [other for other in cells if other.method == "none" and other.rest == cell.rest]
        if cell.method == "none" or not without:
            continue
        reference = min(without, key=lambda other: (other.pairs != cell.pairs, other.pairs))
        gain = _gain([(cell, reference)], primary)
        if gain is not None:
            about = {"cell": cell.label, "context_tokens": cell.trials[0]["context_tokens"]}
            found.append(about | {key: gain[key] for key in ("gain_percent", "low", "high")})
    return found


def _returns(cells: Sequence[_Cell], primary: Primary) -> list[dict[str, Any]]:
    found = []
    chains = [("length", group) for group in _lengths(cells)] + [("pairs", group) for group in _along(cells, "pairs")]
    for axis, group in chains:
        for first, second in itertools.pairwise(group):
            gain = _gain([(second, first)], primary)
            if gain is not None:
                start, end = getattr(first, axis), getattr(second, axis)
                about = {key: second.trials[0][key] for key in ("method", "length", "pairs", "scale")}
                places = {"first": first.label, "second": second.label, "axis": axis, "from": start, "to": end}
                figures = {key: gain[key] for key in ("gain_percent", "low", "high")}
                found.append(about | places | figures | {"per_added": gain["gain_percent"] / (end - start)})
    return found


def _lengths(cells: Sequence[_Cell]) -> list[list[_Cell]]:
    """Cells by length for either method with frames, from the one without."""
    plain = {(cell.pairs, cell.rest): [cell] for cell in cells if cell.method == "none"}
    groups = _along([cell for cell in cells if cell.method != "none"], "length")
    return [plain.get((group[0].pairs, group[0].rest), []) + group for group in groups]
