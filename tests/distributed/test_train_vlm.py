"""What ``covray vlm train`` refuses before Ray is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from covray.config.vlm import VlmTrainConfig
from covray.distributed.train_vlm import train_vlm
from covray.errors import ConfigError, CovrayError, ManifestError, WeightsError


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def started() -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("covray.distributed.train_vlm.ray_session", started)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"data": "/absent.parquet"}, ManifestError, "absent"),
        ({"texts__split": "test"}, ManifestError, "split test: has nothing to use"),
        ({"texts__validation_split": "test"}, ManifestError, "split test: has nothing to use"),
        ({"model": "/absent"}, WeightsError, "no such folder"),
        ({"mask_id": 3}, WeightsError, "is a token of"),
        ({"workers__count": 7}, ConfigError, "7 workers, but a step has 6 samples"),
        ({"compute__deepspeed": "zero9"}, ConfigError, "zero9 is none of"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(
    changes: dict[str, Any], kind: type[CovrayError], message: str, vlm_config: Callable[..., VlmTrainConfig],
    no_ray: None,
) -> None:  # fmt: skip
    config = vlm_config(**changes)
    with pytest.raises(kind, match=message) as error:
        train_vlm(config)
    assert "\n" not in str(error.value)
    assert not list(Path(config.out).glob("*.json"))
