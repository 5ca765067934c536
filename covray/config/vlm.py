"""The configuration of ``covray vlm``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from covray.config.section import Section


class VlmModelConfig(Section):
    """The vision-language model: a LLaVA, Qwen2-VL or Qwen2.5-VL checkpoint of transformers."""

    path: str
    """Folder of the model, or a hub id. Only safetensors are read, and no code of a checkpoint is run."""
    revision: str | None = None
    """Commit, tag or branch of a hub id; pin a commit for anything that is to be repeated."""
    mask_id: int | None = Field(default=None, ge=0)
    """Id of the mask token. Null: that of the folder, if it was trained for blocks, else the first id of the vocabulary
    that the tokenizer does not use, else one new row."""


class VlmDecodingConfig(Section):
    """How an answer is written."""

    decoder: Literal["autoregressive", "block_diffusion", "speculative"] | None = None
    """One token a pass; whole blocks in a few passes; or drafts by blocks that a causal pass verifies, which are the
    tokens of ``autoregressive`` in float32. Null: blocks for a model that was trained for them, else one by one."""
    max_tokens: int = Field(default=128, ge=1, le=100_000)
    """Tokens of an answer, at most."""
    block: int | None = Field(default=None, ge=1, le=1024)
    """Tokens of a block. Null: as the model was trained."""
    passes: int | None = Field(default=None, ge=1, le=1024)
    """Passes in which a block is written, at most its tokens: fewer are faster and worse. Null: one for each token."""
    unmask: Literal["even", "cosine", "confidence", "entropy"] = "even"
    """What a pass writes: equally many tokens, the surest first (``even``, DiffusionVL's static rule), few at first
    (``cosine``), all that are sure but at least as many as ``even`` (``confidence``, its dynamic rule), or as many as
    keep the sum of their entropies within the threshold (``entropy``)."""
    threshold: float | None = Field(default=None, gt=0)
    """Of ``confidence`` a probability (null: 0.85), of ``entropy`` nats (null: 1)."""
    temperature: float = Field(default=0.0, ge=0.0, le=100.0)
    """0: always the likeliest token (greedy)."""
    top_k: int | None = Field(default=None, ge=1)
    """Sample only from this many likeliest tokens."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Sample only from the likeliest tokens that together reach this probability."""
    seed: int = Field(default=0, ge=0)
    """Everything random follows from it and from the prompt's tokens."""
