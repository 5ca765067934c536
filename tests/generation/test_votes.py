"""Joined answers: one answer is itself, equal ones are black in the spread, and what is joined is the candidates."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from covray.config import EvaluateConfig, SamplingConfig
from covray.generation.votes import draw_spread, join_answers
from covray.tasks import TASKS

NOISE = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize("task", [*TASKS, None])
def test_one_answer_is_itself(task: str | None) -> None:
    assert np.array_equal(join_answers(task, [NOISE[0]], None), NOISE[0])


def test_answers_without_a_task_are_joined_as_pictures() -> None:
    assert np.abs(join_answers(None, list(NOISE), None) - NOISE.mean(axis=0)).max() <= 0.5 + 1e-3


def test_the_spread_is_black_where_candidates_agree_and_white_where_they_are_opposite() -> None:
    assert not draw_spread([NOISE[0]] * 3).any()
    halves = np.zeros((2, 4, 4, 3), np.uint8)
    halves[1, :, 2:] = 255
    spread = draw_spread(list(halves))
    assert spread.shape == (4, 4, 3)
    assert not spread[:, :2].any()
    assert (spread[:, 2:] == 255).all()
    assert np.array_equal(draw_spread(list(NOISE)), draw_spread(list(NOISE[[3, 1, 4, 0, 2]])))


def test_a_vote_excludes_best_of() -> None:
    with pytest.raises(ValidationError, match="set one of them to 1"):
        SamplingConfig(temperature=1.0, best_of=2, vote=2)


def test_without_a_vote_identities_are_those_of_versions_before_votes() -> None:
    """An evaluation begun before there were votes goes on."""
    base = {"data": "chains", "out": "eval"}
    assert "vote" not in EvaluateConfig.model_validate(base).identity()["sampling"]
    voting = EvaluateConfig.model_validate(base | {"sampling": {"temperature": 1.0, "vote": 8}})
    assert voting.identity()["sampling"]["vote"] == 8
    assert EvaluateConfig.model_validate(voting.model_dump(mode="json")) == voting
