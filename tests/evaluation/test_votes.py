"""Rows of votes, of chains and of plain answers, and rows by length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from covray.chains.dataset import ChainDataset
from covray.config import EvaluateConfig
from covray.evaluation.lengths import best_lengths
from covray.evaluation.records import SubjectEntry, SubjectScore, TaskSummary
from covray.evaluation.results import tabulate
from covray.evaluation.subjects import subjects_of
from tests.support.evaluations import Row

Write = Callable[..., Any]


@pytest.fixture
def data(write_dataset: Write, write_manifest: Write) -> str:
    """A dataset of two tasks with chains of 2, 3 and 4, and its manifest."""
    path, rows = write_dataset({"depth": 12, "edges": 8}, lengths=(3, 4))
    write_manifest(rows)
    return str(path)


def values(rows: list[Row], subject: str) -> list[Any]:
    return [(row["pair_id"], row["values"], row["images"]) for row in rows if row["subject"] == subject]


def test_votes_of_chains_and_of_plain_answers_at_equal_samples_and_equal_tokens(
    data: str, write_run: Write, config_of: Write, runner_of: Write
) -> None:
    runs = (write_run(data, "chains", method="diffusion", lengths=(4,)), write_run(data, "plain", method="none"))
    options: dict[str, Any] = {"adapters": runs, "untuned": False, "baselines": ()}
    config = config_of(data, votes={"samples": [2, 3], "temperature": 1.0}, **options)
    subjects = {subject.name: subject for subject in subjects_of(config, ChainDataset(data))}
    assert {name: (subject.votes, subject.samples) for name, subject in subjects.items()} == {
        "chains": (1, 1), "plain": (1, 1),
        "chains, votes of 2": (2, 2), "chains, votes of 3": (3, 3),
        "plain, votes of 2": (2, 2), "plain, votes of 3": (3, 3),
        "plain, votes of 6": (6, 6), "plain, votes of 9": (9, 9),
    }  # fmt: skip
    for subject in subjects.values():
        assert SubjectEntry.of(subject).subject() == subject
    without = config_of(data, votes={"samples": [2], "equal_tokens": False}, **options)
    assert "plain, votes of 6" not in [subject.name for subject in subjects_of(without, ChainDataset(data))]

    runner, episodes = runner_of(config)
    rows = runner.run(episodes).to_pylist()
    for name, subject in subjects.items():
        pictures = (1 if name.startswith("plain") else 3) * subject.samples
        for row in (row for row in rows if row["subject"] == name):
            assert len(row["images"]) == pictures
    plain, _ = runner_of(config_of(data, **options))
    alone = plain.run(episodes.filter([name in ("chains", "plain") for name in episodes["subject"].to_pylist()]))
    voted, _ = runner_of(config_of(data, sampling={"temperature": 1.0, "vote": 3}, **options))
    votes = voted.run(episodes.filter([name in ("chains", "plain") for name in episodes["subject"].to_pylist()]))
    for name in ("chains", "plain"):
        assert values(rows, name) == values(alone.to_pylist(), name), "its own answer stays as it is"
        assert values(rows, f"{name}, votes of 3") == values(votes.to_pylist(), name), "as sampling.vote makes it"
    compared = {(row.first, row.second) for row in tabulate(rows, tuple(subjects.values()), 0).differences}
    assert ("plain, votes of 6", "chains, votes of 2") in compared, "differences are paired"


def test_an_adapter_has_a_row_for_each_length(data: str, write_run: Write, config_of: Write) -> None:
    several = write_run(data, "several", method="diffusion", lengths=(2, 3, 4))
    plain = write_run(data, "plain", method="none")
    config = config_of(data, adapters=(several, plain), lengths=(2, 3, 4), untuned=False, baselines=())
    rows = {subject.name: (subject.method, subject.length) for subject in subjects_of(config, ChainDataset(data))}
    assert rows == {
        "several L=2": ("none", 2), "several L=3": ("diffusion", 3), "several L=4": ("diffusion", 4),
        "plain": ("none", 2),
    }  # fmt: skip


def test_the_best_length_is_chosen_task_by_task() -> None:
    def entry(name: str, length: int, samples: int = 1) -> SubjectEntry:
        return SubjectEntry(name=name, kind="adapter", about="", length=length, adapter="run", samples=samples)

    def score(task: str, name: str, metric: str, mean: float | None) -> SubjectScore:
        return SubjectScore(task=task, subject=name, metric=metric, mean=mean, low=None, high=None, episodes=3)

    subjects = [entry("a", 2), entry("b", 3), entry("c", 4), entry("votes", 6, samples=8)]
    tasks = {
        "edges": TaskSummary(episodes=3, primary="f", metrics=("f",)),
        "depth": TaskSummary(episodes=3, primary="abs_rel", metrics=("abs_rel",)),
        "pose": TaskSummary(episodes=3, primary="pck", metrics=("pck",)),
    }
    scores = [
        score("edges", "a", "f", 0.2), score("edges", "b", "f", 0.4), score("edges", "c", "f", 0.3),
        score("edges", "votes", "f", 0.9),
        score("depth", "a", "abs_rel", 0.2), score("depth", "b", "abs_rel", 0.2), score("depth", "c", "abs_rel", 0.3),
        score("pose", "a", "pck", None), score("pose", "c", "pck", 0.0),
    ]  # fmt: skip
    assert best_lengths(subjects, scores, tasks, ["abs_rel"]) == {"run": {"edges": 3, "depth": 2, "pose": 4}}
    assert best_lengths(subjects[:1], scores, tasks, ["abs_rel"]) == {}


def test_an_identity_without_votes_and_lengths_is_what_it_was() -> None:
    identity = EvaluateConfig(data="chains", out="eval").identity()
    assert not {"votes", "lengths"} & identity.keys()
    asked = EvaluateConfig(data="chains", out="eval", votes={"samples": (8, 8)}, lengths=(4, 3)).identity()
    assert asked["votes"]["samples"] == [8]
    assert asked["lengths"] == [3, 4]
