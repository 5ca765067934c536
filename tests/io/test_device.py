from __future__ import annotations

import pytest
import torch

from covray.config import EngineConfig
from covray.errors import ConfigError
from covray.io.device import choose_device, resolve_device


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
