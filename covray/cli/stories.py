"""The demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from covray.cli.options import Json, require_folder_name
from covray.cli.output import console


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
    from covray.recipes.demo import run_demo

    result = run_demo(out, console, think)
    if json_:
        print(json.dumps(result.to_json()))
