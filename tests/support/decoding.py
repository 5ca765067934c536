"""What the tests of every decoder decode: the same prompt and queries, greedily and with noise."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.support.backbones import CODES

TOKENS, IMAGES = 8, 3
STEPS = TOKENS * IMAGES
GREEDY: dict[str, Any] = {}
SAMPLED: list[dict[str, Any]] = [
    {"temperature": 1.0}, {"temperature": 1.0, "top_k": 30}, {"temperature": 0.8, "top_p": 0.9},
]  # fmt: skip


def ids(*shape: int, seed: int = 0) -> np.ndarray:
    """Random codes in this shape."""
    return np.random.default_rng(seed).integers(0, CODES, shape, dtype=np.uint16)


PROMPT, QUERIES = ids(40), ids(5, TOKENS, seed=1)
