"""Check and measure a machine or a cluster, and run steps on it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from covray.cli.answers import EVALUATE
from covray.cli.chains import BUILD
from covray.cli.options import ConfigFile, Json, Sets, StepOptions, numbers
from covray.cli.output import console, escape, figure, print_values
from covray.cli.serve import SERVE
from covray.cli.sweeps import SWEEP
from covray.cli.think import EVALUATE as THINK_EVALUATE
from covray.cli.think import FEATURES as THINK_FEATURES
from covray.cli.think import TRAIN as THINK_TRAIN
from covray.cli.training import TRAIN
from covray.config import PlanConfig, Section, load_config
from covray.errors import ConfigError
from covray.progress import own_display

STEPS: dict[str, StepOptions[Any]] = {
    "build": BUILD,
    "train": TRAIN,
    "evaluate": EVALUATE,
    "sweep": SWEEP,
    "serve": SERVE,
    "think features": THINK_FEATURES,
    "think train": THINK_TRAIN,
    "think evaluate": THINK_EVALUATE,
}
"""The steps that can be submitted, with the options that make their configuration."""
PAIRS = "pairs"
"""Can be submitted, too; it has no configuration, and its arguments are the job's."""
_GROUPS = ("think",)
"""Groups of commands; the name of the command follows."""

_STATUS_STYLES = {"problem": "red", "note": "yellow", "ok": "dim"}
"""Style of what the doctor finds, the worst first."""


def submit(
    context: typer.Context,
    step: Annotated[
        str, typer.Argument(metavar="pairs|build|train|evaluate|sweep|serve|think", help="Its options follow.")
    ],
    address: Annotated[
        str | None, typer.Option(help="Address of the dashboard; by default RAY_API_SERVER_ADDRESS, or this machine's.")
    ] = None,
    submission_id: Annotated[str | None, typer.Option(help="Name of the job; by default Ray gives one.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Show the job's output, and end as it does.")] = True,
) -> None:
    """Run a step on a Ray cluster: checked here first, then sent with this very covray. Its paths are the cluster's."""
    arguments = list(context.args)
    if step in _GROUPS and arguments:
        step = f"{step} {arguments.pop(0)}"
    if step not in (PAIRS, *STEPS):
        raise ConfigError(f"{step}: cannot be submitted; give one of {PAIRS}, {', '.join(STEPS)}")
    if "--plan" in arguments:
        raise ConfigError("--plan: needs no cluster; run it here, without submit")
    if step == PAIRS:
        config = None
        require_actors(context, arguments)
    else:
        config = submitted_config(context, step, arguments)
    # The job's configuration is sent as a file, so of the options only those remain that are no part of it.
    options = arguments
    if config is not None:
        options = ["--json"] if "--json" in arguments else []
    from covray.distributed.submit import submit as submit_job

    with own_display():
        code = submit_job(
            step, config, options, address=address, submission_id=submission_id, wait=wait, console=console
        )
    raise typer.Exit(code)


def require_actors(context: typer.Context, arguments: list[str]) -> None:
    """Parse ``covray pairs ARGUMENTS``, and refuse what would not be made by actors.

    Raises:
        ConfigError: The source is unknown, or ``--actors`` is missing.
    """
    sources = context.find_root().command.commands[PAIRS].commands  # type: ignore[attr-defined]
    source = arguments[0] if arguments else ""
    if source not in sources:
        raise ConfigError(f"pairs {source}: no such source; give one of {', '.join(sources)}")
    # Parsed by the command itself: its mistakes are found here, before anything is sent.
    parsed = sources[source].make_context(f"covray submit pairs {source}", arguments[1:])
    if parsed.params.get("actors") is None:
        raise ConfigError(f"pairs {source}: is made in one process; give --actors, or run it here without submit")


def submitted_config(context: typer.Context, step: str, arguments: list[str]) -> Section | None:
    """Return the configuration that ``covray STEP ARGUMENTS`` would run; the step itself is only parsed, not run.

    None for a sweep that is resumed, which has its configuration on the cluster.

    Raises:
        ConfigError: The configuration is refused.
    """
    command: Any = context.find_root().command
    for name in step.split():
        command = command.commands[name]
    parsed = command.make_context(f"covray submit {step}", list(arguments))
    if parsed.params.get("resume"):
        return None
    return STEPS[step].resolve(parsed)


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
    counts = Counter(finding.status for finding in findings)
    if json_:
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        table = Table(show_header=False, box=None, pad_edge=False)
        for status, style in _STATUS_STYLES.items():
            for finding in findings:
                if finding.status == status:
                    advice = f"\n[default]{escape(finding.advice)}[/default]" if finding.advice else ""
                    table.add_row(status, escape(finding.name), escape(finding.found) + advice, style=style)
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
    resolved = load_config(PlanConfig, config, {}, sets or ())
    sizes = None if pairs is None else numbers("--pairs", pairs)
    from covray.distributed.benchmark import calibrate

    calibration = calibrate(resolved, out, sizes, train_steps)
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
