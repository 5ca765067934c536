"""``covray experiments``: fixed programmes of experiments on the nano models, one function a programme."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from covray.cli.options import Json, OutFolder
from covray.cli.results import print_sweep


def claims(
    out: OutFolder,
    data: Annotated[str | None, typer.Option(help="Chains of 4 by both methods; by default scenes, built.")] = None,
    json_: Json = False,
) -> None:
    """None, linear and diffusion on seven tasks, three seeds: an hour on two cores. The same command continues."""
    from covray.recipes.claims import run_claims

    results = run_claims(out, data)
    print_sweep(results, f"{out}/claims", json_)


def diffusionvl(
    model: Annotated[str, typer.Option(help="The autoregressive checkpoint: covray nano train vlm makes one.")],
    out: OutFolder,
    data: Annotated[str | None, typer.Option(help="Manifest with words; by default portraits, rendered.")] = None,
    budget: Annotated[str, typer.Option(metavar="small|full", help="Seeds, samples and ablations.")] = "full",
    json_: Json = False,
) -> None:
    """Blocks against the model tuned as long token by token: quality, speed, ablations. The same command continues."""
    from covray.recipes.diffusionvl import run_diffusionvl, tables

    results = run_diffusionvl(out, model, data, budget)
    print(json.dumps(results) if json_ else tables(results))
