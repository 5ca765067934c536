"""Train and score a grid of trials, and write the pages again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from covray.cli.options import ConfigFile, Json, Plan, Sets, StepOptions, TokensPerS, require_speed, words
from covray.cli.output import console, print_values
from covray.cli.results import print_evaluation, print_sweep
from covray.config import SweepConfig
from covray.errors import ConfigError

if TYPE_CHECKING:
    from covray.sweeps.plan import SweepPlan

SWEEP = StepOptions(SweepConfig)


def sweep(
    context: typer.Context,
    out: Annotated[str | None, SWEEP.option("--out", "out")] = None,
    data: Annotated[str | None, SWEEP.option("--data", "data")] = None,
    manifest: Annotated[str | None, SWEEP.option("--manifest", "manifest")] = None,
    concurrency: Annotated[int | None, SWEEP.option("--concurrency", "concurrency")] = None,
    track: Annotated[str | None, SWEEP.option("--track", "tracking.to", read=words, metavar="NAME,...")] = None,
    tracking_uri: Annotated[str | None, SWEEP.option("--tracking-uri", "tracking.uri")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the sweep in OUT, as it was configured.")] = False,
    plan: Plan = False,
    tokens_per_s: TokensPerS = None,
    json_: Json = False,
) -> None:
    """Train and score a grid of chain lengths, pairs and methods.

    Run the same command again to resume after any interruption.
    """
    require_speed(tokens_per_s, plan)
    if resume:
        # The trials of a sweep share its settings: what differs from the folder would not be comparable.
        if out is None or config or sets or data or manifest or concurrency or track or tracking_uri:
            raise ConfigError("--resume: takes --out SWEEP alone; the sweep's folder has its configuration")
        from covray.distributed.sweep import resumed

        resolved = resumed(out)
    else:
        resolved = SWEEP.resolve(context)
    if plan:
        from covray.distributed.sweep_checks import plan_checked_sweep

        _print_sweep_plan(plan_checked_sweep(resolved, tokens_per_s), json_)
        return
    from covray.distributed.sweep import run_sweep

    print_sweep(run_sweep(resolved), resolved.out, json_)


def report(
    folder: Annotated[
        str,
        typer.Argument(metavar="EVAL|SWEEP|CLAIMS", help="An evaluation, a sweep or a programme, finished or not."),
    ],
    json_: Json = False,
) -> None:
    """Page and table of an evaluation, or of a sweep or a programme of claims from what is done so far."""
    from covray.distributed import evaluate as evaluations
    from covray.distributed import sweep as sweeps
    from covray.evaluation.claims.records import ProgrammeRecord
    from covray.evaluation.records import EvaluationRecord
    from covray.io import storage

    # The file with the record tells what the folder is; what has none is refused as no sweep.
    if storage.exists(storage.join(folder, EvaluationRecord.FILE)):
        evaluation = evaluations.report(folder)
        if json_:
            print(json.dumps(evaluation.to_json()))
        else:
            print_evaluation(evaluation, folder)
        return
    if storage.exists(storage.join(folder, ProgrammeRecord.FILE)):
        from covray.cli.experiments import print_claims
        from covray.recipes.claims_page import report_programme

        print_claims(report_programme(folder), folder, json_)
        return
    print_sweep(sweeps.report(folder), folder, json_)


def _print_sweep_plan(planned: SweepPlan, json_: bool) -> None:
    if json_:
        print(json.dumps(planned.to_json()))
        return
    total = planned.total.to_json()  # without what a plan without a rate lacks
    shown = {"trials": f"{len(planned.trials):,}", "left out": f"{len(planned.left_out):,}"}
    for key, value in total.items():
        shown[key] = f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"
    if planned.builds is not None:
        lengths = ", ".join(map(str, planned.builds.lengths))
        shown["builds first"] = f"chains of {lengths} by {', '.join(planned.builds.methods) or 'no method'}"
    print_values(shown, False)
    if "gpu_hours" not in total:
        console.print("hours: give --tokens-per-s, which covray train prints", highlight=False)
