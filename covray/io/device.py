"""The device that networks run on, and the type that they compute in."""

from __future__ import annotations

from typing import Protocol

import torch

from covray.errors import ConfigError

MPS = torch.device("mps")
"""Apple's GPUs by Metal, which have no float64."""


class Engine(Protocol):
    """What a configuration says of the device, as ``covray.config.EngineConfig`` does."""

    @property
    def device(self) -> str:
        """``auto``, ``cpu``, ``cuda`` or ``mps``."""

    @property
    def dtype(self) -> str:
        """``auto``, ``float32`` or ``bfloat16``."""


def choose_device(wanted: str, field: str) -> torch.device:
    """Return the device ``wanted``: ``cpu``, ``cuda``, ``mps``, or ``auto``, which takes an NVIDIA or AMD GPU if any.

    Raises ConfigError, naming the ``field`` of the configuration or the option, for a GPU that torch does not see.
    """
    if wanted == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError(f"{field}: is mps, but torch sees no Metal GPU; set auto or cpu")
        return MPS
    available = torch.cuda.is_available()  # also of AMD's GPUs, which torch calls cuda
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


def bfloat16_units() -> str | None:
    """Return the name of the unit that makes bfloat16 faster than float32 on this CPU, or None.

    Training the nano LVM, bfloat16 was 1.9 times as fast on a Xeon with AMX, 2.4 times on an EPYC with AVX512-BF16.
    """
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() else None
