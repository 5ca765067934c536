"""The page of an evaluation: tables, plots and picture strips in one HTML file, to read and to pass on."""

from __future__ import annotations

import posixpath
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
from PIL import Image

from covray.config import SamplingConfig, leaves, recorded_section
from covray.evaluation.records import Difference, EvaluationResults, SubjectEntry, SubjectScore
from covray.io import storage
from covray.report.dots import Dot, DotPlot, draw_dots
from covray.report.formatting import (
    NONE,
    counted,
    duration,
    interval,
    is_finite,
    listed,
    numbers,
    p_value,
    plural,
    readable,
)
from covray.report.html import Link, render
from covray.report.metrics import MetricHead, axis_title, glossary, metric_head, metric_of
from covray.report.tables import ScoreCell, best_mean, score_cell

_SIGNIFICANT = 0.05
_MAX_FAILED = 20
_MAX_OPEN_DIFFERENCES = 12
"""With more rows than this, a table of differences is folded away."""
_TILE_PX = 128
_STORED_PX = 512
"""The longer side of a photograph on the page: twice the largest tile."""
RANKS = ("best", "median", "worst")


@dataclass(frozen=True)
class Strip:
    """What one subject made of one query. Pictures are uint8 RGB."""

    task: str
    subject: str
    rank: Literal["best", "median", "worst"]
    pair_id: int
    score: float | None
    """By the task's primary metric; None where it is undefined."""
    query: np.ndarray
    """[h, w, 3]"""
    frames: Sequence[np.ndarray]
    """What a model wrote before the answer, each [h, w, 3]."""
    answer: np.ndarray
    """[h, w, 3]"""
    label: np.ndarray
    """[h, w, 3]"""


@dataclass(frozen=True)
class Column:
    """A column of a score table."""

    task: str
    metric: str
    head: MetricHead
    episodes: int
    """Those of most rows; a row with another number says so."""
    best: float | None


@dataclass(frozen=True)
class SubjectRow:
    """A subject with its scores."""

    name: str
    form: str
    scores: tuple[ScoreCell, ...]


@dataclass(frozen=True)
class SubjectTable:
    """A table of scores; the ceilings stand apart."""

    columns: tuple[Column, ...]
    rows: tuple[SubjectRow, ...]
    ceilings: tuple[SubjectRow, ...]


@dataclass(frozen=True)
class DifferenceRow:
    """A difference between two subjects, as it is written."""

    first: str
    second: str
    metric: MetricHead
    mean: str
    interval: str
    p_value: str
    episodes: int
    verdict: str
    css: str


@dataclass(frozen=True)
class StripView:
    """The pictures of one subject for one query."""

    subject: str
    score: str
    frames: tuple[np.ndarray, ...]
    answer: np.ndarray


@dataclass(frozen=True)
class StripRow:
    """The answers of all subjects to one query."""

    rank: str
    pair_id: int
    query: np.ndarray
    label: np.ndarray
    answers: tuple[StripView, ...]


@dataclass(frozen=True)
class TaskView:
    """The section of one task."""

    task: str
    counts: str
    table: SubjectTable
    absent: tuple[tuple[str, str], ...]
    """Metrics that are missing, each with the reason."""
    primary: MetricHead
    plot: DotPlot | None
    plot_label: str
    axis_title: str
    differences: tuple[DifferenceRow, ...]
    strips: tuple[StripRow, ...]


def write_evaluation_page(results: EvaluationResults, strips: Sequence[Strip], out: str) -> None:
    """Write the page of an evaluation.

    The page holds all it needs, loads nothing, and runs no script but its own, whatever the texts in it are.

    Args:
        results: The table of the evaluation.
        strips: The answers to show as pictures, in any order.
        out: The file to write.

    Raises:
        OSError: ``out`` cannot be written.
    """
    data = str(results.config.get("data", ""))
    title = f"Evaluation on {posixpath.basename(data.rstrip('/')) or 'no dataset'}"

    # A template walks tasks in the order of the table, so that strips are grouped once, here.
    strips_by_task: dict[str, list[Strip]] = defaultdict(list)
    for strip in strips:
        strips_by_task[strip.task].append(strip)
    tasks = [_task(results, task, strips_by_task[task]) for task in results.tasks]
    page = render(
        "evaluation.html",
        title,
        styles=("tables.css", "evaluation.css"),
        tile_px=_TILE_PX,
        links=_links(results),
        path=data,
        tiles=_tiles(results),
        lines=_facts(results),
        fingerprints=list(results.fingerprints.items()),
        config=results.config,
        overview=_table(results, [(task, about.primary) for task, about in results.tasks.items()]),
        subjects=[(subject.name, subject.about) for subject in results.subjects],
        tasks=tasks,
        failed=results.failed[:_MAX_FAILED],
        failed_count=len(results.failed),
        max_open_differences=_MAX_OPEN_DIFFERENCES,
        glossary=glossary(about.metrics for about in results.tasks.values()),
        stored=_shrink,
        is_small=lambda picture: max(picture.shape[:2]) < _TILE_PX,
    )
    storage.write_bytes(out, page)


def _links(results: EvaluationResults) -> list[Link]:
    links = [Link("overview", "Overview")]
    links += [Link(task, readable(task)) for task in results.tasks]
    if results.failed:
        links.append(Link("failed", "Failed"))
    if results.tasks:
        links.append(Link("metrics", "Metrics"))
    return links


def _tiles(results: EvaluationResults) -> list[tuple[str, str]]:
    """Return the large figures of the head, each with what it counts."""
    tasks, subjects, failed = len(results.tasks), len(results.subjects), len(results.failed)
    episodes = 0
    for task in results.tasks.values():
        episodes += task.episodes
    return [
        (f"{episodes:,}", "episodes"),
        (str(tasks), plural(tasks, "task")),
        (str(subjects), f"{plural(subjects, 'row')} in the table"),
        (f"{failed:,}", plural(failed, "failed answer")),
        (duration(results.seconds), "of work"),
    ]


def _facts(results: EvaluationResults) -> list[tuple[str, str]]:
    """Return how the evaluation was made."""
    config = results.config
    # A subject that sees no examples has no number of pairs.
    pairs = sorted({subject.pairs for subject in results.subjects if subject.pairs is not None})
    # What the results do not record of the section has its default.
    sampling = recorded_section(config, "sampling")
    how = "greedy"
    asked = SamplingConfig.model_validate(sampling)
    if not asked.is_greedy or asked.expected is not None:
        values = []
        for key, value in leaves(sampling):
            if value is not None:
                values.append(f"{readable(key.replace('.', ' ')).lower()} {value}")
        how = listed(values)
    return [
        ("Queries", f"{config.get('split', NONE)} split"),
        ("Examples", f"{config.get('example_split', NONE)} split, {config.get('selection', NONE)} selection"),
        ("Examples a query", listed(pairs)),
        ("Sampling", how),
        ("Seed", str(config.get("seed", NONE))),
    ]


def _task(results: EvaluationResults, task: str, strips: Sequence[Strip]) -> TaskView:
    """Return the section of a task: its table, plot, differences and pictures."""
    about = results.tasks[task]
    counts = counted(about.episodes, "episode")
    if about.rejected:
        counts += f", {about.rejected:,} rejected"
    # A metric without scores has a column, unless its absence has a reason, which is written below the table.
    scored = {score.metric for score in results.scores if score.task == task}
    keys = []
    for metric in about.metrics:
        if metric in scored or metric not in about.absent:
            keys.append((task, metric))
    absent = []
    for metric, reason in about.absent.items():
        absent.append((metric_of(metric).label, reason))

    differences = []
    for row in results.differences:
        if row.task == task:
            differences.append(_difference(row, results))
    names = [subject.name for subject in results.subjects]
    primary = metric_of(about.primary)
    return TaskView(
        task=task,
        counts=counts,
        table=_table(results, keys),
        absent=tuple(absent),
        primary=metric_head(about.primary, results.lower_is_better),
        plot=_plot(results, task, about.primary),
        plot_label=f"{primary.label} of {readable(task)}: means with 95% intervals, as in the table above",
        axis_title=axis_title(about.primary, results.lower_is_better),
        differences=tuple(differences),
        strips=tuple(_strip_rows(strips, names)),
    )


def _table(results: EvaluationResults, keys: Sequence[tuple[str, str]]) -> SubjectTable:
    """Return a table with a row a subject and a column for each of ``keys`` (task, metric)."""
    # Scores by column, then by subject; scores of other columns belong to another table of the page.
    scores: dict[tuple[str, str], dict[str, SubjectScore]] = {key: {} for key in keys}
    for score in results.scores:
        if (score.task, score.metric) in scores:
            scores[score.task, score.metric][score.subject] = score
    # The ceiling has seen the label, and is no competitor.
    competitors = [subject.name for subject in results.subjects if subject.kind != "ceiling"]
    columns = []
    for (task, metric), by_subject in scores.items():
        counts = {score.episodes for score in by_subject.values() if score.mean is not None}
        # The head says of how many episodes a mean is; cells of another number say so themselves.
        episodes = results.tasks[task].episodes
        if len(counts) == 1:
            episodes = counts.pop()
        competing = [by_subject.get(name) for name in competitors]
        best = best_mean(metric, competing, results.lower_is_better)
        columns.append(Column(task, metric, metric_head(metric, results.lower_is_better), episodes, best))

    # A row a subject. The ceiling is never marked as best, although its mean often is.
    rows: list[SubjectRow] = []
    ceilings: list[SubjectRow] = []
    for subject in results.subjects:
        is_ceiling = subject.kind == "ceiling"
        cells = []
        for column in columns:
            cell_score = scores[column.task, column.metric].get(subject.name)
            note = ""
            if cell_score is not None and cell_score.episodes != column.episodes:
                note = f"n = {cell_score.episodes:,}"
            best = None
            if not is_ceiling:
                best = column.best
            cells.append(score_cell(cell_score, best, note))
        row = SubjectRow(subject.name, _form(subject), tuple(cells))
        if is_ceiling:
            ceilings.append(row)
        else:
            rows.append(row)
    return SubjectTable(tuple(columns), tuple(rows), tuple(ceilings))


def _form(subject: SubjectEntry) -> str:
    """Return what kind of subject it is, and after what chains it answers."""
    parts: list[str] = [subject.kind]
    if subject.method == "none":
        parts.append("no frames")
    elif subject.method is not None:
        parts.append(f"{subject.method}, L={subject.length}")
    if subject.pairs is not None:
        parts.append(counted(subject.pairs, "pair"))
    if subject.samples > 1:
        parts.append(f"{subject.samples} samples")
    return " · ".join(parts)


def _plot(results: EvaluationResults, task: str, metric: str) -> DotPlot | None:
    """Return the means of all subjects with their intervals; None where there are none."""
    # One score a subject: a score is unique by task, metric and subject.
    scores = {}
    for score in results.scores:
        if (score.task, score.metric) == (task, metric):
            scores[score.subject] = score
    dots = []
    for subject in results.subjects:
        of_subject = scores.get(subject.name)
        if of_subject is not None and is_finite(of_subject.mean):
            dots.append(Dot(subject.name, subject.kind, of_subject.mean, of_subject.low, of_subject.high))
    if not dots:
        return None
    return draw_dots(dots)


def _difference(row: Difference, results: EvaluationResults) -> DifferenceRow:
    # Three texts with as many decimals each, so that mean and bounds can be compared at a glance.
    mean, low, high = numbers(row.mean, row.low, row.high)
    between = NONE
    if row.low is not None and row.high is not None:
        between = interval(low, high)
    verdict, css = _verdict(row, results.lower_is_better)
    head = metric_head(row.metric, results.lower_is_better)
    return DifferenceRow(row.first, row.second, head, mean, between, p_value(row.p_value), row.episodes, verdict, css)


def _verdict(row: Difference, lower_is_better: Sequence[str]) -> tuple[str, str]:
    """Return what a difference says of the first subject, and the style class of these words."""
    if row.mean is None or row.p_value is None:
        return NONE, "faint"
    if row.p_value >= _SIGNIFICANT or not row.mean:
        return f"not significant at {_SIGNIFICANT}", "open faint"
    # `mean` is first minus second: above zero is better only where more is.
    is_better = (row.mean > 0) != (row.metric in lower_is_better)
    if is_better:
        return "better", "better"
    return "worse", "worse"


def _strip_rows(strips: Iterable[Strip], subjects: Sequence[str]) -> list[StripRow]:
    """Return a row for every query, the best first, with the subjects in the order of the table."""
    # Strips of subjects that the table does not have (an older evaluation) stand last.
    order = {name: index for index, name in enumerate(subjects)}

    def key(strip: Strip) -> tuple[int, int]:
        return RANKS.index(strip.rank), strip.pair_id

    rows = []
    # groupby joins neighbours only, so it needs the order that it groups by.
    for _, group in groupby(sorted(strips, key=key), key=key):
        of_query = sorted(group, key=lambda strip: order.get(strip.subject, len(order)))
        answers = []
        for strip in of_query:
            score, *_ = numbers(strip.score)
            answers.append(StripView(strip.subject, score, tuple(strip.frames), strip.answer))
        first = of_query[0]
        rows.append(StripRow(first.rank.capitalize(), first.pair_id, first.query, first.label, tuple(answers)))
    return rows


def _shrink(picture: np.ndarray) -> np.ndarray:
    """Return a large picture made smaller: the page is to look at and to send."""
    if max(picture.shape[:2]) <= _STORED_PX:
        return picture
    image = Image.fromarray(picture)
    image.thumbnail((_STORED_PX, _STORED_PX), Image.Resampling.LANCZOS)
    return np.asarray(image)
