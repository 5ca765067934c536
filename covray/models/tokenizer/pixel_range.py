"""Tell a VQGAN of pixels in [-1, 1] from one of [0, 1], where its folder does not say which it is.

A picture is encoded and decoded in both ways. A tokenizer of [0, 1] that reads [-1, 1] gets dark pixels that it never
saw, and loses 10 dB and more. One of [-1, 1] that reads [0, 1] sees the picture pale, at half its contrast, and loses
2 to 8 dB, because its error then counts twice. Untrained weights return grey in both ways, under 12 dB.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from covray.errors import WeightsError
from covray.io.pixels import psnr

if TYPE_CHECKING:
    import diffusers

_LEAST_DB = 15.0
"""A tokenizer that returns the picture worse than this, in the better way, returns nothing that could be compared."""
_CLEARLY_DB = 1.0
_LEAST_PX = 64
_LEAST_TOKENS = 4  # a side
_WAVES = 2
"""Highest frequency of the picture, in waves a side: what every trained tokenizer can write."""


def require_unsigned(model: diffusers.VQModel, downsampling: int, folder: Path) -> None:
    """Refuse a tokenizer whose pictures come back better when they are read as [-1, 1].

    Args:
        model: The tokenizer, on its device, in float32.
        downsampling: Pixels a side of a token.
        folder: Where it is from, which states no range.

    Raises:
        WeightsError: It is one of [-1, 1]. The message says how the range is stated.
    """
    picture = _picture(max(_LEAST_PX, _LEAST_TOKENS * downsampling))
    unsigned_db = psnr(_reconstructed(model, picture, low=0), picture)
    signed_db = psnr(_reconstructed(model, picture, low=-1), picture)
    if signed_db >= _LEAST_DB and signed_db > unsigned_db + _CLEARLY_DB:
        raise WeightsError(
            f"{folder}: is trained on pixels in [-1, 1], as a picture shows that comes back at {signed_db:.1f} dB, and "
            f'at {unsigned_db:.1f} dB in [0, 1]; write {{"version": 1, "pixels": [-1, 1]}} to its covray.json'
        )


def _picture(size_px: int) -> NDArray[np.uint8]:
    """Return a soft coloured picture of full contrast, uint8 ``[size_px, size_px, 3]``."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size_px, :size_px] / size_px

    def waves() -> NDArray[np.float64]:
        total = np.zeros_like(x)
        for down in range(_WAVES + 1):
            for across in range(-_WAVES, _WAVES + 1):
                if down or across:
                    phase = 2 * np.pi * (across * x + down * y + rng.uniform())
                    # Weaker where the frequency is higher, as in photographs.
                    total += rng.normal() * np.cos(phase) / np.hypot(across, down)
        return (total - total.mean()) / total.std()

    grey = waves()
    channels = np.stack([grey + 0.2 * waves() for _ in range(3)], axis=-1)
    return np.rint(255 * np.clip(0.5 + channels / 3.2, 0, 1)).astype(np.uint8)


@torch.inference_mode()
def _reconstructed(model: diffusers.VQModel, picture: NDArray[np.uint8], low: float) -> NDArray[np.uint8]:
    """Return ``picture`` from tokens, with pixels in [low, 1]."""
    unit = torch.from_numpy(picture).permute(2, 0, 1)[None].to(model.device).float() / 255
    codes, _, _ = model.quantize(model.encode(low + (1 - low) * unit).latents)
    pixels = model.decoder(model.post_quant_conv(codes), codes if model.config.norm_type == "spatial" else None)
    levels = ((pixels - low) / (1 - low)).clamp(0, 1).mul(255).round().to(torch.uint8)
    reconstructed: NDArray[np.uint8] = levels[0].permute(1, 2, 0).cpu().numpy()
    return reconstructed
