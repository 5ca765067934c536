"""Shell completion, and ``covray config``."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from covray.cli.app import app
from covray.config.reference import STEPS, all_keys, annotated_yaml
from covray.config.shipped import shipped_files
from covray.errors import ConfigError
from covray.tasks import TASKS, metrics

ROOT = Path(__file__).parents[2]


def completed(words: str) -> list[str]:
    """Return what bash offers for the last of the words, each a line."""
    environment = {
        "_COVRAY_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1),
    }  # fmt: skip
    result = CliRunner().invoke(app, [], prog_name="covray", env=environment)
    assert result.exit_code == 0
    return result.stdout.split()


def test_commands_tasks_scales_and_other_fixed_values_are_completed() -> None:
    assert completed("covray eval") == ["evaluate"]
    assert completed("covray generate --task ") == list(TASKS)
    assert completed("covray evaluate --task depth,po") == ["depth,pose"]
    assert completed("covray evaluate --task depth,de") == []
    assert completed("covray pairs scenes --task seg") == ["segmentation"]
    assert completed("covray train --scale ") == ["nano", "300m", "600m", "1b", "3b", "7b", "custom"]
    assert completed("covray build --method ") == ["linear", "diffusion", "copy", "coarse"]
    assert completed("covray evaluate --selection s") == ["similar"]


def test_metrics_of_installed_packages_are_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert completed("covray evaluate --metrics ") == []
    monkeypatch.setattr(metrics, "added_metrics", lambda: ["depth/contrast", "pose/reach"])
    assert completed("covray evaluate --metrics de") == ["depth/contrast"]
    assert completed("covray evaluate --metrics depth/contrast,") == ["depth/contrast,pose/reach"]


def test_keys_of_the_step_are_completed() -> None:
    assert completed("covray build --set prior.st") == ["prior.steps="]
    assert completed("covray train --set ") == [f"{key}=" for key in all_keys(STEPS["train"])]
    assert completed("covray benchmark --set ") == []


def test_shipped_files_are_completed() -> None:
    assert completed("covray train --config paper/tr") == ["paper/train-1b", "paper/train-300m", "paper/train-7b"]
    assert completed("covray config cluster/g") == ["cluster/gpu.yaml"]
    assert completed("covray config trai") == ["train", "train/nano"]


def test_a_completion_can_be_installed() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).stdout
    assert "--install-completion" in shown


@pytest.mark.parametrize("step", STEPS)
def test_the_configuration_of_a_step_is_printed(step: str) -> None:
    assert CliRunner().invoke(app, ["config", step]).stdout == annotated_yaml(step)


def test_shipped_files_are_printed_and_listed() -> None:
    listed = CliRunner().invoke(app, ["config"]).stdout.split()
    for name, path in shipped_files().items():
        assert name in listed
        assert CliRunner().invoke(app, ["config", name]).stdout == path.read_text()
    assert {word for step in STEPS for word in step.split()} < set(listed)


def test_a_name_that_is_none_is_one_line() -> None:
    result = CliRunner().invoke(app, ["config", "biuld"])
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception) == "biuld: is neither a step nor a shipped file; covray config lists both"
