"""The configuration of ThinkDiff."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from covray.config.section import Section
from covray.config.vlm import VlmModelConfig


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


class LanguageModelConfig(Section):
    """The frozen language model whose decoder the aligner learns to write for: a T5."""

    path: str
    """Folder of the model, or a hub id."""
    revision: str | None = None
    """Commit, tag or branch of a hub id; pin a commit for anything that is to be repeated."""
    max_tokens: int = Field(default=128, ge=2, le=4096)
    """Tokens of a text to write, at most, its end token among them."""


class AlignerConfig(Section):
    """The aligner between the two models."""

    norm: Literal["encoder", "ones", "none"] = "encoder"
    """What it ends with: a norm that starts as the language encoder's, one that starts as 1, or none."""
    seed: int = Field(default=0, ge=0)
    """Of its first weights."""


class SplitConfig(Section):
    """How a caption is parted into what is read and what is written."""

    mode: Literal["prefix", "tokens", "none"] = "prefix"
    """``prefix``: the features before a random cut, the tokens after it (the authors' code); ``tokens``: a random half
    of the tokens (the paper's words); ``none``: everything is read and written, an ablation of the paper."""
    longest: int = Field(default=128, ge=1, le=100_000)
    """The longest prefix, in tokens."""


class AlignmentConfig(Section):
    """The training of the aligner: AdamW, a linear warm-up, then a cosine."""

    steps: int = Field(default=25_000, ge=1)
    """Steps of the training."""
    batch: int = Field(default=96, ge=1, le=65_536)
    """Captions of a step."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """The highest learning rate."""
    warmup_steps: int = Field(default=2000, ge=0)
    """Steps in which the learning rate rises."""
    warmup_from: float = Field(default=1e-6, ge=0)
    """Where it begins."""
    final: float = Field(default=8e-5, ge=0)
    """Where the cosine ends."""
    cosine_steps: int = Field(default=200_000, ge=1)
    """Steps of the whole cosine, the warm-up's among them; a training of fewer steps ends before it does."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Of the matrices; biases and the norm have none."""
    clip: float | None = Field(default=None, gt=0)
    """The largest norm of a step's gradient; null: none is cut."""
    seed: int = Field(default=42, ge=0)
    """The order of the captions and their splits follow from it."""


class EpisodesConfig(Section):
    """The reasoning episodes of CoBSAT's rule."""

    shots: tuple[int, ...] = Field(default=(2, 4), min_length=1)
    """Demonstrations of an episode, 1 to 8; each number makes a set of episodes of its own."""
    count: int = Field(default=1000, ge=1, le=1_000_000)
    """Episodes of each task and number of shots."""
    seed: int = Field(default=123, ge=0)
    """Of the permutations; those of CoBSAT's own file have none."""
    instruction: str = (
        "I give you several words and pictures. First, please analyse what the next picture is. Then give me a "
        "detailed diffusion prompt to describe the next picture. Please only provide me the detailed prompt and start "
        "the answer with 'Create an image'."
    )
    """The text that the vision-language model reads before the demonstrations."""

    @field_validator("shots")
    @classmethod
    def _shots_fit(cls, shots: tuple[int, ...]) -> tuple[int, ...]:
        for number in shots:
            if not 1 <= number <= 8:
                raise ValueError(f"{number} shots: of ten values an episode takes 1 to 8; give others")
        return shots


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


class ThinkConfig(Section):
    """The models and settings of ThinkDiff, from features to pictures."""

    variant: Literal["lvlm", "clip"]
    """Whose features are aligned: a vision-language model's of its own text, or a vision tower's of a picture."""
    vlm: VlmModelConfig
    """The model that the features are of; with ``clip`` its vision tower."""
    language_model: LanguageModelConfig
    painter: PainterConfig
    thought: ThoughtConfig = ThoughtConfig()
    """With ``lvlm`` only."""
    patches: int = Field(default=2, ge=1, le=64)
    """With ``clip``: how many times smaller the grid of patches is made, on each side."""
    aligner: AlignerConfig = AlignerConfig()
    split: SplitConfig = SplitConfig()
    """With ``lvlm`` only; captions of ``clip`` are cut at a random word."""
    training: AlignmentConfig = AlignmentConfig()
    episodes: EpisodesConfig = EpisodesConfig()
