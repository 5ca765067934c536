"""The page of all commands, made from what ``covray --help`` is made from.

``python -m covray.cli.reference > docs/commands.md`` writes the page again.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from covray.cli.app import app

_INTRODUCTION = """\
# Commands

`covray --help` lists the commands, `covray COMMAND --help` the options of one. All commands take `--help`, and
`--debug`, which shows the cause of an error and where Ray's logs are. Commands that start Ray show its dashboard with
`--dashboard`. A mistake is one line and exit code 2; Ctrl-C ends with 130. `covray --version` prints the version.
`covray --install-completion` makes the shell complete commands, options and values.

This page is generated from the commands in `covray/cli/`: `python -m covray.cli.reference > docs/commands.md`.
"""
_VALUES = {str: "TEXT", int: "INTEGER", float: "NUMBER", Path: "PATH"}
"""What stands for a value of a type."""


def commands_page() -> str:
    """Return docs/commands.md: every command with its arguments and its options."""
    sections: dict[str, list[str]] = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        sections.setdefault(command.rich_help_panel, []).extend(_entries(f"covray {name}", command))
    parts = [_INTRODUCTION]
    for title, entries in sections.items():
        parts += [f"## {title}\n", *entries]
    return "\n".join(parts)


def _entries(name: str, command: Any) -> Iterator[str]:
    """Yield the entry of a command; of a group, one of the group and one of each of its commands."""
    inner = getattr(command, "commands", None)
    text = inspect.cleandoc(command.help or "").replace("``", "`")
    if inner is None:
        items = "\n".join(_items(command))
        yield f"### {name}\n\n{text}\n\n```sh\n{_usage(name, command)}\n```\n\n{items}\n"
        return
    yield f"### {name}\n\n{text}\n"
    for word, member in inner.items():
        yield from _entries(f"{name} {word}", member)


def _usage(name: str, command: Any) -> str:
    """Return how a command is called."""
    words = [name, "[OPTIONS]"]
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            word = _argument(parameter)
            words.append(word if parameter.required or word.startswith("[") else f"[{word}]")
    return " ".join(words)


def _argument(parameter: Any) -> str:
    """Return the name of an argument, as its value stands in the usage."""
    name: str = parameter.metavar or parameter.name.upper()
    return f"{name}..." if parameter.nargs != 1 and not name.endswith("...") else name


def _items(command: Any) -> Iterator[str]:
    """Yield a line for each argument and option of a command."""
    # The annotations say more than the parsed options: the words of a Literal, and that a text is a path.
    types = get_type_hints(command.callback)
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        if parameter.param_type_name == "argument":
            shown = _argument(parameter)
        else:
            shown = _option(parameter, types[parameter.name])
        marks = ""
        if parameter.required:
            marks += " (required)"
        if getattr(parameter, "multiple", False):
            marks += " (repeatable)"
        meaning = " ".join((parameter.help or "").split()).replace("``", "`")
        yield f"- `{shown}`{marks}: {meaning}{_default(parameter)}"


def _option(parameter: Any, annotation: Any) -> str:
    """Return an option with what stands for its value."""
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    if parameter.is_flag:
        return names
    value = parameter.metavar or _value(annotation)
    return f"{names} {value}"


def _value(annotation: Any) -> str:
    """Return what stands for a value of a type: its kind, or the words that it can be."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, inner))
    if origin in (Union, UnionType):
        return _value(next(kind for kind in inner if kind is not NoneType))
    if origin is tuple:
        return " ".join(map(_value, inner))
    if inner:
        return _value(inner[0])
    return _VALUES[annotation]


def _default(parameter: Any) -> str:
    """Return the sentence of a default; nothing where there is none, or where the text of the meaning has it."""
    if parameter.required or parameter.default in (None, False, ()):
        return ""
    value = parameter.opts[0] if parameter.default is True else parameter.default
    return f" Default: {value}."


if __name__ == "__main__":
    print(commands_page(), end="")
