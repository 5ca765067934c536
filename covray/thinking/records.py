"""What the JSON files of ThinkDiff's folders hold."""

from __future__ import annotations

from typing import ClassVar

from covray.config.section import JsonObject
from covray.errors import ConfigError, CovrayError
from covray.io.records import Record, RecordPart


class FeaturesRecord(Record):
    """What a folder of features is: written first, and compared by every command that continues it."""

    FILE: ClassVar[str] = "_features.json"
    FIX: ClassVar[str] = "take the features again into another folder"

    config: JsonObject
    """The resolved configuration of `covray think features`."""
    identity: JsonObject
    """The part of the configuration that decides the features."""
    fingerprints: dict[str, str]
    """SHA-256 (hex) of `vlm`, the model, and of `data`: pictures, captions and splits, or episodes."""
    width: int
    """Numbers of a feature."""
    samples: int
    """Pictures, or episodes."""


class FeaturesResult(Record):
    """What a finished folder of features holds: written last, so that readers trust it."""

    FILE: ClassVar[str] = "_result.json"
    FIX: ClassVar[str] = "run the same covray think features again to continue it"

    samples: int
    """Pictures or episodes, those with an error among them."""
    failed: int
    """Those without features."""
    reasons: dict[str, int]
    """Those without features, by reason."""
    per_split: dict[str, int]
    """Those with features, by split; of episodes, by task."""
    features: int
    """Features of all of them."""
    bytes: int
    """Of all shards."""
    seconds: float
    """Of the command that finished."""


class ThinkAnswer(Record):
    """What `covray think generate` was asked and has answered."""

    FILE: ClassVar[str] = "answer.json"
    FIX: ClassVar[str] = "generate again into another folder"
    ERROR: ClassVar[type[CovrayError]] = ConfigError

    config: JsonObject
    """The resolved configuration."""
    fingerprints: dict[str, str]
    """SHA-256 (hex) of the models that were loaded, and of the aligner."""
    text: str | None
    """What the vision-language model wrote; null with a vision tower."""
    files: tuple[str, ...]
    """What was drawn, `answer.png` or the frames of a video; and the text."""


class ReasoningRecord(Record):
    """What an evaluation of reasoning is: written first, and compared by every command that continues it."""

    FILE: ClassVar[str] = "_reasoning.json"
    FIX: ClassVar[str] = "give another --out"
    ERROR: ClassVar[type[CovrayError]] = ConfigError

    config: JsonObject
    """The resolved configuration of `covray think evaluate`."""
    identity: JsonObject
    """The part of the configuration that decides the scores."""
    fingerprints: dict[str, str]
    """SHA-256 (hex) of the models, of every aligner, of CoBSAT's pictures, and of features of episodes."""
    mlflow_run_id: str | None
    """The MLflow run; null without tracking."""
    tracker_runs: dict[str, str] | None = None
    """The runs in other trackers than MLflow, by tracker; absent without any."""


class ReasoningScore(RecordPart):
    """A share of right answers of a row of the table."""

    row: str
    task: str
    """A task, or `mean`: the episodes of all tasks."""
    shots: int
    side: str
    """What is right: `both` sides, which is the score; `detail`, `object`, `named` (the side that the query's word
    names) or `hidden` (the side that must be found)."""
    mean: float
    low: float | None
    """The lower end of the 95% interval; null for a single episode."""
    high: float | None
    """The upper end of the 95% interval."""
    episodes: int


class ReasoningDifference(RecordPart):
    """The first row minus the second, over the same episodes, both sides right."""

    first: str
    second: str
    task: str
    shots: int
    mean: float
    low: float | None
    high: float | None
    episodes: int
    p_value: float
    """Of a two-sided sign-flip test."""


class ReasoningResults(Record):
    """The table of an evaluation of reasoning; written last."""

    FILE: ClassVar[str] = "results.json"
    FIX: ClassVar[str] = "evaluate again into another folder"
    ERROR: ClassVar[type[CovrayError]] = ConfigError

    benchmark: str
    """`CoBSAT`, or `CoBSAT-style, rendered`."""
    rows: tuple[str, ...]
    """The rows of the table in their order."""
    chance: float
    """What guessing both sides reaches."""
    scores: tuple[ReasoningScore, ...]
    differences: tuple[ReasoningDifference, ...]
    """Of every aligner from every other row."""
    failed: int
    """Episodes without an answer, which count as wrong."""
    seconds: float
    """Of the command that finished."""
    config: JsonObject
    fingerprints: dict[str, str]
