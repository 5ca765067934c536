"""Lay out charts: from figures to the places of lines and marks. The templates of ``charts.html`` write them as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from covray.report.formatting import fixed, is_finite, short_count

METHODS = ("none", "linear", "diffusion")
"""The methods of chains, in the order of legends and tables."""
SMALL_PX, LARGE_PX, HEIGHT_PX = 300, 760, 220
"""Widths of a chart, and its height."""
_LEFT_PX, _RIGHT_PX, _TOP_PX, _BOTTOM_PX = 46, 12, 26, 40
"""Space around the area of a chart, for its axes."""
_INSET_PX = 22
"""Space between the axis and the first and last of named places."""
_DODGE_PX = 6
"""Distance between the marks of several methods at one place."""
_CAP_PX = 3
"""Half the width of the end of a whisker."""
_MARK_PX, _CURVE_MARK_PX = 4.5, 3.0
_LOGARITHMIC_FROM = 5
"""A curve's axis is logarithmic when its ends differ by more than this factor."""
_CORNERS = {
    "none": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "linear": ((0.0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
    "other": ((0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)),
}
"""The shape of each method's mark, in units of its size; the mark of diffusion is a circle."""


@dataclass(frozen=True)
class Point:
    """A figure with its interval, and the text that is shown on pointing at it."""

    x: float
    y: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True)
class Series:
    """What one method reached."""

    method: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Tick:
    """A place on an axis, and what is written there."""

    value: float
    text: str


@dataclass(frozen=True)
class LineChart:
    """What a chart shows: a line a series, with marks and whiskers."""

    title: str
    x_title: str
    y_title: str
    series: Sequence[Series]
    places: Sequence[Tick] = ()
    """The only values of x; without them x is an axis of numbers."""
    width_px: int = SMALL_PX
    curves: bool = False
    """Draw many thin lines, each with a mark at its end only."""
    level: bool = False
    """Draw a series of one point as a dashed line across, to compare the others with."""
    include_zero: bool = False
    """Whether the axis of y reaches zero."""


@dataclass(frozen=True)
class Segment:
    """A straight line."""

    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True)
class Mark:
    """The shape of a method at a place: methods can be told apart without colours, too."""

    x: float
    y: float
    size: float
    corners: str
    """The points of the polygon; empty for a circle."""


@dataclass(frozen=True)
class DrawnPoint:
    """A point of a series as it is drawn."""

    text: str
    mark: Mark
    whisker: tuple[Segment, ...]


@dataclass(frozen=True)
class DrawnSeries:
    """A series as it is drawn."""

    css: str
    line: str
    """The points of the line; empty where there is none."""
    level: Segment | None
    points: tuple[DrawnPoint, ...]


@dataclass(frozen=True)
class DrawnTick:
    """A tick as it is drawn, at a number of pixels along its axis."""

    at: float
    text: str
    zero: bool = False


@dataclass(frozen=True)
class Drawing:
    """A chart with the place of everything in it, in pixels from the upper left."""

    title: str
    label: str
    """For readers who cannot see it."""
    x_title: str
    y_title: str
    width: int
    height: int
    left: int
    right: int
    bottom: int
    thin: bool
    x_ticks: tuple[DrawnTick, ...]
    y_ticks: tuple[DrawnTick, ...]
    series: tuple[DrawnSeries, ...]


@dataclass(frozen=True)
class Axis:
    """Where the values of an axis lie."""

    ticks: tuple[Tick, ...]
    start: float
    """The pixel of the first tick."""
    end: float
    """The pixel of the last tick."""
    logarithmic: bool = False

    @property
    def low(self) -> float:
        """The value at the start."""
        return self.ticks[0].value

    @property
    def high(self) -> float:
        """The value at the end."""
        return self.ticks[-1].value

    def place(self, value: float) -> float:
        """Return the pixel of ``value``; the middle where the axis has one value only."""
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log(value), math.log(low), math.log(high)
        share = 0.5
        if high > low:
            share = (value - low) / (high - low)
        return self.start + (self.end - self.start) * share


def draw(chart: LineChart) -> Drawing:
    """Lay out ``chart``, which has at least one point."""
    x_axis, y_axis = _x_axis(chart), _y_axis(chart)

    # Pixels count from the upper left, so that the bottom is the larger number.
    left, right = _LEFT_PX, chart.width_px - _RIGHT_PX
    label = f"{chart.y_title} against {chart.x_title}"
    if chart.title:
        label = f"{chart.title}, {label}"
    return Drawing(
        title=chart.title,
        label=label,
        x_title=chart.x_title,
        y_title=chart.y_title,
        width=chart.width_px,
        height=HEIGHT_PX,
        left=left,
        right=right,
        bottom=HEIGHT_PX - _BOTTOM_PX,
        thin=chart.curves,
        x_ticks=_draw_ticks(x_axis),
        y_ticks=_draw_ticks(y_axis),
        series=tuple(_draw_series(chart, x_axis, y_axis)),
    )


def _draw_ticks(axis: Axis) -> tuple[DrawnTick, ...]:
    drawn = []
    for tick in axis.ticks:
        drawn.append(DrawnTick(_pixel(axis.place(tick.value)), tick.text, tick.value == 0))
    return tuple(drawn)


def _draw_series(chart: LineChart, x_axis: Axis, y_axis: Axis) -> Iterator[DrawnSeries]:
    """Place every series; at named places the methods stand side by side."""
    # Methods with figures at one place would cover each other: they are spread around it.
    methods = list(dict.fromkeys(series.method for series in chart.series))
    for series in chart.series:
        offset = 0.0
        if chart.places:
            offset = (methods.index(series.method) - (len(methods) - 1) / 2) * _DODGE_PX
        ordered = sorted(series.points, key=lambda point: point.x)
        drawn = [_draw_point(series.method, point, chart.curves, offset, (x_axis, y_axis)) for point in ordered]
        # One point is no line; where asked for, it is a level to compare the other series with.
        line, level = "", None
        if len(drawn) > 1:
            line = " ".join(f"{point.mark.x},{point.mark.y}" for point in drawn)
        elif chart.level:
            y = drawn[0].mark.y
            level = Segment(_LEFT_PX, y, chart.width_px - _RIGHT_PX, y)
        if chart.curves:  # marked at their ends only
            drawn = drawn[-1:]
        yield DrawnSeries(method_class(series.method), line, level, tuple(drawn))


def _draw_point(method: str, point: Point, curve: bool, offset: float, axes: tuple[Axis, Axis]) -> DrawnPoint:
    """Place a point and its interval; ``offset`` is added to its pixels across, ``axes`` are those of x and y."""
    x_axis, y_axis = axes
    x, y = _pixel(x_axis.place(point.x) + offset), _pixel(y_axis.place(point.y))
    whisker: tuple[Segment, ...] = ()
    if is_finite(point.low) and is_finite(point.high):
        whisker = tuple(_whisker(x, point.low, point.high, y_axis))
    # All marks of a curve would hide it.
    size_px = _MARK_PX
    if curve:
        size_px = _CURVE_MARK_PX
    mark = _mark(method, x, y, size_px)
    return DrawnPoint(point.text, mark, whisker)


def _whisker(x: float, low: float, high: float, axis: Axis) -> Iterator[Segment]:
    """Draw an interval as far as the axis goes; an end that lies on the axis gets a cap."""
    # Both ends are clamped to the axis, which wide intervals exceed.
    bottom = _pixel(axis.place(max(axis.low, min(axis.high, low))))
    top = _pixel(axis.place(max(axis.low, min(axis.high, high))))
    yield Segment(x, bottom, x, top)
    for end, y in ((low, bottom), (high, top)):
        if axis.low <= end <= axis.high:
            yield Segment(_pixel(x - _CAP_PX), y, _pixel(x + _CAP_PX), y)


def _x_axis(chart: LineChart) -> Axis:
    left, right = _LEFT_PX, chart.width_px - _RIGHT_PX
    if chart.places:
        return Axis(tuple(chart.places), left + _INSET_PX, right - _INSET_PX)
    # An axis of numbers reaches from the first point to the last.
    values = [point.x for point in _points(chart)]
    first = min(values)
    if chart.curves:  # they begin with the training
        first = 0.0
    numbers, _ = round_ticks(first, max(values))
    ticks = [Tick(number, short_count(number)) for number in numbers]
    return Axis(tuple(ticks), left, right)


def _points(chart: LineChart) -> list[Point]:
    """Return the points of all series."""
    points: list[Point] = []
    for series in chart.series:
        points += series.points
    return points


def _y_axis(chart: LineChart) -> Axis:
    """Return the axis of y, which shows all points, and their intervals as far as these leave the points apart."""
    points = _points(chart)
    values = [point.y for point in points]
    if chart.include_zero:
        values.append(0.0)
    ends = list(values)
    for point in points:
        ends += filter(is_finite, (point.low, point.high))
    # An interval of few seeds can be many times wider than all differences, and would flatten them on its axis.
    span = max(values) - min(values) or math.inf
    low, high = max(min(ends), min(values) - span), min(max(ends), max(values) + span)

    bottom, top = HEIGHT_PX - _BOTTOM_PX, _TOP_PX
    # Perplexities fall from thousands to tens: on a straight axis all that follows the start would be one line.
    if chart.curves and 0 < _LOGARITHMIC_FROM * low < high:
        return Axis(_logarithmic_ticks(low, high), bottom, top, logarithmic=True)
    numbers, decimals = round_ticks(low, high)
    ticks = [Tick(number, fixed(number, decimals)) for number in numbers]
    return Axis(tuple(ticks), bottom, top)


def _logarithmic_ticks(low: float, high: float) -> tuple[Tick, ...]:
    """Return the powers of ten around ``low`` and ``high``, with 2 and 5 between them where there are few."""
    steps: tuple[int, ...] = (1,)
    if high < 100 * low:
        steps = (1, 2, 5)
    # All candidates, one power of ten wider than needed; those outside are dropped.
    values = []
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for step in steps:
            values.append(step * 10.0**power)
    # The axis begins at the last candidate that is not above `low` and ends at the first that is not below `high`.
    first, last = values[0], values[-1]
    for value in values:
        if value <= low:
            first = value
    for value in reversed(values):
        if value >= high:
            last = value

    ticks = []
    for value in values:
        if first <= value <= last:
            ticks.append(Tick(value, f"{value:,.10g}"))
    return tuple(ticks)


def round_ticks(low: float, high: float) -> tuple[list[float], int]:
    """Choose the ticks of an axis.

    Args:
        low: The smallest value to show.
        high: The largest value to show.

    Returns:
        About five round numbers, from at most ``low`` to at least ``high``, and the decimals to write them with.
    """
    # A single value gets a tenth of itself on either side.
    if low == high:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    # Five steps of 1, 2, 5 or 10 times a power of ten span the values: the smallest step that does.
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(step * power for step in (1, 2, 5, 10) if 5 * step * power >= high - low)
    first, last = math.floor(low / step), math.ceil(high / step)
    # A step of 1 has no decimals, one of 0.5 has one; 1e-9 is for logarithms that fall just below a whole number.
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [index * step for index in range(first, last + 1)], decimals


def method_class(method: str) -> str:
    """Return the style class of a method's colour."""
    if method not in METHODS:
        return "m-other"
    return f"m-{method}"


def swatch(method: str) -> Mark:
    """Return the mark of a method for legends and tables, around (0, 0)."""
    return _mark(method, 0, 0, 5.5)


def _mark(method: str, x: float, y: float, size: float) -> Mark:
    if method == "diffusion":
        return Mark(x, y, size, "")
    # Corners are in units of the mark's size, around its middle.
    places = []
    for across, down in _CORNERS.get(method, _CORNERS["other"]):
        places.append(f"{_pixel(x + size * across)},{_pixel(y + size * down)}")
    return Mark(x, y, size, " ".join(places))


def _pixel(place: float) -> float:
    """Round to tenths of a pixel, which no one can see."""
    return round(place, 1)
