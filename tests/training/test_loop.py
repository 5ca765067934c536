"""The loop: the same curve however often it is stopped, however many workers share a step."""

from __future__ import annotations

import json
import math
import multiprocessing
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from covray.config import TrainConfig
from covray.errors import ConfigError
from covray.training.loop import Place, Wish, train
from covray.training.state import read_records
from tests.training.conftest import STEPS

TIMED = ("seconds", "tokens_per_s", "memory_bytes")


def curve(config: TrainConfig) -> list[dict[str, Any]]:
    """All that must be the same in two runs."""
    records = read_records(f"{config.out}/metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in TIMED} for record in records]


def test_it_learns(tiny_config: Callable[..., TrainConfig]) -> None:
    config = tiny_config(optimizer__steps=40, validate_every_steps=40)
    result = train(config)
    assert result is not None
    losses = [record["loss"] for record in curve(config) if "loss" in record]
    assert losses[-1] < losses[0] - 0.3
