"""What ``covray vlm evaluate`` refuses before Ray is started."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from covray.config import load_config
from covray.config.vlm import VlmEvaluateConfig, VlmTrainConfig
from covray.distributed.evaluate_vlm import evaluate_vlm
from covray.errors import ConfigError, CovrayError, DatasetError, ManifestError
from covray.evaluation.vision_text import BatchAnswerer, Row, compare_evaluations, row_lines, summarize_rows
from covray.generation.vision_text import answerer_facts
from covray.training.objectives.vision_text import read_data
from tests.support.vlm_trainings import trained

ConfigOf = Callable[..., VlmEvaluateConfig]


@pytest.fixture
def config_of(vlm_config: Callable[..., VlmTrainConfig], tmp_path: Path) -> ConfigOf:
    """Gives configurations of an evaluation of a tiny run: eight prompts in batches of three."""
    training = vlm_config(objective="block_diffusion")
    trained(training)

    def config(out: str = "scores", **changes: Any) -> VlmEvaluateConfig:
        options = {
            "run": training.out, "data": training.data, "texts.instruction": "what is it", "split": "val", "batch": 3,
            "decoding.max_tokens": 6, "tracking.uri": "none", "out": str(tmp_path / out),
        }  # fmt: skip
        return load_config(VlmEvaluateConfig, None, options | {key.replace("__", "."): changes[key] for key in changes})

    return config


def answered(config: VlmEvaluateConfig) -> list[Row]:
    """The rows of all batches, without Ray."""
    answerer = BatchAnswerer(config)
    return [row for number in range(3) for row in answerer.answer(number)]


def as_begun(config: VlmEvaluateConfig) -> dict[str, Any]:
    """``_evaluation.json`` as covray 0.1.0 wrote it."""
    data = read_data(config.data, config.texts).fingerprint()
    identity = config.identity() | {"data": data, "model": answerer_facts(config).fingerprint}
    return {"version": 1, "identity": identity}


def write(folder: Path, config: VlmEvaluateConfig, rows: list[Row]) -> None:
    folder.mkdir()
    (folder / "_evaluation.json").write_text(json.dumps(as_begun(config)))
    (folder / "answers.jsonl").write_text("\n".join(row_lines(rows)) + "\n")


def test_a_finished_evaluation_of_any_age_is_only_read(
    config_of: ConfigOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("covray.distributed.evaluate_vlm.ray_session", lambda: pytest.fail("Ray was started"))
    config = config_of()
    rows = answered(config)
    write(tmp_path / "scores", config, rows)
    (tmp_path / "scores" / "results.json").write_text(json.dumps(summarize_rows(rows).to_json()))
    assert evaluate_vlm(config) == summarize_rows(rows)
    with pytest.raises(DatasetError, match="samples was None, is 6"):
        evaluate_vlm(config_of(samples=6))
    differences = compare_evaluations(config.out, config.out)
    assert differences["questions"].mean == differences["answer_nats"].mean == 0
    with pytest.raises(ConfigError, match="no finished evaluation"):
        compare_evaluations(config.out, str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"out": "."}, DatasetError, "did not write"),
        ({"run": "."}, ConfigError, "is not a finished run"),
        ({"split": "other"}, ManifestError, "split other: has nothing to use"),
        ({"decoding__passes": 9}, ConfigError, "9 passes of a block of 4 tokens"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(
    changes: dict[str, Any], kind: type[CovrayError], message: str, config_of: ConfigOf, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("covray.distributed.evaluate_vlm.ray_session", lambda: pytest.fail("Ray was started"))
    if "run" in changes:
        changes = {"run": str(tmp_path)}
    with pytest.raises(kind, match=message) as error:
        evaluate_vlm(config_of(**changes))
    assert "\n" not in str(error.value)
