"""The report of a sweep: by hand for a few trials, the same in any order, and with what fails or is undefined left out.

Scores are binary fractions where figures are compared exactly.
"""

from __future__ import annotations

import csv
import io
import json
import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from covray.sweeps.cells import t_interval
from covray.sweeps.records import SweepResults
from covray.sweeps.results import to_csv
from tests.support.sweeps import tabulate

Trial = dict[str, Any]
TASKS = {
    "segmentation": {"episodes": 4, "primary": "iou", "metrics": ["iou", "p_acc", "perplexity_own"]},
    "depth": {"episodes": 4, "primary": "abs_rel", "metrics": ["abs_rel"]},
}
LOWER = ["abs_rel", "perplexity_own"]
PERPLEXITY = "perplexity_own"
METRICS = {"iou": "segmentation", "p_acc": "segmentation", "perplexity_own": "segmentation", "abs_rel": "depth"}


def trial(method: str, length: int, pairs: int, seed: int, more: dict[str, Any] | None = None, **scores: Any) -> Trial:
    """A finished trial; ``scores`` by metric, ``more`` replaces entries."""
    listed = [
        {"task": METRICS[metric], "metric": metric, "mean": mean, "low": 0.0, "high": 9.0, "episodes": 4}
        for metric, mean in scores.items()
    ]
    return {
        "name": f"{method}-L{length}-p{pairs}-s{seed}", "label": f"{method} L={length}, {pairs} pairs",
        "method": method, "length": length, "pairs": pairs, "tasks": None, "scale": "nano", "fields": {}, "seed": seed,
        "status": "finished", "error": None, "train_seconds": 8.0, "evaluate_seconds": 2.0, "steps": 10,
        "tokens": 1000, "context_tokens": 64 * length * (pairs + 1), "gpus": 0.0, "gpu_hours": 0.0,
        "validation": [{"tokens": 500, "answer_perplexity": 9.0}], "scores": listed, **(more or {}),
    }  # fmt: skip


def table(
    trials: Iterable[Trial], lower: Sequence[str] = LOWER, references: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    left_out = [{"name": "linear-L2-p1-s0", "reason": "repeats none-L2-p1-s0"}]
    results = tabulate(trials, references, TASKS, lower, left_out, {"out": "sweep"}, 60.0)
    json.dumps(results, allow_nan=False)  # what is written must be read by any browser
    return results


def by_seed(method: str, length: int, pairs: int, **scores: Sequence[float | None]) -> list[Trial]:
    """Trials of the seeds 0, 1, .. with the values of each metric."""
    seeds = range(len(next(iter(scores.values()))))
    return [
        trial(method, length, pairs, seed, **{metric: values[seed] for metric, values in scores.items()})
        for seed in seeds
    ]


def score_of(results: dict[str, Any], label: str, metric: str) -> dict[str, Any]:
    cell = next(cell for cell in results["cells"] if cell["label"] == label)
    return next(score for score in cell["scores"] if score["metric"] == metric)


def claim_of(results: dict[str, Any], key: str) -> dict[str, Any]:
    return next(claim for claim in results["claims"] if claim["key"] == key)


def compared(results: dict[str, Any], key: str) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["first"], row["second"]) for row in claim_of(results, key)["rows"]))


def whole_grid() -> list[Trial]:
    generator = random.Random(0)
    forms = [("none", 2)] + [(method, length) for method in ("linear", "diffusion") for length in (3, 4, 8)]
    return [
        trial(
            method, length, pairs, seed,
            iou=generator.random(), p_acc=generator.random(), perplexity_own=1 + 50 * generator.random(),
            abs_rel=generator.random(),
        )
        for method, length in forms for pairs in (1, 2, 3) for seed in (0, 1, 2)
    ]  # fmt: skip


# --- intervals and cells ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 5, 30])
def test_the_interval_is_students(count: int) -> None:
    generator = random.Random(count)
    values = [generator.gauss(3, 2) for _ in range(count)]
    mean, low, high = t_interval(values)
    expected = stats.t.interval(0.95, count - 1, loc=sum(values) / count, scale=stats.sem(values))
    assert mean == pytest.approx(sum(values) / count)
    assert (low, high) == pytest.approx(expected)


def test_one_value_has_no_interval_and_equal_ones_have_no_width() -> None:
    assert t_interval([0.5]) == (0.5, None, None)
    assert t_interval([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = random.Random(1)
    covered = 0
    for _ in range(1000):
        _, low, high = t_interval([generator.gauss(1, 1) for _ in range(3)])
        assert low is not None
        assert high is not None
        covered += low <= 1 <= high
    assert covered / 1000 == pytest.approx(0.95, abs=0.03)


def test_a_cell_by_hand() -> None:
    trials = [
        trial("diffusion", 4, 1, 7, {"train_seconds": 4.0, "tokens": 100, "gpu_hours": None}, iou=0.25),
        trial("diffusion", 4, 1, 3, {"train_seconds": 8.0, "tokens": 200, "gpu_hours": 0.5}, iou=0.75),
    ]
    (cell,) = table(trials)["cells"]
    half = stats.t.ppf(0.975, 1) * 0.25  # of two values, the standard error is half their distance
    assert cell == {
        "label": "diffusion L=4, 1 pairs", "method": "diffusion", "length": 4, "pairs": 1, "tasks": None,
        "scale": "nano", "fields": {}, "context_tokens": 512,
        "trials": ["diffusion-L4-p1-s3", "diffusion-L4-p1-s7"], "seeds": [3, 7],
        "train_seconds": 6.0, "tokens": 150.0, "gpu_hours": 0.5,
        "scores": [{"task": "segmentation", "metric": "iou", "mean": 0.5, "low": pytest.approx(0.5 - half),
                    "high": pytest.approx(0.5 + half), "seeds": 2}],
    }  # fmt: skip


def test_whatever_differs_but_the_seed_makes_a_cell_of_its_own() -> None:
    differences: list[dict[str, Any]] = [
        {}, {"tasks": ["depth"]}, {"scale": "7b"}, {"fields": {"optimizer.learning_rate": 0.1}},
        {"fields": {"optimizer.learning_rate": 0.2}},
    ]  # fmt: skip
    trials = [trial("linear", 4, 1, seed, more, iou=0.5) for more in differences for seed in (0, 1)]
    trials += [trial("linear", 4, 2, 0, iou=0.5), trial("linear", 3, 1, 0, iou=0.5), trial("none", 2, 1, 0, iou=0.5)]
    assert sorted(len(cell["seeds"]) for cell in table(trials)["cells"]) == [1, 1, 1, 2, 2, 2, 2, 2]


def test_perplexities_are_averaged_as_logarithms() -> None:
    score = score_of(table(by_seed("linear", 4, 1, perplexity_own=[2.0, 8.0, 4.0])), "linear L=4, 1 pairs", PERPLEXITY)
    _, low, high = t_interval([math.log(value) for value in (2, 8, 4)])
    assert low is not None
    assert high is not None
    assert (score["mean"], score["low"], score["high"]) == pytest.approx((4, math.exp(low), math.exp(high)))


def test_a_seed_that_diverged_leaves_every_bound_a_number() -> None:
    score = score_of(table(by_seed("linear", 4, 1, perplexity_own=[2.0, 1e200])), "linear L=4, 1 pairs", PERPLEXITY)
    assert 0 <= score["low"] < score["mean"] < score["high"] < math.inf


def test_a_single_seed_has_its_own_interval_over_episodes() -> None:
    score = score_of(table([trial("none", 2, 1, 5, iou=0.5, perplexity_own=3.0)]), "none L=2, 1 pairs", PERPLEXITY)
    assert score == {"task": "segmentation", "metric": PERPLEXITY, "mean": 3.0, "low": 0.0, "high": 9.0, "seeds": 1}


def test_undefined_scores_are_left_out_of_their_metric_alone() -> None:
    trials = by_seed("none", 2, 1, iou=[0.25, None, 0.75], p_acc=[None, math.nan, 0.5], abs_rel=[None, None, None])
    results = tabulate(trials, [], TASKS, LOWER, [], {}, 1.0)
    figures = {
        metric: [score_of(results, "none L=2, 1 pairs", metric)[key] for key in ("mean", "low", "high", "seeds")]
        for metric in ("iou", "p_acc", "abs_rel")
    }
    assert figures["iou"] == [0.5, pytest.approx(0.5 - stats.t.ppf(0.975, 1) / 4), pytest.approx(3.6765512), 2]
    assert figures["p_acc"] == [0.5, 0.0, 9.0, 1]
    assert figures["abs_rel"] == [None, None, None, 0]
    json.dumps([results[key] for key in ("cells", "claims", "efficiency", "returns")], allow_nan=False)


def test_trials_that_are_not_finished_are_in_no_cell_and_still_listed() -> None:
    unfinished = [
        trial("diffusion", 4, 1, seed, {"status": status, "scores": [], "train_seconds": None, "error": "x"}, iou=0.0)
        for seed, status in enumerate(["failed", "stopped", "waiting"], start=1)
    ]
    finished = trial("diffusion", 4, 1, 0, iou=0.5)
    results = table([*unfinished, finished])
    assert [cell["trials"] for cell in results["cells"]] == [[finished["name"]]]
    assert [entry["status"] for entry in results["trials"]] == ["finished", "failed", "stopped", "waiting"]
    nothing = table(unfinished)
    assert [nothing[key] for key in ("cells", "efficiency", "returns")] == [[], [], []]
    assert [(claim["rows"], claim["overall"]) for claim in nothing["claims"]] == [([], None)] * 5


def test_the_order_of_trials_does_not_matter() -> None:
    trials = whole_grid()
    expected = table(trials)
    assert [len(expected[key]) for key in ("cells", "efficiency", "returns", "claims")] == [21, 18, 32, 5]
    for seed in range(3):
        random.Random(seed).shuffle(trials)
        assert json.dumps(table(iter(trials))) == json.dumps(expected)


def test_trials_that_differ_in_nothing_are_not_mixed() -> None:
    trials = [trial("none", 2, 1, 0, {"name": name}, iou=0.5) for name in ("none-ab-s0", "none-cd-s0")]
    with pytest.raises(ValueError, match="none-ab-s0 and none-cd-s0"):
        table(trials)


def test_what_is_given_is_passed_on() -> None:
    reference = {"name": "copy", "kind": "baseline", "scores": []}
    results = table([], references=[reference])
    assert (results["version"], results["seconds"], results["config"]) == (1, 60.0, {"out": "sweep"})
    assert (results["tasks"], results["lower_is_better"], results["references"]) == (TASKS, LOWER, [reference])
    assert results["left_out"] == [{"name": "linear-L2-p1-s0", "reason": "repeats none-L2-p1-s0"}]


def percent(logarithm: float) -> float:
    """The gain of a ratio."""
    return 100 * float(np.expm1(logarithm))


# --- claims ----------------------------------------------------------------------------------------------------------


def test_every_verdict_by_hand() -> None:
    trials = [
        *by_seed("none", 2, 1, iou=[0.75, 0.75, 0.5], abs_rel=[0.75, 0.5, 0.75]),
        *by_seed("linear", 4, 1, iou=[0.5, 0.5, 0.25], abs_rel=[0.5, 0.75, 0.75]),
        *by_seed("diffusion", 4, 1, iou=[1.0, 1.0, 0.75], abs_rel=[0.5, 0.25, 0.5]),
    ]
    results = table(trials)
    found = {
        key: [(row["task"], row["metric"], row["mean"], row["verdict"]) for row in claim_of(results, key)["rows"]]
        for key in ("diffusion_none", "linear_none", "diffusion_linear")
    }
    assert found == {
        "diffusion_none": [
            ("segmentation", "iou", 0.25, "holds"), ("depth", "abs_rel", -0.25, "holds"),
        ],
        "linear_none": [
            ("segmentation", "iou", -0.25, "does not hold"), ("depth", "abs_rel", 0.0, "not significant"),
        ],
        "diffusion_linear": [
            ("segmentation", "iou", 0.5, "holds"), ("depth", "abs_rel", -0.25, "not significant"),
        ],
    }  # fmt: skip
    # By seed: IoU 4/3, 4/3, 3/2 times; A.Rel smaller by 3/2, 2, 3/2.
    logarithms = np.log([4 / 3 * 3 / 2, 4 / 3 * 2, 3 / 2 * 3 / 2]) / 2
    half = 4.302653 * logarithms.std(ddof=1) / 3**0.5
    overall = claim_of(results, "diffusion_none")["overall"]
    assert overall == {
        "gain_percent": pytest.approx(percent(logarithms.mean())),
        "low": pytest.approx(percent(logarithms.mean() - half), rel=1e-5),
        "high": pytest.approx(percent(logarithms.mean() + half), rel=1e-5), "seeds": 3, "verdict": "holds",
    }  # fmt: skip
    # Where one claim's overall gain is of IoU 2/3, 2/3, 1/2 and A.Rel 3/2, 2/3, 1.
    overall = claim_of(results, "linear_none")["overall"]
    assert overall["gain_percent"] == pytest.approx(percent(np.log([1, 4 / 9, 1 / 2]).mean() / 2))
    assert overall["verdict"] == "not significant"


def test_differences_are_of_the_same_seed() -> None:
    """What all methods share of a seed's luck is no noise of their difference."""
    luck = [0.0, 0.25, 0.5, 0.125]
    none = by_seed("none", 2, 1, iou=luck)
    diffusion = by_seed("diffusion", 4, 1, iou=[value + 0.0625 for value in luck])
    (row,) = claim_of(table(none + diffusion), "diffusion_none")["rows"]
    assert (row["mean"], row["low"], row["high"], row["seeds"]) == (0.0625, 0.0625, 0.0625, 4)
    swapped = [one | {"seed": one["seed"] ^ 1} for one in diffusion]
    (row,) = claim_of(table(none + swapped), "diffusion_none")["rows"]
    assert row["verdict"] == "not significant"


def test_only_seeds_that_both_have_are_compared() -> None:
    none = by_seed("none", 2, 1, iou=[0.5, 0.5, None])
    diffusion = by_seed("diffusion", 4, 1, iou=[None, 1.0, 0.75])
    claim = claim_of(table(none + diffusion), "diffusion_none")
    assert [(row["mean"], row["low"], row["seeds"]) for row in claim["rows"]] == [(0.5, None, 1)]
    apart = claim_of(table(none[:1] + diffusion[1:]), "diffusion_none")
    assert (apart["rows"], apart["overall"]) == ([], None)


def test_one_seed_is_never_significant() -> None:
    results = table([trial("none", 2, 1, 0, iou=0.125), trial("diffusion", 4, 1, 0, iou=1.0)])
    claim = claim_of(results, "diffusion_none")
    (row,) = claim["rows"]
    assert (row["mean"], row["low"], row["high"], row["seeds"]) == (0.875, None, None, 1)
    assert row["verdict"] == "not significant"
    assert claim["overall"] == {
        "gain_percent": pytest.approx(700.0), "low": None, "high": None, "seeds": 1, "verdict": "not significant",
    }  # fmt: skip
    assert [(entry["gain_percent"], entry["low"], entry["high"]) for entry in results["efficiency"]] == [
        (pytest.approx(700.0), None, None)
    ]


def test_equal_scores_are_no_difference() -> None:
    results = table(by_seed("none", 2, 1, iou=[0.5, 0.25]) + by_seed("linear", 4, 1, iou=[0.5, 0.25]))
    claim = claim_of(results, "linear_none")
    assert [(row["low"], row["high"], row["verdict"]) for row in claim["rows"]] == [(0.0, 0.0, "not significant")]
    assert claim["overall"]["verdict"] == "not significant"


def test_a_metric_of_which_less_is_better_mirrors_every_verdict_and_gain() -> None:
    # Large differences at some places, so that all verdicts occur.
    offset = {"none": 2.0, "linear": 1.0, "diffusion": 4.0}
    trials = [
        one | {"scores": [score | {"mean": score["mean"] + offset[one["method"]]} for score in one["scores"]]}
        for one in whole_grid()
    ]
    plain, mirrored = table(trials, lower=[]), table(trials, lower=["iou", "abs_rel"])
    opposite = {"holds": "does not hold", "does not hold": "holds", "not significant": "not significant"}
    seen = set()
    for claim, other in zip(plain["claims"], mirrored["claims"], strict=True):
        for row, back in zip(claim["rows"], other["rows"], strict=True):
            seen.add(row["verdict"])
            assert back == row | {"verdict": opposite[row["verdict"]]}
        ours, theirs = claim["overall"], other["overall"]
        # What is a third less seen from one side is a half more from the other.
        inverse = [percent(-np.log1p(ours[key] / 100)) for key in ("gain_percent", "high", "low")]
        assert [theirs["gain_percent"], theirs["low"], theirs["high"]] == pytest.approx(inverse)
        assert theirs["verdict"] == opposite[ours["verdict"]]
    assert seen == set(opposite)


def test_a_score_and_its_inverse_gain_the_same() -> None:
    """Less of 1 / x is more of x: whichever of two ways a metric is written, the gain is one."""
    trials = whole_grid()
    inverse = [
        one
        | {"scores": [score | {"mean": 1 / score["mean"]} for score in one["scores"] if score["metric"] != PERPLEXITY]}
        for one in trials
    ]
    plain, other = table(trials, lower=[]), table(inverse, lower=["iou", "abs_rel"])
    for key in ("efficiency", "returns"):
        assert [entry["gain_percent"] for entry in other[key]] == pytest.approx(
            [entry["gain_percent"] for entry in plain[key]]
        )
    for ours, theirs in zip(plain["claims"], other["claims"], strict=True):
        assert theirs["overall"] == ours["overall"] | {
            key: pytest.approx(ours["overall"][key]) for key in ("gain_percent", "low", "high")
        }


def test_what_each_claim_compares() -> None:
    forms = [
        ("none", 2, 1), ("none", 2, 3), ("linear", 3, 1), ("linear", 4, 1), ("diffusion", 3, 1), ("diffusion", 4, 1),
        ("diffusion", 6, 1), ("diffusion", 6, 2), ("diffusion", 4, 3),
    ]  # fmt: skip
    results = table(trial(*form, 0, iou=0.5) for form in forms)

    def label(method: str, length: int, pairs: int) -> str:
        return f"{method} L={length}, {pairs} pairs"

    none_1, none_3 = label("none", 2, 1), label("none", 2, 3)
    assert compared(results, "diffusion_none") == [
        (label("diffusion", 3, 1), none_1), (label("diffusion", 4, 1), none_1), (label("diffusion", 4, 3), none_3),
        (label("diffusion", 6, 1), none_1),
    ]  # fmt: skip
    assert compared(results, "linear_none") == [(label("linear", 3, 1), none_1), (label("linear", 4, 1), none_1)]
    assert compared(results, "diffusion_linear") == [
        (label("diffusion", 3, 1), label("linear", 3, 1)), (label("diffusion", 4, 1), label("linear", 4, 1)),
    ]  # fmt: skip
    assert compared(results, "longer") == [(label("diffusion", 6, 1), label("diffusion", 3, 1))]
    assert compared(results, "pairs") == [
        (none_3, none_1), (label("diffusion", 4, 3), label("diffusion", 4, 1)),
        (label("diffusion", 6, 2), label("diffusion", 6, 1)),
    ]  # fmt: skip


@pytest.mark.parametrize("more", [{"tasks": ["segmentation"]}, {"scale": "7b"}, {"fields": {"lora.rank": 8}}])
def test_nothing_is_compared_with_what_differs_elsewhere(more: dict[str, Any]) -> None:
    trials = [
        *by_seed("none", 2, 1, iou=[0.25, 0.25]),
        *(one | more for one in by_seed("none", 2, 2, iou=[0.5, 0.5])),
        *(one | more for one in by_seed("linear", 4, 1, iou=[0.5, 0.5])),
    ]
    results = table(trials)
    assert all(claim["rows"] == [] and claim["overall"] is None for claim in results["claims"])
    assert results["returns"] == []
    gains = [(entry["cell"], entry["gain_percent"]) for entry in results["efficiency"]]
    assert gains == [("linear L=4, 1 pairs", 0.0)]  # over no frames of 2 pairs, all else equal


def test_without_a_cell_of_no_frames_only_the_others_are_compared() -> None:
    results = table(one for one in whole_grid() if one["method"] != "none")
    assert results["efficiency"] == []
    tried = [claim["key"] for claim in results["claims"] if claim["overall"] is not None]
    assert tried == ["diffusion_linear", "longer", "pairs"]


def test_a_task_without_a_relative_gain_is_left_out_of_its_seed() -> None:
    none = by_seed("none", 2, 1, iou=[0.0, 0.25], abs_rel=[0.5, 0.5])
    diffusion = by_seed("diffusion", 4, 1, iou=[0.5, 0.5], abs_rel=[0.25, 0.5])
    claim = claim_of(table(none + diffusion), "diffusion_none")
    # Of 2 times (A.Rel alone), and 2 times and even.
    assert claim["overall"]["gain_percent"] == pytest.approx(percent(0.75 * np.log(2)))
    assert [row["mean"] for row in claim["rows"]] == [0.375, -0.125]  # the rows keep it
    zero = claim_of(table(by_seed("none", 2, 1, iou=[0.0, 0.0]) + diffusion), "diffusion_none")
    assert (len(zero["rows"]), zero["overall"]) == (1, None)


# --- gains against context -------------------------------------------------------------------------------------------


def test_efficiency_is_against_no_frames_of_as_many_pairs_or_of_the_fewest() -> None:
    trials = [
        *by_seed("none", 2, 1, iou=[0.5, 0.5], abs_rel=[0.5, 0.5]),
        *by_seed("none", 2, 2, iou=[0.25, 0.25], abs_rel=[0.5, 0.5]),
        *by_seed("diffusion", 4, 2, iou=[0.5, 0.75], abs_rel=[0.25, 0.5]),
        *by_seed("diffusion", 4, 3, iou=[0.75, 0.75], abs_rel=[0.5, 0.5]),
    ]
    first, second = table(trials)["efficiency"]
    # Over none of 2 pairs: IoU 2 and 3 times; A.Rel half, and even.
    logarithms = np.log([2 * 2, 3]) / 2
    half = stats.t.ppf(0.975, 1) * abs(logarithms[0] - logarithms[1]) / 2
    assert first == {
        "cell": "diffusion L=4, 2 pairs", "context_tokens": 768,
        "gain_percent": pytest.approx(percent(logarithms.mean())),
        "low": pytest.approx(percent(logarithms.mean() - half)),
        "high": pytest.approx(percent(logarithms.mean() + half)),
    }  # fmt: skip
    gain = pytest.approx(percent(np.log(1.5) / 2))
    assert second == {
        "cell": "diffusion L=4, 3 pairs", "context_tokens": 1024, "gain_percent": gain, "low": gain, "high": gain,
    }  # fmt: skip


def test_returns_go_from_one_value_to_the_next_and_start_without_frames() -> None:
    scores = {("none", 2, 1): 0.25, ("diffusion", 4, 1): 0.5, ("diffusion", 8, 1): 0.75, ("diffusion", 8, 3): 1.5}
    results = table(trial(*form, 0, iou=value) for form, value in scores.items())
    near, keys = pytest.approx, ("axis", "first", "second", "from", "to", "gain_percent", "per_added", "low")
    assert [tuple(entry[key] for key in keys) for entry in results["returns"]] == [
        ("length", "none L=2, 1 pairs", "diffusion L=4, 1 pairs", 2, 4, near(100.0), near(50.0), None),
        ("length", "diffusion L=4, 1 pairs", "diffusion L=8, 1 pairs", 4, 8, near(50.0), near(12.5), None),
        ("pairs", "diffusion L=8, 1 pairs", "diffusion L=8, 3 pairs", 1, 3, near(100.0), near(50.0), None),
    ]
    assert [[entry[key] for key in ("method", "length", "pairs", "scale")] for entry in results["returns"]] == [
        ["diffusion", 4, 1, "nano"], ["diffusion", 8, 1, "nano"], ["diffusion", 8, 3, "nano"],
    ]  # fmt: skip


# --- CSV -------------------------------------------------------------------------------------------------------------


def test_the_csv_says_what_the_table_says() -> None:
    fields = {"optimizer.learning_rate": 0.001, "lora.targets": ["q_proj", "v_proj"]}
    trials = [
        *whole_grid(),
        trial("none", 2, 1, 0, {"label": 'a, "b"\n', "tasks": ("depth", "edges"), "fields": fields}, abs_rel=None),
    ]
    reference_score = {"task": "depth", "metric": "abs_rel", "mean": 0.5, "low": 0.25, "high": None, "episodes": 4}
    references = [{"name": "copy", "kind": "baseline", "method": "none", "length": 2, "scores": [reference_score]}]
    results = table(trials, references=references)
    lines = list(csv.DictReader(io.StringIO(to_csv(SweepResults.model_validate(results)))))
    expected = [(cell, score) for cell in results["cells"] for score in cell["scores"]]
    assert len(lines) == len(expected) + 1
    for line, (cell, score) in zip(lines, expected, strict=False):
        assert (line["label"], line["method"], line["scale"]) == (cell["label"], cell["method"], cell["scale"])
        assert (line["task"], line["metric"]) == (score["task"], score["metric"])
        assert line["tasks"].split("+") == (cell["tasks"] or [""])
        assert json.loads(line["fields"]) == cell["fields"]
        for key in ("mean", "low", "high", "seeds"):
            assert (float(line[key]) if line[key] else None) == score[key]
        for key in ("length", "pairs", "context_tokens", "tokens", "train_seconds", "gpu_hours"):
            assert float(line[key]) == cell[key]
    about = {key: value for key, value in lines[-1].items() if value}
    assert about == {"label": "copy", "task": "depth", "metric": "abs_rel", "mean": "0.5", "low": "0.25"}
