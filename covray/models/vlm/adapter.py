"""Adapters of vision-language models in PEFT's format, and whole models, as a training writes them.

An adapter of block diffusion also trains the mask's row of the embedding (PEFT's ``trainable_token_indices``), and has
a ``block_diffusion.json`` beside it. Where the mask is one row more than the model has, plain PEFT needs the embedding
resized first (``resize_token_embeddings(mask_id + 1)``).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from covray.errors import WeightsError, one_line
from covray.io.storage import Folder
from covray.models.vlm.batch import Blocks
from covray.models.vlm.checkpoint import BLOCKS_FILE, VlmFacts, blocks_file, read_blocks
from covray.models.vlm.model import Vlm

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_OWN, _PEFT = "model.", "base_model.model."
"""Prefixes of a parameter's name here and in PEFT's files."""
_NAME = ".default"
"""PEFT's name of an adapter, which its files leave out."""


def add_adapter(vlm: Vlm, rank: int, alpha: float, targets: Sequence[str], mask: bool, seed: int) -> None:
    """Put a new adapter into the language model of ``vlm``, and freeze all else.

    Args:
        vlm: The model.
        rank: Rank of B and A.
        alpha: Scale of the update before it is divided by the rank.
        targets: Projections that get an update.
        mask: Whether the mask's row of the embedding is trained, too.
        seed: Of A; B is zero.
    """
    # PEFT draws A from the global generator; the caller's random numbers must not change by that.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_peft_config(rank, alpha, targets, vlm.mask_id if mask else None), vlm.model)
    for name, parameter in vlm.named_parameters():
        # In float32 whatever the model is: a step's update is below what bfloat16 can add to a weight.
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        elif "lora_" in name:
            raise AssertionError(f"{name} is frozen")


def _peft_config(rank: int, alpha: float, targets: Sequence[str], mask_id: int | None) -> LoraConfig:
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=rf".*language_model.*\.({'|'.join(targets)})",
        trainable_token_indices=None if mask_id is None else {"embed_tokens": [mask_id]},
    )


def adapter_files(vlm: Vlm, tensors: Mapping[str, Tensor], facts: VlmFacts, blocks: Blocks | None) -> dict[str, bytes]:
    """Return the files of an adapter by name.

    Args:
        vlm: The model, of which the adapter's settings are read.
        tensors: The trained parameters by the names that they have in ``vlm``, float32.
        facts: Of the checkpoint that is adapted.
        blocks: What it was trained for; None: next tokens only.
    """
    stored = {}
    for name, tensor in tensors.items():
        stored[_PEFT + name.removeprefix(_OWN).replace(_NAME, "")] = tensor.contiguous()
    config = vlm.model.peft_config["default"].to_dict()
    # PEFT keeps the targets as a set: JSON has none, and its order differs from process to process.
    about = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    about |= {"base_model_name_or_path": str(facts.folder), "inference_mode": True}
    files = {WEIGHTS_FILE: save(stored, {"format": "pt"})}
    if blocks is not None:
        files[BLOCKS_FILE] = blocks_file(facts.mask_id, blocks)
    files[CONFIG_FILE] = (json.dumps(about, indent=2, sort_keys=True) + "\n").encode()
    return files


def adapter_blocks(folder: str) -> Blocks | None:
    """Return the blocks that the adapter of ``folder`` was trained for; None: next tokens only.

    Raises:
        WeightsError: The file that says so cannot be read.
    """
    known = _read_adapter_blocks(Folder(folder))
    return None if known is None else known[1]


def _read_adapter_blocks(folder: Folder) -> tuple[int, Blocks | None] | None:
    """Return the mask's id and the blocks of an adapter's ``block_diffusion.json``, if it has one."""
    try:
        about = folder.read_bytes(BLOCKS_FILE) if folder.exists(BLOCKS_FILE) else None
    except OSError as error:
        raise WeightsError(f"{folder.path}: cannot be read ({one_line(error)}); restore it") from error
    return None if about is None else read_blocks(about, folder.join(BLOCKS_FILE))


def load_adapter(vlm: Vlm, folder: str, rank: int, alpha: float, targets: Sequence[str]) -> Blocks | None:
    """Put the adapter of ``folder`` into ``vlm``, and return the blocks that it was trained for.

    Args:
        vlm: The model that was adapted.
        folder: A folder with the files of ``adapter_files``.
        rank: Of the training, as ``alpha`` and ``targets``.
        alpha: See there.
        targets: See there.

    Raises:
        WeightsError: A file cannot be read, or the adapter is of another model.
    """
    source = Folder(folder)
    try:
        stored = load(source.read_bytes(WEIGHTS_FILE))
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{folder}: cannot be read ({one_line(error)}); restore it") from error
    blocks = None
    known = _read_adapter_blocks(source)
    if known is not None:
        mask_id, blocks = known
        if mask_id != vlm.mask_id:
            raise WeightsError(f"{folder}: has mask {mask_id}, the model {vlm.mask_id}; set mask_id as trained")
    add_adapter(vlm, rank, alpha, targets, blocks is not None, 0)
    parameters = {name: value for name, value in vlm.named_parameters() if value.requires_grad}
    by_file = {_PEFT + name.removeprefix(_OWN).replace(_NAME, ""): value for name, value in parameters.items()}
    # All names and shapes first: an adapter that is half another one's would answer, wrongly.
    for name in sorted(by_file.keys() | stored.keys()):
        shapes = [list(side[name].shape) if name in side else None for side in (stored, by_file)]
        if shapes[0] != shapes[1]:
            raise WeightsError(f"{folder}: {name} is {shapes[0]}, the model has {shapes[1]}; give its own checkpoint")
    with torch.no_grad():
        for name, value in by_file.items():
            value.copy_(stored[name])
    return blocks


def model_files(vlm: Vlm, tensors: Mapping[str, Tensor], facts: VlmFacts, blocks: Blocks | None) -> dict[str, bytes]:
    """Return the files of a whole trained model by name, a folder that ``load_vlm`` and transformers read.

    Args:
        vlm: The model; what is not among ``tensors`` is as it is there.
        tensors: The trained parameters by the names that they have in ``vlm``, float32.
        facts: Of the checkpoint that training began with.
        blocks: What it was trained for; None: next tokens only.
    """
    state: dict[str, Any] = {}
    for name, tensor in vlm.model.state_dict().items():
        state[name] = tensors.get(_OWN + name, tensor.detach().cpu())
    for name in vlm.model.all_tied_weights_keys:  # named_parameters lists tied weights once
        state.pop(name, None)
    files: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        vlm.model.save_pretrained(folder, state_dict=state, max_shard_size="1000GB")
        copy_texts(facts.folder, folder)
        # The file copied from a folder that knew blocks would say that this model still does.
        if blocks is not None or facts.blocks is not None:
            (folder / BLOCKS_FILE).write_bytes(blocks_file(facts.mask_id, blocks))
        for file in sorted(folder.iterdir()):
            files[file.name] = file.read_bytes()
    return files


def copy_texts(source: Path, folder: Path) -> None:
    """Copy the files of tokenizer, image processor and templates that ``folder`` does not have."""
    for file in sorted(source.iterdir()):
        is_text = file.is_file() and file.suffix in (".json", ".txt", ".model", ".jinja")
        # An index names the shards of the source, which may be cut otherwise here.
        if is_text and not (folder / file.name).exists() and not file.name.endswith(".index.json"):
            shutil.copy(file, folder / file.name)
