"""``covray experiments``: fixed programmes of experiments on the nano models, one function a programme."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from covray.cli.options import Json, OutFolder, Plan, Seed
from covray.cli.output import console, escape
from covray.cli.results import print_sweep
from covray.errors import ConfigError

if TYPE_CHECKING:
    from covray.evaluation.claims.records import ProgrammeResults
    from covray.recipes.claims_run import Programme
    from covray.recipes.thinking.compositions import CompositionScores
    from covray.recipes.thinking.table import ShotTable

_BUDGET = (
    "Run the whole programme: noise in frames, controls, lengths, alphas, decodings and votes, learning curves. small: "
    "hours on two cores; full: days. By default only none, linear and diffusion."
)


def claims(
    out: OutFolder,
    budget: Annotated[Literal["small", "full"] | None, typer.Option(help=_BUDGET)] = None,
    backbone: Annotated[
        list[str] | None,
        typer.Option(
            help="With --budget: NAME=PATH, a backbone; all arms start from the first, the others are compared."
        ),
    ] = None,
    tokenizer: Annotated[str, typer.Option(help="With --budget: the tokenizer of the backbones.")] = "nano",
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help="With --budget: run this arm only; repeatable. --plan lists all. Without it the command runs the rest."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Without --budget: chains of 4 by both methods; by default scenes, built.")
    ] = None,
    plan: Plan = False,
    json_: Json = False,
) -> None:
    """None, linear and diffusion on seven tasks, or with --budget all arms. The same command continues.

    The first takes an hour on two cores.
    """
    if budget is None:
        if backbone or arm or plan:
            raise ConfigError("--backbone, --arm, --plan: are of the programme; give --budget small or full")
        # Recipes import torch, for which no --help should wait.
        from covray.recipes.claims import run_claims

        results = run_claims(out, data)
        print_sweep(results, f"{out}/claims", json_)
        return
    if data is not None:
        raise ConfigError("--data: the programme builds its own chains; leave it out, or leave out --budget")
    from covray.recipes.claims_run import open_programme

    programme = open_programme(out, budget, tuple(backbone or ("nano=nano",)), tokenizer)
    if plan:
        _print_plan(programme, arm or (), json_)
        return
    from covray.recipes.claims_page import run_programme

    print_claims(run_programme(programme, arm or ()), out, json_)


def diffusionvl(
    model: Annotated[str, typer.Option(help="The autoregressive checkpoint: covray nano train vlm makes one.")],
    out: OutFolder,
    data: Annotated[str | None, typer.Option(help="Manifest with words; by default portraits, rendered.")] = None,
    budget: Annotated[str, typer.Option(metavar="small|medium|full", help="Seeds, samples and ablations.")] = "full",
    json_: Json = False,
) -> None:
    """Blocks against the model tuned as long token by token: quality, speed, ablations. The same command continues."""
    from covray.recipes.diffusionvl import run_diffusionvl
    from covray.recipes.diffusionvl_tables import as_markdown

    results = run_diffusionvl(out, model, data, budget)
    print(json.dumps(results.to_json()) if json_ else as_markdown(results))


def print_claims(results: ProgrammeResults, out: str, json_: bool) -> None:
    """Print what the claims came to; all else is on the page."""
    if json_:
        print(json.dumps(results.to_json()))
        return
    from rich.table import Table

    table = Table("claim", "equal", "gain", "95%", "verdict", box=None, pad_edge=False)
    for claim in results.claims:
        # A claim whose arms have not run, or have no common scores.
        if claim.gain_percent is None:
            continue
        interval = "–" if claim.low is None else f"{claim.low:+.1f} to {claim.high:+.1f}"
        table.add_row(escape(claim.claim), escape(claim.view), f"{claim.gain_percent:+.1f}%", interval, claim.verdict)
    if table.row_count:
        console.print(table)
    console.print(escape(results.conclusion), highlight=False, soft_wrap=True)
    console.print(f"{results.arms_done} of {results.arms_planned} trainings done", highlight=False)
    console.print(f"{escape(out.rstrip('/'))}/index.html", highlight=False, soft_wrap=True)


def _print_plan(programme: Programme, names: Sequence[str], json_: bool) -> None:
    """Print every arm, or those of ``names``, with its steps and tokens; nothing is started."""
    from rich.table import Table

    from covray.recipes.claims_run import plan_programme

    planned = plan_programme(programme, names)
    if json_:
        print(json.dumps(asdict(planned)))
        return
    table = Table("arm", "seeds", "steps", "tokens", "", box=None, pad_edge=False)
    for arm in planned.arms:
        row = (arm.arm, str(arm.seeds), f"{arm.steps:,}", f"{arm.tokens:,}", arm.about)
        table.add_row(*map(escape, row))
    console.print(table)
    console.print(f"{planned.tokens:,} tokens to train on; best chains: all seeds besides", highlight=False)


def thinking(
    out: OutFolder,
    budget: Annotated[
        Literal["small", "medium", "full"],
        typer.Option(
            help="full: the table; medium: with fewer captions, steps and episodes; small: every station in about an "
            "hour, whose figures mean nothing."
        ),
    ] = "full",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """ThinkDiff on rendered portraits: nano parts, aligners, the table of its ablations. The same command continues."""
    from covray.recipes.thinking.programme import run_thinking

    results = run_thinking(out, budget, threads, device, seed)
    if json_:
        print(json.dumps(results.to_json()))
        return
    for shots, own in results.shots.items():
        _print_rows(shots, own)
    for kind, rows in results.compositions.items():
        _print_compositions(kind, rows)


def _print_rows(shots: str, results: ShotTable) -> None:
    """Print a table of ThinkDiff's programme."""
    from rich.table import Table

    table = Table(shots, "right", "95%", "held-out cells", "below LVLM", "p", box=None, pad_edge=False)
    for name, row in results.rows.items():
        right, held_out, below = row.right, row.held_out, row.below_reference
        cells = [name, f"{right.mean:.3f}", f"{right.low:.3f} to {right.high:.3f}"]
        cells.append("" if held_out is None else f"{held_out.mean:.3f}")
        if below is not None:
            cells += [f"{below.mean:+.3f}", f"{below.p_value:.4f}"]
        table.add_row(*cells)
    table.add_row("chance", f"{results.chance:.3f}")
    console.print(table)


def _print_compositions(kind: str, rows: dict[str, CompositionScores]) -> None:
    """Print a table of ThinkDiff-CLIP's compositions."""
    from rich.table import Table

    table = Table(kind, "facts kept", "all kept", "obeyed", "both", box=None, pad_edge=False)
    for name, row in rows.items():
        means = (row.facts, row.kept, row.obeyed, row.both)
        table.add_row(name, *(f"{mean.mean:.3f}" for mean in means))
    console.print(table)
