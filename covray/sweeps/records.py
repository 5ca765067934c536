"""The files of a sweep: what was asked for, what became of every trial, and the report of all of them."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from covray.config.section import JsonObject
from covray.errors import ConfigError, CovrayError
from covray.evaluation.records import SubjectScore, TaskSummary
from covray.io.records import Record, RecordPart

TRIALS = "trials"
"""The folder of a sweep that holds one ``TrialRecord`` a trial."""

Verdict = Literal["holds", "does not hold", "not significant"]
"""What an interval says of a claim: it excludes zero on the claimed side, on the other, or not at all."""
Status = Literal["finished", "failed", "stopped", "waiting"]


class SweepRecord(Record):
    """A sweep as it was started, and how long it has run."""

    FILE: ClassVar[str] = "_sweep.json"
    FIX: ClassVar[str] = "give the --out of a covray sweep"
    ERROR: ClassVar[type[CovrayError]] = ConfigError

    config: JsonObject
    """The whole configuration."""
    identity: JsonObject
    """The part of the configuration that all trials share, and that cannot change when the sweep is continued."""
    mlflow_run_id: str | None
    seconds: float
    """Summed over all calls of the command."""
    tracker_runs: dict[str, str] | None = None
    """The runs in other trackers than MLflow, by tracker; absent without any."""


class Validation(RecordPart):
    """A point of a training's validation curve."""

    tokens: int
    """Tokens trained on so far."""
    answer_perplexity: float | None


class TrialScore(RecordPart):
    """The mean of a metric over the episodes of a task."""

    task: str
    metric: str
    mean: float | None
    """None where the metric is undefined for every episode."""
    low: float | None
    """The lower end of the 95% interval; None for metrics of a whole set."""
    high: float | None
    """The upper end of the 95% interval."""
    episodes: int


class TrialTable(RecordPart):
    """What a trial's evaluation found."""

    tasks: dict[str, TaskSummary]
    lower_is_better: tuple[str, ...]
    """The metrics of which less is better."""
    scores: tuple[SubjectScore, ...]


class TrialRecord(Record):
    """A trial that ended: ``trials/NAME.json``. One that finished has figures, one that did not has its error."""

    FILE: ClassVar[str] = "trials/NAME.json"
    FIX: ClassVar[str] = "delete it, and run the same command again to repeat the trial"
    VERSION: ClassVar[int | None] = None
    ERROR: ClassVar[type[CovrayError]] = ConfigError

    status: Status
    error: str | None = None
    train_seconds: float | None = None
    evaluate_seconds: float | None = None
    steps: int | None = None
    tokens: int | None = None
    gpus: float = 0.0
    gpu_hours: float | None = None
    validation: tuple[Validation, ...] = ()
    table: TrialTable | None = None
    tracked: bool = True
    """False where MLflow was away when the trial ended, and lacks its scores."""


class TrialEntry(RecordPart):
    """A trial in ``results.json``."""

    name: str
    label: str
    """What tells the trial from others, but for the seed."""
    method: str
    length: int
    """Pictures of a chain with both ends; 2 for the method ``none``."""
    pairs: int
    tasks: tuple[str, ...] | None
    """None: all tasks of the dataset."""
    scale: str
    fields: dict[str, Any]
    """The values of ``grid.fields``."""
    seed: int
    context_tokens: int
    """Tokens of one visual sentence: example chains, query, frames and answer."""
    status: Status
    error: str | None
    train_seconds: float | None
    evaluate_seconds: float | None
    steps: int | None
    tokens: int | None
    gpu_hours: float | None
    gpus: float
    validation: tuple[Validation, ...]
    scores: tuple[TrialScore, ...]


class Reference(RecordPart):
    """What trials are compared with: a baseline, the ceiling, or the untuned backbone after one form of chain."""

    name: str
    kind: str
    method: str | None = None
    length: int | None = None
    pairs: int | None = None
    about: str = ""
    scores: tuple[TrialScore, ...]


class CellScore(RecordPart):
    """The mean of a metric over the seeds of a cell."""

    task: str
    metric: str
    mean: float | None
    low: float | None
    """The lower end of the 95% interval: over seeds, or over episodes where there is one seed."""
    high: float | None
    """The upper end of the 95% interval."""
    seeds: int


class CellEntry(RecordPart):
    """All finished trials that differ in nothing but the seed. Times and counts are means over them."""

    label: str
    method: str
    length: int
    pairs: int
    tasks: tuple[str, ...] | None
    scale: str
    fields: dict[str, Any]
    context_tokens: int
    trials: tuple[str, ...]
    seeds: tuple[int, ...]
    train_seconds: float | None
    tokens: float | None
    gpu_hours: float | None
    scores: tuple[CellScore, ...]


class OverallGain(RecordPart):
    """How much better the first cells of a claim are than the second ones, over all tasks."""

    gain_percent: float | None
    """In percent of the second; positive where the claim is right."""
    low: float | None
    """The lower end of the 95% interval over seeds."""
    high: float | None
    """The upper end of the 95% interval over seeds."""
    seeds: int
    verdict: Verdict


class ClaimRow(RecordPart):
    """One pair of cells on one task: the first minus the second, over the seeds that both have."""

    first: str
    second: str
    task: str
    metric: str
    mean: float | None
    low: float | None
    high: float | None
    seeds: int
    verdict: Verdict


class ClaimEntry(RecordPart):
    """A conclusion of the paper, and what the sweep says of it."""

    key: str
    claim: str
    paper: str
    """The figures of the paper."""
    rows: tuple[ClaimRow, ...]
    overall: OverallGain | None
    """None: there was nothing to compare."""


class Efficiency(RecordPart):
    """The gain of a cell with frames over the one without, beside the tokens it reads and writes."""

    cell: str
    context_tokens: int
    gain_percent: float | None
    low: float | None
    high: float | None


class Return(RecordPart):
    """The gain from one chain length, or number of pairs, to the next that was tried."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    method: str
    length: int
    pairs: int
    scale: str
    first: str
    second: str
    axis: Literal["length", "pairs"]
    start: int = Field(alias="from")
    end: int = Field(alias="to")
    gain_percent: float | None
    low: float | None
    high: float | None
    per_added: float | None
    """The gain divided by the frames, or pairs, that were added."""


class LeftOut(RecordPart):
    """A combination of the grid that is no trial."""

    name: str
    reason: str


class SweepResults(Record):
    """The report of a sweep, finished or not."""

    FILE: ClassVar[str] = "results.json"
    FIX: ClassVar[str] = "write it again with covray report"
    ERROR: ClassVar[type[CovrayError]] = ConfigError

    config: JsonObject
    seconds: float
    left_out: tuple[LeftOut, ...]
    lower_is_better: tuple[str, ...]
    """The metrics of which less is better."""
    tasks: dict[str, TaskSummary]
    references: tuple[Reference, ...]
    trials: tuple[TrialEntry, ...]
    cells: tuple[CellEntry, ...]
    efficiency: tuple[Efficiency, ...]
    returns: tuple[Return, ...]
    claims: tuple[ClaimEntry, ...]
