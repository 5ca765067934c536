"""Print the configuration of a step, and the files that covray ships."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from covray.cli.completion import complete_steps_and_files
from covray.cli.output import console
from covray.config.reference import STEPS, annotated_yaml
from covray.config.shipped import shipped_files
from covray.errors import ConfigError


def config(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[STEP|FILE]",
            help="A step, or a shipped file as paper/train-7b; by default their names are listed.",
            autocompletion=complete_steps_and_files,
        ),
    ] = None,
) -> None:
    """Print a step's configuration as YAML with every key, its meaning and its default; or a file that covray ships."""
    files = shipped_files()
    if name is None:
        _print_names("steps", list(STEPS))
        _print_names("files, which --config takes by name", [file for file in files if not file.startswith("cluster/")])
        _print_names("files of clusters, to save and edit", [file for file in files if file.startswith("cluster/")])
    elif name in STEPS:
        # Not by rich, which wraps lines and reads brackets as markup: the text is to be saved as a file.
        sys.stdout.write(annotated_yaml(name))
    elif name in files:
        sys.stdout.write(files[name].read_text(encoding="utf-8"))
    else:
        raise ConfigError(f"{name}: is neither a step nor a shipped file; covray config lists both")


def _print_names(title: str, names: list[str]) -> None:
    console.print(f"[bold]{title}[/bold]")
    for name in names:
        console.print(f"  {name}", highlight=False)
