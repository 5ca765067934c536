"""The device that networks run on, and the type that they compute in."""

from __future__ import annotations

from typing import Protocol

import torch

from covray.errors import ConfigError


class Engine(Protocol):
    """What a configuration says of the device, as ``covray.config.EngineConfig`` does."""

    @property
    def device(self) -> str:
        """``auto``, ``cpu`` or ``cuda``."""

    @property
    def dtype(self) -> str:
        """``auto``, ``float32`` or ``bfloat16``."""


def choose_device(wanted: str, field: str) -> torch.device:
    """Return the device ``wanted``: ``cpu``, ``cuda``, or ``auto``, which takes the GPU if there is one.

    Raises ConfigError, naming the ``field`` of the configuration or the option, for a GPU that torch does not see.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ConfigError(f"{field}: is cuda, but torch sees no GPU; set auto or cpu")
    return torch.device("cuda" if wanted != "cpu" and available else "cpu")


def resolve_device(engine: Engine) -> tuple[torch.device, torch.dtype]:
    """Return the device of ``engine`` and the type of its arithmetic; ``auto`` is bfloat16 on a GPU, else float32.

    Raises ConfigError for a GPU that torch does not see.
    """
    device = choose_device(engine.device, "engine.device")
    dtype = engine.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return device, torch.bfloat16 if dtype == "bfloat16" else torch.float32
