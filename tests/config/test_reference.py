"""A step's configuration as YAML: it changes nothing as it is, and has every key with its default."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from covray.config import load_config
from covray.config.reference import STEPS, all_keys, annotated_yaml, key_text

REQUIRED: dict[str, dict[str, Any]] = {
    "build": {"pairs": "pairs.parquet", "out": "chains"},
    "serve": {"adapters": ["run"]},
    "train": {"data": "chains", "out": "run"},
    "generate": {"queries": ["room.png"], "out": "answers"},
    "evaluate": {"data": "chains", "out": "eval"},
    "sweep": {"data": "chains", "out": "sweep"},
    "plan": {},
    "vlm train": {"data": "words.parquet", "out": "run", "model": "checkpoint"},
    "vlm generate": {"run": "run", "prompt": "What is it?"},
    "vlm evaluate": {"run": "run", "data": "words.parquet", "out": "eval"},
    "think features": {"data": "words.parquet", "out": "features", "vlm": {"path": "vlm"}},
    "think train": {"data": "features", "out": "run", "language_model": {"path": "text"}},
    "think generate": {
        "run": "run",
        "out": "answer",
        "images": ["a.png"],
        "painter": {"kind": "unet", "path": "prior"},
    },
    "think evaluate": {"out": "eval", "aligners": ["run"], "painter": {"kind": "unet", "path": "prior"}},
}


def leaves(values: dict[str, Any], keys: set[str], prefix: str = "") -> dict[str, Any]:
    """Return the values of ``keys``, dotted."""
    found = {}
    for name, value in values.items():
        if prefix + name in keys:
            found[prefix + name] = value
        else:
            found |= leaves(value, keys, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize("step", STEPS)
def test_the_file_as_it_is_changes_nothing(step: str, tmp_path: Path) -> None:
    file = tmp_path / "step.yaml"
    file.write_text(annotated_yaml(step))
    loaded = load_config(STEPS[step], file, REQUIRED[step])
    assert loaded == load_config(STEPS[step], None, REQUIRED[step])
    assert loaded.model_fields_set - set(REQUIRED[step]) == set()


@pytest.mark.parametrize("step", STEPS)
def test_the_file_has_every_key_with_its_default(step: str, tmp_path: Path) -> None:
    written = re.sub(r"^( *)#(?=\w)", r"\1", annotated_yaml(step), flags=re.MULTILINE)
    keys = set(all_keys(STEPS[step]))
    assert leaves(yaml.safe_load(written), keys).keys() == keys
    file = tmp_path / "step.yaml"
    file.write_text(written)
    assert load_config(STEPS[step], file, REQUIRED[step]) == load_config(STEPS[step], None, REQUIRED[step])


@pytest.mark.parametrize("step", STEPS)
def test_the_file_says_what_every_key_means(step: str) -> None:
    lines = [line.strip().removeprefix("# ") for line in annotated_yaml(step).splitlines()]
    text = " ".join(lines)
    for key in all_keys(STEPS[step]):
        assert key_text(STEPS[step], key).replace("``", "`") in text


def test_a_default_that_another_setting_changes_is_not_fixed(tmp_path: Path) -> None:
    file = tmp_path / "build.yaml"
    file.write_text(annotated_yaml("build").replace("#solver: ddim", "solver: dpm"))
    assert load_config(STEPS["build"], file, REQUIRED["build"]).prior.steps == 12  # type: ignore[attr-defined]
