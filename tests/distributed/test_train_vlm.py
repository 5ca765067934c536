"""What ``covray vlm train`` refuses before Ray is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from covray.config.vlm import VlmTrainConfig
from covray.distributed.train_vlm import train_vlm, with_trainable_dtype
from covray.errors import ConfigError, CovrayError, ManifestError, WeightsError


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def started() -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("covray.distributed.train.ray_session", started)


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


def test_weights_that_are_trained_without_deepspeed_are_float32(vlm_config: Callable[..., VlmTrainConfig]) -> None:
    def dtype_of(wanted: str, **changes: Any) -> str:
        return with_trainable_dtype(vlm_config(compute__dtype="bfloat16", **changes), wanted).compute.dtype

    assert dtype_of("auto", train="full") == "float32"
    assert dtype_of("auto", train="lora") == "bfloat16"
    assert dtype_of("bfloat16", train="full", compute__deepspeed="zero2") == "bfloat16"
    with pytest.raises(ConfigError, match="bfloat16 with train=language needs DeepSpeed"):
        dtype_of("bfloat16", train="language")
