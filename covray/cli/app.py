"""The command line: every command with its name, and what happens to a mistake.

A command parses its options, calls one function and prints the result. Commands import what they call when they run, so
that ``covray --help`` does not wait for torch.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from covray import __version__
from covray.cli import answers, chains, cluster, models, pairs, planning, stories, sweeps, training
from covray.cli.output import console, escape
from covray.errors import CovrayError

STEPS = "Step by step"
MODELS = "Models and data"
SCALE = "Before it starts, and at scale"

app = typer.Typer(
    name="covray",
    help="Chains of vision: a diffusion model interpolates from an image to its label, a VQGAN writes every frame as "
    "tokens, vision models learn to think in them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(rich_help_panel=STEPS)(chains.build)
app.command(rich_help_panel=STEPS)(chains.view)
app.command(rich_help_panel=STEPS)(chains.inspect)
app.command(rich_help_panel=STEPS)(stories.demo)
app.command(rich_help_panel=STEPS)(training.train)
app.command(rich_help_panel=STEPS)(training.export)
app.command(rich_help_panel=MODELS)(models.fetch)
app.command(rich_help_panel=STEPS)(answers.generate)
app.command(rich_help_panel=STEPS)(answers.evaluate)
app.command(rich_help_panel=STEPS)(sweeps.sweep)
app.command(rich_help_panel=STEPS)(sweeps.report)
# What follows the step is the step's own.
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
    rich_help_panel=SCALE,
)(cluster.submit)
app.command(rich_help_panel=SCALE)(cluster.doctor)
app.command(rich_help_panel=SCALE)(planning.plan)
app.command(rich_help_panel=SCALE)(cluster.benchmark)

pairs_app = typer.Typer(help="Make a manifest of (image, label) pairs.", no_args_is_help=True)
pairs_app.command()(pairs.photos)
pairs_app.command()(pairs.scenes)
pairs_app.command()(pairs.manifest)
pairs_app.command()(pairs.coco)
pairs_app.command()(pairs.nyuv2)
pairs_app.command()(pairs.bsds)
pairs_app.command()(pairs.lol)
app.add_typer(pairs_app, name="pairs", rich_help_panel=STEPS)

nano_app = typer.Typer(help="The nano family: train it again, measure it.", no_args_is_help=True)
nano_app.command("train")(models.nano_train)
nano_app.command("measure")(models.nano_measure)
app.add_typer(nano_app, name="nano", rich_help_panel=MODELS)

experiments_app = typer.Typer(help="Fixed experiments on the nano family.", no_args_is_help=True)
experiments_app.command("claims")(stories.experiments_claims)
app.add_typer(experiments_app, name="experiments", rich_help_panel=SCALE)

convert_app = typer.Typer(help="Weights of other programs, written as covray reads them.", no_args_is_help=True)
convert_app.command("tokenizer")(models.convert_a_tokenizer)
convert_app.command("backbone")(models.convert_a_backbone)
convert_app.command("prior")(models.convert_a_prior)
app.add_typer(convert_app, name="convert", rich_help_panel=MODELS)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        console.print(f"covray {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the console script: a user's mistake is one line and exit code 2."""
    try:
        app()
    except CovrayError as error:
        _fail(str(error), 2)
    except SystemExit as end:
        if end.code == 130:  # what typer makes of Ctrl-C
            _fail("stopped; the same command continues", 130)
        raise


def _fail(message: str, code: int) -> None:
    Console(stderr=True, emoji=False).print(f"[red]covray:[/red] {escape(message)}", highlight=False, soft_wrap=True)
    sys.exit(code)
