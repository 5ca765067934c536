"""The command line: every command with its name, and what happens to a mistake.

A command parses its options, calls one function and prints the result. Commands import what they call when they run, so
that ``covray --help`` does not wait for torch.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from covray import __version__
from covray.cli import (
    answers,
    chains,
    cluster,
    configurations,
    experiments,
    models,
    pairs,
    pairs_lists,
    planning,
    plugins,
    serve,
    sharing,
    stories,
    sweeps,
    think,
    training,
    vlm,
)
from covray.cli.command import Command, once_spelled
from covray.cli.output import console, escape, quiet_libraries
from covray.cli.waiting import details_shown, informed, show_details
from covray.distributed.dashboard import ask_for_dashboard
from covray.errors import CovrayError

STEPS = "Step by step"
MODELS = "Models and data"
SISTERS = "Vision-language models"
SCALE = "Before it starts, and at scale"

_STOPPED = "stopped; run the same command again to continue"

app = typer.Typer(
    name="covray",
    help="Chains of vision: a diffusion model interpolates from an image to its label, a VQGAN writes every frame as "
    "tokens, vision models learn to think in them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command(cls=once_spelled(pairs="manifest", lengths="length", methods="method"), rich_help_panel=STEPS)(chains.build)
app.command(cls=Command, rich_help_panel=STEPS)(chains.view)
app.command(cls=Command, rich_help_panel=STEPS)(chains.inspect)
app.command(cls=Command, rich_help_panel=STEPS)(stories.demo)
app.command(cls=once_spelled(pairs="example-pairs"), rich_help_panel=STEPS)(training.train)
app.command(cls=Command, rich_help_panel=STEPS)(training.export)
app.command(cls=Command, rich_help_panel=MODELS)(models.fetch)
app.command(cls=Command, rich_help_panel=MODELS)(sharing.push)
app.command(cls=Command, rich_help_panel=STEPS)(answers.generate)
app.command(cls=once_spelled(pairs="example-pairs", tasks="task"), rich_help_panel=STEPS)(answers.evaluate)
app.command(cls=Command, rich_help_panel=STEPS)(serve.serve)
app.command(cls=Command, rich_help_panel=STEPS)(sweeps.sweep)
app.command(cls=Command, rich_help_panel=STEPS)(sweeps.report)
# What follows the step is the step's own.
app.command(
    cls=Command,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
    rich_help_panel=SCALE,
)(cluster.submit)
app.command(cls=Command, rich_help_panel=SCALE)(cluster.doctor)
app.command(cls=Command, rich_help_panel=SCALE)(configurations.config)
app.command(cls=Command, rich_help_panel=MODELS)(plugins.plugins)
app.command(cls=Command, rich_help_panel=SCALE)(planning.plan)
app.command(cls=Command, rich_help_panel=SCALE)(cluster.benchmark)

pairs_app = typer.Typer(help="Make a manifest of (image, label) pairs, and check it.", no_args_is_help=True)
pairs_app.command(cls=once_spelled(tasks="task"))(pairs.photos)
pairs_app.command(cls=Command)(pairs.label)
pairs_app.command(cls=once_spelled(tasks="task"))(pairs.scenes)
pairs_app.command(cls=Command)(pairs.portraits)
pairs_app.command(cls=Command)(pairs_lists.manifest)
pairs_app.command(cls=Command)(pairs_lists.hub)
pairs_app.command(cls=Command)(pairs.coco)
pairs_app.command(cls=Command)(pairs.nyuv2)
pairs_app.command(cls=Command)(pairs.bsds)
pairs_app.command(cls=Command)(pairs.lol)
pairs_app.command("from", cls=Command)(pairs.from_plugin)
pairs_app.command(cls=Command)(pairs.check)
app.add_typer(pairs_app, name="pairs", rich_help_panel=STEPS)

vlm_app = typer.Typer(help="Vision-language models: train, generate, evaluate, compare.", no_args_is_help=True)
vlm_app.command(cls=Command)(vlm.train)
vlm_app.command(cls=Command)(vlm.convert)
vlm_app.command(cls=Command)(vlm.generate)
vlm_app.command(cls=Command)(vlm.evaluate)
vlm_app.command(cls=Command)(vlm.compare)
app.add_typer(vlm_app, name="vlm", rich_help_panel=SISTERS)

think_app = typer.Typer(
    help="ThinkDiff: a vision-language model's thoughts, drawn by a diffusion model.", no_args_is_help=True
)
think_app.command(cls=Command)(think.features)
think_app.command(cls=Command)(think.train)
think_app.command(cls=Command)(think.generate)
think_app.command(cls=Command)(think.evaluate)
app.add_typer(think_app, name="think", rich_help_panel=SISTERS)

nano_app = typer.Typer(help="The nano family: train it, measure it, judge its tokenizer.", no_args_is_help=True)
nano_app.command("train", cls=Command)(models.nano_train)
nano_app.command("measure", cls=Command)(models.nano_measure)
nano_app.command("probe", cls=Command)(models.nano_probe)
app.add_typer(nano_app, name="nano", rich_help_panel=MODELS)

experiments_app = typer.Typer(help="Fixed experiments on the nano family.", no_args_is_help=True)
experiments_app.command("claims", cls=Command)(experiments.claims)
experiments_app.command("diffusionvl", cls=Command)(experiments.diffusionvl)
experiments_app.command("thinking", cls=Command)(experiments.thinking)
app.add_typer(experiments_app, name="experiments", rich_help_panel=SCALE)

convert_app = typer.Typer(help="Weights of other programs, written as covray reads them.", no_args_is_help=True)
convert_app.command("tokenizer", cls=Command)(models.convert_a_tokenizer)
convert_app.command("backbone", cls=Command)(models.convert_a_backbone)
convert_app.command("prior", cls=Command)(models.convert_a_prior)
convert_app.command("aligner", cls=Command)(think.convert_an_aligner)
app.add_typer(convert_app, name="convert", rich_help_panel=MODELS)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show the cause of an error, and where Ray's logs are. All commands take it."),
    ] = False,
    dashboard: Annotated[
        bool,
        typer.Option(
            "--dashboard", help="Show Ray's dashboard, and print its address. All commands that start Ray take it."
        ),
    ] = False,
) -> None:
    if debug:
        show_details()
    if dashboard:
        ask_for_dashboard()
    if version:
        console.print(f"covray {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the console script: a user's mistake is one line and exit code 2; Ctrl-C is 130, SIGTERM 143."""
    with informed(), quiet_libraries(), _ended_by_signals() as received:
        try:
            app(prog_name="covray")
        except CovrayError as error:
            if details_shown():
                traceback.print_exception(error)
            _fail(str(error), 2)
        except (KeyboardInterrupt, SystemExit) as end:
            if received or isinstance(end, KeyboardInterrupt) or end.code == 130:  # what typer makes of Ctrl-C
                number = received[0] if received else signal.SIGINT
                _fail(_STOPPED, 128 + number)
            raise


_SWALLOWING = ("<frozen importlib._bootstrap>", f"{os.sep}trimesh{os.sep}")
"""Parts of the names of files whose code may go on after any exception: imports, as some libraries do without what
cannot be imported, and trimesh, which falls back to slower code."""
_SWALLOWING_S = 10.0
"""So long a stop waits for the end of such code, so that what is open is closed. Imports take seconds on a busy
machine."""
_AGAIN_S = 0.05
_LOST_S = 1.0
"""Other code may swallow an interrupt, too. This long after it the command is looked at again."""


@contextmanager
def _ended_by_signals() -> Iterator[list[int]]:
    """Make SIGTERM end the block as Ctrl-C does; the list has the numbers of the signals that came."""
    received: list[int] = []
    first_s = math.inf  # when the first came

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal first_s
        received.append(number)
        first_s = min(first_s, time.monotonic())
        end(number, frame)

    def end(_: int, frame: FrameType | None) -> None:
        if _is_swallowing(frame):
            if time.monotonic() - first_s > _SWALLOWING_S:
                _end_at_once(received[-1])
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)  # no thread: the signal may have come to one that is started
            return
        signal.setitimer(signal.ITIMER_REAL, _LOST_S)
        raise KeyboardInterrupt

    def look_again(number: int, frame: FrameType | None) -> None:
        if _is_ending():
            signal.setitimer(signal.ITIMER_REAL, _LOST_S)
        else:
            end(number, frame)

    def ignored(unraisable: sys.UnraisableHookArgs) -> None:
        # Python ignores an exception in a finaliser or a callback of C, and the command would go on.
        if received and isinstance(unraisable.exc_value, KeyboardInterrupt):
            _end_at_once(received[-1])
        hook(unraisable)

    hook, sys.unraisablehook = sys.unraisablehook, ignored
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as a shell's background job ignores Ctrl-C
            before[number] = signal.signal(number, interrupt)
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, look_again)
    try:
        yield received
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


def _end_at_once(number: int) -> NoReturn:
    """End the process where an interrupt would be swallowed. Nothing is lost: a command can be killed anywhere."""
    os.write(2, f"covray: {_STOPPED}\n".encode())
    os._exit(128 + number)


def _is_ending() -> bool:
    """Return whether something is being closed because of an interrupt: then it is what is handled, or led to that."""
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


def _is_swallowing(frame: FrameType | None) -> bool:
    """Return whether an interrupt could be ignored where a signal came."""
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in _SWALLOWING):
            return True
        frame = frame.f_back
    return False


def _fail(message: str, code: int) -> NoReturn:
    Console(stderr=True, emoji=False).print(f"[red]covray:[/red] {escape(message)}", highlight=False, soft_wrap=True)
    sys.exit(code)
