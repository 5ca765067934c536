"""The page of a programme of claims: each claim with its verdict, pictures, learning curves and costs, in one file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from covray.evaluation.claims.records import (
    ClaimResult,
    ClaimTask,
    CurvePoint,
    ProgrammeResults,
)
from covray.evaluation.metrics import lower_is_better
from covray.io import storage
from covray.report.charts import Drawing, LineChart, Point, Series, draw
from covray.report.claims_tables import cost_table, exposure_table, percent, quality_table, score_table
from covray.report.evaluation import Strip
from covray.report.formatting import (
    NONE,
    counted,
    duration,
    fixed,
    interval,
    is_finite,
    listed,
    numbers,
    plural,
    readable,
    short_count,
    signed_numbers,
)
from covray.report.html import Link, render
from covray.report.metrics import MetricHead, glossary, metric_head

_TILE_PX = 96
_VERDICTS = {"holds": "holds", "does not hold": "fails", "open": "", "not run": ""}
"""The style class of each verdict."""
_GROUPS = (
    ("paper", "What the paper claims"),
    ("pays", "Do chains pay?"),
    ("training", "How to train them"),
    ("form", "Which chains"),
    ("decoding", "How to write answers"),
)


@dataclass(frozen=True)
class GainPlot:
    """Where a gain and its interval lie across a drawing, in percent of its width."""

    gain: float
    whisker: tuple[float, float] | None


@dataclass(frozen=True)
class TaskRow:
    """A claim on one task, as it is written."""

    task: str
    metric: MetricHead
    first: str
    second: str
    difference: str
    interval: str
    verdict: str
    css: str


@dataclass(frozen=True)
class ClaimView:
    """A claim, as it is written."""

    claim: str
    view: str
    arms: str
    counts: str
    verdict: str
    css: str
    gain: str
    interval: str
    basis: str
    """Seeds and queries."""
    plot: GainPlot | None
    rows: tuple[TaskRow, ...]


@dataclass(frozen=True)
class ClaimGroup:
    """Claims about one thing."""

    title: str
    claims: tuple[ClaimView, ...]


@dataclass(frozen=True)
class StripView:
    """What one arm wrote for a query."""

    arm: str
    score: str
    frames: tuple[np.ndarray, ...]
    answer: np.ndarray


@dataclass(frozen=True)
class StripRow:
    """The answers of several arms to one query of a task."""

    task: str
    query: np.ndarray
    label: np.ndarray
    answers: tuple[StripView, ...]


def write_claims_page(results: ProgrammeResults, strips: Sequence[Strip], out: str) -> None:
    """Write the page of a programme.

    Args:
        results: What the programme says so far.
        strips: The answers to show, the arms of a query in their order.
        out: The file to write.

    Raises:
        OSError: ``out`` cannot be written.
    """
    # Groups of which no claim was planned are not shown.
    groups = [group for group in _claim_groups(results) if group.claims]
    pictures = _strip_rows(strips)
    tile_px = None
    if pictures:
        tile_px = _TILE_PX
    charts = _charts(results.curves)
    page = render(
        "claims.html",
        "Do chains of vision pay?",
        styles=("tables.css", "evaluation.css", "sweep.css", "claims.css"),
        tile_px=tile_px,
        links=_links(groups, bool(pictures), bool(charts), results),
        results=results,
        tiles=_tiles(results),
        lines=_facts(results),
        groups=groups,
        pictures=pictures,
        charts=charts,
        curve_arms=list(dict.fromkeys(point.arm for point in results.curves)),
        exposure=exposure_table(results.exposure),
        quality=quality_table(results.quality),
        scores=score_table(results.arms),
        cost=cost_table(results.arms),
        glossary=glossary([_metrics(results)]),
    )
    storage.write_bytes(out, page)


def _links(groups: Sequence[ClaimGroup], pictures: bool, curves: bool, results: ProgrammeResults) -> list[Link]:
    sections = [
        ("claims", "Claims", bool(groups)),
        ("pictures", "Pictures", pictures),
        ("curves", "Learning curves", curves),
        ("likelihood", "Likelihood", bool(results.exposure)),
        ("quality", "Quality of chains", bool(results.quality)),
        ("arms", "Arms", True),
    ]
    links = []
    for target, text, present in sections:
        if present:
            links.append(Link(target, text))
    return links


def _tiles(results: ProgrammeResults) -> list[tuple[str, str]]:
    """Return the large figures of the head."""
    tokens = 0
    # What the programme cost in data: an arm is trained once a seed.
    for arm in results.arms:
        tokens += (arm.tokens or 0) * len(arm.seeds)  # each seed is a training

    counts: dict[str, int] = defaultdict(int)
    for claim in results.claims:
        counts[claim.verdict] += 1
    verb = "hold"
    if counts["holds"] == 1:
        verb = "holds"
    return [
        (str(counts["holds"]), f"{plural(counts['holds'], 'claim')} that {verb}"),
        (str(counts["does not hold"]), "that do not"),
        (str(counts["open"]), "open"),
        (f"{results.arms_done} of {results.arms_planned}", "trainings done"),
        (short_count(tokens), "tokens trained"),
        (duration(3600 * results.hours), "of work"),
    ]


def _facts(results: ProgrammeResults) -> list[tuple[str, str]]:
    """Return how the programme was made."""
    scenes: Mapping[str, int] = results.budget["scenes"]
    scene_counts = [f"{count:,} {split}" for split, count in scenes.items()]
    backbones = [f"{each['name']} ({each['path']})" for each in results.backbones]
    # `listed` names each kind of hardware once, however many arms ran on it.
    hardware: list[str] = []
    for arm in results.arms:
        hardware += arm.hardware
    facts = [
        ("Budget", results.budget_name),
        ("Scenes", listed(scene_counts)),
        ("Backbones", listed(backbones)),
        ("Hardware", listed(hardware)),
        ("Best chains", f"{results.best or NONE}, chosen on the validation split"),
    ]
    if results.lengths:
        lengths = [f"{readable(task)} {length}" for task, length in results.lengths.items()]
        facts.append(("Best length by task", f"{listed(lengths)} (2: no frames; chosen on the validation split)"))
    return facts


# --- claims ----------------------------------------------------------------------------------------------------------


def _claim_groups(results: ProgrammeResults) -> list[ClaimGroup]:
    # The drawings of all claims share one scale.
    furthest_gain, furthest = 0.0, 0.0
    for claim in results.claims:
        if is_finite(claim.gain_percent):
            furthest_gain = max(furthest_gain, abs(claim.gain_percent))
        for end in (claim.gain_percent, claim.low, claim.high):
            if is_finite(end):
                furthest = max(furthest, abs(end))
    # One wide interval must not make all others invisible.
    reach = min(furthest, 2 * furthest_gain) or 1.0
    groups = []
    for name, title in _GROUPS:
        views = []
        for claim in results.claims:
            if claim.group == name:
                views.append(_claim(claim, reach))
        groups.append(ClaimGroup(title, tuple(views)))
    return groups


def _claim(claim: ClaimResult, reach: float) -> ClaimView:
    """Write a claim; its gain is drawn from -``reach`` to +``reach`` percent."""
    counts, gain, between, plot = "", "", "", None
    # `better` is True, False, or None where the test is open.
    better = [row.better for row in claim.tasks]
    if better:
        counts = f"{better.count(True)} of {counted(len(better), 'task')} better, {better.count(False)} worse"
    if is_finite(claim.gain_percent):
        gain = percent(claim.gain_percent)
        whisker = None
        if is_finite(claim.low) and is_finite(claim.high):
            between = f"{interval(percent(claim.low), percent(claim.high))} %"
            whisker = _place(claim.low, reach), _place(claim.high, reach)
        plot = GainPlot(_place(claim.gain_percent, reach), whisker)
    lower = lower_is_better()
    return ClaimView(
        claim=claim.claim,
        view=claim.view,
        arms=f"{claim.first} against {claim.second}",
        counts=counts,
        verdict=claim.verdict,
        css=_VERDICTS[claim.verdict],
        gain=gain,
        interval=between,
        basis=f"{counted(claim.seeds, 'seed')}, {counted(claim.queries, 'query').replace('querys', 'queries')}",
        plot=plot,
        rows=tuple(_task_row(row, lower) for row in claim.tasks),
    )


def _task_row(row: ClaimTask, lower: Sequence[str]) -> TaskRow:
    first, second = numbers(row.first, row.second)
    difference, low, high = signed_numbers(row.difference, row.low, row.high)
    verdict, css = "open", "open faint"
    if row.better is not None:
        verdict = "worse"
        if row.better:
            verdict = "better"
        css = verdict
    between = NONE
    if is_finite(row.low) and is_finite(row.high):
        between = interval(low, high)
    return TaskRow(readable(row.task), metric_head(row.metric, lower), first, second, difference, between, verdict, css)


def _place(gain: float, reach: float) -> float:
    """Return where a gain lies across a drawing, in percent of its width."""
    # Ends beyond the reach are drawn at the edge; zero is in the middle, at 50%.
    return round(50 + 50 * max(-1.0, min(1.0, gain / reach)), 2)


def _metrics(results: ProgrammeResults) -> list[str]:
    """Return the metrics of the claims, each once."""
    names: dict[str, None] = {}
    for claim in results.claims:
        for row in claim.tasks:
            names[row.metric] = None
    return list(names)


# --- pictures and curves ---------------------------------------------------------------------------------------------


def _strip_rows(strips: Sequence[Strip]) -> list[StripRow]:
    """Return a row for every task, with its query and the answers of all arms."""
    # Strips arrive in the order of the arms; a task shows its first query.
    by_task: dict[str, list[Strip]] = defaultdict(list)
    for strip in strips:
        by_task[strip.task].append(strip)
    rows = []
    for task, of_task in by_task.items():
        answers = []
        for strip in of_task:
            score, *_ = numbers(strip.score)
            answers.append(StripView(strip.subject, score, tuple(strip.frames), strip.answer))
        rows.append(StripRow(readable(task), of_task[0].query, of_task[0].label, tuple(answers)))
    return rows


def _charts(curves: Sequence[CurvePoint]) -> list[Drawing]:
    """Return the learning curves: gain at equal answers and at equal tokens, and perplexity."""
    if not curves:
        return []
    gain = "gain over the untuned backbone, %"
    return [
        _chart("At equal answers", "queries trained on", gain, curves, lambda point: point.answers),
        _chart("At equal tokens", "tokens trained on", gain, curves, lambda point: point.tokens),
        _chart(
            "Perplexity after own frames", "queries trained on", "perplexity, less is better", curves,
            lambda point: point.answers, perplexity=True,
        ),
    ]  # fmt: skip


def _chart(
    title: str,
    x_title: str,
    y_title: str,
    curves: Sequence[CurvePoint],
    x: Callable[[CurvePoint], int],
    *,
    perplexity: bool = False,
) -> Drawing:
    by_arm: dict[str, list[Point]] = defaultdict(list)
    for point in curves:
        y: float | None = point.gain_percent
        low, high = point.low, point.high
        if perplexity:  # the bounds are those of the gain
            y, low, high = point.perplexity_own, None, None
        if is_finite(y):
            text = f"{point.arm}: {fixed(y, 1)} at {short_count(x(point))} {x_title.split()[0]}"
            by_arm[point.arm].append(Point(float(x(point)), y, low, high, text))
    series = [Series(arm, tuple(points)) for arm, points in by_arm.items()]
    return draw(LineChart(title, x_title, y_title, series, include_zero=not perplexity))
