"""Recipes of nano models at a size that trains in a moment."""

from __future__ import annotations

import pytest

from covray.recipes.nano import clip, judge, painter, prior, text, vlm


def make_small(patched: pytest.MonkeyPatch) -> None:
    """Give the parts of ThinkDiff one layer and batches of four."""
    for name, value in {"TOKENIZED_PORTRAITS": 50, "WIDTH": 64, "LAYERS": 1, "INNER": 32, "VISION_WIDTH": 32}.items():
        patched.setattr(vlm, name, value)
    patched.setattr(vlm, "VISION_LAYERS", 1)
    patched.setattr(vlm, "VISION_INNER", 32)
    for name, value in {"WIDTH": 32, "LAYERS": 1, "INNER": 32, "BATCH": 4, "_VALIDATED": 4}.items():
        patched.setattr(text, name, value)
    patched.setattr(judge, "WIDTHS", (8, 16))
    patched.setattr(prior, "CHANNELS", (16, 32))
    for module in (judge, painter, clip):
        patched.setattr(module, "BATCH", 4)
    for name in ("VISION_WIDTH", "TEXT_WIDTH", "SHARED_WIDTH"):
        patched.setattr(clip, name, 16)
    patched.setattr(clip, "VISION_LAYERS", 1)
    patched.setattr(clip, "TEXT_LAYERS", 1)
