"""docs/python.md: its examples run, one after another, in a folder with the files that they name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import covray
from covray.config import GeneratorConfig, Section
from covray.generation.generator import Generator
from tests.generation.conftest import ENGINE

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def test_the_examples_of_the_page_run(
    write_run: Callable[..., str], pictures: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("query", "room", "room_depth"):
        Path(pictures(1, prefix=name)[0]).rename(tmp_path / f"{name}.png")
    run = write_run(method="linear")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    configs: list[Section] = []
    for step in ("build", "train", "evaluate"):
        monkeypatch.setattr(covray, step, configs.append, raising=False)
    tiny = Generator.load(GeneratorConfig.model_validate({"adapter": run, "engine": ENGINE, "batch": 4}))
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        with monkeypatch.context() as patched:
            if "untuned" in block:  # the nano models would take seconds
                patched.setattr(Generator, "load", lambda config: tiny)
            exec(block, namespace)
    answer = namespace["answer"]
    assert (answer.image.size, answer.data.shape, len(answer.frames)) == ((40, 30), (30, 40), 2)
    assert np.array_equal(namespace["answers"][0].image, answer.image)
    assert namespace["picture"].is_answer
    assert namespace["voted"].spread is not None
    assert len(namespace["row"].pictures()) == 4
    assert namespace["batch"]["ids"].shape[1] == 2 * 4 * 16
    assert [type(config).__name__ for config in configs] == ["BuildConfig", "TrainConfig", "EvaluateConfig"]
