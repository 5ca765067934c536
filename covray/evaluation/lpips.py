"""LPIPS (Zhang et al. 2018) on AlexNet, for who has the weights: they are looked for, and never downloaded."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from covray.errors import WeightsError, one_line

ALEXNET = "alexnet-owt-7be5be79.pth"
"""The file of torchvision's AlexNet trained on ImageNet; its name has the beginning of its SHA-256."""
_LAYERS = ((0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False), (10, 1, 1, False))
"""Convolutions: number in the file, stride, padding, whether the features before are pooled."""
LEAST_PX = 31
"""Of smaller pictures nothing is left after the last pooling."""
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips:
    """Distance of two pictures uint8 [h, w, 3]: 0 for equal ones. See ``load_lpips``."""

    def __init__(self, convolutions: list[tuple[Tensor, Tensor]], weights: list[Tensor]):
        self._convolutions, self._weights = convolutions, weights

    @torch.inference_mode()
    def __call__(self, first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
        """The distance; pictures of one size, at least ``LEAST_PX``."""
        pixels = torch.from_numpy(np.stack([first, second])).permute(0, 3, 1, 2).float() / 127.5 - 1
        shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (_SHIFT, _SCALE))
        total = 0.0
        for features, weight in zip(self._features((pixels - shift) / scale), self._weights, strict=True):
            unit = features / torch.sqrt(1e-8 + features.square().sum(1, keepdim=True))
            total += float(F.conv2d((unit[:1] - unit[1:]).square(), weight).mean())
        return total

    def _features(self, x: Tensor) -> Iterator[Tensor]:
        for (kernel, bias), (_, stride, padding, pooled) in zip(self._convolutions, _LAYERS, strict=True):
            x = F.max_pool2d(x, 3, 2) if pooled else x
            x = F.relu(F.conv2d(x, kernel, bias, stride, padding))
            yield x


def find_alexnet() -> Path | None:
    """AlexNet's weights where torchvision would have put them; None where they are not."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    return path if path.is_file() else None


def load_lpips(path: Path) -> Lpips:
    """LPIPS with the AlexNet of ``path`` and the linear weights that torchmetrics carries.

    Raises WeightsError for a file that is not what its name says, or not torchvision's AlexNet.
    """
    try:
        data = path.read_bytes()
        if path.name == ALEXNET and hashlib.sha256(data).hexdigest()[:8] != "7be5be79":
            raise WeightsError(f"{path}: is damaged, its SHA-256 is not that of its name; get it again")
        trunk = _read(path)
        convolutions = [(trunk[f"features.{index}.weight"], trunk[f"features.{index}.bias"]) for index, *_ in _LAYERS]
    except (OSError, EOFError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{path}: is not torchvision's AlexNet ({one_line(error)}); give {ALEXNET}") from error
    linear = _read(Path(str(files("torchmetrics"))) / "functional" / "image" / "lpips_models" / "alex.pth")
    return Lpips(convolutions, [linear[f"lin{number}.model.1.weight"] for number in range(len(_LAYERS))])


def _read(path: Path) -> dict[str, Any]:
    tensors: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return tensors
