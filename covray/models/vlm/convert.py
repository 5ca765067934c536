"""An autoregressive vision-language model becomes one with a mask token, for block diffusion to be trained from it.

Training adds the row of a mask to a model that has none free. A folder that has it is a model of its own, whose
vocabulary other programs read without resizing it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from covray.config.section import JsonObject
from covray.config.vlm import VlmModelConfig
from covray.errors import WeightsError
from covray.io.tensor_files import new_folder, require_new
from covray.models.vlm.adapter import copy_texts
from covray.models.vlm.checkpoint import BLOCKS_FILE, blocks_file, load_vlm, vlm_facts

_SHARD = "5GB"


def convert_vlm(config: VlmModelConfig, out: str) -> JsonObject:
    """Write a checkpoint with a mask token to the folder ``out``.

    The mask's row of the embedding is the mean of all tokens' rows, as a training begins with; all other weights stay.

    Args:
        config: The checkpoint.
        out: The folder, which must not exist.

    Returns:
        The folder, the mask's id, whether the embedding got one more row for it, and what to run next.

    Raises:
        WeightsError: The checkpoint cannot be used, or has a mask already.
        ConfigError: The folder exists.
    """
    require_new(Path(out))
    facts = vlm_facts(config)
    if (facts.folder / BLOCKS_FILE).is_file():
        raise WeightsError(f"{config.path}: has mask {facts.mask_id} already; give it to covray vlm train --model")
    # In the type that the folder has: a conversion must not round a weight.
    stored = facts.config.dtype if isinstance(facts.config.dtype, torch.dtype) else torch.float32
    vlm = load_vlm(facts, stored, torch.device("cpu")).model
    with new_folder(Path(out)) as folder:
        vlm.model.save_pretrained(folder, max_shard_size=_SHARD)
        copy_texts(facts.folder, folder)
        (folder / BLOCKS_FILE).write_bytes(blocks_file(facts.mask_id, None))
    return {
        "folder": out,
        "mask_id": facts.mask_id,
        "new_row": facts.mask_id >= facts.vocabulary,
        "next": f"covray vlm train --model {out} --objective block_diffusion --data DATA --out RUN",
    }
