"""The judge of portraits: each theme asks its own heads, and what it cannot judge is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from covray.errors import WeightsError
from covray.thinking.episodes import COBSAT, PORTRAITS, VALUES
from covray.thinking.judge import SIDES, WEIGHTS, JudgeNetwork, JudgeRecord, load_judge, save_judge

CPU = torch.device("cpu")
PICTURES = list(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = JudgeNetwork(len(PORTRAITS), (8, 16))
    record = JudgeRecord(
        size_px=64, widths=[8, 16], details={theme.name: list(theme.details) for theme in PORTRAITS},
        objects={theme.name: list(theme.objects) for theme in PORTRAITS},
    )  # fmt: skip
    save_judge(tmp_path / "judge", network, record)
    return tmp_path / "judge"


def test_each_theme_asks_its_own_two_heads(folder: Path) -> None:
    judge = load_judge(folder, CPU)
    with torch.no_grad():
        judge.network.heads.weight.zero_()
        logits = judge.network.heads.bias.zero_().view(len(PORTRAITS), SIDES, VALUES)
        for number in range(len(PORTRAITS)):
            logits[number, 0, number] = logits[number, 1, 9 - number] = 1.0
    for number, theme in enumerate(PORTRAITS):
        for cell in judge.choose(theme, PICTURES, batch=2):
            assert (cell.detail, cell.object) == (theme.details[number], theme.objects[9 - number])


def test_a_picture_is_judged_alike_alone_and_among_others(folder: Path) -> None:
    judge = load_judge(folder, CPU)
    together = judge.choose(PORTRAITS[0], PICTURES)
    assert together == [judge.choose(PORTRAITS[0], [picture])[0] for picture in PICTURES]
    assert judge.choose(PORTRAITS[0], []) == []


def test_what_it_cannot_judge_is_refused(folder: Path) -> None:
    judge = load_judge(folder, CPU)
    with pytest.raises(WeightsError, match="theme color: the judge knows colour, texture"):
        judge.choose(COBSAT[0], PICTURES)
    with pytest.raises(WeightsError, match="pictures of 32x32 px: the judge reads 64"):
        judge.choose(PORTRAITS[0], [np.zeros((32, 32, 3), np.uint8)])
    (folder / WEIGHTS).write_bytes(b"")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_judge(folder, CPU)


@pytest.mark.parametrize(
    "wrong",
    [{"widths": []}, {"widths": [8, 12]}, {"details": {"colour": ["red"]}}, {"objects": {}}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_record_of_no_judge_is_refused_in_one_line(wrong: dict[str, Any], folder: Path) -> None:
    JudgeRecord.read(str(folder)).model_copy(update=wrong).write(str(folder))
    with pytest.raises(WeightsError, match=r"judge\.json: is of no judge, .*; train it again") as error:
        load_judge(folder, CPU)
    assert "\n" not in str(error.value)
