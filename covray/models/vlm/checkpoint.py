"""Folders of vision-language models: found, checked, fingerprinted and loaded by transformers.

Only safetensors are read, and no code of a checkpoint is run. A folder that was trained for blocks has a
``block_diffusion.json``, which says what decoding needs to know.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from covray.config.vlm import VlmModelConfig
from covray.errors import WeightsError, one_line
from covray.io.model_folders import fingerprint_folder, require_files, require_whole, resolve_folder
from covray.io.tensor_files import require_stored_floats, weight_files
from covray.models.vlm.batch import Blocks
from covray.models.vlm.model import M_ROPE_TYPES, Vlm
from covray.models.vlm.prompts import LLAVA_TOWERS, Prompter

BLOCKS_FILE = "block_diffusion.json"
"""In a folder that was trained for blocks: the mask's id, and the blocks."""
_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
_WEIGHT_FILES = (_WEIGHTS, "model-*-of-*.safetensors", _INDEX)
_TOKENIZER_FILES = (
    "tokenizer*.json", "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
_TYPES = ("llava", *M_ROPE_TYPES)


@dataclass(frozen=True)
class VlmFacts:
    """What is known of a checkpoint before its weights are loaded."""

    folder: Path
    config: Any
    """Of transformers."""
    fingerprint: str
    """SHA-256 (hex) of configuration, weights, tokenizer and image processor."""
    known_ids: int
    """Ids that the tokenizer uses: those below it."""
    mask_id: int
    blocks: Blocks | None
    """What the folder was trained for; None: next tokens only."""

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding in the folder."""
        return int(self.config.get_text_config().vocab_size)


@dataclass(frozen=True)
class LoadedVlm:
    """A checkpoint ready for use."""

    model: Vlm
    prompter: Prompter
    stop_ids: frozenset[int]
    """Ids that end an answer."""


def vlm_facts(config: VlmModelConfig) -> VlmFacts:
    """Find a checkpoint, check everything but the values of its weights, and fingerprint it.

    Raises:
        WeightsError: The folder is incomplete, or of a kind that is not supported.
    """
    patterns = (_CONFIG, "generation_config.json", BLOCKS_FILE, *_WEIGHT_FILES, *_TOKENIZER_FILES)
    folder = resolve_folder(config.path, config.revision, "vlm", patterns)
    require_files(folder, [_CONFIG, (_WEIGHTS, _INDEX), ("preprocessor_config.json", "processor_config.json")])
    loaded = _read_config(folder)
    try:
        require_stored_floats(weight_files(folder, (_WEIGHTS, _INDEX)))
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{folder}: cannot be read ({one_line(error)}); get the folder again") from error
    # Not its length: ids of added tokens may leave gaps, and a mask must be no token's id.
    known = max(_tokenizer(folder).get_vocab().values()) + 1
    mask_id, blocks = _read_blocks(folder)
    if config.mask_id is not None:
        mask_id = config.mask_id
    rows = int(loaded.get_text_config().vocab_size)
    # A row of the embedding that no token uses is free to be the mask's; without one a row is added.
    if mask_id is None:
        mask_id = known if known < rows else rows
    if not known <= mask_id <= rows:
        raise WeightsError(
            f"mask_id: {mask_id} is a token of {folder}; give one of {known} to {rows}, which no token has"
        )
    fingerprint = fingerprint_folder(folder, (_CONFIG, BLOCKS_FILE, *_WEIGHT_FILES, *_TOKENIZER_FILES))
    return VlmFacts(folder, loaded, fingerprint, known, mask_id, blocks)


def load_vlm(facts: VlmFacts, dtype: torch.dtype, device: torch.device) -> LoadedVlm:
    """Load a checkpoint.

    The row of a mask that was not trained yet is the mean of all tokens' rows.

    Args:
        facts: Of the checkpoint.
        dtype: Type of the weights.
        device: Where the model is put.

    Raises:
        WeightsError: Tensors are missing or cannot be read.
    """
    disable_progress_bar()  # a bar of a moment's length between the lines of a command
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            facts.folder,
            config=facts.config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            attn_implementation="sdpa",  # flash attention takes no mask of blocks
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"{facts.folder}: cannot be loaded ({one_line(error)}); get the folder again") from error
    require_whole(facts.folder, report)
    if facts.mask_id >= facts.vocabulary:
        model.resize_token_embeddings(facts.mask_id + 1, mean_resizing=False)
        with torch.no_grad():  # it is random, and never used: the mask is not predicted
            model.get_output_embeddings().weight[facts.mask_id] = 0
    if facts.blocks is None:
        with torch.no_grad():
            rows = model.get_input_embeddings().weight
            rows[facts.mask_id] = rows[: facts.known_ids].float().mean(0).to(rows.dtype)
    model.to(device).eval()
    prompter = load_prompter(facts)
    # A chat's turn may end with another token than the tokenizer's texts.
    stop = model.generation_config.eos_token_id
    stops = stop if isinstance(stop, list) else [stop]
    known_stops = {token for token in stops if token is not None}
    return LoadedVlm(Vlm(model, facts.mask_id), prompter, frozenset(known_stops | {prompter.end_id}))


def load_prompter(facts: VlmFacts) -> Prompter:
    """Load tokenizer, image processor and chat template.

    Raises:
        WeightsError: A file cannot be read, or the tokenizer has no end token.
    """
    tokenizer = _tokenizer(facts.folder)
    if tokenizer.eos_token_id is None:
        raise WeightsError(f"{facts.folder}: its tokenizer has no end token; set eos_token in tokenizer_config.json")
    try:
        # The default backend needs torchvision.
        processor = AutoImageProcessor.from_pretrained(
            facts.folder, backend="pil", trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, ImportError) as error:
        raise WeightsError(f"{facts.folder}: its image processor cannot be loaded ({one_line(error)})") from error
    return Prompter(facts.config, tokenizer, processor, tokenizer.chat_template or _older_template(facts.folder))


def blocks_file(mask_id: int, blocks: Blocks | None) -> bytes:
    """Return ``block_diffusion.json``; without blocks, that of a model with a mask that is not trained for it yet."""
    about = {"version": 1, "objective": "block_diffusion", "mask_id": mask_id}
    if blocks is None:
        about["trained"] = False
    else:
        about |= {"block": blocks.size, "context": blocks.context, "start": blocks.start}
    # Absent where it is false, as in the files of before it.
    if blocks is not None and blocks.shift:
        about["shift"] = True
    return (json.dumps(about, indent=2) + "\n").encode()


def read_blocks(text: bytes, where: str) -> tuple[int, Blocks | None]:
    """Return the mask's id and the blocks of a ``block_diffusion.json``; None: it is not trained for any yet.

    Raises:
        WeightsError: It is not one; the message names ``where`` it is.
    """
    try:
        about = json.loads(text)
        mask_id, shift = about["mask_id"], about.get("shift", False)
        if about.get("trained") is False and about["version"] == 1 and mask_id >= 0:
            return int(mask_id), None
        size = about["block"]
        known = about["context"] in ("causal", "block") and about["start"] in ("prompt", "sequence")
        good = about["version"] == 1 and known and shift in (False, True) and min(mask_id, size - 1) >= 0
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{where}: does not describe blocks ({one_line(error)}); get the folder again") from error
    if not good:
        raise WeightsError(f"{where}: does not describe blocks; get the folder again")
    return int(mask_id), Blocks(int(size), about["context"], about["start"], bool(shift))


def _read_blocks(folder: Path) -> tuple[int | None, Blocks | None]:
    file = folder / BLOCKS_FILE
    return read_blocks(file.read_bytes(), str(file)) if file.is_file() else (None, None)


def _read_config(folder: Path) -> Any:
    """Return the configuration of transformers. Raises WeightsError for a kind of model that is not supported."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{folder}: {_CONFIG} cannot be read ({one_line(error)}); get the folder again") from error
    if config.model_type not in _TYPES:
        raise WeightsError(f"{folder}: is of type {config.model_type}; give one of {', '.join(_TYPES)}")
    if config.model_type == "llava" and config.vision_config.model_type not in LLAVA_TOWERS:
        raise WeightsError(
            f"{folder}: its vision tower is of type {config.vision_config.model_type}; give a LLaVA with one of "
            f"{', '.join(LLAVA_TOWERS)}"
        )
    return config


def _tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise WeightsError(
            f"{folder}: its tokenizer cannot be loaded ({one_line(error)}); complete the folder"
        ) from error


def _older_template(folder: Path) -> str | None:
    """Return the template of ``chat_template.json``, where processors kept it before transformers 4.52."""
    file = folder / "chat_template.json"
    if not file.is_file():
        return None
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["chat_template"])
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{file}: cannot be read ({one_line(error)}); get the folder again") from error
