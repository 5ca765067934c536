"""The table: by hand for a few rows, from rows in any order, with what is undefined left out."""

from __future__ import annotations

import csv
import io
import json
import math
import random
from typing import Any

import numpy as np
import pytest

from covray.evaluation.records import EvaluationTable
from covray.evaluation.results import choose_episodes, tabulate, to_csv
from covray.evaluation.scores import aggregate
from covray.evaluation.statistics import mean_interval, paired_difference
from covray.evaluation.subjects import Kind, Subject
from covray.tasks.base import Score
from covray.tasks.edges import THRESHOLDS

Row = dict[str, Any]
SUBJECTS = tuple(
    Subject(name, kind, "")
    for name, kind in [
        ("copy", "baseline"), ("untuned", "untuned"), ("first", "adapter"), ("second", "adapter"), ("vqgan", "ceiling"),
    ]
)  # fmt: skip


def row(subject: str, pair_id: int, task: str = "depth", error: str | None = None, **values: float | None) -> Row:
    """A row of ``Runner.run``; its counts, where the task has some, by the key ``counts``."""
    counts = values.pop("counts", None)
    listed = [{"metric": metric, "value": value} for metric, value in values.items()]
    return {
        "episode": hash((subject, pair_id, task)), "subject": subject, "task": task, "pair_id": pair_id,
        "examples": None, "values": None if error else listed, "counts": counts, "images": None,
        "log_likelihood": None, "error": error,
    }  # fmt: skip


def scores_of(results: EvaluationTable) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(entry["task"], entry["subject"], entry["metric"]): entry for entry in results.to_json()["scores"]}


def test_a_table_by_hand() -> None:
    rows = [
        row("copy", 1, abs_rel=0.5, delta1=0.25),
        row("copy", 2, abs_rel=0.75, delta1=0.75),
        row("first", 1, abs_rel=0.25, delta1=0.5, perplexity_own=math.log(2), perplexity_reference=math.log(3)),
        row("first", 2, abs_rel=0.25, delta1=None, perplexity_own=math.log(8), perplexity_reference=math.log(3)),
        row("vqgan", 1, abs_rel=0.125),
        row("vqgan", 2, error="truncated: label: x"),
    ]
    results = tabulate(rows, SUBJECTS, seed=0)
    table = scores_of(results)
    assert {key[1:]: (entry["mean"], entry["episodes"]) for key, entry in table.items()} == {
        ("copy", "abs_rel"): (0.625, 2),
        ("copy", "delta1"): (0.5, 2),
        ("first", "abs_rel"): (0.25, 2),
        ("first", "delta1"): (0.5, 1),
        ("first", "perplexity_own"): (pytest.approx(4), 2),  # the geometric mean
        ("first", "perplexity_reference"): (pytest.approx(3), 2),
        ("vqgan", "abs_rel"): (0.125, 1),
    }
    assert (table["depth", "copy", "abs_rel"]["low"], table["depth", "copy", "abs_rel"]["high"]) == (0.5, 0.75)
    assert table["depth", "first", "delta1"]["low"] is None, "one episode has no spread"
    assert table["depth", "first", "perplexity_own"]["low"] == pytest.approx(2)
    assert table["depth", "first", "perplexity_own"]["high"] == pytest.approx(8)
    assert results.to_json()["tasks"] == {
        "depth": {
            "episodes": 2,
            "primary": "abs_rel",
            "metrics": ["abs_rel", "delta1", "perplexity_own", "perplexity_reference"],
            "absent": {},
            "rejected": 1,
        }
    }
    assert results.to_json()["failed"] == [
        {"task": "depth", "subject": "vqgan", "pair_id": 2, "error": "truncated: label: x"}
    ]
    assert {"abs_rel", "perplexity_own", "perplexity_reference"} <= set(results.to_json()["lower_is_better"])
    assert EvaluationTable.model_validate_json(json.dumps(results.to_json()), strict=True) == results


def random_rows(*tasks: str, episodes: int = 9) -> list[Row]:
    generator = np.random.default_rng(0)
    rows = []
    for task in tasks:
        for subject in SUBJECTS:
            for pair_id in range(-episodes // 2, episodes // 2):
                values: dict[str, Any] = {"mse": float(generator.random()), "psnr": None}
                if task == "edges":
                    values = {"f": float(generator.random())}
                    met = np.sort(generator.integers(0, 50, (2, len(THRESHOLDS))), axis=1)[:, ::-1]
                    values["counts"] = [
                        (met[0] + met[1]).tolist(), met[0].tolist(), [50] * len(THRESHOLDS), met[0].tolist(),
                    ]  # fmt: skip
                rows.append(row(subject.name, pair_id, task, **values))
    return rows


def test_the_order_of_rows_does_not_matter() -> None:
    rows = random_rows("colorization", "edges")
    expected = tabulate(rows, SUBJECTS, seed=3)
    assert list(expected.tasks) == ["colorization", "edges"]
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        found = tabulate(rows, SUBJECTS, seed=3)
        assert found == expected
        assert json.dumps(found.to_json()) == json.dumps(expected.to_json()), "to the byte"
        assert choose_episodes(rows, found) == choose_episodes(rows, expected)


def test_intervals_and_differences_are_those_of_statistics() -> None:
    rows = random_rows("colorization")
    results = tabulate(rows, SUBJECTS, seed=5)
    table = scores_of(results)
    values = {
        subject.name: [one["values"][0]["value"] for one in rows if one["subject"] == subject.name]
        for subject in SUBJECTS
    }
    for name, numbers in values.items():
        mean = mean_interval(numbers, 5)
        assert mean is not None
        found = table["colorization", name, "mse"]
        assert (found["mean"], found["low"], found["high"]) == (mean.mean, mean.low, mean.high)
    pairs = [(entry["first"], entry["second"]) for entry in results.to_json()["differences"]]
    assert pairs == [
        ("first", "copy"), ("first", "untuned"), ("second", "copy"), ("second", "untuned"), ("second", "first"),
    ], "adapters from all before them, never from the ceiling"  # fmt: skip
    for entry in results.to_json()["differences"]:
        difference = paired_difference(values[entry["first"]], values[entry["second"]], 5)
        assert difference is not None
        assert {key: entry[key] for key in vars(difference)} == vars(difference)


def test_a_difference_is_first_less_second_over_episodes_that_both_have() -> None:
    rows = [row("copy", pair_id, abs_rel=0.5) for pair_id in range(3)]
    rows += [row("first", 0, abs_rel=0.25), row("first", 1, abs_rel=0.375), row("first", 2, error="damaged: x")]
    (difference,) = tabulate(rows, SUBJECTS, seed=0).to_json()["differences"]
    assert (difference["metric"], difference["mean"], difference["episodes"]) == ("abs_rel", -0.1875, 2)
    assert difference["high"] < 0


def test_metrics_of_a_set_are_taken_from_its_sums() -> None:
    def counts(intersections: list[int], unions: list[int]) -> Any:
        return [intersections, unions]

    rows = [
        row("first", 1, "segmentation", iou=0.75, p_acc=0.5, counts=counts([1, 2], [2, 2])),
        row("first", 2, "segmentation", iou=0.0, p_acc=0.5, counts=counts([0, 0], [6, 0])),
        row("first", 3, "segmentation", error="truncated: x"),
    ]
    found = scores_of(tabulate(rows, SUBJECTS, seed=0))["segmentation", "first", "miou"]
    assert found["mean"] == (1 / 8 + 2 / 2) / 2
    assert (found["low"], found["high"], found["episodes"]) == (None, None, 2)

    edges = random_rows("edges")
    results = tabulate(edges, SUBJECTS, seed=0)
    mine = [Score({}, np.array(one["counts"])) for one in edges if one["subject"] == "copy"]
    for metric, mean in aggregate("edges", mine).items():
        assert scores_of(results)["edges", "copy", metric]["mean"] == mean
    assert {"ods_f", "ois_f"} <= set(results.to_json()["tasks"]["edges"]["metrics"])


def test_a_metric_that_is_never_defined_has_no_mean() -> None:
    rows = [row(subject, pair_id, abs_rel=None) for subject in ("copy", "first") for pair_id in (1, 2)]
    results = tabulate(rows, SUBJECTS, seed=0)
    assert [
        (entry["mean"], entry["low"], entry["high"], entry["episodes"]) for entry in results.to_json()["scores"]
    ] == [(None, None, None, 0)] * 2
    assert results.to_json()["differences"] == []
    assert choose_episodes(rows, results) == {}
    assert "\ndepth,first,abs_rel,,,,0\n" in to_csv(results)


def test_the_perplexity_of_a_diverged_model_is_a_number() -> None:
    results = tabulate([row("first", 1, perplexity_own=2e4), row("first", 2, perplexity_own=3e4)], SUBJECTS, seed=0)
    (score,) = results.scores
    assert score.mean == score.high == math.exp(700)


def test_a_task_of_which_every_episode_failed_is_still_named() -> None:
    rows = [row(subject, 1, task, error="damaged: x") for subject in ("copy", "first") for task in ("edges", "depth")]
    results = tabulate(rows, SUBJECTS, seed=0)
    assert list(results.to_json()["tasks"]) == ["edges", "depth"]
    assert all(about["episodes"] == about["rejected"] == 1 for about in results.to_json()["tasks"].values())
    assert len(results.to_json()["failed"]) == 4
    assert all(entry["mean"] is None for entry in results.to_json()["scores"])


def test_metrics_whose_network_is_not_there_are_named() -> None:
    results = tabulate([row("first", 1, "colorization", mse=0.1, psnr=10.0)], SUBJECTS, seed=0)
    assert list(results.to_json()["tasks"]["colorization"]["absent"]) == ["lpips"]
    assert "lpips" not in results.to_json()["tasks"]["colorization"]["metrics"]


@pytest.mark.parametrize(
    ("who", "chooser"),
    [
        (("copy", "untuned", "first", "second", "vqgan"), "first"),
        (("copy", "untuned", "vqgan"), "untuned"),
        (("vqgan", "copy"), "copy"),
    ],
)
def test_best_median_and_worst_are_those_of_the_one_the_table_is_about(who: tuple[str, ...], chooser: str) -> None:
    values = {name: np.random.default_rng(number).permutation(5) / 10 for number, name in enumerate(who)}
    rows = [row(name, pair_id, abs_rel=float(values[name][pair_id])) for name in who for pair_id in range(5)]
    rows += [row(name, 5, error="damaged: x") for name in who]
    results = tabulate(rows, [subject for subject in SUBJECTS if subject.name in who], seed=0)
    order = np.argsort(values[chooser])  # lower is better
    assert choose_episodes(rows, results) == {"depth": {"best": order[0], "median": order[2], "worst": order[4]}}


def test_of_a_metric_where_more_is_better_the_best_is_the_largest() -> None:
    rows = [row("first", pair_id, "low_light", psnr=float(pair_id)) for pair_id in range(4)]
    chosen = choose_episodes(rows, tabulate(rows, SUBJECTS, seed=0))
    assert chosen == {"low_light": {"best": 3, "median": 2, "worst": 0}}


def test_csv_says_what_the_table_says() -> None:
    kind: Kind = "adapter"
    hostile = Subject('a, "b"\n', kind, "")
    rows = [*random_rows("colorization", "edges"), row(hostile.name, 1, "edges", f=0.1)]
    results = tabulate(rows, (*SUBJECTS, hostile), seed=0)
    read = list(csv.DictReader(io.StringIO(to_csv(results), newline="")))
    assert len(read) == len(results.to_json()["scores"])
    for line, entry in zip(read, results.to_json()["scores"], strict=True):
        for key, value in entry.items():
            if isinstance(value, float):
                assert float(line[key]) == value
            else:
                assert line[key] == ("" if value is None else str(value))
