"""Predict time, money and storage."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from covray.cli.options import ConfigFile, Json, Sets, StepOptions
from covray.cli.output import console, escape, figure, print_values
from covray.config import PlanConfig

PLAN = StepOptions(PlanConfig)


def plan(
    context: typer.Context,
    steps: Annotated[list[str] | None, typer.Argument(metavar="[build] [train]", help="build by default.")] = None,
    pairs: Annotated[int | None, PLAN.option("--pairs", "pairs")] = None,
    gpus: Annotated[
        int | None,
        PLAN.option("--gpus", "build_on.gpus", text="GPUs of the build; those of the training are train_on.gpus."),
    ] = None,
    calibration: Annotated[str | None, PLAN.option("--calibration", "calibration")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    seed: Annotated[int | None, PLAN.option("--seed", "seed", min=0)] = None,
    json_: Json = False,
) -> None:
    """What a build or a training will take in time, GPU hours, money and storage."""
    resolved = PLAN.resolve(context, steps=steps or None)
    from covray.planning.plan import plan as make_plan

    planned = make_plan(resolved).to_json()
    if json_:
        print(json.dumps(planned))
        return
    for step in resolved.steps:
        console.print(f"[bold]{step}[/bold]")
        values = planned[step]
        notes = values.pop("notes")
        print_values({key: figure(value) for key, value in values.items()}, False)
        for note in notes:
            console.print(f"[yellow]note:[/yellow] {escape(note)}", highlight=False, soft_wrap=True)
    console.print(f"rates: {escape(planned['rates'])}", highlight=False, soft_wrap=True)
