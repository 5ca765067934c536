"""The page of a sweep: what it says of the paper's claims, the ablation table, plots and cost in one HTML file."""

from __future__ import annotations

import math
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from typing import Any, NamedTuple

from covray.io import storage
from covray.report.html import (
    TABLES_STYLE,
    axis_title,
    best_mean,
    configuration,
    document,
    duration,
    facts,
    figures,
    glossary,
    human,
    known,
    metric_name,
    navigation,
    numbers,
    plural,
    round_ticks,
    score_cell,
)

_ORDER = ("none", "linear", "diffusion")
_STATUSES = ("failed", "stopped", "waiting", "finished")  # what needs a look stands first
_PERPLEXITY = "perplexity_own"
_UNTUNED_SHOWN = 6  # more forms of the untuned backbone than this only stand in the tables of all metrics
_LARGE_PX, _SMALL_PX, _CHART_PX = 760, 300, 220  # widths of a chart, and how high it is
_LEFT_PX, _RIGHT_PX, _TOP_PX, _BOTTOM_PX = 46, 12, 26, 40  # around what it draws
_DODGE_PX = 6  # between methods of one place on the axis
_LOG_FROM = 5  # an axis of perplexity whose ends differ by more than this factor is logarithmic

_STYLE = """
:root { --none: #5d6673; --linear: #c2570c; --diffusion: #2f62d0; --other: #8a3ffc; }
@media (prefers-color-scheme: dark) { :root { --none: #aab3c0; --linear: #fb9a4b; --diffusion: #8fb0ff;
  --other: #c6a5ff; } }
.m-none { color: var(--none); } .m-linear { color: var(--linear); } .m-diffusion { color: var(--diffusion); }
.m-other { color: var(--other); }
.claim { display: grid; grid-template-columns: minmax(0, 1fr) 130px 150px 190px; gap: 4px 20px; align-items: center;
  padding: 14px 20px; color: var(--ink); font-size: 14px; }
.claim small { display: block; color: var(--faint); font-size: 12px; }
.claim .gain { text-align: right; font-variant-numeric: tabular-nums; }
.claims > * + * { border-top: 1px solid var(--rule); }
.claims summary { list-style: none; } .claims summary::-webkit-details-marker { display: none; }
.claims summary .fold::before { content: "▸ "; } .claims details[open] .fold::before { content: "▾ "; }
.claims .differences { background: var(--paper); }
.verdict { justify-self: start; padding: 2px 10px; border-radius: 99px; font-size: 12px; white-space: nowrap;
  border: 1px solid var(--rule); color: var(--faint); }
.holds { color: var(--good); white-space: nowrap; } .fails { color: var(--warn); white-space: nowrap; }
.verdict.holds, .verdict.fails { border-color: currentColor; font-weight: 600; }
.verdict.fails { background: var(--warn-paper); }
.interval { width: 100%; height: 22px; overflow: visible; } .interval line { stroke: var(--faint); }
.interval .whisker { stroke: currentColor; stroke-width: 2; } .interval circle { fill: currentColor; }
.cells tbody th { min-width: 132px; max-width: 132px; width: 132px; padding-right: 6px; }
.cells thead th:first-child { min-width: 132px; }
.cells .key { position: sticky; z-index: 1; background: var(--card); padding: 8px 6px; min-width: 52px; max-width: 52px;
  color: var(--ink); }
.cells thead .key { color: var(--faint); } .cells .length { left: 132px; } .cells .pairs { left: 184px; }
.cells tbody th[colspan] { max-width: 236px; width: 236px; } .cells .reference th { font-weight: 400; }
.cells svg, .legend svg { width: 13px; height: 13px; vertical-align: -1px; margin-right: 7px; overflow: visible; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 22px; padding: 0 20px 8px; font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 260px), 1fr)); gap: 12px 20px;
  padding: 4px 20px 16px; }
.charts.large { display: block; overflow-x: auto; } .charts.large svg { max-width: 900px; min-width: 520px; }
.charts figure { margin: 0; min-width: 0; } .charts figcaption { font-size: 13px; font-weight: 600; }
.chart { display: block; width: 100%; max-width: 460px; overflow: visible; font-size: 11px; fill: var(--faint); }
.chart .grid { stroke: var(--rule); } .chart .zero { stroke: var(--faint); }
.chart .series { fill: none; stroke: currentColor; stroke-width: 1.6; opacity: .75; }
.chart .thin { stroke-width: 1; opacity: .55; }
.chart .level { stroke: currentColor; stroke-dasharray: 5 4; opacity: .7; }
.chart .whisker { stroke: currentColor; stroke-width: 1.2; opacity: .7; }
.mark { fill: currentColor; stroke: var(--card); stroke-width: 1; }
.card .group > summary { font-size: 13px; color: var(--ink); padding: 10px 20px; border-top: 1px solid var(--rule); }
.tall { max-height: 560px; overflow: auto; }
.tall thead th { position: sticky; top: 0; background: var(--card); z-index: 1; }
.cost td, .cost th { padding: 6px 14px; } .cost .name { overflow-wrap: anywhere; min-width: 170px; }
.cost .number, .cost td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.cost tfoot td { position: sticky; bottom: 0; background: var(--card); border-top: 2px solid var(--faint);
  font-weight: 600; }
.error { color: var(--warn); min-width: 200px; max-width: 420px; overflow-wrap: anywhere; font-size: 12px; }
@media (max-width: 800px) { .claim { grid-template-columns: minmax(0, 1fr) auto; align-items: start; }
  .claim .interval { display: none; }
  .claim .gain { grid-column: 1 / -1; display: flex; gap: 12px; align-items: baseline; }
  .cost td, .cost th { padding: 6px 10px; } .cost .name { min-width: 130px; }
  .cells tbody th { padding-left: 12px; } .cells thead th:first-child { padding-left: 12px; } }
@media print { .tall { max-height: none; } }
"""


class _Point(NamedTuple):
    x: float
    y: float
    low: float | None
    high: float | None
    text: str
    """On pointing at it."""


class _Line(NamedTuple):
    method: str
    points: list[_Point]


class _Charts(NamedTuple):
    """Charts that belong together, under one name."""

    name: str
    charts: list[str]


def write_sweep_page(results: dict[str, Any], out: str) -> None:
    """Write the page of a sweep to the file ``out``: claims, ablation table, plots, cost, glossary.

    ``results``: what ``covray sweep`` writes as ``results.json``; the sweep may be unfinished. The page holds all it
    needs, loads nothing, and runs no script but its own, whatever the texts in it are. Raises OSError where ``out``
    cannot be written.
    """
    plots = list(_plots(results))
    links = [("claims", "Claims")] if results["claims"] else []
    links += [("table", "Ablation table")]
    links += [("plots", "Plots")] if plots else []
    links += [("cost", "Cost")]
    links += [("metrics", "Metrics")] if results["tasks"] else []
    name = posixpath.basename(str(results["config"].get("out", "")).rstrip("/"))
    title = f"Sweep {name}" if name else "Sweep"
    parts = [*_header(title, results), navigation(links), *_claims(results), *_table_section(results)]
    parts += [*plots, *_cost(results), *glossary(results)]
    storage.write_bytes(out, document(title, parts, style=TABLES_STYLE + _STYLE))


def _header(title: str, results: dict[str, Any]) -> Iterator[str]:
    config, trials = results["config"], results["trials"]
    yield f'<header><h1>{escape(title)}</h1><code class="faint">{escape(str(config.get("out", "")))}</code>'
    statuses = Counter(trial["status"] for trial in trials)
    tiles = [(f"{statuses['finished']:,} of {len(trials):,}", f"{plural(len(trials), 'trial')} finished")]
    tiles += [(f"{statuses[status]:,}", status) for status in _STATUSES[:-1] if statuses[status]]
    seeds = len({trial["seed"] for trial in trials})
    tiles += [(f"{seeds:,}", plural(seeds, "seed")), (_short(_total(trials, "tokens")), "tokens trained on")]
    work = _total(trials, "train_seconds") + _total(trials, "evaluate_seconds")
    if any(trial["gpus"] for trial in trials):
        tiles.append((numbers(_total(trials, "gpu_hours"))[0], "GPU hours"))
    else:
        tiles.append((duration(work), "of CPU work"))
    yield figures([*tiles, (duration(results["seconds"]), "from start to end")])
    fields = dict.fromkeys(key for trial in trials for key in trial["fields"])
    lines = [
        ("Data", str(config.get("data") or config.get("manifest") or "–")),
        ("Tasks", ", ".join(human(task) for task in results["tasks"]) or "–"),
        ("Methods", _values(sorted((trial["method"] for trial in trials), key=_rank))),
        ("Chain lengths", _values(sorted(trial["length"] for trial in trials))),
        ("Example pairs", _values(sorted(trial["pairs"] for trial in trials))),
        ("Scales", _values(trial["scale"] for trial in trials)),
        ("Seeds", _values(sorted(trial["seed"] for trial in trials))),
        *((key, _values(trial["fields"].get(key, "–") for trial in trials)) for key in fields),
        ("Early stopping", str(config.get("stopping", "none"))),
    ]
    yield facts(lines) + configuration(config) + "</header>"


def _claims(results: dict[str, Any]) -> Iterator[str]:
    """A line a claim, what it rests on folded beneath."""
    claims, lower = results["claims"], set(results["lower_is_better"])
    if not claims:
        return
    found = [claim["overall"] for claim in claims if claim["overall"] is not None]
    gains = [abs(overall["gain_percent"]) for overall in found if known(overall["gain_percent"])]
    ends = [abs(overall[key]) for overall in found for key in ("low", "high") if known(overall[key])]
    # An interval of two seeds can be so wide that nothing else would be seen beside it.
    reach = min(max([*gains, *ends], default=0), 3 * max(gains, default=0)) or 1.0
    yield '<section id="claims"><h2>What the paper says, and what was found</h2><div class="card claims">'
    for claim in claims:
        line = _claim(claim, reach)
        if not claim["rows"]:
            yield f'<div class="claim">{line}</div>'
            continue
        yield f'<details><summary class="claim">{line}</summary><div class="scroll"><table class="differences">'
        yield '<tr><th>First</th><th>Second</th><th>Task</th><th>Metric</th><th class="number">First − second</th>'
        yield '<th class="number">95% interval</th><th class="number">Seeds</th><th>The claim</th></tr>'
        for row in claim["rows"]:
            mean, low, high = numbers(row["mean"], row["low"], row["high"])
            interval = "–" if row["low"] is None or row["high"] is None else f"[{low}, {high}]"
            yield (
                f'<tr><td class="text">{escape(row["first"])}</td><td class="text">{escape(row["second"])}</td>'
                f"<td>{escape(human(row['task']))}</td><td>{metric_name(row['metric'], lower)}</td>"
                f'<td class="number">{mean}</td><td class="number">{interval}</td>'
                f'<td class="number">{row["seeds"]:,}</td>'
                f'<td class="{_verdict_class(row["verdict"])}">{escape(row["verdict"])}</td></tr>'
            )
        yield "</table></div></details>"
    yield "</div><div class='card'><p>Gain: how much better the first is than the second, in percent of the second's "
    yield "primary metric: geometric mean of the ratios over tasks and all pairs of cells alike in everything else. "
    yield "Interval: 95%, Student t over seeds. A claim holds where the interval lies above 0, does not hold where it "
    yield "lies below, and is not significant in between, or with one seed, which shows nothing of training's luck. "
    yield "The paper's figures are those of its own models and data.</p></div></section>"


def _claim(claim: dict[str, Any], reach: float) -> str:
    """What it says, the verdict, and the gain as a drawing of ``reach`` percent to either side, and in figures."""
    overall, rows = claim["overall"], claim["rows"]
    counts = Counter(row["verdict"] for row in rows)
    fold = ""
    if rows:
        told = ", ".join(f"{verdict} in {counts[verdict]:,}" for verdict in sorted(counts, key=_verdict_rank))
        fold = f'<small class="fold">{len(rows):,} {plural(len(rows), "comparison")}: {escape(told)}</small>'
    what = f"<div>{escape(claim['claim'])}<small>Paper: {escape(claim['paper'])}</small>{fold}</div>"
    if overall is None:
        return what + f'<span class="verdict">{"no figure" if rows else "not tried"}</span><span></span><span></span>'
    css = _verdict_class(overall["verdict"])
    gain, low, high = _percents(overall["gain_percent"], overall["low"], overall["high"])
    seeds = f"{overall['seeds']:,} {plural(overall['seeds'], 'seed')}"
    between = f"[{low}, {high}] %, {seeds}" if known(overall["low"]) and known(overall["high"]) else seeds

    def x(value: float) -> str:
        return f"{50 + 50 * max(-1.0, min(1.0, value / reach)):.2f}%"

    drawn = '<line x1="50%" x2="50%" y1="0" y2="22"/>'
    if known(overall["low"]) and known(overall["high"]):
        ends = f'x1="{x(overall["low"])}" x2="{x(overall["high"])}"'
        drawn += f'<line class="whisker" {ends} y1="11" y2="11"/>'
    if known(overall["gain_percent"]):
        drawn += f'<circle cx="{x(overall["gain_percent"])}" cy="11" r="4.5"/>'
    return (
        f'{what}<span class="verdict {css}">{escape(overall["verdict"])}</span>'
        f'<svg class="interval" role="img" aria-label="{gain} percent {escape(between)}">{drawn}</svg>'
        f'<div class="gain"><b>{gain} %</b><small>{between}</small></div>'
    )


def _table_section(results: dict[str, Any]) -> Iterator[str]:
    """The ablation table by primary metrics, then every metric, folded, a table a task."""
    tasks, lower = results["tasks"], set(results["lower_is_better"])
    untuned = [reference for reference in results["references"] if reference["kind"] == "untuned"]
    few = len(untuned) <= _UNTUNED_SHOWN
    shown = [reference for reference in results["references"] if few or reference["kind"] != "untuned"]
    heads = [
        f"{escape(human(task))}<small>{metric_name(about['primary'], lower)}</small>" for task, about in tasks.items()
    ]
    columns = [(task, about["primary"]) for task, about in tasks.items()]
    yield '<section id="table"><h2>Ablation table <small>each task by its first metric</small></h2>'
    yield f'<div class="card"><div class="scroll">{_table(results, heads, columns, shown)}</div>'
    if not results["cells"]:
        yield "<p>No trial has finished yet.</p>"
    seeds = {len(cell["seeds"]) for cell in results["cells"]}
    over = "the mean over seeds: Student t" if seeds - {1} else "the mean over episodes, as there is one seed"
    yield f"<p>Mean, and beneath it the 95% interval of {over}. ↑ more is better, ↓ less is better. Bold: the best "
    yield "trained row. Context: tokens of one visual sentence, what inference reads and writes. References stand "
    yield "apart: evaluated once, their intervals are over episodes.</p>"
    if not few:
        yield f"<p>The untuned backbone after {len(untuned):,} forms of chain stands in the tables of all metrics.</p>"
    yield "</div>"
    if tasks:
        yield '<div class="card"><h3>All metrics<small>a table a task</small></h3>'
        for task, about in tasks.items():
            heads = [metric_name(metric, lower) for metric in about["metrics"]]
            table = _table(results, heads, [(task, metric) for metric in about["metrics"]], results["references"])
            episodes = f"{about['episodes']:,} {plural(about['episodes'], 'episode')}"
            yield f'<details class="group"><summary>{escape(human(task))}, {episodes}</summary>'
            yield f'<div class="scroll">{table}</div></details>'
        yield "</div>"
    names = [(reference["name"], reference["about"]) for reference in shown if reference["about"]]
    yield (facts(names) if names else "") + "</section>"


def _table(
    results: dict[str, Any],
    heads: Sequence[str],
    columns: Sequence[tuple[str, str]],
    references: Sequence[dict[str, Any]],
) -> str:
    """Rows of cells by method, then ``references``; ``columns`` are (task, metric) under ``heads``, which are HTML."""
    cells, lower = _sorted(results["cells"]), set(results["lower_is_better"])
    variants = _variants(cells)
    found = [_scores(cell) for cell in cells]
    best = {column: best_mean(column[1], [scores.get(column) for scores in found], lower) for column in columns}
    seeds = Counter(scores[column]["seeds"] for scores in found for column in columns if column in scores)
    usual = seeds.most_common(1)[0][0] if seeds else 0
    parts = ['<table class="scores cells"><thead><tr><th></th><th class="key length">Length<small>images</small></th>']
    parts += [
        '<th class="key pairs">Pairs</th><th>Context<small>tokens</small></th>',
        *(f"<th>{head}</th>" for head in heads),
    ]
    parts.append("</tr></thead>")
    method = ""
    for cell, scores in zip(cells, found, strict=True):
        if cell["method"] != method:
            parts.append("</tbody><tbody>" if method else "<tbody>")
            method = cell["method"]
        variant = variants[cell["label"]]
        more = f"<small>{escape(variant)}</small>" if variant else ""
        parts.append(f'<tr title="{escape(cell["label"])}"><th>{_swatch(method)}{escape(method)}{more}</th>')
        parts.append(f'<td class="key length">{cell["length"]}</td><td class="key pairs">{cell["pairs"]}</td>')
        parts.append(f"<td>{cell['context_tokens']:,}</td>")
        for column in columns:
            row = scores.get(column)
            other = row is not None and row["seeds"] != usual
            note = f"{row['seeds']:,} {plural(row['seeds'], 'seed')}" if row is not None and other else ""
            parts.append(score_cell(row, best[column], note))
        parts.append("</tr>")
    parts.append("</tbody>" if cells else "")
    for group in (False, True):
        rows = [reference for reference in references if (reference["kind"] == "ceiling") is group]
        if rows:
            parts.append(f'<tbody class="{"reference ceiling" if group else "reference"}">')
        for reference in rows:
            scores = _scores(reference)
            parts.append(f'<tr><th colspan="3">{escape(reference["name"])}</th><td></td>')
            parts += [score_cell(scores.get(column), None) for column in columns]
            parts.append("</tr>")
        parts.append("</tbody>" if rows else "")
    return "".join([*parts, "</table>"])


def _plots(results: dict[str, Any]) -> Iterator[str]:
    """All that have something to show, in one section; nothing where none has."""
    tasks = results["tasks"]
    cells = _sorted(results["cells"])
    primary = {task: about["primary"] for task, about in tasks.items()}
    perplexity = {task: _PERPLEXITY for task, about in tasks.items() if _PERPLEXITY in about["metrics"]}
    lower = set(results["lower_is_better"])
    interval = "whiskers: 95% intervals; one without an end goes on beyond the axis"
    parts = [
        *_plot(
            "Score and chain length", f"{interval}; dashed: no frames", _against("length", cells, primary, lower), cells
        ),
        *_plot("Score and example pairs", interval, _against("pairs", cells, primary, lower), cells),
        *_plot(
            "Perplexity of the answer and chain length",
            f"{interval}; dashed: no frames",
            _against("length", cells, perplexity, lower),
            cells,
        ),
        *_plot("Validation while training", "a line a trial", _curves(results["trials"]), results["trials"]),
        *_efficiency(results, cells),
        *_returns(results, cells),
    ]
    if parts:
        yield '<section id="plots"><h2>Plots <small>point at a mark for its figures</small></h2>'
        yield from parts
        yield "</section>"


def _plot(
    title: str, about: str, groups: Iterable[_Charts], rows: Sequence[dict[str, Any]], after: str = "", css: str = ""
) -> Iterator[str]:
    """A card of charts, the methods of ``rows`` as its legend; all but the first group folded. ``after`` is HTML."""
    groups = [group for group in groups if group.charts]
    if not groups:
        return
    yield f'<div class="card"><h3>{escape(title)}<small>{escape(about)}</small></h3><div class="legend">'
    for method in dict.fromkeys(row["method"] for row in _sorted(rows)):
        yield f"<span>{_swatch(method)}{escape(method)}</span>"
    yield "</div>"
    for index, group in enumerate(groups):
        charts = f'<div class="charts {css}">{"".join(group.charts)}</div>'
        if len(groups) == 1:
            yield charts
        else:
            opened = " open" if index == 0 else ""
            yield f'<details class="group"{opened}><summary>{escape(group.name)}</summary>{charts}</details>'
    yield after + "</div>"


def _against(axis: str, cells: Sequence[dict[str, Any]], metrics: dict[str, str], lower: set[str]) -> Iterator[_Charts]:
    """Scores against ``axis`` (length or pairs) with everything else fixed, a chart a task by its metric."""
    variants = _variants(cells)
    keys = {_fixed(axis, cell, variants) for cell in cells if cell["method"] != "none"}
    for key in sorted(keys or {_fixed(axis, cell, variants) for cell in cells}):
        # No frames have no length: they belong beside the chains of every length.
        members = [
            cell
            for cell in cells
            if _fixed(axis, cell, variants) == key
            or (axis == "pairs" and cell["method"] == "none" and variants[cell["label"]] == key[1])
        ]
        places = sorted({cell[axis] for cell in members})
        charts = []
        for task, metric in metrics.items():
            lines = _lines(members, axis, (task, metric))
            if any(len(line.points) > 1 for line in lines):
                charts.append(
                    _chart(
                        human(task),
                        "chain length, images" if axis == "length" else "example pairs",
                        axis_title(metric, lower),
                        lines,
                        [(place, str(place)) for place in places],
                        level=axis == "length",
                    )
                )
        yield _Charts(_fixed_name(axis, key), charts)


def _lines(cells: Iterable[dict[str, Any]], axis: str, column: tuple[str, str]) -> list[_Line]:
    """A line a method through what ``cells`` scored in ``column``."""
    lines: dict[str, list[_Point]] = {}
    for cell in cells:
        row = _scores(cell).get(column)
        if row is not None and known(row["mean"]):
            text = _told(cell["label"], row["mean"], row["low"], row["high"])
            point = _Point(cell[axis], row["mean"], row["low"], row["high"], text)
            lines.setdefault(cell["method"], []).append(point)
    return [_Line(method, points) for method, points in lines.items()]


def _curves(trials: Sequence[dict[str, Any]]) -> Iterator[_Charts]:
    """Perplexity on the validation split while training, a chart for every number of pairs."""
    variants = _variants(trials)
    charts: dict[tuple[int, str], list[_Line]] = {}
    for trial in _sorted(trials):
        points = [
            _Point(row["tokens"], row["answer_perplexity"], None, None, "")
            for row in trial["validation"]
            if known(row["answer_perplexity"])
        ]
        if points:
            last = points[-1]
            text = _told(f"{trial['name']}, {_short(last.x)} tokens", last.y, None, None)
            line = _Line(trial["method"], [*points[:-1], last._replace(text=text)])
            charts.setdefault(_fixed("length", trial, variants), []).append(line)
    yield _Charts(
        "",
        [
            _chart(
                _fixed_name("length", key),
                "tokens trained on",
                "answer perplexity (less is better)",
                lines,
                curves=True,
            )
            for key, lines in sorted(charts.items())
            if any(len(line.points) > 1 for line in lines)
        ],
    )


def _efficiency(results: dict[str, Any], cells: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Gain against context tokens; lines join what differs in length only."""
    of_label = {cell["label"]: cell for cell in cells}
    variants = _variants(cells)
    lines: dict[tuple[str, int, str], list[_Point]] = {}
    rows = [row for row in results["efficiency"] if row["cell"] in of_label and known(row["gain_percent"])]
    for row in rows:
        cell = of_label[row["cell"]]
        text = _told(row["cell"], row["gain_percent"], row["low"], row["high"], _percents) + " %"
        point = _Point(row["context_tokens"], row["gain_percent"], row["low"], row["high"], text)
        lines.setdefault((cell["method"], cell["pairs"], variants[row["cell"]]), []).append(point)
    if len(rows) < 2:
        return
    drawn = [_Line(key[0], points) for key, points in sorted(lines.items(), key=lambda item: _rank(item[0][0]))]
    chart = _chart("", "context, tokens of a visual sentence", "gain, %", drawn, width=_LARGE_PX, zero=True)
    table = _figures(
        ("Cell", "Context, tokens", "Gain, %", "95% interval"),
        [
            (row["cell"], f"{row['context_tokens']:,}", *_gain(row["gain_percent"], row["low"], row["high"]))
            for row in rows
        ],
    )
    about = "gain over no frames in percent, geometric mean over tasks; lines join chains with as many pairs"
    yield from _plot(
        "Information efficiency", about, [_Charts("", [chart])], [of_label[row["cell"]] for row in rows], table, "large"
    )


def _returns(results: dict[str, Any], cells: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Gain per added frame, and per added pair: from every length, or number of pairs, to the next."""
    of_label = {cell["label"]: cell for cell in cells}
    variants = _variants(cells)
    for axis, noun in (("length", "frame"), ("pairs", "pair")):
        charts: dict[tuple[int, str], dict[str, list[_Point]]] = {}
        starts: dict[tuple[tuple[int, str], int], set[str]] = {}
        lines, compared = [], []
        for row in results["returns"]:
            cell = of_label.get(row["second"])
            if cell is None or row["axis"] != axis or not known(row["per_added"]):
                continue
            steps = row["to"] - row["from"]
            low, high = (None if row[key] is None else row[key] / steps for key in ("low", "high"))
            text = _told(f"{row['first']} → {row['second']}", row["per_added"], low, high, _percents)
            fixed = _fixed(axis, cell, variants)
            point = _Point(row["to"], row["per_added"], low, high, f"{text} % per {noun}")
            charts.setdefault(fixed, {}).setdefault(cell["method"], []).append(point)
            starts.setdefault((fixed, row["to"]), set()).add(str(row["from"]))
            compared.append(cell)
            lines.append((row["first"], row["second"], *_gain(row["per_added"], low, high)))
        drawn = [
            _chart(
                _fixed_name(axis, key),
                "chain length, from → to" if axis == "length" else "example pairs, from → to",
                f"gain per {noun}, %",
                [_Line(method, points) for method, points in sorted(found.items(), key=lambda item: _rank(item[0]))],
                sorted(
                    (at, f"{'/'.join(sorted(froms))}→{at}") for (fixed, at), froms in starts.items() if fixed == key
                ),
                zero=True,
            )
            for key, found in sorted(charts.items())
            if any(len(points) > 1 for points in found.values())
        ]
        table = _figures(("From", "To", f"Gain per {noun}, %", "95% interval"), lines)
        about = f"what every further {noun} gains, in percent of the scores before it, geometric mean over tasks"
        yield from _plot(f"Diminishing returns: {noun}s", about, [_Charts("", drawn)], compared, table)


def _chart(
    title: str,
    x_title: str,
    y_title: str,
    lines: Sequence[_Line],
    places: Sequence[tuple[float, str]] = (),
    *,
    width: int = _SMALL_PX,
    curves: bool = False,
    level: bool = False,
    zero: bool = False,
) -> str:
    """A chart of lines with marks and whiskers, as SVG.

    ``places``: the values of x there are, with their texts; none for an axis of numbers. ``curves``: many thin lines,
    marked at their ends. ``level``: draw the height of a method that has one point across, to compare with. ``zero``:
    is on the axis of y.
    """
    values = [point.y for line in lines for point in line.points] + [0.0] * zero
    ends = [end for line in lines for point in line.points for end in (point.low, point.high) if known(end)]
    # An interval of few seeds can be many times wider than all differences, and would flatten them on its axis.
    span = max(values) - min(values) or math.inf
    y_low, y_high = max(min(values + ends), min(values) - span), min(max(values + ends), max(values) + span)
    logarithmic = curves and 0 < _LOG_FROM * y_low < y_high
    if logarithmic:
        marks = (1, 2, 5) if y_high < 100 * y_low else (1,)
        powers = range(math.floor(math.log10(y_low)), math.ceil(math.log10(y_high)) + 1)
        all_ticks = [mark * 10.0**power for power in powers for mark in marks]
        first = max((tick for tick in all_ticks if tick <= y_low), default=all_ticks[0])
        last = min((tick for tick in all_ticks if tick >= y_high), default=all_ticks[-1])
        y_ticks = [(tick, f"{tick:,.10g}") for tick in all_ticks if first <= tick <= last]
    else:
        ticks, decimals = round_ticks(y_low, y_high)
        y_ticks = [(tick, f"{tick:,.{decimals}f}".replace("-", "−")) for tick in ticks]
    if places:
        x_ticks = list(places)
    else:
        xs = [point.x for line in lines for point in line.points]
        x_ticks = [(tick, _short(tick)) for tick in round_ticks(0 if curves else min(xs), max(xs))[0]]
    methods = list(dict.fromkeys(line.method for line in lines))
    inset = 22 if places else 0
    left, right, bottom = _LEFT_PX + inset, width - _RIGHT_PX - inset, _CHART_PX - _BOTTOM_PX

    def x(value: float) -> float:
        first, last = x_ticks[0][0], x_ticks[-1][0]
        return left + (right - left) * ((value - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        first, last = y_ticks[0][0], y_ticks[-1][0]
        if logarithmic:
            value, first, last = math.log(value), math.log(first), math.log(last)
        return bottom - (bottom - _TOP_PX) * (value - first) / (last - first)

    label = ", ".join(text for text in (title, f"{y_title} against {x_title}") if text)
    parts = [f'<svg class="chart" role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {_CHART_PX}">']
    parts.append(f'<text x="2" y="12">{escape(y_title)}</text>')
    for tick, text in y_ticks:
        css = "grid zero" if tick == 0 else "grid"
        parts.append(
            f'<line class="{css}" x1="{_LEFT_PX}" x2="{width - _RIGHT_PX}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        )
        parts.append(f'<text x="{_LEFT_PX - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{text}</text>')
    for tick, text in x_ticks:
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{escape(text)}</text>')
    middle = (_LEFT_PX + width - _RIGHT_PX) / 2
    parts.append(f'<text x="{middle:.0f}" y="{bottom + 34}" text-anchor="middle">{escape(x_title)}</text>')
    for line in lines:
        ordered = sorted(line.points, key=lambda point: point.x)
        aside = (methods.index(line.method) - (len(methods) - 1) / 2) * _DODGE_PX if places else 0.0
        parts.append(f'<g class="{_css(line.method)}">')
        if len(ordered) > 1:
            path = " ".join(f"{x(point.x) + aside:.1f},{y(point.y):.1f}" for point in ordered)
            parts.append(f'<polyline class="series{" thin" if curves else ""}" points="{path}"/>')
        elif level:
            across = f'x1="{_LEFT_PX}" x2="{width - _RIGHT_PX}"'
            at = f"{y(ordered[0].y):.1f}"
            parts.append(f'<line class="level" {across} y1="{at}" y2="{at}"/>')
        for point in ordered[-1:] if curves else ordered:
            at_x = x(point.x) + aside
            parts.append(f"<g><title>{escape(point.text)}</title>")
            if known(point.low) and known(point.high):
                parts += _whisker(at_x, point.low, point.high, y, (y_ticks[0][0], y_ticks[-1][0]))
            parts.append(f"{_mark(line.method, at_x, y(point.y), 3.0 if curves else 4.5)}</g>")
        parts.append("</g>")
    caption = f"<figcaption>{escape(title)}</figcaption>" if title else ""
    return "".join(["<figure>", caption, *parts, "</svg></figure>"])


def _whisker(
    x: float, low: float, high: float, y: Callable[[float], float], axis: tuple[float, float]
) -> Iterator[str]:
    """From ``low`` to ``high`` as far as the ``axis`` goes; an end that is on it has a cap."""
    ends = [max(axis[0], min(axis[1], end)) for end in (low, high)]
    yield f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{y(ends[0]):.1f}" y2="{y(ends[1]):.1f}"/>'
    for end, shown in zip((low, high), ends, strict=True):
        if end == shown:
            at = f"{y(end):.1f}"
            yield f'<line class="whisker" x1="{x - 3:.1f}" x2="{x + 3:.1f}" y1="{at}" y2="{at}"/>'


def _mark(method: str, x: float, y: float, size: float) -> str:
    """A method's own shape around (x, y): told apart without colours, too."""
    if method == "diffusion":
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>'
    corners = {
        "none": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        "linear": ((0.0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
    }.get(method, ((0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)))
    points = " ".join(f"{x + size * across:.1f},{y + size * down:.1f}" for across, down in corners)
    return f'<polygon class="mark" points="{points}"/>'


def _swatch(method: str) -> str:
    """The method's mark for texts."""
    return f'<svg class="{_css(method)}" viewBox="-7 -7 14 14" aria-hidden="true">{_mark(method, 0, 0, 5.5)}</svg>'


def _css(method: str) -> str:
    return f"m-{method if method in _ORDER else 'other'}"


def _figures(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The figures of a plot as a folded table; of a row the last two are numbers."""
    parts = ['<details class="group"><summary>The figures</summary><div class="scroll"><table class="differences"><tr>']
    parts += [
        f'<th class="{"number" if index >= len(heads) - 2 else "text"}">{head}</th>' for index, head in enumerate(heads)
    ]
    parts.append("</tr>")
    for row in rows:
        cells = [
            f'<td class="{"number" if index >= len(heads) - 2 else "text"}">{escape(text)}</td>'
            for index, text in enumerate(row)
        ]
        parts.append(f"<tr>{''.join(cells)}</tr>")
    return "".join([*parts, "</table></div></details>"])


def _cost(results: dict[str, Any]) -> Iterator[str]:
    """What every trial took, those that need a look first; then what was not tried."""
    trials, left_out = results["trials"], results["left_out"]
    ranked = sorted(trials, key=lambda trial: _STATUSES.index(trial["status"]))
    yield f'<section id="cost"><h2>Cost <small>{len(trials):,} {plural(len(trials), "trial")}</small></h2>'
    yield '<div class="card"><div class="scroll tall"><table class="cost"><thead><tr><th>Trial</th><th>Status</th>'
    heads = ("Steps", "Tokens", "Training", "Evaluation", "GPU hours")
    yield "".join(f'<th class="number">{head}</th>' for head in heads) + "</tr></thead><tbody>"
    for trial in ranked:
        error = (trial["error"] or "").strip()
        told = f'<div class="error" title="{escape(error)}">{escape(error.splitlines()[0])}</div>' if error else ""
        yield f'<tr><td class="name" title="{escape(trial["label"])}">{escape(trial["name"])}{told}</td>'
        yield f'<td class="{"fails" if trial["status"] == "failed" else "faint"}">{escape(trial["status"])}</td>'
        yield "".join(f'<td class="number">{text}</td>' for text in _costs(trial)) + "</tr>"
    yield "</tbody><tfoot><tr><td>All</td><td></td>"
    keys = ("steps", "tokens", "train_seconds", "evaluate_seconds", "gpu_hours")
    total = {key: _total(trials, key) if any(trial[key] is not None for trial in trials) else None for key in keys}
    yield "".join(f'<td class="number">{text}</td>' for text in _costs(total)) + "</tr></tfoot></table></div></div>"
    if left_out:
        count = f"{len(left_out):,} {plural(len(left_out), 'combination')} not tried"
        yield f'<div class="card"><details><summary>{count}</summary><div class="scroll tall"><table class="cost">'
        yield "<tr><th>Combination</th><th>Why</th></tr>"
        for row in left_out:
            yield f'<tr><td class="name">{escape(row["name"])}</td><td>{escape(row["reason"])}</td></tr>'
        yield "</table></div></details></div>"
    yield "</section>"


def _costs(row: dict[str, Any]) -> list[str]:
    """Steps, tokens, times and GPU hours as they are written."""
    counts = ["–" if row[key] is None else f"{row[key]:,}" for key in ("steps", "tokens")]
    times = ["–" if row[key] is None else duration(row[key]) for key in ("train_seconds", "evaluate_seconds")]
    return [*counts, *times, numbers(row["gpu_hours"])[0]]


def _fixed(axis: str, row: dict[str, Any], variants: dict[str, str]) -> tuple[int, str]:
    """What stays as it is where ``axis`` (length or pairs) varies: the other of the two, and all else."""
    return row["pairs" if axis == "length" else "length"], variants[row["label"]]


def _fixed_name(axis: str, fixed: tuple[int, str]) -> str:
    number, variant = fixed
    name = f"{number} {plural(number, 'pair')}" if axis == "length" else f"L={number}"
    return f"{name}, {variant}" if variant else name


def _sorted(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cells or trials by method, then length, then pairs."""
    return sorted(rows, key=lambda row: (_rank(row["method"]), row["length"], row["pairs"], row["label"]))


def _rank(method: str) -> tuple[int, str]:
    return (_ORDER.index(method) if method in _ORDER else len(_ORDER)), method


def _variants(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """By label: what tells cells, or trials, apart beside method, length, pairs and seed; empty where nothing does."""
    parts = {
        row["label"]: [
            str(row["scale"]),
            "all tasks" if row["tasks"] is None else " + ".join(row["tasks"]),
            *(f"{key} {value}" for key, value in row["fields"].items()),
        ]
        for row in rows
    }
    common = set.intersection(*map(set, parts.values())) if parts else set()
    return {label: ", ".join(part for part in found if part not in common) for label, found in parts.items()}


def _scores(row: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Of a cell or a reference, by task and metric."""
    return {(score["task"], score["metric"]): score for score in row["scores"]}


def _verdict_rank(verdict: str) -> tuple[int, str]:
    order = ("holds", "not significant", "does not hold")
    return (order.index(verdict) if verdict in order else len(order)), verdict


def _verdict_class(verdict: str) -> str:
    return {"holds": "holds", "does not hold": "fails"}.get(verdict, "faint")


def _told(
    name: str,
    value: float,
    low: float | None,
    high: float | None,
    written: Callable[..., list[str]] = numbers,
) -> str:
    """What is shown on pointing at a mark."""
    texts = written(value, low, high)
    return f"{name}: {texts[0]}" + (f" [{texts[1]}, {texts[2]}]" if known(low) and known(high) else "")


def _percents(value: float | None, *bounds: float | None) -> list[str]:
    """As ``numbers``, but with a sign where they are positive."""
    texts = numbers(value, *bounds)
    return [
        f"+{text}" if known(number) and number > 0 else text
        for number, text in zip((value, *bounds), texts, strict=True)
    ]


def _gain(value: float | None, low: float | None, high: float | None) -> tuple[str, str]:
    """A gain and its interval."""
    texts = _percents(value, low, high)
    return texts[0], f"[{texts[1]}, {texts[2]}]" if known(low) and known(high) else "–"


def _total(rows: Iterable[dict[str, Any]], key: str) -> float:
    return sum(row[key] or 0 for row in rows)


def _short(count: float) -> str:
    """A count with three digits: 172k, 1.2M."""
    rounded = float(f"{count:.3g}")
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if rounded >= size:
            return f"{rounded / size:.3g}{unit}"
    return f"{rounded:.3g}"


def _values(values: Iterable[Any]) -> str:
    """What is among ``values``, each once."""
    return ", ".join(dict.fromkeys(str(value) for value in values)) or "–"
