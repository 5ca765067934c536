"""The configuration of ``covray evaluate``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from covray.config.fields import (
    ActorsConfig,
    BackboneConfig,
    ChainMethod,
    EngineConfig,
    ExamplePairs,
    Length,
    SamplingConfig,
    TaskName,
    TokenizerConfig,
    TrackingConfig,
)
from covray.config.section import Section


class FormConfig(Section):
    """A form of chain, as a model reads and writes it."""

    method: ChainMethod = "diffusion"
    length: Length = 4
    pairs: ExamplePairs = 1
    """Example pairs before the query."""


class EvaluateConfig(Section):
    """``covray evaluate``: chains and adapters in, scores with intervals out."""

    data: str
    """Dataset of chains: the ``--out`` of a ``covray build``."""
    out: str
    """Folder to write."""
    adapters: tuple[str, ...] = ()
    """Finished runs of ``covray train``, each ``RUN`` or ``NAME=RUN``; a run's name is by default its folder's."""
    backbone: BackboneConfig | None = None
    """Of the runs, where it has moved since; without runs the untuned backbone to evaluate, by default nano."""
    untuned: bool = True
    """Also evaluate the backbone without its adapter, once for every form of chain that the adapters have."""
    forms: tuple[FormConfig, ...] = ()
    """Further forms of chain for the untuned backbone."""
    baselines: tuple[Literal["copy", "mean", "nearest", "focus", "ceiling"], ...] = (
        "copy", "mean", "nearest", "focus", "ceiling",
    )  # fmt: skip
    """What else stands in the table: the query as its own answer, the mean label, the nearest example's label,
    Chain-of-Focus, and what the tokenizer makes of the label itself."""
    manifest: str | None = None
    """Manifest with the labels as they are; null: the one the dataset was built from."""
    tokenizer: TokenizerConfig | None = None
    """Where the dataset's tokenizer is now; null: where it was."""
    tasks: tuple[TaskName, ...] | None = None
    """Only these; by default all of the dataset."""
    split: str = "test"
    """Whose pairs are the queries."""
    example_split: str = "train"
    """Whose pairs are the examples; it may be the same: no pair is its own example."""
    episodes: int | None = Field(default=None, ge=1)
    """At most so many queries of a task, the same for everyone."""
    pairs: ExamplePairs | None = None
    """Example pairs before the query; null: as many as a run was trained with, at most."""
    selection: Literal["random", "similar", "focus"] = "random"
    """How examples are chosen: by the seed, by the query's nearest pictures, or as Chain-of-Focus does."""
    lpips: str | None = None
    """AlexNet's weights for LPIPS, torchvision's file; null: where torchvision keeps it, if it is there. Never
    downloaded: without them the metric is named as absent."""
    baseline_examples: int = Field(default=256, ge=1)
    """At most so many examples of a task for the mean and the nearest label."""
    sampling: SamplingConfig = SamplingConfig()
    batch: int = Field(default=16, ge=1, le=4096)
    """Rows of the fixed, padded batch of the decoder."""
    engine: EngineConfig = EngineConfig()
    actors: ActorsConfig = ActorsConfig()
    rows_per_block: int = Field(default=64, ge=1, le=100_000)
    """Episodes an actor takes at a time; also the unit that a kill can cost."""
    tracking: TrackingConfig = TrackingConfig()
    seed: int = Field(default=0, ge=0)

    @field_validator("adapters", "baselines", "tasks")
    @classmethod
    def _distinct(cls, value: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        return None if value is None else tuple(dict.fromkeys(value))

    def identity(self) -> dict[str, Any]:
        """What decides the scores; a resume must agree in all of it."""
        return self.model_dump(mode="json", exclude={"out", "actors", "rows_per_block", "tracking"})
