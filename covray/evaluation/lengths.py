"""Which chain length suits a task: the one whose answers were the best, chosen on a split that no claim is made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from covray.evaluation.records import SubjectEntry, SubjectScore, TaskSummary


def best_lengths(
    subjects: Sequence[SubjectEntry],
    scores: Sequence[SubjectScore],
    tasks: dict[str, TaskSummary],
    lower_is_better: Sequence[str],
) -> dict[str, dict[str, int]]:
    """Return the best chain length of every task, by adapter; only of adapters that answered at several lengths.

    Best is the mean of the task's first metric; of equal ones the shorter chain.

    Args:
        subjects: The rows of a table.
        scores: Of the rows.
        tasks: What was measured of each task.
        lower_is_better: Metrics of which less is better.

    Returns:
        Length by task, by run folder.
    """
    lengths: dict[str, dict[str, int]] = defaultdict(dict)  # by run folder and subject
    for subject in subjects:
        # Answers of several samples are left out: a length is chosen by single ones.
        if subject.adapter is not None and subject.length is not None and subject.samples == 1:
            lengths[subject.adapter][subject.name] = subject.length

    means = {}
    for score in scores:
        means[score.task, score.subject, score.metric] = score.mean
    best: dict[str, dict[str, int]] = {}
    for adapter, of_adapter in lengths.items():
        # With one length there is nothing to choose.
        if len(of_adapter) < 2:
            continue
        best[adapter] = {}
        for task, about in tasks.items():
            sign = -1  # the best is the least
            if about.primary in lower_is_better:
                sign = 1
            ranked = []
            for name, length in of_adapter.items():
                mean = means.get((task, name, about.primary))
                if mean is not None:
                    ranked.append((sign * mean, length))
            if ranked:
                # Of equal means the smaller second item, the shorter chain.
                best[adapter][task] = min(ranked)[1]
    return best
