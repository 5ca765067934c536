"""Predict time, money and storage."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from covray.cli.options import ConfigFile, Json, Sets, StepOptions
from covray.cli.output import console, escape, figure, print_values
from covray.config import PlanConfig

if TYPE_CHECKING:
    from covray.planning.records import VlmPlan

PLAN = StepOptions(PlanConfig)


def plan(
    context: typer.Context,
    steps: Annotated[
        list[str] | None, typer.Argument(metavar="[build] [train] [vlm]", help="build by default.")
    ] = None,
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
    from covray.planning.records import VlmPlan

    planned = make_plan(resolved)
    if json_:
        print(json.dumps(planned.to_json()))
        return
    for step, of_step in (("build", planned.build), ("train", planned.train), ("vlm", planned.vlm)):
        if of_step is None:
            continue
        console.print(f"[bold]{step}[/bold]")
        values = {}
        for key, value in of_step.to_json().items():
            # Lists have a form of their own, below.
            if not isinstance(value, list):
                values[key] = figure(value)
        print_values(values, False)
        if isinstance(of_step, VlmPlan):
            _print_sources(of_step)
        for note in of_step.notes:
            console.print(f"[yellow]note:[/yellow] {escape(note)}", highlight=False, soft_wrap=True)
    console.print(f"rates: {escape(planned.rates)}", highlight=False, soft_wrap=True)


def _print_sources(planned: VlmPlan) -> None:
    """Print the memory of a GPU by stage, and what the plan rests on."""
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    table = Table("GiB of a GPU", *parts, "all", box=None, pad_edge=False)
    for stage in planned.memory:
        gib = [getattr(stage, part) / 2**30 for part in parts]
        table.add_row(f"ZeRO stage {stage.stage}", *(f"{value:.1f}" for value in gib), f"{sum(gib):.1f}")
    console.print(table)
    table = Table("figure", "", "source", box=None, pad_edge=False)
    for entry in planned.figures:
        text = f"{entry.value:g}"
        if entry.value >= 1e12:  # rates of a GPU, of which all digits would fill the column
            text = f"{entry.value:.3g}"
        elif entry.value >= 1:
            text = f"{entry.value:,.0f}"
        table.add_row(entry.name, f"{text} {entry.unit}".strip(), escape(entry.source))
    console.print(table)
