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
    TaskName,
    TokenizerConfig,
)
from covray.config.section import Section


class GeneratorConfig(Section):
    """The models of a ``covray.generation.Generator``, which are loaded once and answer many requests.

    Fields left null are taken from the run; without a run, from the nano models.
    """

    adapter: str | None = None
    """A finished run of ``covray train``; null: the untuned backbone."""
    backbone: BackboneConfig | None = None
    length: Length | None = None
    """Pictures of a chain, both ends counted; must be given for a run trained at several lengths. Without a run 4."""
    method: ChainMethod | None = None
    """How the examples' frames are made; ``none``: chains have none."""
    prior: PriorConfig | None = None
    tokenizer: TokenizerConfig | None = None
    fit: Literal["stretch", "crop"] | None = None
    """How a picture becomes square; an answer of ``crop`` is of the centre square only."""
    engine: EngineConfig = EngineConfig(batch=4, image_batch=4)
    batch: int = Field(default=16, ge=1, le=4096)
    """Rows of the fixed, padded batch of the decoder."""
    seed: int = Field(default=0, ge=0)
    """Seed of a backbone with random weights."""


class GenerateConfig(Section):
    """``covray generate``: example pairs and queries in, frames and answers out.

    What is null is the run's, or where there is no run the nano family's.
    """

    queries: tuple[str, ...] = Field(min_length=1)
    """Picture files to answer."""
    out: str
    """Folder to write: one folder a query, and ``generation.json``."""
    examples: tuple[tuple[str, str], ...] = ()
    """Picture files of image and label, each pair one example chain of the prompt."""
    adapter: str | None = None
    """A finished run of ``covray train``; null: the untuned backbone."""
    task: TaskName | None = None
    """How labels are resized and answers read as data; null: the run's if it has one, else answers are pictures."""
    classes: int = Field(default=21, ge=1, le=256)
    """Of a segmentation: by whose colours an answer is read (PASCAL VOC has 21, COCO's panoptic labels 134)."""
    backbone: BackboneConfig | None = None
    length: Length | None = None
    """Pictures of a chain, both ends counted; of a run trained at several it must be given. Without a run 4."""
    method: ChainMethod | None = None
    """How the examples' frames are made; ``none``: chains have none."""
    prior: PriorConfig | None = None
    tokenizer: TokenizerConfig | None = None
    fit: Literal["stretch", "crop"] | None = None
    """How a picture becomes square; an answer of ``crop`` is of the centre square only."""
    engine: EngineConfig = EngineConfig(batch=4, image_batch=4)
    """Small batches: here are few pictures. The frames have a build's bits at the build's ``batch``, here and there."""
    sampling: SamplingConfig = SamplingConfig()
    batch: int = Field(default=16, ge=1, le=4096)
    """Rows of the fixed, padded batch of the decoder."""
    seed: int = Field(default=0, ge=0)

    def generator(self) -> GeneratorConfig:
        """Return the part that says which models answer."""
        return GeneratorConfig.model_validate({name: getattr(self, name) for name in GeneratorConfig.model_fields})
