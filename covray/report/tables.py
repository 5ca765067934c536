"""Tables of scores, as the pages of evaluations and sweeps show them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from covray.report.formatting import interval, is_finite, numbers
from covray.report.metrics import metric_of


class Estimate(Protocol):
    """A mean with its 95% interval; None where it is undefined."""

    @property
    def mean(self) -> float | None:
        """The mean itself."""

    @property
    def low(self) -> float | None:
        """The lower end of its interval."""

    @property
    def high(self) -> float | None:
        """The upper end of its interval."""


@dataclass(frozen=True)
class ScoreCell:
    """A score as it is written in a table."""

    mean: str | None = None
    """None: there is no score."""
    interval: str = ""
    note: str = ""
    best: bool = False


def score_cell(score: Estimate | None, best: float | None = None, note: str = "") -> ScoreCell:
    """Write a score for a table.

    Args:
        score: The score; None where there is none.
        best: The best mean of the column, which is marked.
        note: A few words below it.
    """
    if score is None or score.mean is None:
        return ScoreCell()
    mean, low, high = numbers(score.mean, score.low, score.high)
    # A single seed or episode has a mean and no interval.
    bounds = ""
    if score.low is not None and score.high is not None:
        bounds = interval(low, high)
    return ScoreCell(mean, bounds, note, best=score.mean == best)


def best_mean(metric: str, scores: Iterable[Estimate | None], lower_is_better: Collection[str]) -> float | None:
    """Return the best mean of ``scores``; None where there is none, or where the metric has no better and worse."""
    # NaN compares with nothing, and would hide the best.
    means = [score.mean for score in scores if score is not None and is_finite(score.mean)]
    if not means or metric_of(metric).better is None:
        return None
    if metric in lower_is_better:
        return min(means)
    return max(means)
