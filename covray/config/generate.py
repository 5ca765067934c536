"""The configuration of ``covray generate``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from covray.config.fields import (
    BackboneConfig,
    ChainMethod,
    EngineConfig,
    Length,
    PriorConfig,
    SamplingConfig,
    Spacing,
    TaskName,
    TokenizerConfig,
)
from covray.config.section import Section


class GeneratorConfig(Section):
    """The models of a ``covray.generation.Generator``, which are loaded once and answer many requests.

    Fields left null are taken from the run; without a run, from the nano models.
    """

    adapter: str | None = None
    """Finished run of ``covray train``; by default the backbone without an adapter."""
    backbone: BackboneConfig | None = None
    """Backbone to use; null: the run's, without a run nano."""
    length: Length | None = None
    """Pictures of a chain, both ends counted; must be given for a run trained at several lengths. Without a run 4."""
    method: ChainMethod | None = None
    """How the examples' frames are made; ``none``: chains have none. By default the run's."""
    prior: PriorConfig | None = None
    """Prior of the examples' frames; null: the one the run's dataset was built with, without a run nano."""
    tokenizer: TokenizerConfig | None = None
    """Tokenizer of all pictures; null: the one the run's dataset was built with, without a run nano."""
    fit: Literal["stretch", "crop"] | None = None
    """How a picture becomes square; with ``crop`` an answer shows the centre square only. Null: the run's."""
    spacing: Spacing | None = None
    """Where the examples' frames are made; null: as in the run's dataset, without a run ``even``."""
    engine: EngineConfig = EngineConfig(batch=4, image_batch=4)
    """Small batches, as there are few pictures. Frames have the bits of a build if ``batch`` is the build's."""
    batch: int = Field(default=16, ge=1, le=4096)
    """Rows of the fixed, padded batch of the decoder."""
    seed: int = Field(default=0, ge=0)
    """Seed of a backbone with random weights."""


class GenerateConfig(Section):
    """``covray generate``: example pairs and queries in, frames and answers out.

    Fields left null are taken from the run; without a run, from the nano models.
    """

    queries: tuple[str, ...] = Field(min_length=1)
    """Picture files to answer."""
    out: str
    """Folder to write: one folder per query, and ``generation.json``."""
    examples: tuple[tuple[str, str], ...] = ()
    """Picture files of image and label; each pair is an example chain of the prompt."""
    adapter: str | None = None
    """Finished run of ``covray train``; by default the backbone without an adapter."""
    task: TaskName | None = None
    """Task of the answers: how labels are resized, and answers written as data. Null: the run's, if it has one; else
    answers are pictures only."""
    classes: int = Field(default=21, ge=1, le=256)
    """Classes of a segmentation: an answer is read by their colours (PASCAL VOC has 21, COCO's panoptic labels 134)."""
    backbone: BackboneConfig | None = None
    """Backbone to use; null: the run's, without a run nano."""
    length: Length | None = None
    """Pictures of a chain, both ends counted; must be given for a run trained at several lengths. Without a run 4."""
    method: ChainMethod | None = None
    """How the examples' frames are made; ``none``: chains have none. By default the run's."""
    prior: PriorConfig | None = None
    """Prior of the examples' frames; null: the one the run's dataset was built with, without a run nano."""
    tokenizer: TokenizerConfig | None = None
    """Tokenizer of all pictures; null: the one the run's dataset was built with, without a run nano."""
    fit: Literal["stretch", "crop"] | None = None
    """How a picture becomes square; with ``crop`` an answer shows the centre square only. Null: the run's."""
    spacing: Spacing | None = None
    """Where the examples' frames are made; null: as in the run's dataset, without a run ``even``."""
    engine: EngineConfig = EngineConfig(batch=4, image_batch=4)
    """Small batches, as there are few pictures. Frames have the bits of a build if ``batch`` is the build's."""
    sampling: SamplingConfig = SamplingConfig()
    batch: int = Field(default=16, ge=1, le=4096)
    """Rows of the fixed, padded batch of the decoder."""
    seed: int = Field(default=0, ge=0)
    """Everything random follows from it."""

    def generator(self) -> GeneratorConfig:
        """Return the part that says which models answer."""
        return GeneratorConfig.model_validate({name: getattr(self, name) for name in GeneratorConfig.model_fields})
