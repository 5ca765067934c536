"""Pairs from pictures that have an alpha channel."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from covray.pairs.manifest import Pair, Picture
from covray.pairs.sources import draw
from covray_matting.task import render


def cutouts(root: str, *, split: str, count: int | None, seed: int) -> Iterator[Pair]:
    """Yield a pair for each PNG in the folder of the split: the picture, and its alpha channel as the label."""
    names = [path.name for path in Path(root, split).glob("*.png")]
    for name in draw(names, count, seed):
        alpha = np.asarray(Image.open(Path(root, split, name)).convert("RGBA"))[..., 3] / 255
        label = io.BytesIO()
        Image.fromarray(render(alpha)).save(label, "PNG")
        yield Pair("matting", split, Picture(uri=f"{split}/{name}"), Picture(bytes=label.getvalue()))
