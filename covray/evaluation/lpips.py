"""LPIPS on AlexNet (Zhang et al. 2018), where its weights are installed; they are never downloaded."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from covray.errors import WeightsError, one_line
from covray.io.tensor_files import read_tensors

ALEXNET = "alexnet-owt-7be5be79.pth"
"""The file of torchvision's AlexNet trained on ImageNet; its name ends in the beginning of its SHA-256."""


class _Convolution(NamedTuple):
    """A layer of AlexNet whose features are compared."""

    number: int
    """Of the layer in torchvision's ``features``."""
    stride: int
    padding: int
    pooled: bool
    """Whether the features before it are pooled."""


_LAYERS = (
    _Convolution(0, 4, 2, False),
    _Convolution(3, 1, 2, True),
    _Convolution(6, 1, 1, True),
    _Convolution(8, 1, 1, False),
    _Convolution(10, 1, 1, False),
)
LEAST_PX = 31
"""Side of the smallest picture of which something is left after the last pooling."""
_LINEAR = Path(__file__).parents[1] / "assets" / "lpips" / "alex.safetensors"
"""The weights of each layer's features, version 0.1 of the reference implementation."""
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Mean and deviation of the pixels of ImageNet by channel, in [-1, 1]; the values of the reference implementation."""


class Lpips:
    """The distance of two pictures, 0 for equal ones; ``load_lpips`` makes one."""

    def __init__(self, convolutions: list[tuple[Tensor, Tensor]], weights: list[Tensor]):
        """Use the kernels and biases of ``_LAYERS``, and the weight [1, channels, 1, 1] of each layer's features."""
        self._convolutions, self._weights = convolutions, weights

    @torch.inference_mode()
    def __call__(self, first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
        """Return the distance of two pictures uint8 [h, w, 3] of one size, at least ``LEAST_PX``."""
        # Both pictures in one batch of two, in [-1, 1].
        pixels = torch.from_numpy(np.stack([first, second])).permute(0, 3, 1, 2).float() / 127.5 - 1
        shift = torch.tensor(_SHIFT).view(1, 3, 1, 1)
        scale = torch.tensor(_SCALE).view(1, 3, 1, 1)

        total = 0.0
        for features, weight in zip(self._features((pixels - shift) / scale), self._weights, strict=True):
            # Equation 1 of the paper: features of unit length over the channels, their difference weighted by channel,
            # and the mean over places.
            unit = features / torch.sqrt(1e-8 + features.square().sum(1, keepdim=True))
            total += float(F.conv2d((unit[:1] - unit[1:]).square(), weight).mean())
        return total

    def _features(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the features of every layer of pixels [n, 3, h, w]."""
        for (kernel, bias), layer in zip(self._convolutions, _LAYERS, strict=True):
            if layer.pooled:
                x = F.max_pool2d(x, 3, 2)
            x = F.relu(F.conv2d(x, kernel, bias, layer.stride, layer.padding))
            yield x


def find_alexnet() -> Path | None:
    """Return AlexNet's weights where torchvision keeps what it downloads; None if they are not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    if path.is_file():
        return path
    return None


def load_lpips(path: Path) -> Lpips:
    """Return LPIPS with the AlexNet of ``path`` and the linear weights that covray ships (assets/lpips).

    Raises:
        WeightsError: The file is not what its name says, or is not torchvision's AlexNet.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; give {ALEXNET} of torchvision")
    linear = load_file(_LINEAR)
    weights = [linear[f"lin{number}.model.1.weight"] for number in range(len(_LAYERS))]
    try:
        # The file's own name says its digest; under another name the tensors alone decide.
        if path.name == ALEXNET and hashlib.sha256(path.read_bytes()).hexdigest()[:8] != "7be5be79":
            raise WeightsError(f"{path}: is damaged, its SHA-256 is not that of its name; get it again")
        trunk = read_tensors(path)
        convolutions = []
        for layer in _LAYERS:
            name = f"features.{layer.number}"
            convolutions.append((trunk[f"{name}.weight"], trunk[f"{name}.bias"]))
        lpips = Lpips(convolutions, weights)
        # Computed once: shapes or types that do not fit must not show in the midst of an evaluation.
        black = np.zeros((LEAST_PX, LEAST_PX, 3), np.uint8)
        is_finite = math.isfinite(lpips(black, black))
    except (OSError, KeyError, RuntimeError) as error:
        raise WeightsError(f"{path}: is not torchvision's AlexNet ({one_line(error)}); give {ALEXNET}") from error
    if not is_finite:
        raise WeightsError(f"{path}: holds values that are not finite; give {ALEXNET}")
    return lpips
