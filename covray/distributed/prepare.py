"""The task of a build that feeds its actors. A module of its own: its workers are many, and load no PyTorch."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import ray

from covray.chains.prepare import BuildModels, prepare_block
from covray.config import BuildConfig


def prepare(table: pa.Table, config: BuildConfig, models: BuildModels, root: str | None, noise: Any) -> pa.Table:
    """``prepare_block``, with the index of kept noise (or None) by reference: it is large, and blocks are many."""
    return prepare_block(table, config, models, root, ray.get(noise))
