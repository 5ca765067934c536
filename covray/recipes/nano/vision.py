"""The vision tower of the nano vision-language model learns by itself what portraits show.

Captions and questions teach objects and textures slowly: few of their tokens depend on them, and most of a step's time
goes into the language model. Here the tower alone learns them from the judge's labels, as the towers of large models
are trained before they are joined to a language model. The heads that it is trained with are not kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from covray.io.tensor_files import new_folder
from covray.models.vlm.adapter import copy_texts
from covray.pairs.scenes.portraits import HELD_OUT_SPLIT
from covray.recipes.nano.judge import UNKNOWN, accuracies, described, labelled
from covray.recipes.nano.loop import Run, muon_and_adamw, train
from covray.recipes.nano.lvm import ADAMW_RATE, MUON_RATE
from covray.recipes.nano.portrait_data import read_portraits
from covray.thinking.episodes import PORTRAITS, VALUES

BATCH = 64
_MEASURED = 1000
"""Pictures of a split, at most, that are measured at every save."""


class Looks(nn.Module):
    """A vision tower, and logits of details and objects from the mean of a picture's tokens."""

    def __init__(self, tower: Any):
        """Add random heads to ``tower``."""
        super().__init__()
        self.tower = tower
        width = tower.config.out_hidden_size
        self.heads = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, len(PORTRAITS) * 2 * VALUES)
        )

    def forward(self, pixels: Tensor, grids: Tensor) -> Tensor:
        """Return logits [n, themes, 2 sides, 10] of n pictures of one size, as the image processor returns them."""
        tokens = self.tower(pixels, grids).pooler_output
        logits: Tensor = self.heads(tokens.unflatten(0, (len(grids), -1)).mean(1))
        return logits.unflatten(-1, (len(PORTRAITS), 2, VALUES))


def train_vision(run: Run, manifest: Path, begun_from: Path, ended: Path) -> None:
    """Train the vision tower of a model and save the model with it.

    Args:
        run: The training.
        manifest: Portraits; those of one solid are learned.
        begun_from: Folder of the model to start from, as transformers writes it.
        ended: The folder to write.
    """
    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(begun_from, use_safetensors=True).float()
    processor = Qwen2VLImageProcessorPil.from_pretrained(begun_from)
    parts = read_portraits(manifest)
    single, labels = labelled(parts["train"])
    learned = torch.from_numpy(parts["train"].pictures[single])
    torch.manual_seed(run.seed)

    def loss_of(looks: Any, _: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(learned), (BATCH,), generator=generator)
        # A mirrored portrait has the same labels.
        mirrored = torch.rand(BATCH, generator=generator) < 0.5
        pictures = torch.where(mirrored[:, None, None, None], learned[index].flip(2), learned[index])
        logits = looks(**_read(processor, pictures, run.device)).float()
        return F.cross_entropy(logits.flatten(0, 2), labels[index].flatten().to(run.device), ignore_index=UNKNOWN)

    def optimizers(looks: Any) -> list[torch.optim.Optimizer]:
        return muon_and_adamw(looks, looks.tower.blocks, MUON_RATE, ADAMW_RATE)

    def right(looks: Any, split: str) -> str:
        # Of the test split only the held-out cells count: nothing else is new there.
        some, asked = labelled(parts[split], split == HELD_OUT_SPLIT)
        pictures = torch.from_numpy(parts[split].pictures[some[:_MEASURED]])
        return described(
            accuracies(lambda batch: looks(**_read(processor, batch, run.device)), pictures, asked[:_MEASURED])
        )

    looks = train(
        Looks(model.model.visual), loss_of, run, measure=lambda average: right(average, "val"), optimizers=optimizers
    )
    print(f"{run.name}: held-out cells, {right(looks, HELD_OUT_SPLIT)}", flush=True)
    model.model.visual.load_state_dict(looks.tower.state_dict())
    with new_folder(ended) as folder:
        model.half().save_pretrained(folder)
        copy_texts(begun_from, folder)


def _read(processor: Any, pictures: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Return pictures as ``Looks`` reads them."""
    read = processor(images=list(pictures.numpy()), return_tensors="pt").to(device)
    return {"pixels": read["pixel_values"], "grids": read["image_grid_thw"]}
