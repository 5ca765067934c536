"""The first and the last pictures of the demo; ``tests/test_absent.py`` has the other steps."""

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
from covray.io.pixels import psnr
from covray.pairs.scenes import scene_pairs
from covray.recipes.demo import SCENES, _Demo, _thinking_parts, run_demo
from covray.recipes.first_answers import SHEET
from tests.support.thinking import write_parts


@pytest.fixture
def parts(tmp_path: Path, think_folders: dict[str, str], request: pytest.FixtureRequest) -> Path:
    (tmp_path / "parts").mkdir()
    return write_parts(tmp_path / "parts", think_folders, request.param)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that the demo shows."""
    commands: list[str] = []
    monkeypatch.setattr(_Demo, "announce", lambda _, step, command: commands.append(command))
    return commands


def test_the_first_answer_is_that_of_the_command_that_is_shown(
    tmp_path: Path, run_here: Callable[..., Any], shown: list[str]
) -> None:
    demo = _Demo(tmp_path, Console(quiet=True))
    pairs = list(scene_pairs(sum(SCENES.values()), ["depth"], splits=dict(SCENES)))
    demo.answer_first(pairs)
    run_here(*shlex.split(shown[0]))
    answer = decode((demo.first / "depth_answer.png").read_bytes())
    np.testing.assert_array_equal(answer, decode((demo.first / "depth" / "depth_query" / "answer.png").read_bytes()))
    written = (demo.first / SHEET).stat().st_mtime_ns
    demo.answer_first(pairs)
    assert (demo.first / SHEET).stat().st_mtime_ns == written, "a demo that goes on does not answer again"
    query, label = (decode((demo.first / f"depth_{name}.png").read_bytes()) for name in ("query", "label"))
    assert psnr(answer, label) > psnr(query, label), "it is nearer to the label than the query is"


@pytest.mark.parametrize("parts", ["lvlm"], indirect=True)
def test_the_picture_that_is_drawn_is_that_of_the_command_that_is_shown(
    parts: Path, tmp_path: Path, run_here: Callable[..., Any], shown: list[str]
) -> None:
    demo = _Demo(tmp_path, Console(quiet=True))
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
