"""What the JSON files of an evaluation hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from covray.config import BackboneConfig, JsonObject
from covray.errors import ConfigError, CovrayError
from covray.evaluation.statistics import Mean
from covray.evaluation.subjects import Kind, Subject
from covray.io.records import Record, RecordPart

STRIPS = "strips"
"""The folder of an evaluation with a picture of its answers for each task, ``TASK.png``."""


class SubjectEntry(RecordPart):
    """A row of the table: a ``covray.evaluation.subjects.Subject``."""

    name: str
    kind: Kind
    about: str
    method: str | None = None
    length: int | None = None
    pairs: int | None = None
    adapter: str | None = None
    """The run folder."""
    backbone: JsonObject | None = None
    """The configuration of the backbone; null for answers without a model."""
    fingerprint: str = ""
    """SHA-256 (hex) of the backbone's weights."""
    baseline: str | None = None
    """Which answer without a model."""
    samples: int = 1
    """How many candidates a model writes for an answer; absent where it is one."""
    votes: int = 1
    """How many samples of `votes` the answer is joined from; absent where it is one."""

    @classmethod
    def of(cls, subject: Subject) -> SubjectEntry:
        """Return the entry of ``subject``."""
        values = dict(vars(subject))
        if subject.backbone is not None:
            values["backbone"] = subject.backbone.model_dump(mode="json")
        # Absent where they are 1, so that evaluations from before votes keep their identity.
        for key in ("samples", "votes"):
            if values[key] == 1:
                del values[key]
        return cls.model_validate(values)

    def subject(self) -> Subject:
        """Return what the entry is of."""
        values = {name: getattr(self, name) for name in SubjectEntry.model_fields}
        if self.backbone is not None:
            values["backbone"] = BackboneConfig.model_validate(self.backbone)
        return Subject(**values)


class EvaluationRecord(Record):
    """What an evaluation is: written before its first episode, and compared by every command that continues it."""

    FILE: ClassVar[str] = "_evaluation.json"
    FIX: ClassVar[str] = "give another --out"
    ERROR: ClassVar[type[CovrayError]] = ConfigError

    config: JsonObject
    """The resolved configuration of `covray evaluate`."""
    identity: JsonObject
    """The part of the configuration that decides the scores."""
    fingerprints: dict[str, str]
    """SHA-256 (hex) of the dataset's models and pairs, and of every subject's backbone and adapter."""
    subjects: list[SubjectEntry]
    """Everyone that is evaluated, in the order of the table."""
    mlflow_run_id: str | None
    """The MLflow run; null without tracking."""
    tracker_runs: dict[str, str] | None = None
    """The runs in other trackers than MLflow, by tracker; absent without any."""
    plugins: dict[str, str] | None = None
    """The plug-ins in use, such as `task matting`, each with package and version; absent without any."""


class TaskSummary(RecordPart):
    """What was measured of a task."""

    episodes: int
    primary: str
    """The metric to rank and compare by."""
    metrics: tuple[str, ...]
    absent: dict[str, str] = Field(default_factory=dict)
    """Metrics that the task has and the evaluation lacks, each with the reason."""
    rejected: int = 0
    """Episodes without a score of at least one subject."""


class SubjectScore(RecordPart):
    """The mean of a metric over the episodes of one subject."""

    task: str
    subject: str
    metric: str
    mean: float | None
    """None where the metric is undefined for every episode."""
    low: float | None
    """The lower end of the 95% interval; None for metrics of a whole set."""
    high: float | None
    """The upper end of the 95% interval."""
    episodes: int


class Difference(RecordPart):
    """The first subject minus the second, over the episodes both have, by the primary metric."""

    task: str
    metric: str
    first: str
    second: str
    mean: float | None
    low: float | None
    high: float | None
    episodes: int
    p_value: float | None
    """Of a two-sided sign-flip test."""


class FailedEpisode(RecordPart):
    """An answer without scores."""

    task: str
    subject: str
    pair_id: int
    error: str


class EvaluationTable(RecordPart):
    """What the rows of an evaluation say."""

    subjects: tuple[SubjectEntry, ...]
    tasks: dict[str, TaskSummary]
    lower_is_better: tuple[str, ...]
    """The metrics of which less is better."""
    scores: tuple[SubjectScore, ...]
    differences: tuple[Difference, ...]
    """Of every adapter from the subjects before it."""
    failed: tuple[FailedEpisode, ...]
    best_lengths: dict[str, dict[str, int]] = Field(default_factory=dict)
    """The best chain length of each task, by run folder; absent where no adapter answered at several lengths."""


class EvaluationResults(EvaluationTable, Record):
    """The table of an evaluation, and how it was made; written last."""

    FILE: ClassVar[str] = "results.json"
    FIX: ClassVar[str] = "evaluate again into another folder"
    ERROR: ClassVar[type[CovrayError]] = ConfigError

    seconds: float
    config: JsonObject
    fingerprints: dict[str, str]


class VlmEvaluationRecord(Record):
    """What an evaluation of ``covray vlm`` is: written before its first answer, compared by what continues it."""

    FILE: ClassVar[str] = "_evaluation.json"
    FIX: ClassVar[str] = "give another --out"

    identity: JsonObject
    """What decides the answers: the configuration, and SHA-256 (hex) of `data` and `model`."""
    config: JsonObject = Field(default_factory=dict)
    """The configuration of `covray vlm evaluate`; absent in files of covray 0.1.0."""
    mlflow_run_id: str | None = None
    """The MLflow run; null without tracking."""
    tracker_runs: dict[str, str] | None = None
    """The runs in other trackers than MLflow, by tracker; absent without any."""


@dataclass(frozen=True)
class Accuracy(Mean):
    """The share of right answers to one kind of question."""

    most_frequent: float
    """The share that always giving the most frequent answer would have."""


class VlmEvaluationResults(Record):
    """The scores of an evaluation of ``covray vlm``; written last."""

    FILE: ClassVar[str] = "results.json"
    FIX: ClassVar[str] = "evaluate again into another folder"
    VERSION: ClassVar[int | None] = None
    ERROR: ClassVar[type[CovrayError]] = ConfigError

    prompts: int
    questions: Mean | None
    """The share of right answers: `mean`, its 95% interval from `low` to `high`, and `episodes`, the prompts that have
    the score. The other means are written likewise; null where no prompt has the score."""
    questions_by_kind: dict[str, Accuracy]
    """Beside the mean `most_frequent`, the share that always giving the most frequent answer would have."""
    facts: Mean | None
    """The share of the facts of a portrait that its caption states."""
    facts_by_theme: dict[str, Mean]
    captions_with_all_facts: Mean | None
    bleu: float | None
    """BLEU-4 of captions, all in one; null without captions."""
    chrf: Mean | None = None
    """chrF++ of captions; null without captions or torchmetrics, absent in files of covray 0.1.0."""
    answer_perplexity: float
    """Of the expected answers, token by token."""
    tokens_per_s: float | None
    """Of the answers that were written, by one actor."""
    tokens_per_pass: float | None
    absent: dict[str, str] = Field(default_factory=dict)
    """The scores that could not be computed, each with the reason; absent where there are none."""
