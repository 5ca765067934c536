"""Check and measure a machine or a cluster, and run steps on it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from covray.cli.options import ConfigFile, Json, Resolved, Sets, checking, numbers
from covray.cli.output import console, escape, figure, print_values
from covray.errors import ConfigError

if TYPE_CHECKING:
    from covray.config import Section


def submit(
    context: typer.Context,
    step: Annotated[str, typer.Argument(metavar="build|train|evaluate|sweep", help="Its options follow it.")],
    address: Annotated[
        str | None, typer.Option(help="Of the dashboard; by default RAY_API_SERVER_ADDRESS, or this machine's.")
    ] = None,
    submission_id: Annotated[str | None, typer.Option(help="Name of the job; by default Ray gives one.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Show the job's output, and end as it does.")] = True,
) -> None:
    """Run a step on a Ray cluster: checked here first, then sent with this very covray. Its paths are the cluster's."""
    from covray.distributed.submit import STEPS
    from covray.distributed.submit import submit as submit_job

    if step not in STEPS:
        raise ConfigError(f"{step}: cannot be submitted; give one of {', '.join(STEPS)}")
    arguments = list(context.args)
    if "--plan" in arguments:
        raise ConfigError("--plan: needs no cluster; run it here, without submit")
    config: Section | None = None
    # A sweep that is resumed has its configuration on the cluster.
    if "--resume" not in arguments:
        token = checking.set(True)
        try:
            context.find_root().command.main(args=[step, *arguments], prog_name="covray submit")
        except Resolved as resolved:
            config = resolved.args[0]
        finally:
            checking.reset(token)
    flags = ["--json"] if "--json" in arguments and config is not None else []
    raise typer.Exit(
        submit_job(
            step,
            config,
            flags if config is not None else arguments,
            address=address,
            submission_id=submission_id,
            wait=wait,
            console=console,
        )
    )


def doctor(
    path: Annotated[str, typer.Option("--path", help="Storage where datasets and runs are to go.")] = ".",
    prior: Annotated[str, typer.Option(help="nano, a diffusers folder, or a hub id.")] = "nano",
    tokenizer: Annotated[str, typer.Option(help="nano, a VQModel folder, or a hub id.")] = "nano",
    backbone: Annotated[str, typer.Option(help="nano, a LlamaForCausalLM folder, or a hub id.")] = "nano",
    json_: Json = False,
) -> None:
    """Check this machine, or the cluster of RAY_ADDRESS, and say what to do. Exit code 1: there are problems."""
    from covray.doctor.checks import examine

    findings = list(examine(path, prior, tokenizer, backbone))
    counts = {status: sum(finding.status == status for finding in findings) for status in ("problem", "note", "ok")}
    if json_:
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        styles = {"problem": "red", "note": "yellow", "ok": "dim"}
        table = Table(show_header=False, box=None, pad_edge=False)
        for finding in sorted(findings, key=lambda finding: list(counts).index(finding.status)):
            advice = f"\n[default]{escape(finding.advice)}[/default]" if finding.advice else ""
            table.add_row(escape(finding.name), escape(finding.found) + advice, style=styles[finding.status])
        console.print(table, highlight=False)
        console.print(f"{counts['problem']} problems, {counts['note']} notes, {counts['ok']} ok", highlight=False)
    if counts["problem"]:
        raise typer.Exit(1)


def benchmark(
    out: Annotated[str, typer.Option("--out", help="Calibration to write, .yaml or .json.")],
    pairs: Annotated[str | None, typer.Option(help="Pairs of the two builds, by default 4 and 12 blocks.")] = None,
    train_steps: Annotated[int, typer.Option(min=8, help="Steps of the training.")] = 24,
    config: ConfigFile = None,
    sets: Sets = None,
    json_: Json = False,
) -> None:
    """Measure small real builds and a training on this hardware, for covray plan. Takes a PLAN's configuration."""
    from covray.config import PlanConfig, load_config

    resolved = load_config(PlanConfig, config, {}, sets or ())
    from covray.distributed.benchmark import calibrate

    calibration = calibrate(resolved, out, numbers("--pairs", pairs), train_steps)
    values = calibration.model_dump(mode="json")
    if json_:
        print(json.dumps(values))
        return
    for section in ("build", "train"):
        if values[section] is not None:
            console.print(f"[bold]{section}[/bold]")
            rates = {key: value for key, value in values[section].items() if key != "identity"}
            print_values({key: figure(value) for key, value in rates.items()}, False)
    console.print(escape(out), highlight=False, soft_wrap=True)
