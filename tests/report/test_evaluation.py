from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covray.evaluation.records import EvaluationResults
from covray.report.evaluation import Strip, write_evaluation_page
from tests.support.metrics import LOWER_IS_BETTER, METRICS, SET_METRICS
from tests.support.pages import Page

HOSTILE = "</td><script>alert(1)</script><img src=http://evil/x onerror=alert(2)> & \"'"
OF_MODELS = ("perplexity_own", "perplexity_reference", "frame_psnr", "frame_path", "frame_step_variation")
SUBJECTS = (("copy", "baseline"), ("untuned", "untuned"), ("tuned", "adapter"), ("vqgan", "ceiling"))
Writer = Callable[..., Page]


def _subject(name: str, kind: str) -> dict[str, Any]:
    reads = kind not in ("baseline", "ceiling")
    method, length, pairs = ("diffusion", 4, 3) if reads else (None, None, None)
    return {
        "name": name, "kind": kind, "method": method, "length": length, "pairs": pairs, "about": f"what {name} is",
    }  # fmt: skip


def _results(*tasks: str, subjects: tuple[tuple[str, str], ...] = SUBJECTS) -> dict[str, Any]:
    """An evaluation in which every figure is another one, and the later subject has the larger."""
    generator = np.random.default_rng(0)
    about, scores = {}, []
    for task in tasks:
        metrics = [*METRICS[task], *SET_METRICS.get(task, ()), *OF_MODELS]
        about[task] = {"episodes": 40, "primary": metrics[0], "metrics": metrics, "absent": {}, "rejected": 0}
        for metric in metrics:
            means = np.sort(generator.uniform(0.1, 0.9, len(subjects)))
            for (name, _), mean in zip(subjects, means, strict=True):
                bounds = (None, None) if metric in SET_METRICS.get(task, ()) else (mean - 0.05, mean + 0.05)
                scores.append(_score(task, name, metric, mean, *bounds))
    return {
        "version": 1,
        "config": {"data": "s3://lab/scenes", "split": "test", "example_split": "train", "selection": "random",
                   "seed": 7, "sampling": {"temperature": 0.5, "top_k": None, "top_p": 1.0}},
        "fingerprints": {"codebook": "c0de" * 16},
        "seconds": 61.0,
        "subjects": [_subject(*subject) for subject in subjects],
        "tasks": about,
        "lower_is_better": [*LOWER_IS_BETTER, *OF_MODELS[:2], OF_MODELS[4]],
        "scores": scores,
        "differences": [],
        "failed": [],
    }  # fmt: skip


def _score(
    task: str, subject: str, metric: str, mean: float | None, low: float | None = None, high: float | None = None
) -> dict[str, Any]:
    return {"task": task, "subject": subject, "metric": metric, "mean": mean, "low": low, "high": high, "episodes": 40}


def _difference(metric: str, mean: float, p_value: float | None) -> dict[str, Any]:
    return {"task": "depth", "metric": metric, "first": "tuned", "second": "copy", "mean": mean, "low": mean - 0.1,
            "high": mean + 0.1, "p_value": p_value, "episodes": 40}  # fmt: skip


def _strip(subject: str, rank: Any, pair_id: int, level: int, frames: int, size: int = 8, task: str = "depth") -> Strip:
    def flat(green: int) -> np.ndarray:
        return np.full((size, size, 3), (level, green, pair_id), np.uint8)

    shown = [flat(100 + index) for index in range(frames)]
    return Strip(task, subject, rank, pair_id, level / 200, flat(1), shown, flat(200), flat(2))


@pytest.fixture
def written(tmp_path: Path) -> Writer:
    """Writes a page and reads it, and checks what is true of every page."""

    def write(results: dict[str, Any], *strips: Strip) -> Page:
        write_evaluation_page(EvaluationResults.model_validate(results), strips, str(tmp_path / "index.html"))
        page = Page((tmp_path / "index.html").read_text())
        page.require_self_contained()
        targets = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        links = [(attributes["href"] or "").removeprefix("#") for tag, attributes in page.elements if tag == "a"]
        assert len(set(targets)) == len(targets)
        assert set(links) <= set(targets)
        return page

    return write


def test_every_score_appears_with_its_interval(written: Writer) -> None:
    results = _results(*METRICS)
    texts = written(results).texts
    for row in results["scores"]:
        assert f"{row['mean']:.3f}" in texts, row
        if row["low"] is not None:
            assert f"[{row['low']:.3f}, {row['high']:.3f}]" in texts, row


def test_a_row_says_how_many_samples_an_answer_took(written: Writer) -> None:
    results = _results("depth")
    assert not any("samples" in text for text in written(results).texts)
    for subject in results["subjects"]:
        if subject["method"] is not None:
            subject["samples"] = 8
    expected = 2 * sum(subject["method"] is not None for subject in results["subjects"])  # overview and task
    page = written(results)
    assert sum("3 pairs · 8 samples" in text for text in page.texts) == expected


def test_the_best_is_bold_and_the_ceiling_is_no_competitor(written: Writer) -> None:
    results = _results(*METRICS)
    bold = written(results).texts_in("b")[5:]  # the first five are the large figures of the head
    expected = []
    for task, about in results["tasks"].items():
        for metric in about["metrics"]:
            best = "copy" if metric in results["lower_is_better"] else "tuned"
            (mean,) = [
                row["mean"]
                for row in results["scores"]
                if (row["task"], row["metric"], row["subject"]) == (task, metric, best)
            ]
            times = 2 if metric == about["primary"] else 1  # in the overview too
            expected += [f"{mean:.3f}"] * (times if metric != "frame_path" else 0)
    assert sorted(bold) == sorted(expected)


@pytest.mark.parametrize(
    ("metric", "mean", "p_value", "word"),
    [
        ("delta1", 0.2, 0.01, "better"),
        ("delta1", -0.2, 0.01, "worse"),
        ("abs_rel", 0.2, 0.01, "worse"),
        ("abs_rel", -0.2, 0.01, "better"),
        ("abs_rel", -0.2, 0.05, "not significant at 0.05"),
    ],
)
def test_a_difference_is_worded_by_what_is_better(
    written: Writer, metric: str, mean: float, p_value: float, word: str
) -> None:
    results = _results("depth") | {"differences": [_difference(metric, mean, p_value)]}
    cells = written(results).texts_in("td")
    verdicts = [cell for cell in cells if cell in ("better", "worse", "not significant at 0.05")]
    assert verdicts == [word]
    assert f"{mean:.3f}".replace("-", "−") in cells
    assert f"{p_value:.3f}" in cells


def test_hostile_text_stays_text(written: Writer) -> None:
    subjects = ((HOSTILE, "adapter"), ("long" * 500, "ceiling"))
    results = _results("depth", subjects=subjects)
    results["config"] |= {"data": HOSTILE, HOSTILE: HOSTILE, "split": HOSTILE}
    results["subjects"][0] |= {"about": HOSTILE, "method": HOSTILE}
    results["fingerprints"][HOSTILE] = HOSTILE
    results["tasks"]["depth"]["absent"] = {HOSTILE: HOSTILE, "lpips": HOSTILE}
    results["tasks"]["depth"]["metrics"] += [HOSTILE]
    results["differences"] = [_difference("abs_rel", 0.1, 0.2) | {"first": HOSTILE, "second": HOSTILE}]
    results["failed"] = [{"task": HOSTILE, "subject": HOSTILE, "pair_id": 1, "error": HOSTILE}]
    page = written(results, _strip(HOSTILE, "best", 3, 9, 1))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1
    assert tags.count("img") == 4
    assert page.texts.count(HOSTILE) >= 8


def test_strips_go_from_best_to_worst_and_from_query_to_label_to_the_pixel(written: Writer) -> None:
    strips = [
        _strip(subject, rank, pair_id, level, frames)
        for rank, pair_id in (("worst", 5), ("best", 9), ("median", 7))
        for subject, level, frames in (("tuned", 60, 2), ("copy", 30, 0))
    ]
    page = written(_results("depth"), *strips)
    shown = [picture[0, 0].tolist() for picture in page.pictures()]
    assert shown == [
        pixel
        for pair_id in (9, 7, 5)
        for pixel in ([30, 1, pair_id], [30, 200, pair_id], [60, 100, pair_id], [60, 101, pair_id],
                      [60, 200, pair_id], [30, 2, pair_id])
    ]  # fmt: skip
    classes = [attributes["class"] or "" for tag, attributes in page.elements if tag == "img"]
    assert all("small" in names for names in classes), "enlarged to the pixel"
    assert sum("answer" in names for names in classes) == len(strips)
    assert page.texts_in("h4") == ["Best", "Median", "Worst"]


def test_photographs_are_made_smaller_and_keep_their_shape(written: Writer) -> None:
    wide = np.zeros((300, 1200, 3), np.uint8)
    page = written(_results("depth"), Strip("depth", "copy", "best", 1, None, wide, [], wide, wide))
    assert {picture.shape for picture in page.pictures()} == {(128, 512, 3)}
    assert not [names for tag, names in page.elements if tag == "img" and "small" in (names["class"] or "")]


def test_the_plot_is_to_scale(written: Writer) -> None:
    results = _results("low_light")
    rows = [row for row in results["scores"] if row["metric"] == "psnr"]
    page = written(results)
    dots = [_percent(attributes["cx"]) for tag, attributes in page.elements if tag == "circle"]
    lines = [attributes for tag, attributes in page.elements if tag == "line"]
    whiskers = [(_percent(line["x1"]), _percent(line["x2"])) for line in lines if line.get("class") == "whisker"]
    *subjects, ceiling = rows
    values = [row["mean"] for row in subjects] + [bound for row in subjects for bound in (row["low"], row["high"])]
    places = dots + [end for whisker in whiskers for end in whisker]
    slope, offset = np.polyfit(values, places, 1)
    assert slope > 0
    assert np.allclose(slope * np.array(values) + offset, places, atol=0.02)
    ends = [_percent(line["x1"]) for line in lines if line["x1"] == line["x2"]]
    assert np.isclose(ends, slope * ceiling["mean"] + offset, atol=0.02).sum() == 1
    assert all(0 <= place <= 100 for place in places + ends)
    assert "PSNR, dB (more is better)" in page.texts


def _percent(text: str | None) -> float:
    assert text is not None
    return float(text.removesuffix("%"))


def test_what_is_absent_is_named_with_its_reason(written: Writer) -> None:
    results = _results("pose")
    results["tasks"]["pose"]["absent"] = {"lpips": "no weights at hand"}
    results["scores"] = [row for row in results["scores"] if row["metric"] != "lpips"]
    page = written(results)
    assert "LPIPS is absent: no weights at hand" in page.texts
    results["tasks"]["pose"]["absent"] = {}
    assert "LPIPS is absent: no weights at hand" not in written(results).texts


def test_failures_are_counted_and_the_first_are_shown(written: Writer) -> None:
    results = _results("depth")
    results["failed"] = [
        {"task": "depth", "subject": "tuned", "pair_id": index, "error": f"reason {index}"} for index in range(33)
    ]
    texts = written(results).texts
    assert [text for text in texts if text.startswith("reason")] == [f"reason {index}" for index in range(20)]
    assert "33 answers without scores, the first 20" in texts


def test_fewer_episodes_than_others_are_noted(written: Writer) -> None:
    results = _results("low_light")
    results["scores"][0]["episodes"] = 31
    assert written(results).texts.count("n = 31") == 2  # in the overview and in the task's table


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), 0.0])
def test_degenerate_figures_break_nothing(written: Writer, value: float | None) -> None:
    results = _results("depth", "edges")
    for row in results["scores"]:
        row |= {"mean": value, "low": value, "high": value}
    results["differences"] = [_difference("abs_rel", 0.0, None) | {"mean": value, "low": None, "high": None}]
    written(results, _strip("tuned", "best", 1, 7, 2))


def test_an_evaluation_of_nothing_and_of_much_is_a_page(written: Writer) -> None:
    nothing = _results(subjects=())
    assert written(nothing).pictures() == []
    assert written(nothing | {"config": {}, "fingerprints": {}}).pictures() == []
    written(_results("depth") | {"scores": []})
    many = tuple((f"run {index}", "adapter") for index in range(12))
    page = written(_results("depth", subjects=many) | {"differences": [_difference("abs_rel", 0.1, 0.2)] * 66})
    assert sum(tag == "circle" for tag, _ in page.elements) == 12
    assert not [names for tag, names in page.elements if tag == "details" and "open" in names], (
        "66 rows are folded away"
    )
