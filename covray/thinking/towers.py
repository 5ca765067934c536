"""Vision towers of ThinkDiff-CLIP: that of a CLIP or a BLIP-2 folder, without the rest of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, Blip2VisionModel, CLIPVisionModel

from covray.config.vlm import VlmModelConfig
from covray.errors import ConfigError, WeightsError, one_line
from covray.io.model_folders import fingerprint_folder, require_files, resolve_folder
from covray.io.tensor_files import read_all_tensors, require_tensors, weight_files
from covray.models.vlm.prompts import require_proportions
from covray.thinking.features import patch_features

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
_PROCESSOR = "preprocessor_config.json"
_FILES = (_CONFIG, _WEIGHTS, "model-*-of-*.safetensors", _INDEX, _PROCESSOR)
_PREFIX = "vision_model."
_CLASSES = {
    "clip": CLIPVisionModel,
    "clip_vision_model": CLIPVisionModel,
    "blip-2": Blip2VisionModel,
}


@dataclass(frozen=True)
class TowerFacts:
    """What is known of a tower before its weights are loaded."""

    folder: Path
    config: Any
    """Of the tower, by transformers."""
    kind: str
    """``model_type`` of the folder."""
    fingerprint: str
    """SHA-256 (hex) of configuration, weights and image processor."""

    @property
    def width(self) -> int:
        """Numbers of a feature."""
        return int(self.config.hidden_size)

    def count(self, factor: int) -> int:
        """Return the features of a picture whose grid is made ``factor`` times smaller on each side.

        Raises:
            ConfigError: Nothing is left of the grid.
        """
        return pooled_count(int(self.config.image_size // self.config.patch_size), factor)


def tower_facts(config: VlmModelConfig) -> TowerFacts:
    """Find a tower, check its folder and fingerprint it.

    Raises:
        WeightsError: The folder is incomplete, or of a kind that is not supported.
    """
    folder = resolve_folder(config.path, config.revision, "clip", _FILES)
    require_files(folder, [_CONFIG, (_WEIGHTS, _INDEX), _PROCESSOR])
    try:
        loaded = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{folder}: {_CONFIG} cannot be read ({one_line(error)}); get the folder again") from error
    if loaded.model_type not in _CLASSES:
        raise WeightsError(f"{folder}: is of type {loaded.model_type}; give one of {', '.join(_CLASSES)}")
    # A whole model has its tower's configuration inside; that of a tower's own folder is the tower's.
    vision = getattr(loaded, "vision_config", loaded)
    return TowerFacts(folder, vision, loaded.model_type, fingerprint_folder(folder, _FILES))


class Tower:
    """A vision tower ready for use."""

    def __init__(self, facts: TowerFacts, dtype: torch.dtype, device: torch.device):
        """Load the tower's own tensors of the folder.

        Raises:
            WeightsError: Tensors are missing or cannot be read.
        """
        self.facts = facts
        network = _CLASSES[facts.kind]
        try:
            # Names and shapes alone, to refuse a wrong folder before a second copy of the weights is made.
            with torch.device("meta"):
                shapes = network(facts.config).state_dict()
            tensors = _of_tower(read_all_tensors(weight_files(facts.folder, (_WEIGHTS, _INDEX))), shapes)
            expected = {name: tuple(tensor.shape) for name, tensor in shapes.items()}
            require_tensors(facts.folder, {name: tuple(own.shape) for name, own in tensors.items()}, expected)
            model = network(facts.config)
            model.load_state_dict(tensors)
            self._processor = AutoImageProcessor.from_pretrained(
                facts.folder, backend="pil", trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            raise WeightsError(f"{facts.folder}: cannot be loaded ({one_line(error)}); get it again") from error
        self._model = model.to(device, dtype).requires_grad_(False).eval()
        self._device, self._dtype = device, dtype

    def features(self, pictures: Sequence[NDArray[np.uint8]], factor: int) -> Tensor:
        """Return the pooled features of pictures, [B, n, width]; see ``patch_features``.

        Args:
            pictures: uint8 [h, w, 3] each.
            factor: How many times smaller the grid of patches is made, on each side.

        Raises:
            PairError: See ``require_proportions``.
        """
        for picture in pictures:
            require_proportions(picture)
        images = [Image.fromarray(picture) for picture in pictures]
        pixels = self._processor(images, return_tensors="pt")["pixel_values"]
        return patch_features(self._model, pixels.to(self._device, self._dtype), factor)


def pooled_count(side: int, factor: int) -> int:
    """Return the features of a picture: a class token, and a grid of patches that is made smaller.

    Args:
        side: Patches on a side of the grid.
        factor: How many times smaller the grid is made, on each side.

    Raises:
        ConfigError: Nothing is left of the grid.
    """
    if factor > side:
        raise ConfigError(f"patches: {side} patches on a side cannot be made {factor} times fewer; give at most {side}")
    return 1 + (side // factor) ** 2


def _of_tower(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a tower by the names of its own class, from a whole model's file or its own."""
    own = {}
    # A whole CLIP or BLIP-2 has hundreds of tensors beside the tower's; they are left out, not refused.
    for name, tensor in tensors.items():
        inner = name.removeprefix(_PREFIX)
        if inner in expected:
            own[inner] = tensor
    return own
