"""What cells of a sweep say beside each other: the paper's claims, and what a frame or a pair gains.

The seed is the unit: cells are compared seed by seed, and an interval says what another training would give, not what
other episodes would.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from covray.evaluation.statistics import LARGEST_NATS
from covray.sweeps.cells import Cell, t_interval, vary, vary_length_from_none
from covray.sweeps.records import ClaimEntry, ClaimRow, Efficiency, OverallGain, Return, Verdict

Pair = tuple[Cell, Cell]


@dataclass(frozen=True)
class PrimaryMetric:
    """The metric by which cells are compared on a task."""

    name: str
    sign: Literal[1, -1]
    """1 where more of it is better, -1 where less is."""


Primary = Mapping[str, PrimaryMetric]
"""By task."""


@dataclass(frozen=True)
class Claim:
    """A conclusion of the paper: which cells are said to be better (first) than which (second)."""

    key: str
    claim: str
    paper: str
    compare: Callable[[Sequence[Cell]], list[Pair]]


# The figures: Chain-of-Vision (CVPR 2026), main table and ablation.
CLAIMS = (
    Claim(
        "diffusion_none",
        "Diffused frames beat no frames",
        "7B, L=4: IoU 0.463 → 0.500, pose LPIPS 0.235 → 0.221, depth A.Rel 0.331 → 0.315, PSNR 18.87 → 20.45",
        lambda cells: _between(cells, "diffusion", "none"),
    ),
    Claim(
        "linear_none",
        "Linear frames beat no frames",
        "7B, L=4: IoU 0.463 → 0.487, pose LPIPS 0.235 → 0.235, depth A.Rel 0.331 → 0.326, PSNR 18.87 → 19.40",
        lambda cells: _between(cells, "linear", "none"),
    ),
    Claim(
        "diffusion_linear",
        "Diffused frames beat linear ones",
        "7B, L=4: IoU 0.487 → 0.500, pose LPIPS 0.235 → 0.221, depth A.Rel 0.326 → 0.315, PSNR 19.40 → 20.45",
        lambda cells: _between(cells, "diffusion", "linear"),
    ),
    Claim(
        "longer",
        "Longer chains are better",
        "7B, one task, diffusion L=4 → L=8: IoU 0.510 → 0.533, depth S.Rel 0.060 → 0.050",
        lambda cells: _extremes([cell for cell in cells if cell.method == "diffusion" and cell.length > 2], "length"),
    ),
    Claim(
        "pairs",
        "More example pairs are better",
        "7B, one task, diffusion L=4, 1 → 2 → 3 pairs: IoU 0.510 → 0.532 → 0.540, depth S.Rel 0.060 → 0.051 → 0.049",
        lambda cells: _extremes(cells, "pairs"),
    ),
)


def claim_entry(claim: Claim, cells: Sequence[Cell], primary: Primary) -> ClaimEntry:
    """Compare the cells that a claim is about, all else equal.

    Each row is a pair of cells on one task, over the seeds both have. The claim *holds* where the interval of the
    difference excludes 0 on its side, and *does not hold* where it excludes 0 on the other. A single seed has no
    interval, and is never significant. Every row has a level of 95% of its own; one in twenty of many is wrong by
    chance. The overall gain is ``None`` where nothing can be compared.
    """
    pairs = claim.compare(cells)
    rows = []
    # Every task of every pair of cells is a comparison of its own.
    for first, second in pairs:
        for task, metric in primary.items():
            row = _compare(first, second, task, metric)
            if row is not None:
                rows.append(row)
    gain = _mean_gain(pairs, primary)
    overall = None
    if gain is not None:
        overall = OverallGain(
            gain_percent=gain.percent, low=gain.low, high=gain.high, seeds=gain.seeds,
            verdict=_verdict(gain.low, gain.high),
        )  # fmt: skip
    return ClaimEntry(key=claim.key, claim=claim.claim, paper=claim.paper, rows=tuple(rows), overall=overall)


def efficiency(cells: Sequence[Cell], primary: Primary) -> Iterator[Efficiency]:
    """Yield the gain of every cell with frames over the one without: of as many pairs, or else of the fewest."""
    for cell in cells:
        without_frames = [other for other in cells if other.method == "none" and other.rest == cell.rest]
        if cell.method == "none" or not without_frames:
            continue
        # The cell of as many pairs comes first; without one, that of the fewest pairs.
        reference = min(without_frames, key=lambda other: (other.pairs != cell.pairs, other.pairs))
        gain = _mean_gain([(cell, reference)], primary)
        if gain is not None:
            yield Efficiency(
                cell=cell.label, context_tokens=cell.trials[0].context_tokens,
                gain_percent=gain.percent, low=gain.low, high=gain.high,
            )  # fmt: skip


def returns(cells: Sequence[Cell], primary: Primary) -> Iterator[Return]:
    """Yield the gain from every chain length, then from every number of pairs, to the next that was tried.

    Chains of both methods start at length 2, which is no frames.
    """
    for group in vary_length_from_none(cells):
        yield from _returns_along("length", group, primary)
    for group in vary(cells, "pairs"):
        yield from _returns_along("pairs", group, primary)


def _returns_along(axis: Literal["length", "pairs"], group: Sequence[Cell], primary: Primary) -> Iterator[Return]:
    for first, second in itertools.pairwise(group):
        gain = _mean_gain([(second, first)], primary)
        if gain is None:
            continue
        start, end = getattr(first, axis), getattr(second, axis)
        about = second.trials[0]
        yield Return(
            method=about.method, length=about.length, pairs=about.pairs, scale=about.scale,
            first=first.label, second=second.label, axis=axis, start=start, end=end,
            gain_percent=gain.percent, low=gain.low, high=gain.high, per_added=gain.percent / (end - start),
        )  # fmt: skip


def _between(cells: Sequence[Cell], first: str, second: str) -> list[Pair]:
    """Pair every cell of one method with those of the other that are equal in all else.

    Cells without frames are the same at every length.
    """
    pairs = []
    for cell in cells:
        for other in cells:
            methods_match = (cell.method, other.method) == (first, second)
            lengths_match = cell.length == other.length or second == "none"
            if methods_match and lengths_match and (cell.pairs, cell.rest) == (other.pairs, other.rest):
                pairs.append((cell, other))
    return pairs


def _extremes(cells: Sequence[Cell], axis: Literal["length", "pairs"]) -> list[Pair]:
    """Pair the cell of the most length or pairs with that of the fewest, all else equal."""
    return [(group[-1], group[0]) for group in vary(cells, axis) if len(group) > 1]


@dataclass(frozen=True)
class _MeanGain:
    percent: float
    low: float | None
    high: float | None
    seeds: int


def _mean_gain(pairs: Iterable[Pair], primary: Primary) -> _MeanGain | None:
    """Return how much better the first cells are, in percent of the second ones' scores; None for nothing to compare.

    Per seed it is the geometric mean of the scores' ratios over tasks and pairs of cells that this seed has, then the
    mean over seeds (Fleming & Wallace 1986: an arithmetic mean of ratios would depend on which of the two is the
    reference). Scores that are not above 0 have no ratio, and are left out.
    """
    logarithms: dict[int, list[float]] = defaultdict(list)
    for first, second in pairs:
        for task, metric in primary.items():
            for seed, (ours, theirs) in _common(first, second, task, metric.name).items():
                if ours > 0 and theirs > 0:
                    logarithms[seed].append(metric.sign * math.log(ours / theirs))
    if not logarithms:
        return None
    # Means of logarithms are geometric means of ratios.
    # In the order of seeds, so that a report is the same whatever the order of trials.
    by_seed = [float(np.mean(values)) for _, values in sorted(logarithms.items())]
    mean, low, high = t_interval(by_seed)
    if low is None or high is None:
        return _MeanGain(_percent(mean), None, None, len(by_seed))
    return _MeanGain(_percent(mean), _percent(low), _percent(high), len(by_seed))


def _compare(first: Cell, second: Cell, task: str, metric: PrimaryMetric) -> ClaimRow | None:
    # Trainings of one seed meet the same pairs in the same order: what the seed itself brings cancels out.
    differences = [ours - theirs for ours, theirs in _common(first, second, task, metric.name).values()]
    if not differences:
        return None
    mean, low, high = t_interval(differences)
    return ClaimRow(
        first=first.label, second=second.label, task=task, metric=metric.name, mean=mean, low=low, high=high,
        seeds=len(differences), verdict=_verdict(low, high, metric.sign),
    )  # fmt: skip


def _common(first: Cell, second: Cell, task: str, metric: str) -> dict[int, tuple[float, float]]:
    """Return the first and the second score by seed, for the seeds that have both."""
    ours, theirs = first.value(task, metric), second.value(task, metric)
    return {seed: (ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())}


def _verdict(low: float | None, high: float | None, sign: int = 1) -> Verdict:
    """Return what an interval of differences says of the claim that they are above 0, or for ``sign`` -1 below it."""
    # Without an interval (one seed) nothing is claimed, however large the difference is.
    if low is None or high is None or low <= 0 <= high:
        return "not significant"
    if sign * low > 0:
        return "holds"
    return "does not hold"


def _percent(nats: float) -> float:
    """Return the gain of a ratio, which is given as its logarithm."""
    return 100 * math.expm1(min(nats, LARGEST_NATS))
