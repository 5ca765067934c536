"""The demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from covray.cli.options import Json, require_folder_name
from covray.cli.output import console, escape
from covray.cli.results import print_evaluation


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder to write.", callback=require_folder_name)] = Path(
        "covray-demo"
    ),
    think: Annotated[
        str | None,
        typer.Option("--think", help="Folder with ThinkDiff's parts, as for covray serve; it draws a picture, too."),
    ] = None,
    json_: Json = False,
) -> None:
    """The whole story on the nano family, offline, in minutes: pictures in, chains of vision to look at."""
    from covray.evaluation.records import EvaluationResults
    from covray.recipes.demo import run_demo

    result = run_demo(out, console, think)
    if json_:
        print(json.dumps(result.to_json()))
        return
    folder = str(Path(result.evaluation).parent)
    print_evaluation(EvaluationResults.read(folder), folder)
    about = "On so few pairs an adapter learns to write chains; what longer trainings reach is in docs/results.md."
    console.print(f"[dim]{about}[/dim]", highlight=False, soft_wrap=True)
    console.print(f"\nDone in {result.seconds:.0f} s. Open, in this order:")
    for file in (result.answers, result.page, result.evaluation):
        console.print(f"  [bold]{escape(file)}[/bold]", highlight=False, soft_wrap=True)
