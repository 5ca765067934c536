"""The JSON files of a backbone's folder and of an adapter's that PEFT and transformers do not know."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, PositiveInt

from covray.errors import CovrayError, WeightsError
from covray.io.records import Record

_Size = Annotated[int, Field(gt=0, lt=2**20)]
_Count = Annotated[int, Field(gt=0, lt=2**31)]


class BackboneRecord(Record):
    """Whose codes the ids of a backbone are; a folder that covray did not write has no such file."""

    FILE: ClassVar[str] = "covray.json"
    FIX: ClassVar[str] = "get the folder again"
    ERROR: ClassVar[type[CovrayError]] = WeightsError

    codebook: str | None = None
    """SHA-256 (hex) of the codebook that the ids index; null where it is not known."""
    tokens_per_image: int | None = None
    """Tokens of a picture; null where it is not known."""


class BlockDiffusionRecord(Record):
    """What decoding must know of an adapter of block diffusion."""

    FILE: ClassVar[str] = "block_diffusion.json"
    FIX: ClassVar[str] = "get the adapter again"
    ERROR: ClassVar[type[CovrayError]] = WeightsError

    objective: str
    """``block_diffusion``."""
    block: PositiveInt
    """Tokens of a block, as trained."""


class DraftRecord(Record):
    """A draft adapter: W x + (alpha / rank) B A x on masks."""

    FILE: ClassVar[str] = "draft.json"
    FIX: ClassVar[str] = "get the adapter again"
    ERROR: ClassVar[type[CovrayError]] = WeightsError

    rank: _Count
    alpha: float = Field(gt=0, allow_inf_nan=False)
    targets: tuple[str, ...]
    """Projections that get an update, by their names in transformers."""
    mask_id: _Count
    """The special id of a mask."""
    tokens: _Count
    """Masks behind a token, as trained."""


class VerifierRecord(Record):
    """A verifier, and what it judges."""

    FILE: ClassVar[str] = "verifier.json"
    FIX: ClassVar[str] = "get the adapter again"
    ERROR: ClassVar[type[CovrayError]] = WeightsError

    width: _Size
    """Of the model's states."""
    hidden: _Size
    """Width of its hidden layer."""
    adapter: str
    """SHA-256 (hex) of the weights of the adapter whose answers it judges."""
    backbone: str
    """SHA-256 (hex) of the backbone's weights."""
