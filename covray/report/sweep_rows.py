"""Cells and trials of a sweep: their order, and what tells them apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypeVar

from covray.report.charts import METHODS
from covray.report.formatting import counted
from covray.sweeps.records import CellEntry, TrialEntry

Axis = Literal["length", "pairs"]
Row = TypeVar("Row", CellEntry, TrialEntry)


class Fixed(NamedTuple):
    """What stays as it is where chain length, or the number of pairs, varies."""

    number: int
    """The other of the two."""
    variant: str
    """All else, as ``variants`` names it."""

    def name(self, axis: Axis) -> str:
        """Return its name where ``axis`` varies."""
        name = f"L={self.number}"
        if axis == "length":
            name = counted(self.number, "pair")
        if self.variant:
            name += f", {self.variant}"
        return name


def fixed(axis: Axis, row: CellEntry | TrialEntry, variant: str) -> Fixed:
    """Return what stays as it is where ``axis`` varies from ``row`` on."""
    if axis == "length":
        return Fixed(row.pairs, variant)
    return Fixed(row.length, variant)


def sort_rows(rows: Iterable[Row]) -> list[Row]:
    """Sort cells or trials by method, then length, then pairs."""
    return sorted(rows, key=lambda row: (method_rank(row.method), row.length, row.pairs, row.label))


def method_rank(method: str) -> tuple[int, str]:
    """Return the place of a method in legends and tables; those that covray does not know come last."""
    rank = len(METHODS)
    if method in METHODS:
        rank = METHODS.index(method)
    return rank, method


def variants(rows: Sequence[CellEntry] | Sequence[TrialEntry]) -> dict[str, str]:
    """Name what tells cells, or trials, apart beside method, length, pairs and seed.

    Returns:
        The name by label; empty where nothing tells a row apart.
    """
    traits: dict[str, list[str]] = {}
    for row in rows:
        tasks = "all tasks"
        if row.tasks is not None:
            tasks = " + ".join(row.tasks)
        fields = [f"{key} {value}" for key, value in row.fields.items()]
        traits[row.label] = [row.scale, tasks, *fields]
    # What all rows have in common tells none apart.
    common: set[str] = set()
    if traits:
        common = set.intersection(*map(set, traits.values()))
    names = {}
    for label, of_row in traits.items():
        distinct = [trait for trait in of_row if trait not in common]
        names[label] = ", ".join(distinct)
    return names
