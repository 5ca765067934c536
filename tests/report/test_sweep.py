from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from covray.report.formatting import numbers
from covray.report.sweep import write_sweep_page
from covray.sweeps.records import SweepResults
from tests.support.metrics import LOWER_IS_BETTER, METRICS
from tests.support.pages import Page
from tests.support.sweeps import tabulate

HOSTILE = "\"'></td></svg><script>alert(1)</script><img src=http://evil/x onerror=alert(2)> &"
OF_MODELS = ("perplexity_own", "perplexity_reference", "frame_path")
Writer = Callable[[dict[str, Any]], Page]


def sweep_results(
    tasks: Iterable[str] = ("depth",),
    methods: Iterable[str] = ("none", "linear", "diffusion"),
    lengths: Iterable[int] = (3, 4, 8),
    pairs: Iterable[int] = (1, 2),
    seeds: Sequence[int] = (0, 1, 2),
    fields: Sequence[dict[str, Any]] = ({},),
) -> dict[str, Any]:
    """The results of a sweep in which every figure is another one."""
    generator = np.random.default_rng(0)
    about = {
        task: {"episodes": 40, "primary": METRICS[task][0], "metrics": [*METRICS[task], *OF_MODELS]} for task in tasks
    }

    def scores(metrics: Callable[[str], Iterable[str]]) -> list[dict[str, Any]]:
        found = [(task, metric, generator.uniform(0.2, 0.8)) for task in about for metric in metrics(task)]
        return [
            {"task": task, "metric": metric, "mean": mean, "low": mean - 0.05, "high": mean + 0.05, "episodes": 40}
            for task, metric, mean in found
        ]

    forms = [
        (method, length, number, field)
        for method in methods
        for length in ((2,) if method == "none" else lengths)
        for number in pairs
        for field in fields
    ]
    trials = [
        {
            "name": f"{method}-L{length}-p{number}-{index}-s{seed}", "method": method, "length": length,
            "label": f"{method} L={length}, {number} pairs {field or ''}", "pairs": number, "tasks": None,
            "scale": "nano", "fields": field, "seed": seed, "status": "finished", "error": None,
            "train_seconds": 60.0, "evaluate_seconds": 30.0, "steps": 10, "tokens": 1000, "gpus": 0.0,
            "context_tokens": 64 * length * (number + 1), "gpu_hours": None,
            "validation": [{"tokens": 500 * at, "answer_perplexity": 900.0 / 10**at + seed} for at in range(3)],
            "scores": scores(lambda task: about[task]["metrics"]),
        }
        for index, (method, length, number, field) in enumerate(forms)
        for seed in seeds
    ]  # fmt: skip
    references = [
        {"name": name, "kind": kind, "method": None, "length": None, "pairs": None, "about": f"what {name} is",
         "scores": scores(METRICS.__getitem__)}
        for name, kind in (("copy", "baseline"), ("vqgan", "ceiling"))
    ]  # fmt: skip
    config = {"out": "s3://lab/sweeps/ablation/", "data": "s3://lab/chains", "stopping": "none"}
    lower = sorted({*LOWER_IS_BETTER, *OF_MODELS[:2]})
    return tabulate(trials, references, about, lower, [], config, 100.0)


@pytest.fixture
def written(tmp_path: Path) -> Writer:
    """Writes a page and reads it, and checks what is true of every page."""

    def write(results: dict[str, Any]) -> Page:
        record = SweepResults.model_validate(results)
        before = record.model_copy(deep=True)
        write_sweep_page(record, str(tmp_path / "index.html"))
        assert str(record) == str(before), "the page only reads"
        source = (tmp_path / "index.html").read_text()
        page = Page(source)
        page.require_self_contained()
        targets = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        links = [(attributes["href"] or "").removeprefix("#") for tag, attributes in page.elements if tag == "a"]
        assert len(set(targets)) == len(targets)
        assert set(links) <= set(targets)
        drawn = [value for _, attributes in page.elements for name, value in attributes.items() if name in PLACES]
        assert not [value for value in drawn if "nan" in str(value) or "inf" in str(value)]
        return page

    return write


PLACES = ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "points")


def test_every_score_of_every_cell_and_reference_appears_with_its_interval(written: Writer) -> None:
    results = sweep_results(METRICS, lengths=(4,), pairs=(1,))
    page = written(results)
    for row in [*results["cells"], *results["references"]]:
        for score in row["scores"]:
            mean, low, high = numbers(score["mean"], score["low"], score["high"])
            assert mean in page.texts, score
            assert f"[{low}, {high}]" in page.texts, score


def test_the_best_trained_row_is_bold_and_references_do_not_compete(written: Writer) -> None:
    results = sweep_results(METRICS)
    for reference in results["references"]:
        for score in reference["scores"]:
            score["mean"] = 0.001 if score["metric"] in results["lower_is_better"] else 0.999
    expected = []
    for task, about in results["tasks"].items():
        for metric in about["metrics"]:
            means = [
                score["mean"]
                for cell in results["cells"]
                for score in cell["scores"]
                if (score["task"], score["metric"]) == (task, metric)
            ]
            best = min(means) if metric in results["lower_is_better"] else max(means)
            times = 2 if metric == about["primary"] else 1  # in the ablation table too
            expected += [f"{best:.3f}"] * (times if metric != "frame_path" else 0)
    bold = [text for text in written(results).texts_in("b") if text.startswith("0.")]
    assert sorted(bold) == sorted(expected)


@pytest.mark.parametrize("key", ["data", "manifest"])
def test_the_head_says_what_the_trials_were_trained_on(written: Writer, key: str) -> None:
    results = sweep_results()
    results["config"] = {"data": None, "manifest": None} | {key: "s3://lab/source"}
    assert "s3://lab/source" in written(results).texts_in("dd")


@pytest.mark.parametrize("verdict", ["holds", "does not hold", "not significant", "not tried"])
def test_a_claim_says_what_the_paper_says_and_its_verdict(written: Writer, verdict: str) -> None:
    results = sweep_results()
    row = {"first": "one cell", "second": "another", "task": "depth", "metric": "abs_rel", "mean": -0.0125,
           "low": -0.0131, "high": -0.0119, "seeds": 3, "verdict": verdict}  # fmt: skip
    overall = {"gain_percent": 4.321, "low": -1.5, "high": 10.25, "seeds": 3, "verdict": verdict}
    tried = verdict != "not tried"
    claim = {"key": "k", "claim": "Frames help", "paper": "IoU 1 -> 2", "rows": [row] * tried, "overall": None}
    page = written(results | {"claims": [claim | {"overall": overall} if tried else claim]})
    texts = page.texts
    assert "Frames help" in texts
    assert "Paper: IoU 1 -> 2" in texts
    (badge,) = [text for text in page.texts_in("span") if text == verdict]
    assert badge
    assert ("+4.32 %" in texts) is tried
    assert ("[−1.50, +10.25] %, 3 seeds" in texts) is tried
    assert ([text for text in page.texts_in("td") if "−0.0" in text] == ["−0.0125", "[−0.0131, −0.0119]"]) is tried


def test_what_failed_stands_first_with_the_first_line_of_its_error(written: Writer) -> None:
    results = sweep_results(pairs=(1,))
    results["trials"][3] |= {"status": "failed", "error": "out of memory\nTraceback", "steps": None, "tokens": None}
    results["trials"][5] |= {"status": "stopped"}
    results["left_out"] = [{"name": "diffusion-L16", "reason": "2,048 tokens do not fit"}]
    page = written(results)
    states = [text for text in page.texts_in("td") if text in ("failed", "stopped", "finished")]
    assert states == ["failed", "stopped", *["finished"] * (len(results["trials"]) - 2)]
    assert "out of memory" in page.texts_in("div")
    assert not [text for text in page.texts if "Traceback" in text]
    assert {"diffusion-L16", "2,048 tokens do not fit"} <= set(page.texts_in("td"))
    assert f"{len(results['trials']) - 2} of {len(results['trials'])}" in page.texts_in("b")


def _chart(page: Page, label: str) -> list[tuple[str, dict[str, str | None]]]:
    """The elements of the first chart whose label starts so."""
    starts = [index for index, (tag, _) in enumerate(page.elements) if tag == "svg"]
    for start, end in zip(starts, [*starts[1:], len(page.elements)], strict=True):
        if (page.elements[start][1].get("aria-label") or "").startswith(label):
            return page.elements[start:end]
    raise AssertionError(f"no chart {label}")


def _places(elements: Iterable[tuple[str, dict[str, str | None]]], css: str, name: str) -> list[float]:
    return [float(attributes[name] or "") for _, attributes in elements if attributes.get("class") == css]


def test_charts_are_to_scale(written: Writer) -> None:
    results = sweep_results(methods=("diffusion",), pairs=(1,), seeds=(0,), lengths=(3, 4, 6, 8))
    results["trials"] = []
    rows = [score for cell in results["cells"] for score in cell["scores"] if score["metric"] == "abs_rel"]
    for row in rows:
        row["low"], row["high"] = row["mean"] - 0.01, row["mean"] + 0.03
    chart = _chart(written(results), "Depth, AbsRel (less is better) against chain length, images")
    marks = [attributes for tag, attributes in chart if tag == "circle"]
    ends = _places(chart, "whisker", "y1")[::3] + _places(chart, "whisker", "y2")[::3]
    (line,) = [attributes["points"] for tag, attributes in chart if tag == "polyline"]
    assert line == " ".join(f"{mark['cx']},{mark['cy']}" for mark in marks), "the line goes through its marks"
    values = [row["mean"] for row in rows] + [row["low"] for row in rows] + [row["high"] for row in rows]
    places = [float(mark["cy"] or "") for mark in marks] + ends
    slope, offset = np.polyfit(values, places, 1)
    assert slope < 0, "more is higher"
    assert np.allclose(slope * np.array(values) + offset, places, atol=0.11)
    across = np.polyfit([3, 4, 6, 8], [float(mark["cx"] or "") for mark in marks], 1, full=True)
    assert across[0][0] > 0
    assert across[1][0] < 0.1


def test_a_very_wide_interval_does_not_flatten_the_rest_and_is_left_open(written: Writer) -> None:
    results = sweep_results(methods=("diffusion",), pairs=(1,), lengths=(3, 4, 8))
    rows = [score for cell in results["cells"] for score in cell["scores"] if score["metric"] == "abs_rel"]
    for row, mean, wide in zip(rows, (0.30, 0.31, 0.34), (0.001, 50.0, 0.001), strict=True):
        row |= {"mean": mean, "low": mean - wide, "high": mean + wide}
    chart = _chart(written(results), "Depth, AbsRel")
    heights = [float(attributes["cy"] or "") for tag, attributes in chart if tag == "circle"]
    frame = _places(chart, "grid", "y1")
    assert max(heights) - min(heights) > 0.2 * (max(frame) - min(frame))
    assert len(_places(chart, "whisker", "y1")) == 3 + 4, "three whiskers, and caps of the two that end on the axis"
    assert min(frame) <= min(_places(chart, "whisker", "y1"))


def test_methods_differ_in_shape_as_well_as_in_colour(written: Writer) -> None:
    page = written(sweep_results())
    shapes: dict[str, set[int]] = {}
    css = ""
    for tag, attributes in page.elements:
        names = attributes.get("class") or ""
        css = names if names.startswith("m-") else css
        if names == "mark":
            shapes.setdefault(css, set()).add(len((attributes["points"] or "").split()) if tag == "polygon" else 0)
    assert shapes == {"m-none": {4}, "m-linear": {3}, "m-diffusion": {0}}


@pytest.mark.parametrize(
    ("change", "shown", "absent"),
    [
        ({}, ["Score and chain length", "Score and example pairs", "Diminishing returns: frames"], []),
        ({"lengths": (4,)}, ["Score and example pairs", "Information efficiency"], ["Score and chain length"]),
        ({"pairs": (1,)}, ["Score and chain length"], ["Score and example pairs", "Diminishing returns: pairs"]),
        ({"methods": ("none",)}, ["Score and example pairs"], ["Score and chain length", "Information efficiency"]),
    ],
)
def test_a_plot_with_nothing_to_show_is_left_out(
    written: Writer, change: dict[str, Any], shown: list[str], absent: list[str]
) -> None:
    heads = written(sweep_results(**change)).texts_in("h3")
    assert set(shown) <= set(heads)
    assert not set(absent) & set(heads)


def test_lines_join_only_what_is_alike_in_everything_else(written: Writer) -> None:
    rates = [{"optimizer.learning_rate": rate} for rate in (0.1, 0.2)]
    page = written(sweep_results(fields=rates))
    names = [text for text in page.texts_in("summary") if text.startswith("1 pair")]
    assert names == [f"1 pair, optimizer.learning_rate {rate}" for rate in (0.1, 0.2)] * 2  # of scores and perplexity
    lines = [attributes for tag, attributes in _chart(page, "Depth, AbsRel") if tag == "polyline"]
    assert [len((line["points"] or "").split()) for line in lines] == [3, 3], "linear and diffusion at three lengths"


def test_perplexities_of_very_different_size_stand_on_a_logarithmic_axis(written: Writer) -> None:
    results = sweep_results(methods=("diffusion",), lengths=(4,), pairs=(1,), seeds=(0,))
    chart = _chart(written(results), "1 pair, answer perplexity")
    (line,) = [attributes["points"] or "" for tag, attributes in chart if tag == "polyline"]
    heights = [float(point.split(",")[1]) for point in line.split()]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)  # 900, 90, 9


def test_hostile_text_stays_text(written: Writer) -> None:
    results = sweep_results(pairs=(1,), lengths=(3, 4))
    results["config"] = {"out": HOSTILE, "data": HOSTILE, HOSTILE: [HOSTILE], "stopping": HOSTILE}
    for cell in results["cells"]:
        cell |= {"label": cell["label"] + HOSTILE, "scale": HOSTILE + cell["label"], "fields": {HOSTILE: HOSTILE}}
    results["cells"][0]["method"] = HOSTILE
    for row in results["efficiency"]:
        row["cell"] += HOSTILE
    for row in results["returns"]:
        row |= {"first": HOSTILE, "second": row["second"] + HOSTILE}
    for trial in results["trials"]:
        trial |= {"name": HOSTILE, "label": HOSTILE, "fields": {HOSTILE: HOSTILE}, "error": HOSTILE, "scale": HOSTILE}
        trial |= {"method": HOSTILE, "status": "failed"}
    results["references"][0] |= {"name": HOSTILE, "about": HOSTILE}
    results["left_out"] = [{"name": HOSTILE, "reason": HOSTILE}]
    results["tasks"][HOSTILE] = {"episodes": 1, "primary": HOSTILE, "metrics": [HOSTILE]}
    for claim in results["claims"]:
        claim |= {"claim": HOSTILE, "paper": HOSTILE}
        for row in claim["rows"]:
            row |= {"first": HOSTILE, "second": HOSTILE, "task": HOSTILE, "metric": HOSTILE}
    page = written(results)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert page.texts.count(HOSTILE) > 50


@pytest.mark.parametrize(
    ("place", "key"), [("trials", "status"), ("claims", "overall.verdict"), ("claims", "rows.0.verdict")]
)
def test_words_that_choose_a_style_are_of_a_fixed_set(place: str, key: str) -> None:
    results = sweep_results(pairs=(1,), lengths=(3, 4))
    entry = results[place][0]
    *path, last = key.split(".")
    for part in path:
        entry = entry[int(part) if part.isdigit() else part]
    entry[last] = HOSTILE
    with pytest.raises(ValidationError, match=f"{place}.0.{key}"):
        SweepResults.model_validate(results)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), 0.0, -1e300, 1e300])
def test_degenerate_figures_break_nothing(written: Writer, value: float | None) -> None:
    results = sweep_results(pairs=(1, 2), lengths=(3, 4))
    for row in [*results["cells"], *results["references"]]:
        for score in row["scores"]:
            score |= {"mean": value, "low": value, "high": value}
    written(results)
    for key in ("efficiency", "returns"):
        for row in results[key]:
            row |= {"gain_percent": value, "low": value, "high": value}
            row |= {"per_added": value} if key == "returns" else {}
    for claim in results["claims"]:
        for row in [*claim["rows"], claim["overall"]]:
            row |= {"mean": value, "gain_percent": value, "low": value, "high": value}
    for trial in results["trials"]:
        trial["validation"] = [{"tokens": at, "answer_perplexity": value} for at in range(3)]
    written(results)


def test_a_sweep_of_nothing_of_one_and_of_many_is_a_page(written: Writer) -> None:
    nothing = sweep_results(tasks=(), methods=())
    page = written(nothing | {"config": {}, "claims": [], "references": []})
    assert "Plots" not in page.texts
    unfinished = sweep_results()
    for trial in unfinished["trials"]:
        trial |= {"status": "waiting", "scores": [], "validation": [], "tokens": None, "steps": None}
        trial |= {"train_seconds": None, "evaluate_seconds": None}
    keys = ("tasks", "lower_is_better", "left_out", "config", "seconds")
    none_yet = tabulate(unfinished["trials"], [], **{key: unfinished[key] for key in keys})
    assert "No trial has finished yet." in written(none_yet).texts
    one = sweep_results(methods=("diffusion",), lengths=(4,), pairs=(1,), seeds=(0,))
    assert any("over episodes, as there is one seed" in text for text in written(one).texts)
    many = sweep_results(lengths=range(3, 14), pairs=(1, 2, 3), seeds=(0, 1, 2))
    assert len(many["trials"]) > 200
    written(many)


def test_cells_that_lack_a_task_or_a_seed_say_so(written: Writer) -> None:
    trials = sweep_results(("depth", "edges"), pairs=(1,))
    for trial in trials["trials"]:
        if trial["method"] == "linear":
            trial["scores"] = [score for score in trial["scores"] if score["task"] == "depth"]
        if trial["method"] == "none" and trial["seed"] == 2:
            trial["status"] = "failed"
    keys = ("trials", "references", "tasks", "lower_is_better", "left_out", "config", "seconds")
    page = written(tabulate(**{key: trials[key] for key in keys}))
    metrics = len(trials["tasks"]["edges"]["metrics"])
    everything = sum(len(about["metrics"]) for about in trials["tasks"].values())
    assert page.texts_in("small").count("2 seeds") == 2 + everything
    assert page.texts_in("td").count("–") >= 3 * (1 + metrics)  # three lengths


def test_many_forms_of_the_untuned_backbone_stay_out_of_the_first_table(written: Writer) -> None:
    results = sweep_results()
    for count, times in ((3, 2), (20, 1)):
        named = [results["references"][0] | {"name": f"untuned {index}", "kind": "untuned"} for index in range(count)]
        heads = written(results | {"references": named}).texts_in("th")
        assert heads.count("untuned 0") == times


@pytest.mark.parametrize(
    ("tokens", "text"), [(0, "0"), (999, "999"), (172_032, "172k"), (999_951, "1M"), (1_234_567, "1.23M"), (5e9, "5B")]
)
def test_counts_have_three_digits(written: Writer, tokens: int, text: str) -> None:
    results = sweep_results(methods=("none",), pairs=(1,), seeds=(0,))
    results["trials"][0]["tokens"] = int(tokens)
    assert text in written(results).texts_in("b")
