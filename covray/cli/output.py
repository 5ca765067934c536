"""How commands print: tables, one JSON object, and text that may come from strangers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import rich.markup
from rich.console import Console
from rich.table import Table

console = Console(emoji=False)  # a path may hold ":car:"


def escape(text: str) -> str:
    """Return one printable line without rich's markup: messages may quote hostile file names."""
    printable = ""
    for character in " ".join(text.split()):
        printable += character if character.isprintable() else "?"
    return rich.markup.escape(printable)


def print_values(values: Mapping[str, object], json_: bool) -> None:
    """Print ``values`` as a table of names and values, or with ``json_`` as one JSON object."""
    if json_:
        print(json.dumps(values))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in values.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        table.add_row(key.replace("_", " "), escape(shown))
    console.print(table)


def figure(value: Any) -> str:
    """Return a number for people, or of several the mean with their range; a text is returned as it is."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        mean, low, high = figure(value["mean"]), figure(value["low"]), figure(value["high"])
        if low == high:
            return mean
        return f"{mean}  ({low} to {high})"
    if isinstance(value, float) and abs(value) < 100:
        return f"{value:.3g}"
    return f"{value:,.0f}"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide the deprecation warnings that libraries give about each other: a user of covray can fix none of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
