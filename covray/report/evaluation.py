"""The page of an evaluation: tables, plots and picture strips in one HTML file, to read and to hand on."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any, Literal

import numpy as np
from PIL import Image

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
    img,
    known,
    metric_name,
    metric_of,
    navigation,
    numbers,
    plural,
    round_ticks,
    score_cell,
)

_SIGNIFICANT = 0.05
_FAILED_SHOWN = 20
_DIFFERENCES_OPEN = 12  # more of them than this are folded away
_TILE_PX = 128
_STORED_PX = 512  # longer side of a photograph on the page: twice the largest tile
_ROW_PX, _CAP_PX, _AXIS_PX = 28, 22, 48  # of a plot: a subject, the ceiling's name above, the axis below
_RANKS = ("best", "median", "worst")


_STYLE = """
.plot { display: grid; grid-template-columns: fit-content(38%) minmax(0, 1fr); padding: 0 48px 0 20px; max-width: 900px;
  gap: 0 28px; }
.plot ol { list-style: none; margin: 0; padding: 22px 0 0; min-width: 0; }
.plot li { height: 28px; line-height: 28px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  text-align: right; font-size: 13px; }
.plot svg { display: block; width: 100%; overflow: visible; font-size: 11px; fill: var(--faint); }
.plot line { stroke: var(--rule); } .plot .whisker { stroke: var(--faint); stroke-width: 2; }
.plot circle { fill: var(--card); stroke: var(--faint); stroke-width: 2; }
.plot .adapter circle { fill: var(--accent); stroke: var(--accent); } .plot .adapter .whisker { stroke: var(--accent); }
.plot .ceiling line { stroke: var(--faint); stroke-dasharray: 4 4; }
.row { display: grid; grid-template-columns: max-content minmax(0, 1fr) max-content; gap: 8px 20px; padding: 16px 20px;
  border-top: 1px solid var(--rule); }
.row h4 { grid-column: 1 / -1; margin: 0; font-size: 13px; font-weight: 600; }
.row h4 code { color: var(--faint); font-weight: 400; margin-left: 8px; }
.row figure { margin: 0; display: grid; grid-template-columns: min-content; align-content: start; gap: 4px; }
.row figcaption { font-size: 12px; line-height: 1.35; overflow-wrap: anywhere; }
.row figcaption span { color: var(--faint); font-variant-numeric: tabular-nums; }
.answers { display: flex; flex-wrap: wrap; gap: 14px 20px; overflow-x: auto; padding: 3px; margin: -3px; }
.pictures { display: flex; gap: 6px; }
.row img { height: var(--tile); width: auto; max-width: calc(2 * var(--tile)); object-fit: contain; }
.small { image-rendering: pixelated; } .answer { outline: 2px solid var(--accent); outline-offset: 1px; }
@media (max-width: 800px) { .row { grid-template-columns: max-content 1fr; }
  .answers { grid-area: 3 / 1 / auto / -1; } }
"""


@dataclass(frozen=True)
class Strip:
    """What one subject made of one query. Pictures are uint8 RGB."""

    task: str
    subject: str
    rank: Literal["best", "median", "worst"]
    pair_id: int
    score: float | None
    """By the task's primary metric; None where it is undefined."""
    query: np.ndarray
    """[h, w, 3]"""
    frames: list[np.ndarray]
    """[s, s, 3] each, in the order the model wrote them; none for a subject that writes none."""
    answer: np.ndarray
    """[h, w, 3]"""
    label: np.ndarray
    """[h, w, 3]"""


def write_evaluation_page(results: dict[str, Any], strips: Sequence[Strip], out: str) -> None:
    """Write the page of an evaluation to the file ``out``: an overview, then a section a task.

    ``results``: what ``covray evaluate`` writes as ``results.json``. ``strips``: pictures to show, those of one task,
    rank and pair side by side. The page holds all it needs, loads nothing, and runs no script but its own, whatever
    the texts in it are. Raises OSError where ``out`` cannot be written.
    """
    tasks = list(results["tasks"])
    of_task = {task: [strip for strip in strips if strip.task == task] for task in tasks}
    links = [("overview", "Overview"), *((task, human(task)) for task in tasks)]
    links += [("failed", "Failed")] if results["failed"] else []
    links += [("metrics", "Metrics")] if tasks else []
    parts = [*_header(results), navigation(links, _TILE_PX), *_overview(results)]
    for task in tasks:
        parts += _task(results, task, of_task[task])
    parts += [*_failed(results["failed"]), *glossary(results)]
    title = f"Evaluation on {_base(results['config'].get('data', ''))}"
    storage.write_bytes(out, document(title, parts, tile_px=_TILE_PX, style=TABLES_STYLE + _STYLE))


def _header(results: dict[str, Any]) -> Iterator[str]:
    config, subjects, tasks = results["config"], results["subjects"], results["tasks"]
    data = str(config.get("data", ""))
    yield f'<header><h1>Evaluation on {escape(_base(data))}</h1><code class="faint">{escape(data)}</code>'
    yield figures(
        [
            (f"{sum(task['episodes'] for task in tasks.values()):,}", "episodes"),
            (str(len(tasks)), plural(len(tasks), "task")),
            (str(len(subjects)), plural(len(subjects), "row") + " in the table"),
            (f"{len(results['failed']):,}", plural(len(results["failed"]), "failed answer")),
            (duration(results["seconds"]), "of work"),
        ]
    )
    pairs = sorted({subject["pairs"] for subject in subjects if subject["pairs"] is not None})
    sampling = config.get("sampling", {})
    greedy = not sampling.get("temperature")
    drawn = ", ".join(f"{human(key).lower()} {value}" for key, value in sampling.items() if value is not None)
    lines = [
        ("Queries", f"{config.get('split', '–')} split"),
        ("Examples", f"{config.get('example_split', '–')} split, {config.get('selection', '–')} selection"),
        ("Examples a query", ", ".join(map(str, pairs)) or "–"),
        ("Sampling", "greedy" if greedy else drawn),
        ("Seed", str(config.get("seed", "–"))),
    ]
    hashes = [(human(name), str(value)) for name, value in results["fingerprints"].items()]
    yield facts([*lines, *hashes], codes=[name for name, _ in hashes])
    yield configuration(config) + "</header>"


def _overview(results: dict[str, Any]) -> Iterator[str]:
    """One row a subject, one column a task with its primary metric; then who the subjects are."""
    tasks, lower = results["tasks"], set(results["lower_is_better"])
    heads = [
        f'<a href="#{escape(task)}">{escape(human(task))}</a><small>{metric_name(about["primary"], lower)}</small>'
        for task, about in tasks.items()
    ]
    columns = [(task, about["primary"]) for task, about in tasks.items()]
    yield '<section id="overview"><h2>Overview <small>each task by its first metric</small></h2>'
    yield f'<div class="card"><div class="scroll">{_table(results, heads, columns)}</div>'
    yield (
        "<p>Mean over n episodes, and beneath it the 95% bootstrap interval of the mean. ↑ more is better, ↓ less is "
        "better. Bold: the best row but for the ceiling, which stands apart: it has seen the label.</p></div>"
    )
    rows = [(subject["name"], subject["about"]) for subject in results["subjects"]]
    yield facts(rows) if rows else ""
    yield "</section>"


def _task(results: dict[str, Any], task: str, strips: Sequence[Strip]) -> Iterator[str]:
    about, lower = results["tasks"][task], set(results["lower_is_better"])
    counts = f"{about['episodes']:,} episodes"
    counts += f", {about['rejected']:,} rejected" if about["rejected"] else ""
    yield f'<section id="{escape(task)}"><h2>{escape(human(task))} <small>{counts}</small></h2>'
    scored = {score["metric"] for score in results["scores"] if score["task"] == task}
    metrics = [metric for metric in about["metrics"] if metric in scored or metric not in about["absent"]]
    heads = [metric_name(metric, lower) for metric in metrics]
    table = _table(results, heads, [(task, metric) for metric in metrics])
    yield f'<div class="card"><div class="scroll">{table}</div>'
    for metric, why in about["absent"].items():
        yield f"<p>{escape(metric_of(metric).label)} is absent: {escape(why)}</p>"
    yield "</div>"
    yield from _plot(results, task, about["primary"], lower)
    yield from _differences([row for row in results["differences"] if row["task"] == task], lower)
    yield from _strips(strips, [subject["name"] for subject in results["subjects"]], about["primary"])
    yield "</section>"


def _table(results: dict[str, Any], heads: Sequence[str], columns: Sequence[tuple[str, str]]) -> str:
    """Rows of subjects, the ceilings last and apart; ``columns`` are (task, metric) under ``heads``, which are HTML."""
    scores = {(row["task"], row["metric"], row["subject"]): row for row in results["scores"]}
    lower = set(results["lower_is_better"])
    others = [subject for subject in results["subjects"] if subject["kind"] != "ceiling"]
    ceilings = [subject for subject in results["subjects"] if subject["kind"] == "ceiling"]
    best, episodes = {}, {}
    for column in columns:
        rows = {subject["name"]: scores.get((*column, subject["name"])) for subject in results["subjects"]}
        counts = {row["episodes"] for row in rows.values() if row is not None and row["mean"] is not None}
        episodes[column] = counts.pop() if len(counts) == 1 else results["tasks"][column[0]]["episodes"]
        found = [rows[subject["name"]] for subject in others]
        best[column] = best_mean(column[1], found, lower)
    parts = ['<table class="scores"><thead><tr><th></th>']
    parts += [
        f"<th>{head}<small>n = {episodes[column]:,}</small></th>" for head, column in zip(heads, columns, strict=True)
    ]
    parts.append("</tr></thead>")
    for group, css in ((others, ""), (ceilings, ' class="ceiling"')):
        if not group:
            continue
        parts.append(f"<tbody{css}>")
        for subject in group:
            parts.append(f"<tr><th>{escape(subject['name'])}<small>{escape(_form(subject))}</small></th>")
            for column in columns:
                row = scores.get((*column, subject["name"]))
                note = f"n = {row['episodes']:,}" if row is not None and row["episodes"] != episodes[column] else ""
                parts.append(score_cell(row, None if css else best[column], note))
            parts.append("</tr>")
        parts.append("</tbody>")
    return "".join([*parts, "</table>"])


def _plot(results: dict[str, Any], task: str, metric: str, lower: set[str]) -> Iterator[str]:
    """Means with their intervals, a line a subject; the ceiling as a vertical line through all of them."""
    scores = {
        row["subject"]: row
        for row in results["scores"]
        if (row["task"], row["metric"]) == (task, metric) and known(row["mean"])
    }
    shown = [subject for subject in results["subjects"] if subject["name"] in scores]
    if not shown:
        return
    rows = [subject for subject in shown if subject["kind"] != "ceiling"]
    values = [value for row in scores.values() for value in (row["mean"], row["low"], row["high"]) if known(value)]
    ticks, decimals = round_ticks(min(values), max(values))

    def x(value: float) -> str:
        return f"{100 * (value - ticks[0]) / (ticks[-1] - ticks[0]):.2f}%"

    bottom = _CAP_PX + _ROW_PX * len(rows)
    yield f'<div class="card"><h3>{metric_name(metric, lower)}<small>mean and 95% interval</small></h3>'
    yield '<div class="plot"><ol>'
    for subject in rows:
        yield f'<li title="{escape(subject["name"])}">{escape(subject["name"])}</li>'
    label = f"{metric_of(metric).label} of {human(task)}: means with 95% intervals, as in the table above"
    yield f'</ol><svg role="img" aria-label="{escape(label)}" height="{bottom + _AXIS_PX}">'
    for tick in ticks:
        yield f'<line x1="{x(tick)}" x2="{x(tick)}" y1="{_CAP_PX}" y2="{bottom}"/>'
        yield f'<text x="{x(tick)}" y="{bottom + 16}" text-anchor="middle">{tick:,.{decimals}f}</text>'
    yield f'<text x="50%" y="{bottom + 36}" text-anchor="middle">{escape(axis_title(metric, lower))}</text>'
    for subject in shown:
        if subject["kind"] == "ceiling":
            at = x(scores[subject["name"]]["mean"])
            anchor = "end" if float(at[:-1]) > 50 else "start"
            yield f'<g class="ceiling"><line x1="{at}" x2="{at}" y1="{_CAP_PX - 6}" y2="{bottom}"/>'
            yield f'<text x="{at}" y="{_CAP_PX - 10}" text-anchor="{anchor}">{escape(subject["name"])}</text></g>'
    for index, subject in enumerate(rows):
        row, y = scores[subject["name"]], _CAP_PX + _ROW_PX * (index + 0.5)
        mean, low, high = numbers(row["mean"], row["low"], row["high"])
        css = ' class="adapter"' if subject["kind"] == "adapter" else ""
        yield f"<g{css}><title>{escape(subject['name'])}: {mean} [{low}, {high}]</title>"
        if known(row["low"]) and known(row["high"]):
            yield f'<line class="whisker" x1="{x(row["low"])}" x2="{x(row["high"])}" y1="{y}" y2="{y}"/>'
        yield f'<circle cx="{x(row["mean"])}" cy="{y}" r="5"/></g>'
    yield "</svg></div></div>"


def _differences(rows: Sequence[dict[str, Any]], lower: set[str]) -> Iterator[str]:
    if not rows:
        return
    yield '<div class="card"><h3>Paired differences<small>of the same episodes, first minus second</small></h3>'
    opened = " open" if len(rows) <= _DIFFERENCES_OPEN else ""
    yield f"<details{opened}><summary>{len(rows):,} {plural(len(rows), 'comparison')}</summary>"
    yield '<div class="scroll"><table class="differences"><tr><th>First</th><th>Second</th><th>Metric</th>'
    yield '<th class="number">First − second</th><th class="number">95% interval</th><th class="number">p</th>'
    yield '<th class="number">Episodes</th><th>The first is</th></tr>'
    for row in rows:
        mean, low, high = numbers(row["mean"], row["low"], row["high"])
        interval = "–" if row["low"] is None or row["high"] is None else f"[{low}, {high}]"
        verdict, css = _verdict(row, lower)
        yield (
            f'<tr><td class="text">{escape(row["first"])}</td><td class="text">{escape(row["second"])}</td>'
            f'<td>{metric_name(row["metric"], lower)}</td><td class="number">{mean}</td>'
            f'<td class="number">{interval}</td><td class="number">{_p_value(row["p_value"])}</td>'
            f'<td class="number">{row["episodes"]:,}</td><td class="{css}">{verdict}</td></tr>'
        )
    yield "</table></div></details>"
    yield "<p>p: two-sided sign-flip test, not corrected for the number of comparisons.</p></div>"


def _verdict(row: dict[str, Any], lower: set[str]) -> tuple[str, str]:
    """What a difference says of the first subject, and the class of these words."""
    if row["mean"] is None or row["p_value"] is None:
        return "–", "faint"
    if row["p_value"] >= _SIGNIFICANT or not row["mean"]:
        return f"not significant at {_SIGNIFICANT}", "open faint"
    word = "better" if (row["mean"] > 0) != (row["metric"] in lower) else "worse"
    return word, word


def _strips(strips: Sequence[Strip], subjects: Sequence[str], primary: str) -> Iterator[str]:
    """A row for every rank and query: the query, what each subject made of it, the label."""
    if not strips:
        return
    label = escape(metric_of(primary).label)
    yield f'<div class="card"><h3>Answers<small>best, median and worst by {label}; a model\'s frames, then, '
    yield "outlined, its answer</small></h3>"
    place = {name: index for index, name in enumerate(subjects)}

    def order(strip: Strip) -> tuple[int, int]:
        return _RANKS.index(strip.rank), strip.pair_id

    for _, group in groupby(sorted(strips, key=order), key=order):
        row = sorted(group, key=lambda strip: place.get(strip.subject, len(place)))
        first = row[0]
        yield f'<div class="row"><h4>{first.rank.capitalize()}<code>{first.pair_id}</code></h4>'
        yield f'<figure><div class="pictures">{_picture(first.query, "query")}</div>'
        yield '<figcaption>query</figcaption></figure><div class="answers">'
        for strip in row:
            shown = [
                _picture(frame, f"frame {index} of {strip.subject}") for index, frame in enumerate(strip.frames, 1)
            ]
            shown.append(_picture(strip.answer, f"answer of {strip.subject}", "answer"))
            score = "–" if strip.score is None else numbers(strip.score)[0]
            yield f'<figure><div class="pictures">{"".join(shown)}</div>'
            yield f"<figcaption>{escape(strip.subject)} <span>{score}</span></figcaption></figure>"
        yield f'</div><figure class="label"><div class="pictures">{_picture(first.label, "label")}</div>'
        yield "<figcaption>label</figcaption></figure></div>"
    yield "</div>"


def _picture(picture: np.ndarray, alt: str, css: str = "") -> str:
    """Small pictures to the pixel, large ones made smaller: the page is to look at and to send."""
    longest = max(picture.shape[:2])
    if longest > _STORED_PX:
        image = Image.fromarray(picture)
        image.thumbnail((_STORED_PX, _STORED_PX), Image.Resampling.LANCZOS)
        picture = np.asarray(image)
    classes = f"{css} small" if longest < _TILE_PX else css
    return img(picture, alt, f'class="{classes}"')


def _failed(failed: Sequence[dict[str, Any]]) -> Iterator[str]:
    if not failed:
        return
    shown = f", the first {_FAILED_SHOWN}" if len(failed) > _FAILED_SHOWN else ""
    count = f"{len(failed):,} {plural(len(failed), 'answer')} without scores{shown}"
    yield f'<section id="failed"><h2>Failed <small>{count}</small></h2><div class="card"><div class="scroll"><table>'
    yield "<tr><th>Task</th><th>Subject</th><th>Pair</th><th>Error</th></tr>"
    for row in failed[:_FAILED_SHOWN]:
        yield (
            f'<tr><td>{escape(human(row["task"]))}</td><td class="text">{escape(row["subject"])}</td>'
            f'<td><code>{row["pair_id"]}</code></td><td class="text">{escape(row["error"])}</td></tr>'
        )
    yield "</table></div></div></section>"


def _form(subject: dict[str, Any]) -> str:
    """What kind of subject it is, and after what chains it answers."""
    parts = [subject["kind"]]
    if subject["method"] is not None:
        parts.append("no frames" if subject["method"] == "none" else f"{subject['method']}, L={subject['length']}")
    if subject["pairs"] is not None:
        parts.append(f"{subject['pairs']} {plural(subject['pairs'], 'pair')}")
    return " · ".join(parts)


def _p_value(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _base(path: str) -> str:
    return posixpath.basename(path.rstrip("/")) or "no dataset"
