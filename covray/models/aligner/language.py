"""Folders of T5 language models, whose decoder an aligner learns to write for. Only safetensors are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, T5ForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

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
class LanguageFacts:
    """What is known of a T5 before its weights are loaded."""

    folder: Path
    config: Any
    """Of transformers."""
    fingerprint: str
    """SHA-256 (hex) of configuration, weights and tokenizer."""


@dataclass(frozen=True)
class LanguageModel:
    """A T5 ready for use."""

    model: Any
    """A ``T5ForConditionalGeneration``, frozen, in evaluation mode."""
    tokenizer: Any
    fingerprint: str
    """SHA-256 (hex) of configuration, weights and tokenizer."""

    @torch.no_grad()
    def encode(self, texts: Sequence[str], longest: int) -> list[Tensor]:
        """Return the encoder's states of texts, float32 [n, width] each, without padding; one text at a time.

        Args:
            texts: The texts.
            longest: Tokens of a text, at most.
        """
        states = []
        for text in texts:
            ids = self.tokenizer([text], truncation=True, max_length=longest, return_tensors="pt")["input_ids"]
            output = self.model.encoder(input_ids=ids.to(self.model.device))
            states.append(output.last_hidden_state[0].float())
        return states


def language_facts(config: LanguageModelConfig) -> LanguageFacts:
    """Find a T5, Flan-T5 or T5-v1.1, check everything but the values of its weights, and fingerprint it.

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
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise WeightsError(f"{folder}: cannot be read ({one_line(error)}); get the folder again") from error
    return LanguageFacts(folder, loaded, fingerprint_folder(folder, (_CONFIG, *_WEIGHT_FILES, *_TOKENIZER_FILES)))


def load_language_model(config: LanguageModelConfig, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    """Load a T5, Flan-T5 or T5-v1.1.

    Args:
        config: Which.
        dtype: Type of the weights.
        device: Where the model is put.

    Raises:
        WeightsError: The folder is incomplete, of another kind of model, or cannot be read.
    """
    facts = language_facts(config)
    folder = facts.folder
    disable_progress_bar()  # a bar of a moment's length between the lines of a command
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        model, report = T5ForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise WeightsError(f"{folder}: cannot be loaded ({one_line(error)}); get the folder again") from error
    require_whole(folder, report)
    return LanguageModel(model.to(device).requires_grad_(False).eval(), tokenizer, facts.fingerprint)
