"""The scores of the arms of a programme, read from the folders of their evaluations."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from covray.evaluation.answers import ResultRow
from covray.evaluation.claims.arms import ArmScores, compare, primary_metrics
from covray.evaluation.metrics import lower_is_better
from covray.evaluation.records import EvaluationResults
from covray.io.storage import Folder


@dataclass(frozen=True)
class EvaluationFolder:
    """The evaluation of an arm with one seed."""

    path: str
    subject: str
    """The row of the arm in its table."""
    seed: int

    @property
    def finished(self) -> bool:
        """Whether all episodes are answered."""
        return Folder(self.path).exists(EvaluationResults.FILE)

    def rows(self, subject: str | None = None) -> list[ResultRow]:
        """Return the rows of its subject, or of another one of its table."""
        name = subject or self.subject
        return [row for row in _rows(self.path) if row["subject"] == name]


@functools.lru_cache(maxsize=4)  # the subjects of one evaluation are asked for one after another
def _rows(path: str) -> list[ResultRow]:
    from covray.distributed.evaluate import read_rows  # here: Ray takes seconds to import

    return read_rows(path)


def scores_of(folders: Iterable[EvaluationFolder], subject: str | None = None) -> ArmScores | None:
    """Return the scores of an arm from the evaluations of its seeds that are finished; None where none is.

    Args:
        folders: Of its seeds.
        subject: The row of the tables; by default that of the folder.
    """
    rows = {}
    for folder in folders:
        if folder.finished:
            of_subject = folder.rows(subject)
            if of_subject:
                rows[folder.seed] = of_subject
    return ArmScores.of_rows(rows) if rows else None


def best_chains(validated: Mapping[str, EvaluationFolder], reference: str) -> str | None:
    """Return the arm with the largest gain over the ``reference``; None while an evaluation is missing.

    Args:
        validated: Evaluations on the split that choices are made on, by arm; the reference among them.
        reference: The arm that is no candidate.
    """
    # Of some arms only, the best would be another one later.
    if not all(folder.finished for folder in validated.values()):
        return None
    base = scores_of([validated[reference]])
    # No intervals: a choice needs the value alone.
    gains = []
    for name, folder in validated.items():
        scores = scores_of([folder])
        if name == reference or scores is None or base is None:
            continue
        comparison = compare(scores, base, primary_metrics(scores.tasks), resamples=0)
        if comparison is not None and comparison.gain is not None:
            gains.append((comparison.gain.value, name))
    return max(gains)[1] if gains else None


def best_by_task(candidates: Mapping[str, ArmScores]) -> dict[str, str]:
    """Return for every task the candidate with the best mean of its first metric; of equal ones the first."""
    lower = lower_is_better()
    tasks: dict[str, str] = {}
    for scores in candidates.values():
        tasks |= primary_metrics(scores.tasks)
    best = {}
    for task, metric in tasks.items():
        ranked = []
        for number, (name, scores) in enumerate(candidates.items()):
            mean = scores.mean(task, metric)
            if mean is not None:
                # The number before the name: of equal means the first candidate.
                ranked.append((mean if metric in lower else -mean, number, name))
        best[task] = min(ranked)[2]
    return best
