"""Predict time, money and storage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.table import Table

from covray.cli.options import ConfigFile, Json, Sets, StepOptions
from covray.cli.output import console, escape, figure, print_values
from covray.config import PlanConfig

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

    planned = make_plan(resolved).to_json()
    if json_:
        print(json.dumps(planned))
        return
    for step in resolved.steps:
        console.print(f"[bold]{step}[/bold]")
        values = planned[step]
        notes = values.pop("notes")
        memory, figures = values.pop("memory", ()), values.pop("figures", ())
        print_values({key: figure(value) for key, value in values.items()}, False)
        _print_sources(memory, figures)
        for note in notes:
            console.print(f"[yellow]note:[/yellow] {escape(note)}", highlight=False, soft_wrap=True)
    console.print(f"rates: {escape(planned['rates'])}", highlight=False, soft_wrap=True)


def _print_sources(memory: Sequence[dict[str, Any]], figures: Sequence[dict[str, Any]]) -> None:
    """Print the memory of a GPU by stage, and what a plan rests on; nothing for steps without them."""
    if memory:
        parts = ("weights", "gradients", "optimizer", "activations", "logits")
        table = Table("GiB of a GPU", *parts, "all", box=None, pad_edge=False)
        for stage in memory:
            gib = [stage[part] / 2**30 for part in parts]
            table.add_row(f"ZeRO stage {stage['stage']}", *(f"{value:.1f}" for value in gib), f"{sum(gib):.1f}")
        console.print(table)
    if figures:
        table = Table("figure", "", "source", box=None, pad_edge=False)
        for entry in figures:
            value = entry["value"]
            text = f"{value:g}"
            if value >= 1e12:  # rates of a GPU, of which all digits would fill the column
                text = f"{value:.3g}"
            elif value >= 1:
                text = f"{value:,.0f}"
            table.add_row(entry["name"], f"{text} {entry['unit']}".strip(), escape(entry["source"]))
        console.print(table)
