"""The configuration of ``covray sweep``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from covray.config.fields import BackboneConfig, ChainMethod, ExamplePairs, Length, TaskName, TrackingConfig
from covray.config.section import JsonObject, Section


class GridConfig(Section):
    """What the trials of a sweep differ in: every combination of these values is a trial."""

    methods: tuple[ChainMethod, ...] = ("none", "linear", "diffusion")
    """How frames are made; ``none`` has no frames, so it is one trial for all lengths."""
    lengths: tuple[Length, ...] = (2, 3, 4, 6, 8)
    """Chain lengths, both ends counted; length 2 is the method ``none``."""
    pairs: tuple[ExamplePairs, ...] = (1, 2, 3)
    """Numbers of example pairs before the query."""
    tasks: tuple[tuple[TaskName, ...] | None, ...] = (None,)
    """Sets of tasks, each set for its own trials; null: all tasks of the dataset."""
    scales: tuple[BackboneConfig, ...] = ()
    """Backbones, each a scale such as ``7b``, or ``{scale: 7b, path: LVM-7B}``. By default the backbone of ``train``.
    """
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    """Seeds of the trainings."""
    fields: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Any other key of a training by its dotted name, such as ``optimizer.learning_rate: [0.001, 0.0003]``."""

    @field_validator("scales", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """Take a plain name as the backbone of that scale."""
        if not isinstance(value, list | tuple):
            return value
        backbones = []
        for entry in value:
            backbones.append({"scale": entry} if isinstance(entry, str) else entry)
        return backbones

    @field_validator("methods", "lengths", "pairs", "tasks", "seeds", "fields")
    @classmethod
    def _some(cls, value: Any) -> Any:
        """Refuse an axis without values; of a value given twice one is left."""
        if isinstance(value, dict):
            if not all(value.values()):
                raise ValueError("give at least one")
            return value
        if not value:
            raise ValueError("give at least one")
        # In the order given, in which trials are started.
        return tuple(dict.fromkeys(value))


class SweepConfig(Section):
    """``covray sweep``: train and score a grid of trials, and compare them."""

    out: str
    """Folder to write."""
    data: str | None = None
    """Dataset of chains; null: one is built from ``manifest`` into the sweep's folder, for all lengths at once."""
    manifest: str | None = None
    """Manifest to build the dataset from."""
    grid: GridConfig = GridConfig()
    build: dict[str, Any] = Field(default_factory=dict)
    """Keys of ``covray build`` beside those that the grid sets, such as ``prior: {steps: 20}``."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Keys of ``covray train`` beside those that the grid sets."""
    evaluate: dict[str, Any] = Field(default_factory=dict)
    """Keys of ``covray evaluate``; baselines and the backbone alone are evaluated once for the whole sweep."""
    concurrency: int | None = Field(default=None, ge=1)
    """Trials at a time; by default as many as the cluster holds."""
    retries: int = Field(default=1, ge=0)
    """How often a failed trial is tried again; then it is reported, and the others go on."""
    stopping: Literal["none", "asha", "median"] = "none"
    """End trials early that have a worse perplexity of the validation answers than others at equal tokens: by
    successive halving (``asha``, Li et al. 2020), or below the median. Perplexity is comparable only between trials
    of one method; do not stop early when the grid mixes methods."""
    grace: float = Field(default=0.25, gt=0, le=1)
    """Share of a training before which no trial is stopped."""
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _one_source(self) -> SweepConfig:
        if (self.data is None) == (self.manifest is None):
            raise ValueError("give data, a dataset of chains, or manifest, the pairs to build one from")
        return self

    def identity(self) -> JsonObject:
        """What all trials share; the grid may grow, as every trial is checked by itself."""
        shared = {"data", "manifest", "build", "train", "evaluate", "stopping", "grace"}
        return self.model_dump(mode="json", include=shared)
