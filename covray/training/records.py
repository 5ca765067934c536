"""What the JSON files of a run folder hold."""

from __future__ import annotations

from covray.config.section import JsonObject
from covray.errors import ConfigError
from covray.io.records import Record, RecordPart


class RunRecord(Record):
    """What a training is: written before its first step, and compared by every command that continues it."""

    FILE = "_run.json"
    FIX = "give another --out"
    ERROR = ConfigError

    config: JsonObject
    """The resolved configuration of `covray train`."""
    identity: JsonObject
    """The part of the configuration that decides the losses."""
    fingerprints: dict[str, str | None]
    """SHA-256 (hex) of `backbone`, `codebook` and `data`, of the `adapter` where training starts from one, and of the
    `answers` that a verifier learns from."""
    mlflow_run_id: str | None
    """The MLflow run; null without tracking, and until MLflow has answered."""
    tracker_runs: dict[str, str] | None = None
    """The runs in other trackers than MLflow, by tracker; absent without any."""
    classes: JsonObject | None = None
    """The user's own classes of segmentation that the chains were built with; absent for the built-in palette."""
    plugins: dict[str, str] | None = None
    """The plug-ins that the chains were built with, each with package and version; absent without any."""


class TrainResult(Record):
    """The figures of a finished training: written last."""

    FILE = "_result.json"
    FIX = "delete it, and run covray train again"
    VERSION = None
    ERROR = ConfigError

    adapter: str
    """The folder of the adapter, in PEFT's format."""
    adapter_step: int
    """The step that the adapter is of: the best by validation loss, else the last."""
    steps: int
    tokens: int
    sentences: int
    epochs: float
    """How often each pair was the query."""
    loss: float
    """The loss of the last step, in nats a token."""
    seconds: float
    """Of all steps, without starting, validation and checkpoints."""
    tokens_per_s: float
    """Over all workers."""
    memory_bytes: int
    """The most that worker 0 took: on its GPU, or resident on a CPU."""
    validation_loss_before: float | None = None
    """Before the first step; absent without a validation split, as the three below."""
    validation_loss: float | None = None
    """At its best."""
    answer_perplexity_before: float | None = None
    answer_perplexity: float | None = None
    """At the best validation loss."""


class BestValidation(RecordPart):
    """The best validation of a training so far."""

    step: int
    validation_loss: float


class CheckpointRecord(Record):
    """The description of a checkpoint: written last, so that a checkpoint with this file is whole."""

    FILE = "state.json"
    FIX = "delete the checkpoint's folder"

    step: int
    """Steps that are done."""
    cursor: int
    """Sentences that the steps took, counted through all epochs: the next step begins there."""
    best: BestValidation | None
    how: JsonObject
    """The settings that decide the order in which floats are added; in the code they are called numerics."""
    identity: JsonObject
    """The part of the configuration that decides the losses."""
    files: dict[str, str]
    """SHA-256 (hex) of the other files of the checkpoint, by name."""
