"""Lay out the dot plot of an evaluation: the mean of every subject with its interval, a line a subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from covray.report.charts import Axis, DrawnTick, Tick, round_ticks
from covray.report.formatting import fixed, is_finite, numbers

_ROW_PX, _CAP_PX, _AXIS_PX = 28, 22, 48
"""Heights: of a subject, of the ceiling's name above the plot, and of the axis below it."""


@dataclass(frozen=True)
class Dot:
    """The score of one subject."""

    name: str
    kind: str
    """The kind of subject: the ceiling is drawn as a line through all rows, adapters stand out."""
    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class DrawnDot:
    """A dot as it is drawn: across in percent of the plot's width, down in pixels."""

    name: str
    kind: str
    text: str
    x: float
    y: float
    whisker: tuple[float, float] | None


@dataclass(frozen=True)
class DotPlot:
    """A plot with the place of everything in it."""

    top: int
    bottom: int
    height: int
    ticks: tuple[DrawnTick, ...]
    rows: tuple[DrawnDot, ...]
    ceilings: tuple[DrawnDot, ...]


def draw_dots(dots: Sequence[Dot]) -> DotPlot:
    """Lay out ``dots``, at least one, from the top down."""
    # The axis shows every mean and both ends of every interval.
    values: list[float] = []
    for dot in dots:
        values += filter(is_finite, (dot.mean, dot.low, dot.high))
    ticks, decimals = round_ticks(min(values), max(values))
    tick_marks = [Tick(number, fixed(number, decimals)) for number in ticks]
    axis = Axis(tuple(tick_marks), 0.0, 100.0)  # percent of the plot's width
    # The ceiling is a line through all rows, and takes no row of its own.
    rows: list[DrawnDot] = []
    ceilings: list[DrawnDot] = []
    for dot in dots:
        y = _CAP_PX + _ROW_PX * (len(rows) + 0.5)
        drawn = _draw_dot(dot, axis, y)
        if dot.kind == "ceiling":
            ceilings.append(drawn)
        else:
            rows.append(drawn)
    drawn_ticks = []
    for tick in axis.ticks:
        drawn_ticks.append(DrawnTick(round(axis.place(tick.value), 2), tick.text))
    bottom = _CAP_PX + _ROW_PX * len(rows)
    return DotPlot(
        top=_CAP_PX,
        bottom=bottom,
        height=bottom + _AXIS_PX,
        ticks=tuple(drawn_ticks),
        rows=tuple(rows),
        ceilings=tuple(ceilings),
    )


def _draw_dot(dot: Dot, axis: Axis, y: float) -> DrawnDot:
    mean, low, high = numbers(dot.mean, dot.low, dot.high)
    whisker = None
    if is_finite(dot.low) and is_finite(dot.high):
        whisker = round(axis.place(dot.low), 2), round(axis.place(dot.high), 2)
    text = f"{dot.name}: {mean} [{low}, {high}]"
    return DrawnDot(dot.name, dot.kind, text, round(axis.place(dot.mean), 2), y, whisker)
