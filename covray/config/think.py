"""The configuration of ThinkDiff."""

from __future__ import annotations

from typing import Self

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
