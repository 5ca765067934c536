"""The last step of the demo, a picture that ThinkDiff has reasoned; ``tests/test_absent.py`` has the others."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from covray.errors import ConfigError, WeightsError
from covray.io.images import decode
from covray.recipes.demo import _Demo, _thinking_parts, run_demo
from tests.support.thinking import write_parts


@pytest.fixture
def parts(tmp_path: Path, think_folders: dict[str, str], request: pytest.FixtureRequest) -> Path:
    (tmp_path / "parts").mkdir()
    return write_parts(tmp_path / "parts", think_folders, request.param)


@pytest.mark.parametrize("parts", ["lvlm"], indirect=True)
def test_the_picture_that_is_drawn_is_that_of_the_command_that_is_shown(
    parts: Path, tmp_path: Path, run_here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []
    demo = _Demo(tmp_path, Console(quiet=True))
    monkeypatch.setattr(_Demo, "announce", lambda _, step, command: shown.append(command))
    drawn = Path(demo.think(_thinking_parts(str(parts))))
    command = shlex.split(shown[0])
    assert command.count("--image") == 2
    assert command.count("--word") == 3
    command[command.index("--out") + 1] = str(tmp_path / "again")
    run_here(*command)
    np.testing.assert_array_equal(decode(drawn.read_bytes()), decode((tmp_path / "again" / drawn.name).read_bytes()))


@pytest.mark.parametrize("parts", ["clip"], indirect=True)
def test_parts_that_cannot_reason_are_refused_before_the_first_step(parts: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    with pytest.raises(
        ConfigError, match=r"--think .*: has a vision tower, which reads no words; give parts with a vlm"
    ):
        run_demo(out, Console(quiet=True), str(parts))
    with pytest.raises(WeightsError, match="neither a finished run of covray think train nor"):
        run_demo(out, Console(quiet=True), str(tmp_path))
    assert not out.exists()
