"""The configuration of ``covray build``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from covray.config.fields import (
    MOST_ROWS_PER_BLOCK,
    ActorsConfig,
    Alpha,
    EngineConfig,
    FrameMethod,
    Length,
    PriorConfig,
    Spacing,
    TokenizerConfig,
    TrackingConfig,
)
from covray.config.section import GrownSection, JsonObject, recorded_section


class BuildConfig(GrownSection):
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
    """How frames are made: by the prior (``diffusion``), or by mixing pixels (``linear``). Two controls need no prior
    either: the image itself in place of every frame (``copy``), and the label in cells that become smaller
    (``coarse``). The method ``none`` needs no frames: every dataset has source and label."""
    spacing: Spacing = "even"
    """Where frames are made: at alpha = k/(L-1) (``even``), where a diffused chain has gone k/(L-1) of its own path
    (``path``, 8 further frames a pair to measure it), or at the alphas of a list, ``[0.6, 0.9]``, one for each frame of
    chains of one length. The dataset calls them k/(L-1) all the same."""
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
    tracking: TrackingConfig = TrackingConfig()
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
        # In one order, so that the identity does not depend on how they were typed.
        return tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _noise_fits(self) -> BuildConfig:
        if self.prior.context != "empty" and (self.keep_noise or self.noise_from is not None):
            raise ValueError(
                "keep_noise, noise_from: noise belongs to the context that a picture was inverted with; leave them "
                "out, or set prior.context: empty"
            )
        return self

    @model_validator(mode="after")
    def _spacing_fits(self) -> BuildConfig:
        if isinstance(self.spacing, tuple) and (self.alphas or self.lengths != (len(self.spacing) + 2,)):
            raise ValueError(
                f"spacing: {len(self.spacing)} alphas are those of chains of {len(self.spacing) + 2} pictures; set "
                f"lengths to {len(self.spacing) + 2} and no alphas"
            )
        return self

    def unused_fields(self) -> Iterator[str]:
        """Yield even spacing and no tracking."""
        if self.spacing == "even":
            yield "spacing"
        if self.tracking == TrackingConfig():
            yield "tracking"

    def identity(self) -> JsonObject:
        """What decides the tokens of a pair; a resume must agree in all of it."""
        return self.model_dump(
            mode="json", exclude={"out", "pairs", "actors", "rows_per_block", "noise_from", "tracking"}
        )


def with_solver(identity: JsonObject) -> JsonObject:
    """Return the identity of a build with its defaults stated that ``BuildConfig`` and ``PriorConfig`` leave out.

    Where identities are compared, a key that is left out must not read as one that is left open.
    """
    prior = {"solver": "ddim", "evaluations": "all", "context": "empty"} | recorded_section(identity, "prior")
    return {"spacing": "even", **identity, "prior": prior}


def solver_text(prior: dict[str, Any]) -> str:
    """Return how a prior inverts and denoises, of the section ``prior`` of a build's configuration."""
    context = _CONTEXTS[prior.get("context", "empty")]
    if prior.get("solver", "ddim") == "dpm":
        return f"{prior['steps']} DPM-Solver++ steps{context}"
    text = f"{prior['steps']} DDIM steps"
    if prior.get("evaluations") is not None:
        text += f", {prior['evaluations']} of them evaluated"
    return text + context


_CONTEXTS = {
    "empty": "",
    "caption": ", reading captions (not task-free)",
    "aligned": ", reading aligned features (not task-free)",
}
"""What ``solver_text`` adds for each ``prior.context``."""
