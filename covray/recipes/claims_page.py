"""Run a programme of claims in its folder, and write its results, its page and its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from covray.distributed.evaluate import pictures_of
from covray.distributed.resumable import Output
from covray.distributed.session import ray_session
from covray.evaluation.claims.arms import primary_metrics
from covray.evaluation.claims.records import ProgrammeRecord, ProgrammeResults
from covray.progress import stage
from covray.recipes.claims_results import summarize, to_markdown
from covray.recipes.claims_run import Programme, Steps, read_programme, real_steps
from covray.recipes.claims_scores import EvaluationFolder, scores_of
from covray.report.claims import write_claims_page
from covray.report.evaluation import Strip

PAGE, TABLE = "index.html", "table.md"


def run_programme(programme: Programme, names: Sequence[str] = (), steps: Steps | None = None) -> ProgrammeResults:
    """Run a programme, or continue it.

    Args:
        programme: Of ``open_programme``.
        names: Arms to run now; none: all, and what is chosen among them.
        steps: By default those of the commands.

    Returns:
        What is written to ``claims.json``.

    Raises:
        CovrayError: The folder holds another programme, an arm is not known, or a step cannot be done.
    """
    programme.chosen(names)
    with Output(programme.out, ProgrammeRecord, "covray experiments claims") as output:
        if output.begun is not None:
            output.require_same(output.begun.identity(), programme.record.identity())
        programme.record.write(programme.folder)
        if steps is None:
            with ray_session():  # one for all steps
                replace(programme, steps=real_steps()).work(names)
        else:
            replace(programme, steps=steps).work(names)
        return report_programme(programme.out)


def report_programme(out: str) -> ProgrammeResults:
    """Write results, page and table of the programme in ``out`` from the arms that are done; return the results.

    Raises:
        ConfigError: The folder holds no programme.
    """
    programme = read_programme(out)
    with stage("writing the results and the page"):
        results = summarize(programme)
        write_claims_page(results, _strips(programme, results), programme.folder.join(PAGE))
        programme.folder.write_bytes(TABLE, to_markdown(results).encode())
        results.write(programme.folder)
    return results


def _strips(programme: Programme, results: ProgrammeResults) -> list[Strip]:
    """Return the answers of the main arms to one query a task: the median by the best chains, or by the first arm."""
    done = [entry.name for entry in results.arms if entry.seeds]
    shown = []
    for name in dict.fromkeys(("none", "diffusion", results.best or "own")):
        if name in done:
            shown.append(name)
    if not shown:
        return []
    folders = []
    for name in shown:
        folders.append(programme.evaluation(name, min(_seeds(results, name))))
    # The last of them is the best one: the others answer its median queries.
    queries = _median_queries(folders[-1])
    strips: list[Strip] = []
    for folder in folders:
        strips += pictures_of(folder.path, queries)
    return strips


def _seeds(results: ProgrammeResults, name: str) -> tuple[int, ...]:
    return next(entry.seeds for entry in results.arms if entry.name == name)


def _median_queries(folder: EvaluationFolder) -> dict[str, int]:
    """Return the query of the median score of every task."""
    scores = scores_of([folder])
    queries = {}
    if scores is not None:
        for task, metric in primary_metrics(scores.tasks).items():
            values = scores.by_seed[folder.seed].get((task, metric), {})
            # By the query's number where scores are equal, so that a report shows the same pictures again.
            ranked = sorted(values, key=lambda query: (values[query], query))
            if ranked:
                queries[task] = ranked[len(ranked) // 2]
    return queries
