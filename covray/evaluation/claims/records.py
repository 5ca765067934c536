"""What the JSON files of a programme of claims hold."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from covray.config.section import JsonObject
from covray.errors import ConfigError, CovrayError
from covray.io.records import Record, RecordPart

ClaimVerdict = Literal["holds", "does not hold", "open", "not run"]


class ProgrammeRecord(Record):
    """What a programme is: written first, and compared by every command that continues it."""

    FILE: ClassVar[str] = "_claims.json"
    FIX: ClassVar[str] = "give another --out"
    ERROR: ClassVar[type[CovrayError]] = ConfigError

    budget_name: str
    budget: dict[str, Any]
    """All settings of the budget."""
    backbones: list[dict[str, str]]
    """Name and path of each; all arms but those of the others start from the first."""
    tokenizer: str

    def identity(self) -> JsonObject:
        """What decides the arms; a resume must agree in all of it."""
        return self.model_dump(mode="json")


class ArmRun(Record):
    """An arm with one seed that is trained and evaluated: written last."""

    FILE: ClassVar[str] = "arm.json"
    FIX: ClassVar[str] = "delete it, and run the same covray experiments claims again"
    ERROR: ClassVar[type[CovrayError]] = ConfigError

    arm: str
    seed: int
    steps: int
    tokens: int
    """Trained."""
    answers: int
    """Queries trained on, counted with repeats."""
    train_seconds: float
    evaluate_seconds: float
    hardware: str


class ArmEntry(RecordPart):
    """An arm in the results."""

    name: str
    about: str
    method: str
    length: int
    """Pictures of a chain."""
    share: float
    """Of the queries; below 1 it is a point of a learning curve."""
    seeds: tuple[int, ...]
    """Those that are done."""
    steps: int | None
    tokens: int | None
    """Of one training."""
    answers: int | None
    train_hours: float
    """Of all seeds."""
    evaluate_hours: float
    hardware: tuple[str, ...]
    gain_percent: float | None
    """Over the untuned backbone without frames."""
    low: float | None
    high: float | None
    perplexity_own: float | None
    """Of the answer, after the model's own frames; the geometric mean over tasks."""
    scores: dict[str, float | None]
    """The first metric by task."""


class ClaimTask(RecordPart):
    """What a claim comes to on one task."""

    task: str
    metric: str
    first: float
    second: float
    difference: float
    low: float | None
    high: float | None
    better: bool | None
    """Whether the first is significantly better (true) or worse (false)."""


class ClaimResult(RecordPart):
    """A claim, and what came of it."""

    key: str
    claim: str
    group: Literal["paper", "pays", "training", "form", "decoding"]
    """What it is about; `paper`: a claim of the paper."""
    view: str
    """What is equal."""
    first: str
    second: str
    metric: str
    gain_percent: float | None
    low: float | None
    high: float | None
    seeds: int
    queries: int
    verdict: ClaimVerdict
    tasks: tuple[ClaimTask, ...]


class CurvePoint(RecordPart):
    """A point of a learning curve."""

    arm: str
    """The arm that the whole curve ends in."""
    answers: int
    tokens: int
    gain_percent: float
    """Over the untuned backbone without frames."""
    low: float | None
    high: float | None
    perplexity_own: float | None


class Exposure(RecordPart):
    """Where the answers of chains lose likelihood, in nats a token of the reference answer, by task."""

    arm: str
    task: str
    unlearnt: float
    """After reference frames, over plain pairs: what is not learnt, or where it is below 0, what leaks."""
    exposure: float
    """After own frames, over reference frames."""


class QualityWorth(RecordPart):
    """Whether the quality of a chain predicts what it is worth: a rank correlation over queries."""

    task: str
    worth: str
    """The metric that says what a chain is worth."""
    correlation: float
    low: float | None
    high: float | None


class ProgrammeResults(Record):
    """What a programme says so far."""

    FILE: ClassVar[str] = "claims.json"
    FIX: ClassVar[str] = "run covray report again"
    ERROR: ClassVar[type[CovrayError]] = ConfigError

    budget_name: str
    budget: dict[str, Any]
    backbones: list[dict[str, str]]
    arms_done: int
    arms_planned: int
    """With every seed."""
    conclusion: str
    """In one sentence."""
    best: str | None
    """The arm of chains with the best answers on the validation split."""
    lengths: dict[str, int]
    """The best length of each task on the validation split; 2 means without frames."""
    claims: tuple[ClaimResult, ...]
    arms: tuple[ArmEntry, ...]
    curves: tuple[CurvePoint, ...]
    exposure: tuple[Exposure, ...]
    quality: tuple[QualityWorth, ...]
    hours: float
