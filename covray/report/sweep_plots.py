"""The plots of a sweep's page: scores by chain length and pairs, training curves, and what a frame or pair gains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from covray.evaluation.metrics import OWN
from covray.report.charts import LARGE_PX, Drawing, LineChart, Point, Series, Tick, draw
from covray.report.formatting import NONE, interval, is_finite, numbers, readable, short_count, signed_numbers
from covray.report.metrics import axis_title
from covray.report.sweep_rows import Axis, Fixed, fixed, method_rank, sort_rows, variants
from covray.sweeps.records import CellEntry, SweepResults, TrialEntry

_WHISKERS = "whiskers: 95% intervals; one without an end goes on beyond the axis"
_AXIS_TITLES = {"length": "chain length, images", "pairs": "example pairs"}


@dataclass(frozen=True)
class ChartGroup:
    """Charts that belong together, under one name."""

    name: str
    charts: tuple[Drawing, ...]


@dataclass(frozen=True)
class FigureTable:
    """The figures behind a plot; the last two columns are numbers."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Plot:
    """A card of charts with a legend; all groups but the first are folded."""

    title: str
    about: str
    methods: tuple[str, ...]
    groups: tuple[ChartGroup, ...]
    table: FigureTable | None = None
    large: bool = False


def plots(results: SweepResults) -> list[Plot]:
    """Return the plots that have something to show."""
    cells = sort_rows(results.cells)
    # Perplexity has a plot of its own, of the tasks whose evaluations measured it.
    primary, perplexity = {}, {}
    for task, about in results.tasks.items():
        primary[task] = about.primary
        if OWN in about.metrics:
            perplexity[task] = OWN

    from_none = f"{_WHISKERS}; dashed: no frames"

    found = [
        _plot("Score and chain length", from_none, cells, _against("length", results, cells, primary)),
        _plot("Score and example pairs", _WHISKERS, cells, _against("pairs", results, cells, primary)),
        _plot(
            "Perplexity of the answer and chain length", from_none, cells,
            _against("length", results, cells, perplexity),
        ),
        _plot("Validation while training", "a line a trial", results.trials, [_curves(results.trials)]),
        _efficiency(results, cells),
        _returns("length", results, cells),
        _returns("pairs", results, cells),
    ]  # fmt: skip
    # A sweep of one length, or of one number of pairs, has nothing to draw against that axis.
    return [plot for plot in found if plot is not None]


def _plot(
    title: str,
    about: str,
    rows: Sequence[CellEntry] | Sequence[TrialEntry],
    groups: Iterable[ChartGroup],
    table: FigureTable | None = None,
    large: bool = False,
) -> Plot | None:
    """Return a plot with the methods of ``rows`` as its legend; None where it has no charts."""
    with_charts = tuple(group for group in groups if group.charts)
    if not with_charts:
        return None
    methods = sorted({row.method for row in rows}, key=method_rank)
    return Plot(title, about, tuple(methods), with_charts, table, large)


def _against(
    axis: Axis, results: SweepResults, cells: Sequence[CellEntry], metrics: Mapping[str, str]
) -> Iterator[ChartGroup]:
    """Yield scores against ``axis`` with everything else fixed, a chart a task by its metric of ``metrics``."""
    names = variants(cells)
    # Cells without frames start no group of their own, unless there are no others.
    with_frames = [cell for cell in cells if cell.method != "none"]
    for key in sorted({fixed(axis, cell, names[cell.label]) for cell in with_frames or cells}):
        members = []
        for cell in cells:
            # Without frames there is no length: such cells belong beside the chains of every length.
            everywhere = axis == "pairs" and cell.method == "none" and names[cell.label] == key.variant
            if everywhere or fixed(axis, cell, names[cell.label]) == key:
                members.append(cell)
        places = sorted({getattr(cell, axis) for cell in members})
        ticks = [Tick(place, str(place)) for place in places]
        charts = []
        for task, metric in metrics.items():
            series = _series(members, axis, (task, metric))
            # A line needs two places; a chart of lone marks shows no more than the table.
            if _has_line([curve.points for curve in series]):
                y_title = axis_title(metric, results.lower_is_better)
                chart = LineChart(
                    readable(task), _AXIS_TITLES[axis], y_title, series, ticks, level=axis == "length"
                )  # fmt: skip
                charts.append(draw(chart))
        yield ChartGroup(key.name(axis), tuple(charts))


def _has_line(series: Iterable[Sequence[Point]]) -> bool:
    """Return whether any of ``series`` has two points or more."""
    return any(len(points) > 1 for points in series)


def _series(cells: Iterable[CellEntry], axis: Axis, column: tuple[str, str]) -> list[Series]:
    """Return, for each method, the scores of ``cells`` in a column (task, metric)."""
    points: dict[str, list[Point]] = defaultdict(list)
    for cell in cells:
        score = None
        for entry in cell.scores:
            if (entry.task, entry.metric) == column:
                score = entry
        if score is not None and is_finite(score.mean):
            text = _tooltip(cell.label, score.mean, score.low, score.high)
            points[cell.method].append(Point(getattr(cell, axis), score.mean, score.low, score.high, text))
    return [Series(method, tuple(of_method)) for method, of_method in points.items()]


def _curves(trials: Sequence[TrialEntry]) -> ChartGroup:
    """Return the perplexity on the validation split while training, a chart for every number of pairs."""
    names = variants(trials)
    series: dict[Fixed, list[Series]] = defaultdict(list)
    for trial in sort_rows(trials):
        points = []
        for validation in trial.validation:
            perplexity = validation.answer_perplexity
            if is_finite(perplexity):
                label = f"{trial.name}, {short_count(validation.tokens)} tokens"
                points.append(Point(validation.tokens, perplexity, None, None, _tooltip(label, perplexity)))
        if points:
            series[fixed("length", trial, names[trial.label])].append(Series(trial.method, tuple(points)))
    charts = []
    for key, of_key in sorted(series.items()):
        # A curve of one point is no curve.
        if _has_line([curve.points for curve in of_key]):
            y_title = "answer perplexity (less is better)"
            charts.append(draw(LineChart(key.name("length"), "tokens trained on", y_title, of_key, curves=True)))
    return ChartGroup("", tuple(charts))


def _efficiency(results: SweepResults, cells: Sequence[CellEntry]) -> Plot | None:
    """Return gain against context tokens; lines join cells that differ in length only."""
    cell_by_label = {cell.label: cell for cell in cells}
    names = variants(cells)
    points: dict[tuple[str, Fixed], list[Point]] = defaultdict(list)
    # What the plot compares, and the table of figures under it, are collected in one pass.
    compared, figures = [], []
    for row in results.efficiency:
        cell = cell_by_label.get(row.cell)
        # A gain that is no number cannot be drawn, and is left out of the table as well.
        if cell is None or not is_finite(row.gain_percent):
            continue
        compared.append(cell)
        figures.append((row.cell, f"{row.context_tokens:,}", *_gain(row.gain_percent, row.low, row.high)))
        text = _tooltip(row.cell, row.gain_percent, row.low, row.high, signed_numbers) + " %"
        point = Point(row.context_tokens, row.gain_percent, row.low, row.high, text)
        points[cell.method, fixed("length", cell, names[cell.label])].append(point)
    # A single point shows nothing that its table row does not.
    if len(compared) < 2:
        return None

    series = [Series(method, tuple(points[method, key])) for method, key in sorted(points, key=_by_method)]
    x_title = "context, tokens of a visual sentence"
    chart = draw(LineChart("", x_title, "gain, %", series, width_px=LARGE_PX, include_zero=True))
    return _plot(
        "Information efficiency",
        "gain over no frames in percent, geometric mean over tasks; lines join chains with as many pairs",
        compared,
        [ChartGroup("", (chart,))],
        FigureTable(("Cell", "Context, tokens", "Gain, %", "95% interval"), tuple(figures)),
        large=True,
    )


def _by_method(key: tuple[str, Fixed]) -> tuple[int, str]:
    return method_rank(key[0])


@dataclass
class _Returns:
    """The gains of the cells that are fixed in all but one axis."""

    points: dict[str, list[Point]]
    """By method."""
    starts: dict[int, set[str]]
    """By the value that a gain leads to, the values it starts from."""


def _returns(axis: Axis, results: SweepResults, cells: Sequence[CellEntry]) -> Plot | None:
    """Return the gain per added frame, or pair: from every length, or number of pairs, to the next."""
    noun = "pair"
    if axis == "length":
        noun = "frame"
    cell_by_label = {cell.label: cell for cell in cells}
    names = variants(cells)
    # One chart a number of pairs (or a length), with a line a method in it.
    gains_by_key: dict[Fixed, _Returns] = defaultdict(lambda: _Returns(defaultdict(list), defaultdict(set)))
    compared, figures = [], []
    for row in results.returns:
        cell = cell_by_label.get(row.second)
        if cell is None or row.axis != axis or not is_finite(row.per_added):
            continue
        # The interval of a gain, too, is divided by what was added.
        added = row.end - row.start
        low, high = _divide(row.low, added), _divide(row.high, added)
        text = _tooltip(f"{row.first} → {row.second}", row.per_added, low, high, signed_numbers)
        gains = gains_by_key[fixed(axis, cell, names[cell.label])]
        gains.points[cell.method].append(Point(row.end, row.per_added, low, high, f"{text} % per {noun}"))
        gains.starts[row.end].add(str(row.start))
        compared.append(cell)
        figures.append((row.first, row.second, *_gain(row.per_added, low, high)))

    charts = []
    for key, gains in sorted(gains_by_key.items()):
        if _has_line(gains.points.values()):
            charts.append(draw(_return_chart(axis, key, gains, noun)))
    return _plot(
        f"Diminishing returns: {noun}s",
        f"what every further {noun} gains, in percent of the scores before it, geometric mean over tasks",
        compared,
        [ChartGroup("", tuple(charts))],
        FigureTable(("From", "To", f"Gain per {noun}, %", "95% interval"), tuple(figures)),
    )


def _return_chart(axis: Axis, key: Fixed, gains: _Returns, noun: str) -> LineChart:
    methods = sorted(gains.points, key=method_rank)
    ticks = []
    # Grids may have gaps, so that cells reach one length from different ones: "3/5→9".
    for end, starts in sorted(gains.starts.items()):
        ticks.append(Tick(end, f"{'/'.join(sorted(starts))}→{end}"))
    return LineChart(
        key.name(axis),
        f"{_AXIS_TITLES[axis].partition(',')[0]}, from → to",
        f"gain per {noun}, %",
        [Series(method, tuple(gains.points[method])) for method in methods],
        ticks,
        include_zero=True,
    )


def _divide(value: float | None, by: int) -> float | None:
    if value is None:
        return None
    return value / by


def _tooltip(
    name: str,
    value: float,
    low: float | None = None,
    high: float | None = None,
    write: Callable[..., list[str]] = numbers,
) -> str:
    """Return what is shown on pointing at a mark."""
    mean, lower, upper = write(value, low, high)
    if is_finite(low) and is_finite(high):
        return f"{name}: {mean} {interval(lower, upper)}"
    return f"{name}: {mean}"


def _gain(value: float | None, low: float | None, high: float | None) -> tuple[str, str]:
    """Write a gain and its interval for a table."""
    mean, lower, upper = signed_numbers(value, low, high)
    if is_finite(low) and is_finite(high):
        return mean, interval(lower, upper)
    return mean, NONE
