"""What a block, a step, a start and a shard cost: measured by ``covray benchmark``, or shipped for the nano family."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field

from covray.config import BuildConfig, Section, TrainConfig, differences, load_config, read_yaml, recorded_section
from covray.config.section import JsonObject
from covray.errors import ConfigError, one_line
from covray.io import storage

NANO_FILE = str(Path(__file__).with_name("nano.yaml"))
"""The calibration of the nano family that is shipped with covray."""
MEASURED_NAMES = ("nano", "nano-1")
"""Paths of the edition of tokenizer and LVM that it was measured with."""
_IDENTITY_KEYS = {
    "build": ("prior", "tokenizer", "engine", "fit", "keep_noise"),
    "train": ("backbone", "lora", "compute"),
}
"""The parts of a configuration that rates depend on."""
_MAX_FILE_CHARACTERS = 100_000

Seconds = Annotated[float, Field(ge=0, le=1e9)]
Bytes = Annotated[float, Field(ge=0, le=1e15)]
Step = Literal["build", "train"]


class BuildRates(Section):
    """The rates of a build."""

    identity: JsonObject
    """The part of the configuration that they hold for; empty where they are assumed."""
    rows_per_block: int = Field(ge=1)
    actors: int = Field(ge=1)
    """At work together when it was measured."""
    start_s: Seconds
    """Before the first actor, and after the last: Ray's start and end, checks, loading the models once."""
    load_s: Seconds
    """From the start of an actor until it computes at full speed, beside its blocks."""
    row_s: float = Field(ge=1e-12, le=1e9)
    """Of one actor."""
    evaluations: float = Field(ge=0, le=1e9)
    """Passes of the UNet for a row."""
    pictures: int = Field(ge=2, le=10**9)
    """Tokenized for a row."""
    tokens_per_image: int = Field(ge=1, le=10**9)
    row_bytes: Bytes
    shard_bytes: Bytes
    """Of a shard beside its rows."""
    audit_shard_s: Seconds


class TrainRates(Section):
    """The rates of a training."""

    identity: JsonObject
    """The part of the configuration that they hold for; empty where they are assumed."""
    workers: int = Field(ge=1)
    start_s: Seconds
    """Until the first step and after the last: Ray, loading, the first validation."""
    token_s: float = Field(ge=1e-15, le=1e9)
    """Of one worker, forward and back."""
    validation_token_s: Seconds
    """Of one worker, forward."""
    checkpoint_s: Seconds
    checkpoint_bytes: Bytes


class Calibration(Section):
    """The file that ``covray benchmark`` writes."""

    version: Literal[1] = 1
    hardware: str
    """Processor and GPU it was measured on."""
    date: str
    build: BuildRates | None = None
    train: TrainRates | None = None

    @property
    def source(self) -> str:
        """Where and when it was measured."""
        return f"measured on {self.hardware}, {self.date}"


@dataclass(frozen=True)
class RowCost:
    """What a row of a build costs beside one that was measured, or assumed."""

    evaluations: float
    """Passes of the UNet; 0 for a build without a prior."""
    pictures: int
    """Tokenized."""


def read_calibration(path: str) -> Calibration:
    """Read a calibration, YAML or JSON. Raises ConfigError: absent, of another version, with unknown keys."""
    try:
        text = storage.read_bytes(path).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"calibration {path}: cannot be read; give a file that covray benchmark wrote") from error
    # Before it is parsed: YAML of megabytes, given by mistake, takes minutes.
    if len(text) > _MAX_FILE_CHARACTERS:
        raise ConfigError(f"calibration {path}: is not a calibration; give a file that covray benchmark wrote")
    try:
        values = read_yaml(text)  # JSON is YAML
    except ValueError as error:
        raise ConfigError(f"calibration {path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"calibration {path}: holds {type(values).__name__}, not keys and values")
    try:
        return load_config(Calibration, None, values)
    except ConfigError as error:
        raise ConfigError(f"calibration {path}: {error}") from error


def write_calibration(path: str, calibration: Calibration) -> None:
    """Write ``calibration`` as YAML, or as JSON where ``path`` says so. Raises ConfigError where it cannot."""
    values = calibration.model_dump(mode="json")
    text = json.dumps(values, indent=2) if path.endswith(".json") else yaml.safe_dump(values, sort_keys=False)
    try:
        storage.write_bytes(path, text.encode("utf-8"))
    except OSError as error:
        raise ConfigError(f"calibration {path}: cannot be written ({one_line(error)}); give another file") from error


def measured_build(build: BuildConfig, calibration: Calibration, cost: RowCost) -> tuple[BuildRates, float]:
    """Scale the rates of a calibration to a build.

    The cost of a row goes with its UNet evaluations, or without a prior with its pictures.

    Args:
        build: The build that is planned.
        calibration: What was measured.
        cost: What a row of ``build`` takes.

    Returns:
        The rates, and how many times the measured row one of ``build`` costs.

    Raises:
        ConfigError: Another prior, tokenizer or engine was measured.
    """
    rates = _build_rates(calibration)
    _require_measured(rates.identity, build.identity(), "build")
    return scale_build(rates, cost)


def measured_training(train: TrainConfig, calibration: Calibration) -> TrainRates:
    """Return the calibration's rates for ``train``. Raises ConfigError where something else was measured."""
    rates = _train_rates(calibration)
    _require_measured(rates.identity, train.identity(), "train")
    return rates


def nano_build(build: BuildConfig, cost: RowCost) -> tuple[BuildRates, float, list[str]]:
    """Return the shipped rates for a build with the nano models, as ``measured_build``, and notes on what differs."""
    rates = _build_rates(nano_calibration())
    scaled, times = scale_build(rates, cost)
    return scaled, times, _difference_notes(rates.identity, build.identity(), "build")


def nano_training(train: TrainConfig) -> tuple[TrainRates, list[str]]:
    """Return the shipped rates for a training of the nano backbone, and notes on what differs."""
    rates = _train_rates(nano_calibration())
    return rates, _difference_notes(rates.identity, train.identity(), "train")


def nano_calibration() -> Calibration:
    """Return the calibration that is shipped with covray."""
    return read_calibration(NANO_FILE)


def scale_build(rates: BuildRates, cost: RowCost) -> tuple[BuildRates, float]:
    """Scale ``rates`` to rows of another cost; returns them, and by how much a row costs more.

    Raises ConfigError where only one of both has a prior.
    """
    # The time of a row without a prior says nothing of one with a prior, nor the other way round.
    if bool(cost.evaluations) != (rates.evaluations >= 1):
        raise ConfigError(
            "calibration: of builds with and without a prior one was measured and the other is planned; run covray "
            "benchmark with what is planned"
        )
    # Beside the UNet the tokenizer is a few per cent; without a prior it is all there is.
    times = cost.evaluations / rates.evaluations if cost.evaluations else cost.pictures / rates.pictures
    update = {
        "row_s": rates.row_s * times,
        "row_bytes": rates.row_bytes * cost.pictures / rates.pictures,
        "evaluations": cost.evaluations,
        "pictures": cost.pictures,
    }
    return rates.model_copy(update=update), times


def identity_of(step: Step, identity: JsonObject) -> JsonObject:
    """Return the part of the ``identity`` of a configuration that rates depend on, beyond what they are scaled by."""
    kept = {key: identity[key] for key in _IDENTITY_KEYS[step]}
    # Rows are scaled by their UNet evaluations, so the solver and the number of its steps may differ.
    if step == "build":
        prior = dict(recorded_section(identity, "prior"))
        for key in ("solver", "steps", "evaluations"):
            prior.pop(key, None)
        kept["prior"] = prior
    return kept


def _build_rates(calibration: Calibration) -> BuildRates:
    if calibration.build is None:
        raise ConfigError("calibration: has no build; run covray benchmark with steps=[build]")
    return calibration.build


def _train_rates(calibration: Calibration) -> TrainRates:
    if calibration.train is None:
        raise ConfigError("calibration: has no training; run covray benchmark with steps=[build,train]")
    return calibration.train


def _require_measured(measured: JsonObject, planned: JsonObject, step: Step) -> None:
    differing = differences(measured, identity_of(step, planned), open_matches=True)
    if differing:
        raise ConfigError(f"calibration: {step} {'; '.join(differing)}; run covray benchmark with what is planned")


def _difference_notes(measured: JsonObject, planned: JsonObject, step: Step) -> list[str]:
    differing = differences(measured, identity_of(step, planned), open_matches=True)
    if not differing:
        return []
    return [
        f"the shipped rates were measured with other settings: {'; '.join(differing)}; covray benchmark measures yours"
    ]
