"""The demo and the fixed experiments on the nano models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from covray.cli.options import Json, OutFolder, require_folder_name
from covray.cli.output import console
from covray.cli.results import print_sweep


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder to write.", callback=require_folder_name)] = Path(
        "covray-demo"
    ),
    json_: Json = False,
) -> None:
    """The whole story on the nano family, offline, in minutes: pictures in, chains of vision to look at."""
    from covray.recipes.demo import run_demo

    result = run_demo(out, console)
    if json_:
        print(json.dumps(result.to_json()))


def experiments_claims(
    out: OutFolder,
    data: Annotated[str | None, typer.Option(help="Chains of 4 by both methods; by default scenes, built.")] = None,
    json_: Json = False,
) -> None:
    """None, linear and diffusion on seven tasks, three seeds: an hour on two cores. The same command continues."""
    from covray.recipes.claims import run_claims

    results = run_claims(out, data)
    print_sweep(results, f"{out}/claims", json_)
