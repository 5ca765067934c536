"""The tables at the end of the page of claims: likelihood, quality of chains, scores and cost of every arm."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from covray.evaluation.claims.records import ArmEntry, Exposure, QualityWorth
from covray.evaluation.metrics import lower_is_better
from covray.report.formatting import (
    NONE,
    duration,
    fixed,
    interval,
    is_finite,
    listed,
    numbers,
    readable,
    short_count,
    signed_numbers,
)
from covray.report.metrics import metric_head


@dataclass(frozen=True)
class Table:
    """Texts in rows; the first column is a name, the others are figures."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def exposure_table(entries: Sequence[Exposure]) -> Table | None:
    """Return a row for every arm: what is not learnt, and the exposure to own frames, mean over tasks and by task."""
    if not entries:
        return None
    # A dict serves as an ordered set: tasks stand in the order of the entries.
    tasks: dict[str, None] = {}
    by_arm: dict[str, dict[str, Exposure]] = defaultdict(dict)
    for entry in entries:
        tasks[entry.task] = None
        by_arm[entry.arm][entry.task] = entry
    rows = []
    for arm, by_task in by_arm.items():
        for name, what in (("unlearnt", "not learnt"), ("exposure", "own frames")):
            # An arm that was not measured on a task has a dash there, which its mean leaves out.
            values = [getattr(by_task.get(task), name, None) for task in tasks]
            rows.append((f"{arm}: {what}", _signed(_mean(values)), *map(_signed, values)))
    return Table(("arm", "mean", *map(readable, tasks)), tuple(rows))


def quality_table(entries: Sequence[QualityWorth]) -> Table | None:
    """Return how the quality of chains goes with what their frames are worth, a row a task; None without figures."""
    if not entries:
        return None
    lower = lower_is_better()
    rows = []
    for entry in entries:
        value, low, high = signed_numbers(entry.correlation, entry.low, entry.high)
        between = NONE
        if is_finite(entry.low) and is_finite(entry.high):
            between = interval(low, high)
        rows.append((f"{readable(entry.task)}: {metric_head(entry.worth, lower).label}", value, between))
    return Table(("what the chain's frames are worth", "rank correlation", "95%"), tuple(rows))


def score_table(arms: Sequence[ArmEntry]) -> Table | None:
    """Return the first metric of every task and the gain over the untuned backbone, a row an arm."""
    # Below a share of 1 an arm is a point of a learning curve, which has a chart of its own.
    done = [arm for arm in arms if arm.seeds and arm.share == 1]

    if not done:
        return None
    tasks: dict[str, None] = {}
    for arm in done:
        tasks |= dict.fromkeys(arm.scores)
    rows = []
    for arm in done:
        gain, between = NONE, ""
        if arm.gain_percent is not None:
            gain = percent(arm.gain_percent)
        if is_finite(arm.low) and is_finite(arm.high):
            between = interval(percent(arm.low), percent(arm.high))
        scores = [numbers(arm.scores.get(task))[0] for task in tasks]
        rows.append((arm.name, f"{gain} {between}", numbers(arm.perplexity_own)[0], *scores))
    return Table(("arm", "gain over untuned, %", "perplexity", *map(readable, tasks)), tuple(rows))


def cost_table(arms: Sequence[ArmEntry]) -> Table:
    """Return what every arm took, a row an arm."""
    rows = []
    for arm in arms:
        # An arm without seeds is planned: what it will take is known, its hours are not.
        steps, answers, tokens = _count(arm.steps), _count(arm.answers), NONE
        if arm.tokens is not None:
            tokens = short_count(arm.tokens)
        training = evaluating = NONE
        if arm.seeds:
            training, evaluating = duration(3600 * arm.train_hours), duration(3600 * arm.evaluate_hours)
        chain = "no frames"
        if arm.method != "none":
            chain = f"{arm.method}, {arm.length}"
        seeds = listed(arm.seeds, "waiting")
        rows.append((f"{arm.name}: {arm.about}", chain, seeds, steps, answers, tokens, training, evaluating))
    heads = ("arm", "chain", "seeds", "steps", "queries", "tokens", "training", "evaluation")
    return Table(heads, tuple(rows))


def _count(number: int | None) -> str:
    if number is None:
        return NONE
    return f"{number:,}"


def _mean(values: Iterable[float | None]) -> float | None:
    # Mean of what is known; the table shows beside it where a figure is missing.
    known = [value for value in values if value is not None]
    if not known:
        return None
    return sum(known) / len(known)


def percent(value: float) -> str:
    """Write a gain in percent."""
    return _with_sign(value, 1)


def _signed(value: float | None) -> str:
    if value is None:
        return NONE
    return _with_sign(value, 2)


def _with_sign(value: float, decimals: int) -> str:
    text = fixed(value, decimals)
    if value > 0:
        return f"+{text}"
    return text
