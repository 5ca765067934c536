"""The nano parts that the programme stands on: trained where they are missing, then loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPModel

from covray.config import EngineConfig
from covray.config.think import LanguageModelConfig, PainterConfig
from covray.config.vlm import VlmModelConfig
from covray.models.aligner.language import LanguageModel, load_language_model
from covray.models.vlm.checkpoint import LoadedVlm, load_vlm, vlm_facts
from covray.recipes.nano.painter import CaptionEncoder
from covray.recipes.nano.recipe import train_model
from covray.recipes.thinking.budget import Budget
from covray.thinking.judge import Judge, load_judge
from covray.thinking.unet_painter import UnetPainter, load_unet_painter

PARTS = ("judge", "text", "painter", "vlm", "clip")
"""In the order in which they are trained: what the others are measured with comes first."""


@dataclass(frozen=True)
class Family:
    """The trained nano parts."""

    folder: Path
    vlm: LoadedVlm
    vlm_fingerprint: str
    language: LanguageModel
    encoder: CaptionEncoder
    """The language model's encoder alone, for captions."""
    painter: UnetPainter
    tower: Any
    """The picture tower of the nano CLIP."""
    judge: Judge
    device: torch.device

    @property
    def vlm_width(self) -> int:
        """Width of the vision-language model's states."""
        return int(self.vlm.model.model.config.get_text_config().hidden_size)


def train_family(folder: Path, budget: Budget, threads: int, device: torch.device, seed: int) -> None:
    """Train the nano parts that ``folder`` does not have yet; a killed training continues."""
    for part in PARTS:
        # A part's folder is renamed into place once it is whole: one that is there is trained.
        if not (folder / part).is_dir():
            train_model(part, folder, budget.steps.get(part), budget.portraits, threads, device.type, seed)


def load_family(folder: Path, budget: Budget, threads: int, device: torch.device) -> Family:
    """Load the nano parts of ``folder``. Raises WeightsError."""
    facts = vlm_facts(VlmModelConfig(path=str(folder / "vlm")))
    drawing = PainterConfig(
        kind="unet", path=str(folder / "painter"), steps=budget.painter_steps, guidance=budget.guidance
    )
    towers: Any = CLIPModel.from_pretrained(folder / "clip", use_safetensors=True)
    return Family(
        folder=folder,
        vlm=load_vlm(facts, torch.float32, device),
        vlm_fingerprint=facts.fingerprint,
        language=load_language_model(LanguageModelConfig(path=str(folder / "text")), torch.float32, device),
        encoder=CaptionEncoder(folder / "text", device),
        painter=load_unet_painter(drawing, EngineConfig(device=device.type, threads=threads), verify=False),
        tower=towers.vision_model.float().to(device).requires_grad_(False).eval(),
        judge=load_judge(folder / "judge", device),
        device=device,
    )
