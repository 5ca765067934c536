"""The configuration of ``covray build``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from covray.config.fields import (
    MOST_ROWS_PER_BLOCK,
    ActorsConfig,
    Alpha,
    EngineConfig,
    FrameMethod,
    Length,
    PriorConfig,
    TokenizerConfig,
)
from covray.config.section import Section


class BuildConfig(Section):
    """``covray build``: turn a manifest into shards of tokens."""

    pairs: str
    """Manifest: a Parquet file or a folder of them, local or on any filesystem that pyarrow knows."""
    out: str
    """Dataset folder to write."""
    lengths: tuple[Length, ...] = (4,)
    """Chain lengths to serve, both ends counted; length L has frames at alpha = k/(L-1)."""
    alphas: tuple[Alpha, ...] = ()
    """Further alphas, beside those of the lengths."""
    methods: tuple[FrameMethod, ...] = ("diffusion", "linear")
    """How frames are made. The method ``none`` needs no frames: every dataset has source and label."""
    prior: PriorConfig = PriorConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    engine: EngineConfig = EngineConfig()
    actors: ActorsConfig = ActorsConfig()
    fit: Literal["stretch", "crop"] = "stretch"
    """How a picture becomes square: ``stretch`` as LVM does, or ``crop`` to the centre first."""
    check_endpoints: float = Field(default=0.05, ge=0.0, le=1.0)
    """Share of pairs whose two ends are also denoised, to report how well the inversion returns them."""
    keep_noise: bool = False
    """Keep the inverted noise in the shards, so that a later build needs no inversion."""
    noise_from: str | None = None
    """Dataset built with ``keep_noise`` and the same prior; its noise is used for pairs that have the same pixels."""
    rows_per_block: int | None = Field(default=None, ge=1, le=100_000)
    """Pairs that an actor takes at a time; a kill loses at most the blocks at work. By default several blocks for every
    actor, of as many pairs as fill its batches, and of at most 64."""

    @property
    def most_rows_per_block(self) -> int:
        """Return the rows of a block, of which a small build may have fewer where the configuration leaves it open."""
        return self.rows_per_block or MOST_ROWS_PER_BLOCK

    @field_validator("lengths", "alphas", "methods")
    @classmethod
    def _sorted_set(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(sorted(set(value)))

    def identity(self) -> dict[str, Any]:
        """What decides the tokens of a pair; a resume must agree in all of it."""
        return self.model_dump(mode="json", exclude={"out", "pairs", "actors", "rows_per_block", "noise_from"})


def with_solver(identity: dict[str, Any]) -> dict[str, Any]:
    """Return the identity of a build with the solver stated, as ``PriorConfig`` leaves out DDIM with all evaluations.

    Where identities are compared, a key that is left out must not read as one that is left open.
    """
    return identity | {"prior": {"solver": "ddim", "evaluations": "all"} | identity["prior"]}


def solver_text(prior: dict[str, Any]) -> str:
    """Return how a prior inverts and denoises, of the section ``prior`` of a build's configuration."""
    if prior.get("solver", "ddim") == "dpm":
        return f"{prior['steps']} DPM-Solver++ steps"
    text = f"{prior['steps']} DDIM steps"
    if prior.get("evaluations") is not None:
        text += f", {prior['evaluations']} of them evaluated"
    return text
