"""Folders of T5 language models, whose decoder an aligner learns to write for. Only safetensors are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, T5ForConditionalGeneration

from covray.config.think import LanguageModelConfig
from covray.errors import WeightsError, one_line
from covray.io.model_folders import fingerprint_folder, require_files, require_whole, resolve_folder
from covray.io.tensor_files import require_stored_floats, weight_files

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
_WEIGHT_FILES = (_WEIGHTS, "model-*-of-*.safetensors", _INDEX)
_TOKENIZER_FILES = ("tokenizer*.json", "spiece.model", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class LanguageModel:
    """A T5 ready for use."""

    model: Any
    """A ``T5ForConditionalGeneration``, frozen, in evaluation mode."""
    tokenizer: Any
    fingerprint: str
    """SHA-256 (hex) of configuration, weights and tokenizer."""


def load_language_model(config: LanguageModelConfig, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    """Load a T5, Flan-T5 or T5-v1.1.

    Args:
        config: Which.
        dtype: Type of the weights.
        device: Where the model is put.

    Raises:
        WeightsError: The folder is incomplete, of another kind of model, or cannot be read.
    """
    patterns = (_CONFIG, "generation_config.json", *_WEIGHT_FILES, *_TOKENIZER_FILES)
    folder = resolve_folder(config.path, config.revision, "text", patterns)
    require_files(folder, [_CONFIG, (_WEIGHTS, _INDEX), ("tokenizer.json", "spiece.model")])
    try:
        loaded = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if loaded.model_type != "t5":
            raise WeightsError(f"{folder}: is of type {loaded.model_type}; give a T5, such as google/flan-t5-xxl")
        require_stored_floats(weight_files(folder, (_WEIGHTS, _INDEX)))
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        model, report = T5ForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise WeightsError(f"{folder}: cannot be loaded ({one_line(error)}); get the folder again") from error
    require_whole(folder, report)
    fingerprint = fingerprint_folder(folder, (_CONFIG, *_WEIGHT_FILES, *_TOKENIZER_FILES))
    return LanguageModel(model.to(device).requires_grad_(False).eval(), tokenizer, fingerprint)
