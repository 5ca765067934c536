"""Texts that the vision-language model writes, with their states and their prompts' states, kept in files.

Texts are written in batches and read once more for their states: any engine may write them
(``covray.thinking.features``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from covray.config.vlm import VlmDecodingConfig
from covray.models.vlm.checkpoint import LoadedVlm
from covray.models.vlm.decoding import decode
from covray.models.vlm.prompts import Prompt
from covray.thinking.features import read_features, unwritten_ids

SAMPLING = VlmDecodingConfig(decoder="autoregressive", temperature=0.6, top_p=0.9, max_tokens=80)
"""The paper's temperature and top_p."""
BATCH = 32


@dataclass(frozen=True)
class Thoughts:
    """Texts with states; the lists are of one length."""

    ids: list[NDArray[np.int64]]
    """Of each text, without its end, [N]."""
    texts: list[str]
    generated: list[Tensor]
    """States that the text's tokens were sampled from, float32 [N, width]."""
    read: list[Tensor]
    """States of the prompt's tokens, float32 [P, width]."""

    def chosen(self, numbers: Sequence[int]) -> Thoughts:
        """Return those of the given numbers."""
        chosen = Thoughts([], [], [], [])
        for number in numbers:
            chosen.ids.append(self.ids[number])
            chosen.texts.append(self.texts[number])
            chosen.generated.append(self.generated[number])
            chosen.read.append(self.read[number])
        return chosen


def joined(blocks: Sequence[Thoughts]) -> Thoughts:
    """Return the thoughts of all blocks, in order."""
    whole = Thoughts([], [], [], [])
    for block in blocks:
        whole.ids.extend(block.ids)
        whole.texts.extend(block.texts)
        whole.generated.extend(block.generated)
        whole.read.extend(block.read)
    return whole


def kept_thoughts(file: Path, vlm: LoadedVlm, prompts: Callable[[], Sequence[Prompt]]) -> Thoughts:
    """Return the thoughts of some prompts, from ``file`` if it is there.

    Args:
        file: A safetensors file; states are kept in fp16.
        vlm: The model.
        prompts: Makes the prompts, where they are needed.
    """
    if not file.exists():
        # Written aside and renamed, so that a kill leaves no half file.
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(".part")
        save_file(_think(vlm, prompts()), aside)
        os.replace(aside, file)
    kept = load_file(file)
    # The file holds texts and prompts end to end; their lengths cut them apart.
    lengths = kept["lengths"].tolist()
    ids, generated = kept["ids"].split(lengths), kept["generated"].split(lengths)
    read = kept["read"].split(kept["prompts"].tolist())
    thoughts = Thoughts([], [], [], [])
    for own_ids, own_generated, own_read in zip(ids, generated, read, strict=True):
        thoughts.ids.append(own_ids.numpy())
        thoughts.texts.append(vlm.prompter.text(own_ids.tolist()))
        thoughts.generated.append(own_generated.float())
        thoughts.read.append(own_read.float())
    return thoughts


def _think(vlm: LoadedVlm, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    never = set(unwritten_ids(vlm))
    ids: list[NDArray[np.int64]] = []
    generated: list[Tensor] = []
    read: list[Tensor] = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        written = []
        for answer in decode(vlm, part, SAMPLING, None):
            # An unfinished model may write a placeholder of a picture, which a second pass would look for.
            tokens = [token for token in answer.ids if token not in never]
            written.append(np.array(tokens, np.int64))
        ids += written
        for states in read_features(vlm, part, written):
            generated.append(states.half().cpu())
        for states in read_features(vlm, part, written, "prompt"):
            read.append(states.half().cpu())
    return {
        "ids": torch.from_numpy(np.concatenate(ids)),
        "lengths": torch.tensor(list(map(len, ids))),
        "prompts": torch.tensor(list(map(len, read))),
        "generated": torch.cat(generated),
        "read": torch.cat(read),
    }
