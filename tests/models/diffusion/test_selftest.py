from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from covray.config import EngineConfig, PriorConfig
from covray.errors import WeightsError
from covray.io.model_folders import NANO_FOLDER
from covray.models.diffusion import selftest
from covray.models.diffusion.prior import Prior, load_prior
from covray.models.diffusion.selftest import TOLERANCE, compare, golden, self_test


@pytest.fixture(scope="module")
def recorded() -> list[float]:
    found = self_test("nano")
    known = golden(found.fingerprint)
    assert known is not None, "the nano prior has changed: record what self_test gives in covray/diffusion/golden.json"
    assert (known.size_px, known.steps) == (found.size_px, found.steps) == (64, 5)
    assert compare(found.digest, known.digest) < TOLERANCE / 10
    return known.digest


@pytest.fixture
def nano_copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(NANO_FOLDER / "prior", tmp_path / "prior"))


def load(folder: Path, dtype: str = "float32") -> Prior:
    engine = EngineConfig.model_validate({"device": "cpu", "dtype": dtype})
    return selftest.small(load_prior(PriorConfig(path=str(folder), steps=selftest.STEPS), engine, verify=False))


def test_the_nano_prior_is_what_was_recorded(recorded: list[float]) -> None:
    assert len(recorded) == 16
    assert all(abs(value) < 5 for value in recorded)
    assert len({round(value, 2) for value in recorded}) > 12  # the sixteen numbers are not the same one


def test_threads_and_memory_formats_are_told_from_another_dtype(recorded: list[float]) -> None:
    prior = load(NANO_FOLDER / "prior")
    prior.unet.to(memory_format=torch.contiguous_format)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert compare(selftest.digest(prior), recorded) < TOLERANCE / 10
    finally:
        torch.set_num_threads(threads)
    assert compare(selftest.digest(load(NANO_FOLDER / "prior", "bfloat16")), recorded) > 5 * TOLERANCE


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}),
        ("scheduler/scheduler_config.json", {"steps_offset": 0}),
        ("scheduler/scheduler_config.json", {"set_alpha_to_one": True}),
        ("scheduler/scheduler_config.json", {"beta_end": 0.0121}),
        ("vae/config.json", {"scaling_factor": 0.85}),
    ],
)
def test_other_settings_give_other_numbers(
    file: str, changes: dict[str, object], nano_copy: Path, recorded: list[float]
) -> None:
    config = nano_copy / file
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    prior = load(nano_copy)
    assert compare(selftest.digest(prior), recorded) > 5 * TOLERANCE
    assert golden(prior.fingerprint) is None


def test_a_prior_that_contradicts_itself_is_refused(nano_copy: Path) -> None:
    config = nano_copy / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(WeightsError, match=f"{nano_copy}: .*prediction_type"):
        self_test(str(nano_copy))


def test_a_bias_that_moved_shows_in_the_noise_and_in_the_frame(recorded: list[float]) -> None:
    prior = load(NANO_FOLDER / "prior")
    with torch.no_grad():
        prior.unet.conv_out.bias.add_(0.01)
    damaged = selftest.digest(prior)
    assert compare(damaged[:8], recorded[:8]) > TOLERANCE
    assert compare(damaged[8:], recorded[8:]) > TOLERANCE
    assert selftest.digest(prior) == damaged  # nothing else does


def test_what_is_not_finite_is_infinitely_far() -> None:
    assert compare([1.0, 2.0], [1.5, 1.75]) == 0.5
    assert compare([1.0, math.nan], [1.0, 2.0]) == math.inf
    assert compare([math.inf], [math.inf]) == math.inf
