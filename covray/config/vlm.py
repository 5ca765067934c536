"""The configuration of ``covray vlm``."""

from __future__ import annotations

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
