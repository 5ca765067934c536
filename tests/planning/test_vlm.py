"""The plan of a vision-language model's training: published sizes, and memory and time by their formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from covray.config import PlanConfig, load_config
from covray.config.vlm import VlmModelConfig
from covray.distributed.benchmark import calibrate
from covray.errors import ConfigError
from covray.io.model_folders import resolve_folder
from covray.models.vlm.checkpoint import load_vlm, vlm_facts
from covray.planning.plan import plan
from covray.planning.records import VlmPlan
from tests.support.vlms import write_vlm

CONFIG = Path(__file__).parents[2] / "configs" / "paper" / "diffusionvl-plan.yaml"


def planned(**options: Any) -> VlmPlan:
    result = plan(load_config(PlanConfig, CONFIG, {key.replace("__", "."): options[key] for key in options})).vlm
    assert result is not None
    return result


def test_the_conversion_of_the_7b_is_that_of_the_paper() -> None:
    result = planned()
    assert result.parameters == 8_292_166_656, "as its card says"
    assert result.train_steps == 2883
    by_stage = {memory.stage: memory for memory in result.memory}
    states = by_stage[0].weights + by_stage[0].gradients + by_stage[0].optimizer
    assert states == 16 * result.parameters
    assert by_stage[1].optimizer == by_stage[0].optimizer // 32
    assert by_stage[2].gradients == by_stage[0].gradients // 32
    assert by_stage[3].total < by_stage[2].total < by_stage[1].total < by_stage[0].total
    assert result.hours.mean * 32 == pytest.approx(result.gpu_hours.mean, rel=0.1)
    assert all(figure.source for figure in result.figures)


def test_what_costs_more_takes_longer(tmp_path: Path) -> None:
    # The sizes of a small model: those of the 7B take seconds to count.
    folder = write_vlm(tmp_path, "qwen2_5_vl")
    facts = vlm_facts(VlmModelConfig(path=folder))

    def seconds(**options: Any) -> float:
        return planned(**{"vlm__model": folder, **options}).seconds_per_step

    model = load_vlm(facts, torch.float32, torch.device("cpu")).model
    assert planned(vlm__model=folder).parameters == sum(value.numel() for value in model.parameters())
    base = seconds()
    assert seconds(vlm__objective="autoregressive", vlm__blocks={}) < base
    assert seconds(vlm__train="lora") < base
    assert seconds(vlm__compute__recompute=False) < base
    assert seconds(vlm_data__answer_tokens=400) > base
    assert planned(vlm__model=folder, vlm_data__samples=1, vlm__optimizer__epochs=0.1).train_steps == 1
    assert seconds(vlm_on__gpus=64) == pytest.approx(base / 2)


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"vlm\.model: some/model is no folder here"):
        planned(vlm__model="some/model")
    with pytest.raises(
        ConfigError, match=r"^vlm\.model: .*: its config\.json is of a llama, no vision-language model"
    ) as error:
        planned(vlm__model=str(resolve_folder("nano", None, "lvm", ())))
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"^vlm_on\.interruptions: about .* nodes would be lost"):
        planned(vlm__optimizer__steps=10**9, vlm_on__interruptions=0.1)
    with pytest.raises(ConfigError, match=r"vlm\.data: is not for a plan"):
        planned(vlm__data="words.json")
    with pytest.raises(ConfigError, match="vlm is not measured by a benchmark"):
        calibrate(load_config(PlanConfig, CONFIG), "/absent/rates.yaml")
