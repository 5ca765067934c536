"""Reports of sweeps as plain JSON values, which tests can change and compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from covray.evaluation.records import TaskSummary
from covray.sweeps import results
from covray.sweeps.records import LeftOut, Reference, TrialEntry


def tabulate(
    trials: Iterable[dict[str, Any]],
    references: Sequence[dict[str, Any]],
    tasks: Mapping[str, dict[str, Any]],
    lower_is_better: Iterable[str],
    left_out: Sequence[dict[str, str]],
    config: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Call ``covray.sweeps.results.tabulate`` with records of these values, and return the values of its record."""
    return results.tabulate(
        [TrialEntry.model_validate(trial) for trial in trials],
        [Reference.model_validate(reference) for reference in references],
        {task: TaskSummary.model_validate(about) for task, about in tasks.items()},
        lower_is_better,
        [LeftOut.model_validate(entry) for entry in left_out],
        config,
        seconds,
    ).to_json()
