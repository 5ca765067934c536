"""From trials to the report of a sweep.

    trials --all but the seed equal--> cells --all but one thing equal--> pairs of cells, compared seed by seed

A score that is undefined is None or NaN; it is left out.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from covray.config import JsonObject
from covray.sweeps.cells import cell_entry, group_cells, sort_key
from covray.sweeps.comparisons import CLAIMS, PrimaryMetric, claim_entry, efficiency, returns
from covray.sweeps.records import LeftOut, Reference, SweepResults, TaskSummary, TrialEntry

_COLUMNS = (
    "label", "method", "length", "pairs", "scale", "tasks", "fields", "task", "metric", "mean", "low", "high", "seeds",
    "context_tokens", "tokens", "train_seconds", "gpu_hours",
)  # fmt: skip


def tabulate(
    trials: Iterable[TrialEntry],
    references: Sequence[Reference],
    tasks: Mapping[str, TaskSummary],
    lower_is_better: Iterable[str],
    left_out: Sequence[LeftOut],
    config: JsonObject,
    seconds: float,
) -> SweepResults:
    """Make the report of a sweep from its trials, in any order; those that are not finished are in no cell.

    Args:
        trials: All trials of the grid.
        references: What they are compared with.
        tasks: What was evaluated, by task.
        lower_is_better: The metrics of which less is better.
        left_out: The combinations of the grid that are no trial.
        config: The sweep's configuration as JSON values.
        seconds: How long the sweep has run.

    Raises:
        ValueError: Two finished trials differ in nothing.
    """
    # In one order, so that the report does not depend on which trial ended first.
    ordered = sorted(trials, key=lambda trial: (*sort_key(trial), trial.seed, trial.name))
    finished = [trial for trial in ordered if trial.status == "finished"]
    cells = group_cells(finished)
    lower = set(lower_is_better)
    # Differences are turned so that more is better, whatever the metric.
    primary = {}
    for task, about in tasks.items():
        sign: Literal[1, -1] = 1
        if about.primary in lower:
            sign = -1
        primary[task] = PrimaryMetric(about.primary, sign)
    return SweepResults(
        config=config,
        seconds=seconds,
        left_out=tuple(left_out),
        lower_is_better=tuple(sorted(lower)),
        tasks=dict(tasks),
        references=tuple(references),
        trials=tuple(ordered),
        cells=tuple(map(cell_entry, cells)),
        efficiency=tuple(efficiency(cells, primary)),
        returns=tuple(returns(cells, primary)),
        claims=tuple(claim_entry(claim, cells, primary) for claim in CLAIMS),
    )


def to_csv(results: SweepResults) -> str:
    """Return the cells and references of a report as CSV, a line a score.

    The column ``tasks`` is empty for all tasks, and ``fields`` is JSON. A reference has no method, length and so on of
    a training; its name is its label.
    """
    lines = io.StringIO()
    writer = csv.DictWriter(lines, _COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()

    for cell in results.cells:
        # The columns of a cell stand in every line of its scores.
        about = cell.to_json()
        about["tasks"] = "+".join(cell.tasks or ())
        about["fields"] = json.dumps(cell.fields, sort_keys=True)
        for score in cell.scores:
            writer.writerow(about | score.to_json())
    # A reference has the columns that it has; the others stay empty.
    for reference in results.references:
        for of_reference in reference.scores:
            writer.writerow({"label": reference.name} | of_reference.to_json())
    return lines.getvalue()
