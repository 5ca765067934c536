"""The configuration of ThinkDiff."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from covray.config.section import Section


class ThoughtConfig(Section):
    """How the vision-language model writes the text whose features are taken."""

    max_tokens: int = Field(default=64, ge=1, le=100_000)
    """Tokens of a text, at most."""
    min_tokens: int = Field(default=1, ge=1, le=100_000)
    """Tokens of a text, at least: so long it does not end. As many as ``max_tokens``: all texts are equally long."""
    temperature: float = Field(default=0.6, ge=0.0, le=100.0)
    """0: always the likeliest token (greedy)."""
    top_p: float = Field(default=0.9, gt=0.0, le=1.0)
    """Sample only from the likeliest tokens that together reach this probability."""
    seed: int = Field(default=0, ge=0)
    """The random numbers of a text follow from it and from the prompt's tokens."""

    @model_validator(mode="after")
    def _bounds_agree(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is over max_tokens {self.max_tokens}; give fewer")
        return self


class PainterConfig(Section):
    """The diffusion model that draws from aligned features, and how it draws."""

    kind: Literal["unet", "flux", "sd3", "pixart", "cogvideox"]
    """``unet``: a prior's folder whose UNet reads the features, sampled with covray's schedule. The others are
    pipelines of diffusers: FLUX, Stable Diffusion 3, PixArt-Alpha or Sigma, CogVideoX."""
    path: str
    """Folder of the model in diffusers' layout, or a hub id."""
    revision: str | None = None
    """Commit, tag or branch of a hub id; pin a commit for anything that is to be repeated."""
    steps: int = Field(default=28, ge=1, le=1000)
    """Steps of a picture. With ``unet`` they must divide the model's training steps."""
    guidance: float = Field(default=3.5, ge=1.0, le=100.0)
    """Scale of the guidance; 1: none. FLUX reads the number and needs no second pass."""
    size_px: int | None = Field(default=None, ge=8, le=4096, multiple_of=8)
    """Side of the square pictures in pixels; null: the model's own."""
    frames: int = Field(default=49, ge=1, le=1000)
    """Frames of a video, with ``cogvideox``."""
    words: int = Field(default=128, ge=1, le=1024)
    """T5 tokens of the words that stand after the features, where there are words; with ``cogvideox`` words fill what
    the features leave of its text."""
    seed: int = Field(default=42, ge=0)
    """Of the noise that every picture begins with."""
