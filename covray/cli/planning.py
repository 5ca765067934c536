"""Predict time, money and storage."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from covray.cli.options import ConfigFile, Json, Sets, given
from covray.cli.output import console, escape, figure, print_values


def plan(
    steps: Annotated[list[str] | None, typer.Argument(metavar="[build] [train]", help="build by default.")] = None,
    pairs: Annotated[int | None, typer.Option(help="Pairs of the build.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of the build; of the training: train_on.gpus.")] = None,
    calibration: Annotated[str | None, typer.Option(help="What covray benchmark wrote.")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Everything random follows from it.")] = None,
    json_: Json = False,
) -> None:
    """What a build or a training will take in time, GPU hours, money and storage."""
    from covray.config import PlanConfig, load_config

    options: dict[str, Any] = {
        "steps": steps or None,
        "pairs": pairs,
        "build_on.gpus": gpus,
        "calibration": calibration,
        "seed": seed,
    }
    resolved = load_config(PlanConfig, config, given(options), sets or ())
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
