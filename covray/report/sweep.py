"""The page of a sweep: what it says of the paper's claims, the ablation table, plots and cost in one HTML file."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from covray.io import storage
from covray.report.formatting import (
    NONE,
    counted,
    duration,
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
from covray.report.sweep_plots import plots
from covray.report.sweep_rows import method_rank
from covray.report.sweep_tables import ablation_table, task_tables
from covray.sweeps.records import ClaimEntry, ClaimRow, SweepResults, TrialEntry

_STATUSES = ("failed", "stopped", "waiting", "finished")
"""In the order of the page: what needs a look stands first."""
_VERDICTS = ("holds", "not significant", "does not hold")
_VERDICT_CLASSES = {"holds": "holds", "does not hold": "fails"}
_MAX_UNTUNED = 6
"""With more forms of the untuned backbone than this, they stand in the tables of all metrics only."""


@dataclass(frozen=True)
class GainPlot:
    """A gain and its interval as places across, in percent of the drawing's width; zero is in the middle."""

    gain: float | None
    whisker: tuple[float, float] | None


@dataclass(frozen=True)
class ClaimRowView:
    """A row under a claim, as it is written."""

    first: str
    second: str
    task: str
    metric: MetricHead
    mean: str
    interval: str
    seeds: int
    verdict: str
    css: str


@dataclass(frozen=True)
class ClaimView:
    """A claim, as it is written."""

    claim: str
    paper: str
    counts: str
    """How many comparisons there are, and their verdicts."""
    verdict: str
    css: str
    rows: tuple[ClaimRowView, ...]
    gain: str = ""
    interval: str = ""
    plot: GainPlot | None = None


@dataclass(frozen=True)
class CostRow:
    """What a trial took, as it is written."""

    name: str
    label: str
    status: str
    error: str
    figures: tuple[str, ...]
    """Steps, tokens, training, evaluation, GPU hours."""

    @property
    def error_line(self) -> str:
        """The first line of the error."""
        return self.error.partition("\n")[0]


def write_sweep_page(results: SweepResults, out: str) -> None:
    """Write the page of a sweep, finished or not, to the file ``out``.

    The page holds all it needs, loads nothing, and runs no script but its own, whatever the texts in it are. Raises
    OSError where ``out`` cannot be written.
    """
    path = str(results.config.get("out", ""))
    name = posixpath.basename(path.rstrip("/"))
    title = "Sweep"
    if name:
        title = f"Sweep {name}"
    # Many forms of the untuned backbone would fill the first table; the tables of all metrics have them.
    shown = list(results.references)
    untuned = [reference for reference in shown if reference.kind == "untuned"]
    hidden_forms = 0
    if len(untuned) > _MAX_UNTUNED:
        hidden_forms = len(untuned)
        shown = [reference for reference in shown if reference.kind != "untuned"]
    drawn = plots(results)
    page = render(
        "sweep.html",
        title,
        styles=("tables.css", "sweep.css"),
        links=_links(results, bool(drawn)),
        path=path,
        tiles=_tiles(results),
        lines=_facts(results),
        config=results.config,
        claims=_claims(results),
        table=ablation_table(results, shown),
        several_seeds=any(len(cell.seeds) > 1 for cell in results.cells),
        hidden_forms=hidden_forms,
        task_tables=list(task_tables(results)),
        references=[(reference.name, reference.about) for reference in shown if reference.about],
        plots=drawn,
        cost=_cost(results.trials),
        total=_total_cost(results.trials),
        left_out=results.left_out,
        glossary=glossary(about.metrics for about in results.tasks.values()),
    )
    storage.write_bytes(out, page)


def _links(results: SweepResults, has_plots: bool) -> list[Link]:
    links = []
    if results.claims:
        links.append(Link("claims", "Claims"))
    links.append(Link("table", "Ablation table"))
    if has_plots:
        links.append(Link("plots", "Plots"))
    links.append(Link("cost", "Cost"))
    if results.tasks:
        links.append(Link("metrics", "Metrics"))
    return links


def _tiles(results: SweepResults) -> list[tuple[str, str]]:
    """Return the large figures of the head, each with what it counts."""
    trials = results.trials
    statuses = Counter(trial.status for trial in trials)
    tiles = [(f"{statuses['finished']:,} of {len(trials):,}", f"{plural(len(trials), 'trial')} finished")]
    # A status that no trial has gets no tile.
    for status in ("failed", "stopped", "waiting"):
        if statuses[status]:
            tiles.append((f"{statuses[status]:,}", status))
    seeds = len(set(_column(trials, "seed")))
    tiles.append((f"{seeds:,}", plural(seeds, "seed")))
    tiles.append((short_count(_sum(_column(trials, "tokens"))), "tokens trained on"))
    # GPU hours say what a sweep cost; without GPUs the time of its trials does.
    if any(_column(trials, "gpus")):
        gpu_hours, *_ = numbers(_sum(_column(trials, "gpu_hours")))
        tiles.append((gpu_hours, "GPU hours"))
    else:
        work_s = _sum(_column(trials, "train_seconds")) + _sum(_column(trials, "evaluate_seconds"))
        tiles.append((duration(work_s), "of CPU work"))
    tiles.append((duration(results.seconds), "from start to end"))
    return tiles


def _facts(results: SweepResults) -> list[tuple[str, str]]:
    """Return what was tried."""
    config, trials = results.config, results.trials
    methods = sorted(set(_column(trials, "method")), key=method_rank)
    lines = [
        ("Data", str(config.get("data") or config.get("manifest") or NONE)),
        ("Tasks", listed(map(readable, results.tasks))),
        ("Methods", listed(methods)),
        ("Chain lengths", listed(sorted(_column(trials, "length")))),
        ("Example pairs", listed(sorted(_column(trials, "pairs")))),
        ("Scales", listed(_column(trials, "scale"))),
        ("Seeds", listed(sorted(_column(trials, "seed")))),
    ]
    # Trials may differ in any field of the configuration; the keys of all, in the order in which they first appear.
    keys: dict[str, None] = {}
    for trial in trials:
        keys.update(dict.fromkeys(trial.fields))
    for key in keys:
        values = [trial.fields.get(key, NONE) for trial in trials]
        lines.append((key, listed(values)))
    lines.append(("Early stopping", str(config.get("stopping", "none"))))
    return lines


def _claims(results: SweepResults) -> list[ClaimView]:
    # Percentages of all claims share one scale, so that their drawings can be compared.
    gains: list[float] = []
    ends: list[float] = []
    for claim in results.claims:
        if claim.overall is not None:
            gains += filter(is_finite, [claim.overall.gain_percent])
            ends += filter(is_finite, [claim.overall.low, claim.overall.high])
    largest_gain = max(map(abs, gains), default=0.0)
    # An interval of two seeds can be so wide that nothing else would be seen beside it.
    reach = min(max(map(abs, gains + ends), default=0.0), 3 * largest_gain) or 1.0
    return [_claim(claim, reach, results.lower_is_better) for claim in results.claims]


def _claim(claim: ClaimEntry, reach: float, lower_is_better: Sequence[str]) -> ClaimView:
    """Write a claim; its gain is drawn from -``reach`` to +``reach`` percent."""
    rows = tuple(_claim_row(row, lower_is_better) for row in claim.rows)
    counts = ""
    if rows:
        verdicts = Counter(row.verdict for row in claim.rows)
        texts = []
        for kind in sorted(verdicts, key=_verdict_rank):
            texts.append(f"{kind} in {verdicts[kind]:,}")
        counts = f"{counted(len(rows), 'comparison')}: {', '.join(texts)}"

    # Without a gain there is no interval to draw: the scores were not above zero, or nothing was compared.
    overall = claim.overall
    if overall is None:
        verdict = "not tried"
        if rows:
            verdict = "no figure"
        return ClaimView(claim.claim, claim.paper, counts, verdict, "", rows)

    gain, low, high = signed_numbers(overall.gain_percent, overall.low, overall.high)
    # Two seeds or more have an interval; of one there is only the count to show.
    seeds = counted(overall.seeds, "seed")
    between, whisker, dot = seeds, None, None
    if is_finite(overall.low) and is_finite(overall.high):
        between = f"{interval(low, high)} %, {seeds}"
        whisker = _place(overall.low, reach), _place(overall.high, reach)
    if is_finite(overall.gain_percent):
        dot = _place(overall.gain_percent, reach)
    return ClaimView(
        claim.claim,
        claim.paper,
        counts,
        overall.verdict,
        _VERDICT_CLASSES.get(overall.verdict, "faint"),
        rows,
        gain,
        between,
        GainPlot(dot, whisker),
    )


def _claim_row(row: ClaimRow, lower_is_better: Sequence[str]) -> ClaimRowView:
    """Write one comparison of a claim."""
    mean, low, high = numbers(row.mean, row.low, row.high)
    between = NONE
    if row.low is not None and row.high is not None:
        between = interval(low, high)
    return ClaimRowView(
        row.first,
        row.second,
        readable(row.task),
        metric_head(row.metric, lower_is_better),
        mean,
        between,
        row.seeds,
        row.verdict,
        _VERDICT_CLASSES.get(row.verdict, "faint"),
    )


def _verdict_rank(verdict: str) -> int:
    return _VERDICTS.index(verdict)


def _place(gain: float, reach: float) -> float:
    """Return where a gain lies across a drawing, in percent of its width."""
    # Ends beyond the reach are drawn at the edge; zero is in the middle, at 50%.
    share = max(-1.0, min(1.0, gain / reach))
    return round(50 + 50 * share, 2)


def _cost(trials: Sequence[TrialEntry]) -> list[CostRow]:
    """Return what every trial took, those that need a look first."""
    rows = []
    for trial in sorted(trials, key=lambda trial: _STATUSES.index(trial.status)):
        figures = _cost_figures(
            trial.steps, trial.tokens, trial.train_seconds, trial.evaluate_seconds, trial.gpu_hours
        )  # fmt: skip
        rows.append(CostRow(trial.name, trial.label, trial.status, (trial.error or "").strip(), figures))
    return rows


def _total_cost(trials: Sequence[TrialEntry]) -> tuple[str, ...]:
    """Return the sums over all trials; a dash for what no trial has."""
    sums = []
    for name in ("steps", "tokens", "train_seconds", "evaluate_seconds", "gpu_hours"):
        # A trial that failed or waits has no figures; a sum of none is a dash, not 0.
        known = [value for value in _column(trials, name) if value is not None]
        total = None
        if known:
            total = sum(known)
        sums.append(total)
    return _cost_figures(*sums)


def _cost_figures(*figures: float | None) -> tuple[str, ...]:
    """Write steps, tokens, seconds of training and of evaluation, and GPU hours."""
    steps, tokens, train_s, evaluate_s, gpu_hours = figures
    texts = []
    for count in (steps, tokens):
        texts.append(_or_none(count, "{:,}".format))
    for seconds in (train_s, evaluate_s):
        texts.append(_or_none(seconds, duration))
    return *texts, numbers(gpu_hours)[0]


def _or_none(figure: float | None, write: Callable[[float], str]) -> str:
    if figure is None:
        return NONE
    return write(figure)


def _column(trials: Iterable[TrialEntry], name: str) -> list[Any]:
    """Return the values of a field of all trials."""
    return [getattr(trial, name) for trial in trials]


def _sum(values: Iterable[float | None]) -> float:
    return sum(value or 0 for value in values)
