"""A judge of portraits: a small network that tells the detail and the object of a theme, two heads a theme.

It stands where CoBSAT asks LLaVA two questions of ten options (arXiv:2402.01293). Its rule is CoBSAT's too, and is in
``covray.thinking.episodes``: an answer counts if both sides are right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from covray.errors import WeightsError
from covray.io.model_folders import fingerprint_folder
from covray.io.records import Record
from covray.io.tensor_files import new_folder, read_tensors, require_finite, require_tensors
from covray.thinking.episodes import VALUES, Cell, Theme

WEIGHTS = "judge.safetensors"
SIDES = 2
"""Heads of a theme: detail, object."""
_GROUPS = 8
"""Of the group norms: they divide the channels of every level."""
_GRID = 4
"""The last features are pooled to this many cells a side: where something is matters for arrangements."""


class JudgeRecord(Record):
    """The JSON file of a judge's folder."""

    FILE = "judge.json"
    FIX = "train it again: covray nano train judge"
    ERROR = WeightsError

    size_px: int
    """Side of the pictures."""
    widths: list[int]
    """Channels of its levels, each of half the size of the one before."""
    details: dict[str, list[str]]
    """By theme."""
    objects: dict[str, list[str]]
    """By theme."""


class _Level(nn.Module):
    """Halve the size, then a residual block."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.down = nn.Conv2d(inputs, width, 3, stride=2, padding=1)
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.GroupNorm(_GROUPS, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, s, s] -> [B, width, s / 2, s / 2]."""
        x = F.silu(self.norms[0](self.down(x)))
        inner = F.silu(self.norms[1](self.first(x)))
        return F.silu(x + self.norms[2](self.second(inner)))


class JudgeNetwork(nn.Module):
    """Convolutions with two heads of ten values for each theme."""

    def __init__(self, themes: int, widths: Sequence[int]):
        """Make an untrained network.

        Args:
            themes: How many.
            widths: Channels of its levels.
        """
        super().__init__()
        self.themes = themes
        inputs = (3, *widths[:-1])
        self.levels = nn.ModuleList(_Level(before, width) for before, width in zip(inputs, widths, strict=True))
        self.hidden = nn.Linear(widths[-1] * _GRID**2, 2 * widths[-1])
        self.heads = nn.Linear(2 * widths[-1], themes * SIDES * VALUES)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1], [B, 3, s, s] -> logits [B, themes, 2 sides, 10 values]."""
        x = pixels * 2 - 1
        for level in self.levels:
            x = level(x)
        x = F.silu(self.hidden(F.adaptive_avg_pool2d(x, _GRID).flatten(1)))
        return self.heads(x).unflatten(1, (self.themes, SIDES, VALUES))


@dataclass(frozen=True)
class Judge:
    """A trained judge."""

    network: JudgeNetwork
    record: JudgeRecord
    fingerprint: str
    """SHA-256 (hex) of its folder."""

    @torch.inference_mode()
    def choose(self, theme: Theme, pictures: Sequence[NDArray[np.uint8]], batch: int = 64) -> list[Cell]:
        """Return the detail and the object that the judge sees in each picture.

        Args:
            theme: Which theme's heads are asked.
            pictures: uint8 [h, w, 3] each, all of one size.
            batch: Pictures at a time.

        Raises:
            WeightsError: The judge does not know the theme, or the pictures are of another size.
        """
        # Heads stand in the order of the record's themes.
        record = self.record
        names = list(record.details)
        if theme.name not in names:
            raise WeightsError(f"theme {theme.name}: the judge knows {', '.join(names)}; give a judge of this theme")
        number = names.index(theme.name)
        details, objects = record.details[theme.name], record.objects[theme.name]
        device = next(self.network.parameters()).device
        cells = []
        for start in range(0, len(pictures), batch):
            pixels = torch.from_numpy(np.stack(pictures[start : start + batch])).to(device)
            if pixels.shape[1:] != (record.size_px, record.size_px, 3):
                size = "x".join(map(str, pixels.shape[1:3]))
                raise WeightsError(f"pictures of {size} px: the judge reads {record.size_px}; draw them at its size")
            # [B, themes, 2 sides, values] -> the sides of this theme.
            logits = self.network(pixels.permute(0, 3, 1, 2).float() / 255)[:, number]
            for detail, thing in logits.argmax(-1).tolist():
                cells.append(Cell(details[detail], objects[thing]))
        return cells


def save_judge(out: Path, network: JudgeNetwork, record: JudgeRecord) -> None:
    """Write the folder of a judge, whole or not at all. Raises ConfigError for an ``out`` that exists."""
    with new_folder(out) as draft:
        tensors = {name: tensor.detach().half().cpu().contiguous() for name, tensor in network.state_dict().items()}
        save_file(tensors, draft / WEIGHTS)
        record.write(str(draft))


def load_judge(folder: Path, device: torch.device) -> Judge:
    """Return the judge of a folder, in float32 on ``device``.

    Raises:
        WeightsError: A file is missing, cannot be read, or does not fit the other.
    """
    record = JudgeRecord.read(str(folder))
    _require_judge(folder, record)
    # Without memory: sizes are the file's word until its tensors are known to have them.
    with torch.device("meta"):
        network = JudgeNetwork(len(record.details), record.widths)
    file = folder / WEIGHTS
    tensors = read_tensors(file)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    stored = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    require_tensors(file, stored, expected)
    weights = {}
    for name, tensor in tensors.items():
        weights[name] = require_finite(file, name, tensor).float()  # stored in half precision
    network.load_state_dict(weights, assign=True)
    fingerprint = fingerprint_folder(folder, (JudgeRecord.FILE, WEIGHTS))
    return Judge(network.to(device).eval(), record, fingerprint)


def _require_judge(folder: Path, record: JudgeRecord) -> None:
    """Refuse a record of no judge. Raises WeightsError."""
    is_network = bool(record.widths) and all(width > 0 and width % _GROUPS == 0 for width in record.widths)
    is_named = record.details.keys() == record.objects.keys()
    for values in (*record.details.values(), *record.objects.values()):
        is_named &= len(values) == VALUES
    if not (is_network and is_named and record.details):
        raise WeightsError(
            f"{folder / JudgeRecord.FILE}: is of no judge, which has levels of {_GROUPS} channels or a multiple, and "
            f"{VALUES} details and objects a theme; {JudgeRecord.FIX}"
        )
