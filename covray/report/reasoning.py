"""The page of an evaluation of reasoning: the table, differences, and episodes with every row's picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from covray.io.images import decode
from covray.report.formatting import NONE, p_value, plural
from covray.report.html import Link, render
from covray.thinking.records import ReasoningResults
from covray.thinking.results import MEAN
from covray.thinking.rows import EpisodeRow

_TILE_PX = 96


@dataclass(frozen=True)
class ScoreRow:
    """A row of the table, written."""

    name: str
    cells: tuple[str, ...]
    """Shares of both sides right: the mean, then each task."""
    intervals: tuple[str, ...]


@dataclass(frozen=True)
class ShotTable:
    """The table of a number of shots."""

    shots: int
    tasks: tuple[str, ...]
    rows: tuple[ScoreRow, ...]
    sides: tuple[tuple[str, tuple[str, ...]], ...]
    """Of each row the shares of the sides over all tasks."""
    differences: tuple[tuple[str, ...], ...]
    """First, second, difference, interval, p and episodes, over all tasks."""


@dataclass(frozen=True)
class AnswerView:
    """What a row of the table answered."""

    row: str
    right: bool
    seen: str
    picture: NDArray[np.uint8] | None


@dataclass(frozen=True)
class EpisodeView:
    """An episode with its answers."""

    title: str
    words: tuple[str, ...]
    demonstrations: tuple[NDArray[np.uint8], ...]
    query: str
    answer: str
    text: str
    answers: tuple[AnswerView, ...]


def write_reasoning_page(results: ReasoningResults, episodes: Sequence[EpisodeRow], path: str) -> bytes:
    """Return the page.

    Args:
        results: The table.
        episodes: Rows of the evaluation with pictures, to show.
        path: The folder, for the head of the page.
    """
    shots = sorted({score.shots for score in results.scores})
    tables, links = [], []
    for number in shots:
        tables.append(_table(results, number))
        links.append(Link(f"shots-{number}", f"{number}-shot"))
    # Decoded once here; the template only places them.
    views = tuple(_episode(row) for row in episodes)
    return render(
        "reasoning.html",
        f"{results.benchmark}: reasoning",
        styles=("tables.css", "evaluation.css", "reasoning.css"),
        tile_px=_TILE_PX,
        links=[*links, Link("episodes", "Episodes")],
        path=path,
        results=results,
        tables=tuple(tables),
        episodes=views,
        failed=f"{results.failed:,} {plural(results.failed, 'episode')} without an answer",
    )


def _table(results: ReasoningResults, shots: int) -> ShotTable:
    # Every (row, task, side) has one score for a number of shots.
    by_key = {}
    for score in results.scores:
        if score.shots == shots:
            by_key[score.row, score.task, score.side] = score
    tasks = tuple(sorted({score.task for score in results.scores} - {MEAN}))

    rows, sides = [], []
    for name in results.rows:
        shares, intervals = [], []
        for task in (MEAN, *tasks):
            score = by_key[name, task, "both"]
            shares.append(f"{score.mean:.3f}")
            intervals.append(_bounds(score.low, score.high, ".3f"))
        rows.append(ScoreRow(name, tuple(shares), tuple(intervals)))
        # The sides by themselves, over all tasks: "both" alone does not say what went wrong.
        shares_of_sides = []
        for side in ("detail", "object", "named", "hidden"):
            shares_of_sides.append(f"{by_key[name, MEAN, side].mean:.3f}")
        sides.append((name, tuple(shares_of_sides)))
    differences = []
    for entry in results.differences:
        if entry.shots == shots and entry.task == MEAN:
            interval = _bounds(entry.low, entry.high, "+.3f")
            figures = (f"{entry.mean:+.3f}", interval, p_value(entry.p_value), f"{entry.episodes:,}")
            differences.append((entry.first, entry.second, *figures))
    return ShotTable(shots, tasks, tuple(rows), tuple(sides), tuple(differences))


def _bounds(low: float | None, high: float | None, form: str) -> str:
    if low is None or high is None:
        return NONE
    return f"{format(low, form)} to {format(high, form)}"


def _episode(row: EpisodeRow) -> EpisodeView:
    answers = []
    for answer in row.answers or ():
        # A row that failed has no picture and counts as wrong.
        picture = None
        if answer.picture is not None:
            picture = decode(answer.picture)
        seen = " ".join(filter(None, (answer.seen_detail, answer.seen_object)))
        answers.append(AnswerView(answer.row, answer.right, seen or NONE, picture))
    return EpisodeView(
        title=f"{row.task}, {row.shots}-shot, {row.number}",
        # The last word is the query's; the others name the demonstrations.
        words=tuple(row.words[:-1]),
        demonstrations=tuple(decode(data) for data in row.demonstrations or ()),
        query=row.words[-1],
        answer=f"{row.answer_detail} {row.answer_object}",
        text=row.text or "",
        answers=tuple(answers),
    )
