from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from covray.config import EngineConfig, PriorConfig, TokenizerConfig
from covray.errors import ConfigError
from covray.io import device
from covray.io.device import choose_device, resolve_device
from covray.models.diffusion.engine import ChainEngine, Request
from covray.models.diffusion.prior import load_prior
from covray.models.tokenizer.vqgan import load_tokenizer


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"engine\.device"):
        resolve_device(EngineConfig(device="cuda"))
    with pytest.raises(ConfigError, match=r"^--device: .* set auto or cpu"):
        choose_device("cuda", "--device")
    assert resolve_device(EngineConfig()) == (torch.device("cpu"), torch.float32)
    assert resolve_device(EngineConfig(dtype="bfloat16")) == (torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device(EngineConfig()) == (torch.device("cuda"), torch.bfloat16)
    assert resolve_device(EngineConfig(device="cuda", dtype="float32")) == (torch.device("cuda"), torch.float32)
    assert choose_device("cpu", "--device") == torch.device("cpu")


def test_a_metal_gpu_is_used_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^engine\.device: is mps, but torch sees no Metal GPU"):
        resolve_device(EngineConfig(device="mps"))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device(EngineConfig(device="mps")) == (torch.device("mps"), torch.float32)
    assert choose_device("auto", "engine.device").type != "mps"


class WithoutFloat64(TorchDispatchMode):
    """Stands for Metal on a CPU: a result in float64 is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            assert not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64, func
        return result


def test_the_networks_of_a_build_compute_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(device, "MPS", torch.device("cpu"))  # the fake device
    engine = EngineConfig(device="mps", batch=2, image_batch=2)
    prior = load_prior(PriorConfig(steps=2), engine)
    tokenizer = load_tokenizer(TokenizerConfig(), engine)
    pictures = np.zeros((2, prior.size_px, prior.size_px, 3), np.uint8)
    pictures[1] = 255
    with WithoutFloat64():
        chain = ChainEngine(prior, engine, 2).interpolate(pictures, [Request(0, 1, (0.5,))])
        tokens = tokenizer.encode(np.concatenate([pictures, chain.frames[0]]))
        assert tokenizer.decode(tokens).shape == (3, tokenizer.size_px, tokenizer.size_px, 3)
