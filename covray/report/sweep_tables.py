"""The tables of a sweep's page: cells by method with their scores, and the references below them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from covray.report.formatting import counted, readable
from covray.report.metrics import MetricHead, metric_head
from covray.report.sweep_rows import sort_rows, variants
from covray.report.tables import ScoreCell, best_mean, score_cell
from covray.sweeps.records import CellScore, Reference, SweepResults, TrialScore

Column = tuple[str, str]
"""A task and a metric."""
S = TypeVar("S", CellScore, TrialScore)


@dataclass(frozen=True)
class Head:
    """The head of a column."""

    task: str
    """Empty in the table of one task."""
    metric: MetricHead


@dataclass(frozen=True)
class TableRow:
    """A cell with its scores."""

    label: str
    method: str
    variant: str
    length: int
    pairs: int
    context_tokens: int
    scores: tuple[ScoreCell, ...]


@dataclass(frozen=True)
class ReferenceRow:
    """A reference with its scores."""

    name: str
    scores: tuple[ScoreCell, ...]


@dataclass(frozen=True)
class SweepTable:
    """A table of cells and references."""

    heads: tuple[Head, ...]
    groups: tuple[tuple[TableRow, ...], ...]
    """By method."""
    references: tuple[ReferenceRow, ...]
    ceilings: tuple[ReferenceRow, ...]


@dataclass(frozen=True)
class TaskTable:
    """All metrics of one task."""

    name: str
    table: SweepTable


def ablation_table(results: SweepResults, references: Sequence[Reference]) -> SweepTable:
    """Return the table with the primary metric of each task."""
    columns, heads = [], []
    for task, about in results.tasks.items():
        columns.append((task, about.primary))
        heads.append(Head(readable(task), metric_head(about.primary, results.lower_is_better)))
    return _table(results, heads, columns, references)


def task_tables(results: SweepResults) -> Iterator[TaskTable]:
    """Yield a table with all metrics for each task."""
    for task, about in results.tasks.items():
        columns, heads = [], []
        for metric in about.metrics:
            columns.append((task, metric))
            heads.append(Head("", metric_head(metric, results.lower_is_better)))
        name = f"{readable(task)}, {counted(about.episodes, 'episode')}"
        yield TaskTable(name, _table(results, heads, columns, results.references))


def _table(
    results: SweepResults, heads: Sequence[Head], columns: Sequence[Column], references: Sequence[Reference]
) -> SweepTable:
    """Return a table with a row a cell and a column for each of ``columns``, whose heads are ``heads``."""
    cells = sort_rows(results.cells)
    # [cells], each the scores of a cell by column.
    scores_by_cell = [_by_column(cell.scores) for cell in cells]
    # References do not compete: the best cell of each column is marked.
    best = {}
    for column in columns:
        of_cells = [scores.get(column) for scores in scores_by_cell]
        best[column] = best_mean(column[1], of_cells, results.lower_is_better)
    usual_seeds = _usual_seeds(scores_by_cell, columns)
    names = variants(cells)

    rows = []
    for cell, scores in zip(cells, scores_by_cell, strict=True):
        written = []
        for column in columns:
            # A trial that failed leaves its cells without scores; a mean of fewer seeds says so.
            score = scores.get(column)
            note = ""
            if score is not None and score.seeds != usual_seeds:
                note = counted(score.seeds, "seed")
            written.append(score_cell(score, best[column], note))
        rows.append(
            TableRow(
                cell.label, cell.method, names[cell.label], cell.length, cell.pairs, cell.context_tokens, tuple(written)
            )
        )
    # `sort_rows` has put the cells of a method beside each other.
    groups = [tuple(group) for _, group in groupby(rows, key=lambda row: row.method)]
    # Ceilings stand last and apart: they have seen the label.
    others: list[ReferenceRow] = []
    ceilings: list[ReferenceRow] = []
    for reference in references:
        row = _reference_row(reference, columns)
        if reference.kind == "ceiling":
            ceilings.append(row)
        else:
            others.append(row)
    return SweepTable(tuple(heads), tuple(groups), tuple(others), tuple(ceilings))


def _by_column(scores: Iterable[S]) -> dict[Column, S]:
    return {(score.task, score.metric): score for score in scores}


def _usual_seeds(scores_by_cell: Sequence[dict[Column, CellScore]], columns: Sequence[Column]) -> int:
    """Return the number of seeds that most scores have; only others are noted in the table."""
    seeds: Counter[int] = Counter()
    for scores in scores_by_cell:
        for column in columns:
            if column in scores:
                seeds[scores[column].seeds] += 1
    if not seeds:
        return 0
    return seeds.most_common(1)[0][0]


def _reference_row(reference: Reference, columns: Sequence[Column]) -> ReferenceRow:
    scores = _by_column(reference.scores)
    cells = [score_cell(scores.get(column)) for column in columns]
    return ReferenceRow(reference.name, tuple(cells))
