"""``covray experiments``: fixed programmes of experiments on the nano models, one function a programme."""

from __future__ import annotations

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
