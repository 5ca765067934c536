"""Scores: by hand, against independent implementations, and finite whatever an answer looks like."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torchmetrics.functional import mean_absolute_percentage_error
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index
from torchmetrics.functional.image import structural_similarity_index_measure

from covray.errors import ConfigError
from covray.evaluation.metrics import lower_is_better
from covray.evaluation.scores import aggregate, score
from covray.tasks import TASKS, depth, edges, normals, pose, segmentation
from covray.tasks.base import Score
from covray.tasks.depth import depth_errors
from covray.tasks.edges import THRESHOLDS, edge_counts, f_measure
from covray.tasks.metrics import added_values
from covray.tasks.normals import angle_figures
from covray.tasks.pictures import ssim
from covray.tasks.pose import pck
from covray.tasks.segmentation import class_counts, mean_iou
from tests.support.metrics import LOWER_IS_BETTER, METRICS, SET_METRICS

SIZE = 32
RNG = np.random.default_rng(0)
BLACK = np.zeros((SIZE, SIZE, 3), np.uint8)
WHITE = np.full_like(BLACK, 255)
NOISE = RNG.integers(0, 256, BLACK.shape, dtype=np.uint8)


def label_of(task: str) -> np.ndarray:
    """A label with something to score."""
    rng = np.random.default_rng(1)
    if task == "segmentation":
        return segmentation.render(np.kron(rng.integers(0, 21, (4, 4)), np.ones((8, 8), np.int64)))
    if task == "pose":
        keypoints = np.concatenate([np.argwhere(np.ones((5, 5)))[:18] * 6 + 4, np.ones((18, 1))], axis=1)
        return pose.render(keypoints, SIZE, SIZE)
    if task == "normals":
        return normals.render(np.broadcast_to([0.6, 0.0, 0.8], BLACK.shape))
    if task == "edges":
        return edges.render(np.eye(SIZE, dtype=bool))
    if task == "depth":
        return depth.render(rng.uniform(0.5, 9, (SIZE, SIZE)))
    return NOISE


BEST = {
    "iou": 1, "p_acc": 1, "pck": 1, "mse": 0, "psnr": 100, "ssim": 1, "f": 1, "abs_rel": 0, "sq_rel": 0,
    "delta1": 1, "delta2": 1, "delta3": 1, "within_11_deg": 1, "within_22_deg": 1, "within_30_deg": 1,
    "mean_angle_deg": 0, "median_angle_deg": 0, "miou": 1, "ods_f": 1, "ois_f": 1,
}  # fmt: skip


# --- all tasks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_the_label_itself_is_the_best_answer_there_is(task: str) -> None:
    label = label_of(task)
    own = score(task, label, label)
    assert list(own.values) == [name for name in METRICS[task] if name != "lpips"]
    assert own.values == pytest.approx({name: BEST[name] for name in own.values}, abs=1e-4)
    whole = aggregate(task, [own, own])
    assert whole == pytest.approx({name: BEST[name] for name in SET_METRICS[task]})
    for name, value in score(task, NOISE[::-1], label).values.items():
        assert value is not None
        assert value >= BEST[name] if name in LOWER_IS_BETTER else value <= BEST[name]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.filterwarnings("error")
def test_every_score_is_finite_or_none_on_any_pictures(task: str) -> None:
    pictures = [BLACK, WHITE, NOISE, label_of(task)]
    found = [score(task, answer, label) for answer in pictures for label in pictures]
    for one in found:
        assert all(value is None or math.isfinite(value) for value in one.values.values())
    for count in (0, 1, len(found)):
        whole = aggregate(task, found[:count])
        assert tuple(whole) == SET_METRICS[task]
        assert all(value is None or 0 <= value <= 1 for value in whole.values())


@pytest.mark.parametrize("task", ["pose", "normals", "edges", "depth"])
def test_a_label_that_says_nothing_scores_nothing(task: str) -> None:
    pixels = {"mse"}  # they always are
    for answer in (BLACK, NOISE):
        values = score(task, answer, BLACK).values
        assert {name for name, value in values.items() if value is None} == set(values) - pixels


@pytest.mark.parametrize("task", ["pose", "normals", "edges", "depth"])
def test_an_answer_that_says_nothing_is_wrong_everywhere(task: str) -> None:
    values = score(task, BLACK, label_of(task)).values
    worst = {"pck": 0, "f": 0, "delta1": 0, "delta2": 0, "delta3": 0, "mean_angle_deg": 90, "median_angle_deg": 90}
    worst |= {"within_11_deg": 0, "within_22_deg": 0, "within_30_deg": 0, "abs_rel": 1}
    assert {name: values[name] for name in worst if name in values} == pytest.approx(
        {name: value for name, value in worst.items() if name in values}, abs=0.01
    )


def test_lpips_is_there_when_its_network_is() -> None:
    for task in TASKS:
        values = score(task, NOISE, NOISE[::-1], lpips=lambda answer, label: float(answer[0, 0, 0]) - label[0, 0, 0])
        assert tuple(values.values) == METRICS[task]
        assert "lpips" not in score(task, NOISE, NOISE).values
        assert values.values.get("lpips", 0) == ("lpips" in METRICS[task]) * (float(NOISE[0, 0, 0]) - NOISE[-1, 0, 0])


def test_pictures_that_do_not_match_are_refused() -> None:
    for answer in (BLACK[1:], BLACK[..., :1], BLACK.astype(np.float32)):
        with pytest.raises(ValueError, match="do not match"):
            score("depth", answer, BLACK)
    with pytest.raises(ValueError, match="no such task: detection"):
        score("detection", BLACK, BLACK)


# --- segmentation --------------------------------------------------------------------------------------------------


def test_iou_by_hand() -> None:
    label = np.array([[0, 0, 1, 1], [2, 2, 2, 2]])
    answer = np.array([[0, 1, 1, 1], [2, 2, 0, 3]])
    assert class_counts(answer, label, 5).tolist() == [[1, 2, 2, 0, 0], [3, 3, 4, 1, 0]]
    own = score("segmentation", segmentation.render(answer), segmentation.render(label), {"classes": list("abcde")})
    assert own.values == pytest.approx({"iou": (1 / 3 + 2 / 3 + 1 / 2 + 0) / 4, "p_acc": 5 / 8})


def test_iou_and_accuracy_agree_with_torchmetrics_for_a_picture_and_for_a_set() -> None:
    rng = np.random.default_rng(2)
    classes = 9
    kept = []
    truths = [rng.integers(0, 6, (16, 16)) for _ in range(5)]  # three classes occur in answers only, or nowhere
    founds = [np.where(rng.random((16, 16)) < 0.6, truth, rng.integers(0, 8, (16, 16))) for truth in truths]
    for truth, found in zip(truths, founds, strict=True):
        pair = torch.from_numpy(found), torch.from_numpy(truth)
        values = score(
            "segmentation", segmentation.render(found), segmentation.render(truth), {"classes": ["name"] * classes}
        )
        kept.append(values)
        each = multiclass_jaccard_index(*pair, classes, average="none")
        present = sorted({*truth.flat, *found.flat})
        assert values.values["iou"] == pytest.approx(float(each[present].mean()), abs=1e-6)
        accuracy = float(multiclass_accuracy(*pair, classes, average="micro"))
        assert values.values["p_acc"] == pytest.approx(accuracy, abs=1e-6)
    pooled = multiclass_jaccard_index(
        torch.from_numpy(np.stack(founds)), torch.from_numpy(np.stack(truths)), classes, average="macro"
    )
    assert aggregate("segmentation", kept)["miou"] == pytest.approx(float(pooled), abs=1e-6)


def test_a_mask_of_background_alone_is_a_class_like_any_other() -> None:
    assert score("segmentation", BLACK, BLACK).values == {"iou": 1.0, "p_acc": 1.0}
    red = segmentation.render(np.ones((SIZE, SIZE), np.int64))
    assert score("segmentation", red, BLACK).values == {"iou": 0.0, "p_acc": 0.0}
    assert mean_iou(np.zeros((2, 4), np.int64)) is None


@pytest.mark.parametrize("classes", ["21", 21, [], [str(number) for number in range(257)], {"a": 1}, None])
def test_what_names_no_classes_leaves_those_of_voc(classes: Any) -> None:
    answer, label = (np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8) for seed in (0, 1))
    found = score("segmentation", answer, label, {"classes": classes})
    assert found.values == score("segmentation", answer, label, {}).values
    assert found.values != score("segmentation", answer, label, {"classes": ["sky", "floor"]}).values


def test_pictures_of_fewer_classes_count_in_the_same_set() -> None:
    few, many = np.array([[3, 1], [4, 1]]), np.array([[5, 5, 2], [5, 10, 2]])
    assert aggregate("segmentation", [Score({}, few), Score({}, many)]) == {"miou": (8 / 9 + 6 / 11 + 1) / 3}


# --- pose ----------------------------------------------------------------------------------------------------------


def test_pck_by_hand() -> None:
    label = np.zeros((18, 3))
    label[:4] = [(10, 10, 1), (10, 110, 1), (40, 60, 1), (50, 60, 1)]  # a box of 40 x 100: correct within 10 px
    answer = label.copy()
    answer[0, :2] += (6, 8)  # 10 px
    answer[1, :2] += (6.1, 8)
    answer[2, 2] = 0  # not seen
    answer[5] = (1, 1, 1)  # nobody asked
    assert pck(answer, label, least_px=1) == 2 / 4
    assert pck(answer, label, least_px=11) == 3 / 4
    assert pck(answer, label, least_px=1, alpha=0.09) == 1 / 4


def test_a_lone_keypoint_may_be_off_by_what_a_picture_resolves() -> None:
    label = np.zeros((18, 3))
    label[0] = (8, 8, 1)
    assert pck(label + np.array([1, 0, 0]), label, least_px=1.5) == 1
    assert pck(label + np.array([2, 0, 0]), label, least_px=1.5) == 0


def test_pck_of_a_drawn_person_moved_less_and_more_than_a_tenth() -> None:
    label = label_of("pose")  # a box of 24 px: correct within 2.4
    assert score("pose", np.roll(label, 2, axis=1), label).values["pck"] == 1
    assert score("pose", np.roll(label, 3, axis=1), label).values["pck"] == 0


# --- pixels --------------------------------------------------------------------------------------------------------


def test_ssim_agrees_with_torchmetrics() -> None:
    noisy = np.clip(NOISE * 0.7 + 30 + RNG.normal(0, 20, NOISE.shape), 0, 255).astype(np.uint8)
    pair = [torch.from_numpy(picture).permute(2, 0, 1)[None].double() for picture in (noisy, NOISE)]
    ours = ssim(noisy, NOISE)
    _, everywhere = structural_similarity_index_measure(*pair, data_range=255.0, return_full_image=True)
    inside = everywhere[..., 5:-5, 5:-5]  # torchmetrics mirrors at the border, Wang et al. leave it out
    assert ours == pytest.approx(float(inside.mean()), abs=1e-4)
    assert ours is not None
    assert 0.3 < ours < 0.95
    assert ssim(NOISE[:10], NOISE[:10]) is None


# --- normals -------------------------------------------------------------------------------------------------------


def test_angles_by_hand() -> None:
    turned = np.deg2rad([0, 10, 20, 25, 60])
    answer = np.stack([np.sin(turned), 0 * turned, np.cos(turned)], axis=1)[None]
    label = np.broadcast_to([0.0, 0.0, 1.0], answer.shape)
    figures = {"mean_angle_deg": 23, "median_angle_deg": 20}
    shares = {"within_11_deg": 0.4, "within_22_deg": 0.6, "within_30_deg": 0.8}
    assert angle_figures(answer, label) == pytest.approx(figures | shares)
    masked = label.copy()
    masked[0, 4] = 0  # no normal there: its 60 degrees do not count
    assert angle_figures(answer, masked)["mean_angle_deg"] == pytest.approx(13.75)


def test_only_the_label_decides_which_normals_count() -> None:
    label = label_of("normals")
    holes = label.copy()
    holes[: SIZE // 2] = 0
    assert score("normals", holes, label).values["mean_angle_deg"] == pytest.approx(45, abs=0.1)
    assert score("normals", label, holes).values["mean_angle_deg"] == pytest.approx(0, abs=0.1)


# --- edges ---------------------------------------------------------------------------------------------------------


def brute_counts(answer: np.ndarray, label: np.ndarray) -> np.ndarray:
    """``edge_counts`` from all distances between pixels."""
    tolerance = 0.0075 * np.hypot(*label.shape)
    counts = []
    for threshold in THRESHOLDS:
        found, truth = np.argwhere(answer >= np.float32(threshold)), np.argwhere(label)
        near = np.linalg.norm(found[:, None] - truth[None], axis=2) <= tolerance
        counts.append((len(found), near.any(axis=1).sum(), len(truth), near.any(axis=0).sum()))
    return np.transpose(counts)


@pytest.mark.parametrize(("height", "width"), [(20, 30), (16, 290), (6, 420)])  # tolerances of 0.3, 2.2 and 3.2 px
def test_edge_counts_are_those_of_all_distances(height: int, width: int) -> None:
    rng = np.random.default_rng(width)
    answer = (rng.random((height, width)) ** 8).astype(np.float32)
    label = rng.random((height, width)) < 0.02
    assert np.array_equal(edge_counts(answer, label), brute_counts(answer, label))


def test_f_of_a_small_picture_is_that_of_its_pixels() -> None:
    """Below a pixel of tolerance, edges are a classification of pixels, and sklearn has its F."""
    label = np.random.default_rng(3).random((SIZE, SIZE)) < 0.2
    strength = np.clip(label * 0.5 + np.random.default_rng(4).random((SIZE, SIZE)) * 0.7, 0, 1)
    picture = edges.render(strength)
    seen = edges.read(picture)
    each = [
        f1_score(label.ravel(), (seen >= np.float32(threshold)).ravel(), zero_division=0) for threshold in THRESHOLDS
    ]
    own = score("edges", picture, edges.render(label))
    assert own.counts is not None
    assert f_measure(own.counts) == pytest.approx(each)
    assert own.values["f"] == pytest.approx(max(each))
    assert 0.5 < max(each) < 1


def test_an_edge_may_be_off_by_the_tolerance_and_not_by_more() -> None:
    label = np.zeros((192, 192), bool)  # a diagonal of 272 px: 2.04 px
    label[:, 90] = True
    own = edges.render(label)
    assert score("edges", np.roll(own, 2, axis=1), own).values["f"] == 1
    assert score("edges", np.roll(own, 3, axis=1), own).values["f"] == 0


def test_ods_has_one_threshold_for_the_set_and_ois_one_a_picture() -> None:
    label = np.zeros((SIZE, SIZE))
    label[4] = 1

    def graded(right: float, wrong: float) -> Score:
        strength = label * right
        strength[20] = wrong
        return score("edges", edges.render(strength), edges.render(label))

    pair = [graded(0.9, 0.6), graded(0.5, 0.3)]  # no threshold parts right from wrong in both
    assert [one.values["f"] for one in pair] == [1, 1]
    # From 0.31 to 0.5: the first finds 32 right and 32 wrong, the second is perfect.
    assert aggregate("edges", pair) == pytest.approx({"ods_f": 2 * (2 / 3) / (2 / 3 + 1), "ois_f": 1})
    unlabelled = score("edges", edges.render(label), BLACK)
    assert unlabelled.values == {"f": None}
    # Its 32 wrong pixels stand against the 64 right ones: precision 2/3 at best.
    assert aggregate("edges", [pair[0], pair[0], unlabelled])["ods_f"] == pytest.approx(0.8)
    assert aggregate("edges", [unlabelled]) == {"ods_f": None, "ois_f": None}


# --- depth ---------------------------------------------------------------------------------------------------------


def test_depth_errors_by_hand() -> None:
    label = np.array([[2.0, 4.0, 0.0, 10.0]])  # none, and full white: two pixels do not count
    answer = np.array([[2.6, 3.0, 5.0, 1.0]])
    expected = {"abs_rel": (0.3 + 0.25) / 2, "sq_rel": (0.18 + 0.25) / 2, "delta1": 0, "delta2": 1, "delta3": 1}
    assert depth_errors(answer, label) == pytest.approx(expected)
    assert depth_errors(label / 1.24, label)["delta1"] == 1


def test_abs_rel_agrees_with_torchmetrics() -> None:
    rng = np.random.default_rng(5)
    label, answer = rng.uniform(0.5, 9.5, (SIZE, SIZE)), rng.uniform(0.1, 10, (SIZE, SIZE))
    expected = float(mean_absolute_percentage_error(torch.from_numpy(answer), torch.from_numpy(label)))
    assert depth_errors(answer, label)["abs_rel"] == pytest.approx(expected)


# --- what the metrics say of themselves ----------------------------------------------------------------------------


def test_every_metric_has_a_text_and_is_the_same_in_every_task() -> None:
    by_name: dict[str, object] = {}
    for task in TASKS.values():
        assert task.metrics[0].of_set is None, "answers are ranked by a figure of theirs"
        for metric in task.metrics:
            assert metric.label
            assert metric.about.endswith(".")
            assert by_name.setdefault(metric.name, metric) == metric
    assert set(lower_is_better()) == LOWER_IS_BETTER | {
        "perplexity_own",
        "perplexity_reference",
        "frame_step_variation",
        "nats_frames",
        "nats_answer",
    }


@pytest.mark.parametrize("returned", ["much", [0.5], float("nan")])
def test_a_plugins_metric_that_returns_no_number_is_one_line(returned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd:
        def find(self, name: str) -> Odd:
            return self

        def score(self, answer: Any, label: Any, meta: Any = None) -> Any:
            return returned

    monkeypatch.setattr("covray.tasks.metrics.metric_registry", Odd)
    with pytest.raises(
        ConfigError, match=r"^metrics: depth/odd returned .*; a metric returns a finite number, or None$"
    ):
        added_values("depth", ["depth/odd"], *[np.zeros((4, 4, 3), np.uint8)] * 2, None)
