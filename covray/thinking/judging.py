"""Judges of drawn answers: which detail and which object of a theme a picture shows.

nano    covray's own judge of portraits, two heads a theme
clip    the caption that is nearest to the picture among the theme's hundred (CoBSAT's second score)
vlm     two questions of ten options to a vision-language model (CoBSAT's first score, there LLaVA-1.5)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel

from covray.config.think import JudgeConfig, ThoughtConfig
from covray.config.vlm import VlmModelConfig
from covray.errors import WeightsError, one_line
from covray.io.model_folders import fingerprint_folder, require_files, require_whole, resolve_folder
from covray.models.vlm.checkpoint import LoadedVlm, load_vlm, vlm_facts
from covray.thinking.episodes import Cell, Theme
from covray.thinking.features import write_text
from covray.thinking.judge import WEIGHTS as NANO_WEIGHTS
from covray.thinking.judge import JudgeRecord
from covray.thinking.judge import load_judge as load_nano_judge

_CLIP_FILES = ("*.json", "*.safetensors", "merges.txt", "vocab.txt")
_CLIP_NEEDED = ("config.json", "model.safetensors", "preprocessor_config.json")
_LETTERS = 8
"""Tokens of an answer to a question, at most."""


class Judge(Protocol):
    """What judges pictures."""

    def choose(self, theme: Theme, pictures: Sequence[NDArray[np.uint8]]) -> Sequence[Cell | None]:
        """Return what each picture shows; None where no choice can be read.

        Args:
            theme: The theme whose values are the options.
            pictures: uint8 [h, w, 3] each.
        """


def judge_fingerprint(config: JudgeConfig) -> str:
    """Return the fingerprint (SHA-256, hex) of a judge's model, after all checks that need no weights.

    Raises:
        WeightsError: The folder is missing or incomplete.
    """
    if config.kind == "vlm":
        return vlm_facts(_vlm(config)).fingerprint
    folder = _folder(config)
    return fingerprint_folder(folder, _files(config))


def load_judge(config: JudgeConfig, device: torch.device) -> Judge:
    """Load a judge.

    Raises:
        WeightsError: Its folder is missing, incomplete or of another kind.
    """
    if config.kind == "vlm":
        return VlmJudge(load_vlm(vlm_facts(_vlm(config)), _dtype(device), device))
    folder = _folder(config)
    return load_nano_judge(folder, device) if config.kind == "nano" else ClipJudge(folder, device)


class ClipJudge:
    """A CLIP that compares a picture with a caption of every cell."""

    def __init__(self, folder: Path, device: torch.device):
        """Load the model. Raises WeightsError."""
        try:
            loaded = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            if loaded.model_type != "clip":
                raise WeightsError(f"{folder}: is of type {loaded.model_type}; give a CLIP")
            model, report = CLIPModel.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
            self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            self._processor = AutoImageProcessor.from_pretrained(
                folder, backend="pil", trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise WeightsError(f"{folder}: cannot be loaded ({one_line(error)}); get the folder again") from error
        require_whole(folder, report)
        self._model: Any = model.to(device).requires_grad_(False).eval()
        self._device = device
        self._texts: dict[str, Tensor] = {}

    @torch.no_grad()
    def choose(self, theme: Theme, pictures: Sequence[NDArray[np.uint8]]) -> list[Cell]:
        """See ``Judge``."""
        cells = [Cell(detail, thing) for detail in theme.details for thing in theme.objects]
        texts = self._text_features(theme, cells)
        chosen = []
        for picture in pictures:
            pixels = self._processor([Image.fromarray(picture)], return_tensors="pt")["pixel_values"]
            features = _normed(self._model.get_image_features(pixel_values=pixels.to(self._device)))
            chosen.append(cells[int((features @ texts.T).argmax())])
        return chosen

    def _text_features(self, theme: Theme, cells: Sequence[Cell]) -> Tensor:
        """Return the features of the captions of all cells, [100, width]."""
        if theme.name not in self._texts:
            captions = [f"{theme.word(cell.detail)} {theme.word(cell.object)}" for cell in cells]
            tokens = self._tokenizer(captions, padding=True, truncation=True, return_tensors="pt").to(self._device)
            features = self._model.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"])
            self._texts[theme.name] = _normed(features)
        return self._texts[theme.name]


class VlmJudge:
    """A vision-language model that is asked for the detail, then for the object."""

    def __init__(self, vlm: LoadedVlm):
        """Take a loaded model."""
        self._vlm = vlm
        self._greedy = ThoughtConfig(max_tokens=_LETTERS, temperature=0.0)

    def choose(self, theme: Theme, pictures: Sequence[NDArray[np.uint8]]) -> list[Cell | None]:
        """See ``Judge``."""
        chosen: list[Cell | None] = []
        for picture in pictures:
            detail = self._ask(picture, f"What is the {theme.name} of the picture?", theme, theme.details)
            thing = self._ask(picture, f"What is the main {theme.object_kind}?", theme, theme.objects)
            # What no picture can be, so that a side that was read still counts for itself.
            chosen.append(Cell(detail or "", thing or ""))
        return chosen

    def _ask(self, picture: NDArray[np.uint8], question: str, theme: Theme, values: Sequence[str]) -> str | None:
        """Return the value that the model names by its number; None where the answer has no number of an option."""
        options = "\n".join(f"({number}) {theme.word(value)}" for number, value in enumerate(values, 1))
        text = f"{question}\n{options}\nAnswer with the number of one option."
        ids = write_text(self._vlm, self._vlm.prompter.prompt([picture], text), self._greedy)
        # Models answer "(3)", "3." or "Option 3".
        digits = re.sub(r"\D", "", self._vlm.prompter.text(ids.tolist()))
        number = int(digits) if digits else 0
        return values[number - 1] if 1 <= number <= len(values) else None


def _normed(features: Any) -> Tensor:
    """Return CLIP's features, of length 1 each; transformers 5 returns them in an output."""
    tensor: Tensor = getattr(features, "pooler_output", features)
    return tensor / tensor.norm(dim=-1, keepdim=True)


def _vlm(config: JudgeConfig) -> VlmModelConfig:
    assert config.path is not None  # the configuration asks for it
    return VlmModelConfig(path=config.path, revision=config.revision)


def _folder(config: JudgeConfig) -> Path:
    name = "judge" if config.kind == "nano" else "clip"
    folder = resolve_folder(config.path or "nano", config.revision, name, _CLIP_FILES)
    require_files(folder, (JudgeRecord.FILE, NANO_WEIGHTS) if config.kind == "nano" else _CLIP_NEEDED)
    return folder


def _files(config: JudgeConfig) -> Sequence[str]:
    return (JudgeRecord.FILE, NANO_WEIGHTS) if config.kind == "nano" else _CLIP_FILES


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32
