"""How the results of evaluations and sweeps are printed."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

from rich.table import Table

from covray.cli.output import console, escape

if TYPE_CHECKING:
    from covray.evaluation.records import EvaluationResults
    from covray.sweeps.records import SweepResults


def print_evaluation(results: EvaluationResults, out: str) -> None:
    """Print the primary metric of every task, a row a subject; all else is on the page."""
    from covray.evaluation.metrics import short_metric, short_task

    means = {(score.subject, score.task, score.metric): score.mean for score in results.scores}
    table = Table("", box=None, pad_edge=False)
    has_samples = any(subject.samples > 1 for subject in results.subjects)
    if has_samples:
        table.add_column("samples", justify="right")
    for task, about in results.tasks.items():
        arrow = "↓" if about.primary in results.lower_is_better else "↑"
        title = f"{short_task(task)}\n{short_metric(about.primary)} {arrow}"
        table.add_column(title, justify="right", no_wrap=True)
    for subject in results.subjects:
        cells = []
        if has_samples:
            cells.append("–" if subject.method is None else str(subject.samples))
        for task, about in results.tasks.items():
            mean = means.get((subject.name, task, about.primary))
            cells.append("–" if mean is None else f"{mean:.3g}")
        table.add_row(escape(subject.name), *cells, style="bold" if subject.kind == "adapter" else None)
    console.print(table)
    if results.failed:
        console.print(f"[yellow]{len(results.failed)} episodes failed[/yellow]: they are named on the page")
    console.print(f"{escape(out.rstrip('/'))}/index.html", highlight=False, soft_wrap=True)


def print_sweep(results: SweepResults, out: str, json_: bool) -> None:
    """What the claims came to, and how the trials ended; all else is on the page."""
    if json_:
        print(json.dumps(results.to_json()))
        return
    table = Table("claim", "gain", "95%", "verdict", box=None, pad_edge=False)
    for claim in results.claims:
        overall = claim.overall
        if overall is None or overall.gain_percent is None:
            continue
        interval = "–" if overall.low is None else f"{overall.low:+.1f} to {overall.high:+.1f}"
        table.add_row(escape(claim.claim), f"{overall.gain_percent:+.1f}%", interval, overall.verdict)
    if table.row_count:
        console.print(table)
    ended = Counter(trial.status for trial in results.trials)
    counts = []
    for status in ("finished", "stopped", "failed", "waiting"):
        if ended[status]:
            counts.append(f"{ended[status]} {status}")
    console.print(", ".join(counts), highlight=False)
    for trial in results.trials:
        if trial.status == "failed":
            why = f"[yellow]{escape(trial.name)} failed[/yellow]: {escape(str(trial.error))}"
            console.print(why, highlight=False, soft_wrap=True)
    console.print(f"{escape(out.rstrip('/'))}/index.html", highlight=False, soft_wrap=True)
