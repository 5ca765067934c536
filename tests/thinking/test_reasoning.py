"""Episodes are answered by every row, judged by CoBSAT's rule, and counted over the same episodes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from covray.config import load_config
from covray.config.think import ThinkEvaluateConfig, ThinkFeaturesConfig, ThinkTrainConfig
from covray.errors import ConfigError, CovrayError, DatasetError, WeightsError
from covray.io.images import decode
from covray.report.reasoning import write_reasoning_page
from covray.thinking.building import FeatureBuilder, read_samples
from covray.thinking.cells import demonstration_pictures
from covray.thinking.episodes import COBSAT, PORTRAITS, Order, make_episode, tasks_of
from covray.thinking.judge import JudgeNetwork, JudgeRecord, load_judge, save_judge
from covray.thinking.objective import train_aligner
from covray.thinking.reasoning import Reasoner, require_reasoning
from covray.thinking.records import FeaturesResult, ReasoningResults
from covray.thinking.results import CHANCE, tabulate, to_csv
from covray.thinking.rows import AnswerRow, EpisodeRow
from covray.thinking.worlds import list_episodes, named_cell, open_world
from tests.support.thinking import write_features, write_painter
from tests.support.vlms import picture

Make = Callable[..., ThinkEvaluateConfig]


def write_judge(folder: Path, size_px: int = 64) -> str:
    torch.manual_seed(0)
    record = JudgeRecord(
        size_px=size_px, widths=[8, 8, 8], details={theme.name: list(theme.details) for theme in PORTRAITS},
        objects={theme.name: list(theme.objects) for theme in PORTRAITS},
    )  # fmt: skip
    save_judge(folder, JudgeNetwork(len(PORTRAITS), record.widths), record)
    return str(folder)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, think_folders: dict[str, str]) -> dict[str, str]:
    """An aligner of the text's states and one of the prompt's, a painter and a judge."""
    root = tmp_path_factory.mktemp("reasoning")
    made = {"painter": str(write_painter(root / "painter")), "judge": write_judge(root / "judge")}
    for places in ("text", "prompt"):
        features = {
            "data": think_folders["manifest"], "out": str(root / f"{places}-features"), "places": places,
            "vlm.path": think_folders["vlm"], "instructions": ["what is it"], "engine.device": "cpu",
            "thought.max_tokens": 6, "thought.min_tokens": 2,
        }  # fmt: skip
        run = {
            "data": write_features(load_config(ThinkFeaturesConfig, None, features)), "out": str(root / places),
            "optimizer.steps": 1, "language_model.path": think_folders["text"], "optimizer.batch": 4,
            "compute.device": "cpu", "compute.dtype": "float32", "compute.deepspeed": "none", "tracking.uri": "none",
        }  # fmt: skip
        train_aligner(load_config(ThinkTrainConfig, None, run))
        made[places] = str(root / places)
    return made


@pytest.fixture
def make(parts: dict[str, str], tmp_path: Path) -> Make:
    """Gives configurations, with dotted keys on top."""

    def config(**changes: Any) -> ThinkEvaluateConfig:
        options: dict[str, Any] = {
            "out": str(tmp_path / "eval"), "aligners": [f"ours={parts['text']}", f"input={parts['prompt']}"],
            "painter.kind": "unet", "painter.path": parts["painter"], "painter.steps": 2, "judge.path": parts["judge"],
            "episodes.count": 2, "episodes.shots": [2], "episodes.instruction": "what is it", "engine.device": "cpu",
            "tasks": ["Colour-I", "Style-II"], "tracking.uri": "none",
        }  # fmt: skip
        options |= {key.replace("__", "."): value for key, value in changes.items()}
        return load_config(ThinkEvaluateConfig, None, options)

    return config


def test_a_row_is_the_same_alone_and_among_others_and_holds_what_was_judged(make: Make, parts: dict[str, str]) -> None:
    config = make()
    episodes = list_episodes(config, open_world(config))
    assert len(episodes) == 4
    reasoner = Reasoner(config)
    rows = reasoner.run(episodes).to_pylist()
    assert Reasoner(config).run(episodes.slice(2, 1)).to_pylist() == rows[2:3]
    judge = load_judge(Path(parts["judge"]), torch.device("cpu"))
    tasks = {task.name: task for task in tasks_of(PORTRAITS)}
    for row, about in zip(rows, episodes.to_pylist(), strict=True):
        assert row["error"] is None
        order = Order(tuple(about["named"]), tuple(about["hidden"]))
        episode = make_episode(tasks[row["task"]], row["number"], order, 2)
        for shown, data in zip(demonstration_pictures(episode, 0), row["demonstrations"], strict=True):
            assert np.array_equal(shown, decode(data))
        answers = {answer["row"]: answer for answer in row["answers"]}
        assert list(answers) == ["truth", "caption", "text", "bridge", "untrained", "copy", "ours", "input"]
        assert answers["text"]["picture"] is None
        assert answers["copy"]["picture"] == row["demonstrations"][-1]
        for name in ("truth", "caption", "bridge", "ours", "input"):
            (seen,) = judge.choose(episode.task.theme, [decode(answers[name]["picture"])])
            assert (answers[name]["seen_detail"], answers[name]["seen_object"]) == (seen.detail, seen.object)
            assert answers[name]["detail"] == (seen.detail == row["answer_detail"])
        assert answers["ours"]["picture"] != answers["input"]["picture"]


def test_the_table_counts_both_sides_and_pairs_the_rows() -> None:
    rows = []
    for number in range(20):
        right, half = number < 15, number < 10
        answers = [
            AnswerRow(right, right, right, right, "ours", None, None),
            AnswerRow(half, False, False, half, "copy", None, None),
        ]
        task = "Colour-I" if number % 2 else "Style-I"
        rows.append(EpisodeRow(number, task, 2, number, ("a", "b", "c"), "red", "ball", answers=answers))
    failed = EpisodeRow(99, "Colour-I", 2, 99, ("a", "b", "c"), "red", "ball", error="not_an_image")
    rows.append(failed)  # an error counts as wrong
    scores, differences = tabulate(rows, ("copy", "ours"), ("ours",), 0)
    means = {(score.row, score.task, score.side): score for score in scores}
    assert means["ours", "mean", "both"].mean == pytest.approx(15 / 21)
    assert means["copy", "mean", "both"].mean == 0
    assert means["copy", "mean", "detail"].mean == pytest.approx(10 / 21)
    assert means["ours", "Colour-I", "both"].episodes == 11
    (whole,) = [entry for entry in differences if entry.task == "mean"]
    assert (whole.first, whole.second) == ("ours", "copy")
    assert whole.mean == pytest.approx(15 / 21)
    assert whole.p_value < 0.01
    assert CHANCE == 0.01
    assert to_csv(scores).splitlines()[0] == "row,task,shots,side,mean,low,high,episodes"


def test_the_page_shows_episodes_with_every_rows_picture(make: Make) -> None:
    config = make(tasks=["Colour-I"], episodes__count=1)
    written = Reasoner(config).run(list_episodes(config, open_world(config))).to_pylist()
    rows = list(map(EpisodeRow.of, written))
    names = tuple(answer.row for answer in rows[0].answers)
    scores, differences = tabulate(rows, names, ("ours", "input"), 0)
    results = ReasoningResults(
        benchmark="CoBSAT-style, rendered", rows=names, chance=CHANCE, scores=tuple(scores),
        differences=tuple(differences), failed=0, seconds=1.0, config=config.model_dump(mode="json"), fingerprints={},
    )  # fmt: skip
    page = write_reasoning_page(results, rows, "eval").decode()
    assert page.count("data:image/webp") == 2 + len(names) - 1
    for text in ("2-shot", "Paired differences", "Colour-I", "ours", rows[0].text.split(" ")[0]):
        assert text in page


def test_texts_are_read_by_the_names_of_one_value_of_each_side() -> None:
    colour, background = COBSAT[0], COBSAT[1]
    cell = named_cell(colour, "Create an image of a RED car.")
    assert cell is not None
    assert (cell.detail, cell.object) == ("red", "car")
    assert named_cell(colour, "a red or blue car") is None
    assert named_cell(colour, "a scarf") is None
    park = named_cell(background, "a pig in an amusement park")
    assert park is not None
    assert park.detail == "park"


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"aligners": ["/absent"]}, WeightsError, "neither a finished run of covray think train nor"),
        ({"aligners": []}, ConfigError, "aligners: name at least one, which says the models of the other rows"),
        ({"tasks": ["Taste-I"]}, ConfigError, "tasks: Taste-I is none of Colour-I, Colour-II"),
        ({"judge__path": "/absent"}, WeightsError, "no such folder"),
        ({"painter__path": "/absent"}, WeightsError, "no such folder"),
        ({"language_model__path": "/absent"}, WeightsError, "no such folder"),
        ({"cobsat": "/absent"}, DatasetError, "prompts_list_default.json: cannot be read"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(
    changes: dict[str, Any], kind: type[CovrayError], message: str, make: Make
) -> None:
    with pytest.raises(kind, match=message) as error:
        require_reasoning(make(**changes))
    assert "\n" not in str(error.value)


def test_rows_of_the_table_have_names_of_their_own(make: Make, parts: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="aligners: text names two rows of the table; give NAME=RUN"):
        make(aligners=[parts["text"]])
    with pytest.raises(ConfigError, match="aligners: a names two rows of the table"):
        make(aligners=[f"a={parts['text']}", f"a={parts['prompt']}"])


def write_cobsat(folder: Path, pixels: np.ndarray) -> Path:
    """A copy of CoBSAT's repository with three orders, of which all pictures are ``pixels``."""
    orders = [{"x_list": list(range(10)), "theta_list": list(reversed(range(10)))}] * 3
    (folder / "load_datasets").mkdir(parents=True)
    (folder / "load_datasets" / "prompts_list_default.json").write_text(json.dumps(orders))
    drawn = Image.fromarray(pixels)
    for theme in COBSAT:
        lines = ["image,caption"]
        for thing in theme.objects:
            place = folder / "datasets" / f"{theme.name}_{thing}"
            place.mkdir(parents=True, exist_ok=True)
            for detail in theme.details:
                drawn.save(place / f"{detail}_{thing}.jpg")
                lines.append(f"{theme.name}_{thing}/{detail}_{thing}.jpg,a {detail} {thing}")
        (folder / "datasets" / f"{theme.name}_{theme.object_kind}.csv").write_text("\n".join(lines))
    return folder


def test_cobsats_own_folder_is_read_with_its_orders(make: Make, tmp_path: Path) -> None:
    folder = write_cobsat(tmp_path / "cobsat", picture(0, 64, 64))
    config = make(cobsat=str(folder), tasks=["Color-I"], episodes__count=3)
    world = open_world(config)
    assert world.benchmark == "CoBSAT"
    episodes = list_episodes(config, world)
    assert episodes["named"].to_pylist() == [list(range(10))] * 3
    task = next(task for task in tasks_of(COBSAT) if task.name == "Color-I")
    episode = make_episode(task, 0, world.orders(config.episodes)[0], 2)
    assert len(world.demonstrations(episode)) == 2
    assert world.caption(episode) == f"a {episode.answer.detail} {episode.answer.object}"
    with pytest.raises(ConfigError, match=r"episodes.count: 4, but CoBSAT's file has 3; give fewer"):
        list_episodes(make(cobsat=str(folder), episodes__count=4), world)


@pytest.fixture
def of_episodes(think_folders: dict[str, str], tmp_path: Path) -> Callable[..., ThinkFeaturesConfig]:
    """Gives configurations of features of the episodes of ``make``, with dotted keys on top."""

    def config(**changes: Any) -> ThinkFeaturesConfig:
        options: dict[str, Any] = {
            "of": "episodes", "out": str(tmp_path / "thoughts"), "vlm.path": think_folders["vlm"],
            "thought.max_tokens": 6, "thought.min_tokens": 2, "engine.device": "cpu", "episodes.count": 2,
            "episodes.shots": [2], "episodes.instruction": "what is it", "tasks": ["Colour-I", "Style-II"],
        }  # fmt: skip
        options |= {key.replace("__", "."): value for key, value in changes.items()}
        return load_config(ThinkFeaturesConfig, None, options)

    return config


def test_features_of_an_episode_are_those_of_its_evaluation_in_whatever_block(
    of_episodes: Callable[..., ThinkFeaturesConfig], make: Make
) -> None:
    """So that what is computed after a kill is what would have been computed before it."""
    config = of_episodes()
    samples = read_samples(config)
    together = FeatureBuilder(config, None).build(samples.rows)
    again = FeatureBuilder(config, None)
    for number in (3, 0):
        assert again.build(samples.rows.slice(number, 1)) == together.slice(number, 1)
    evaluation = make()
    asked = list_episodes(evaluation, open_world(evaluation))
    assert together["sample"] == asked["episode"]
    assert together["split"] == asked["task"]
    online = Reasoner(evaluation).run(asked)
    assert together["text"] == online["text"]


def test_an_evaluation_reads_texts_and_states_without_the_model(
    of_episodes: Callable[..., ThinkFeaturesConfig], make: Make, parts: dict[str, str]
) -> None:
    ours = [f"ours={parts['text']}"]
    features = write_features(of_episodes())
    config = make(features=features, aligners=ours, vlm__path="/absent")
    fingerprints = require_reasoning(config)
    assert fingerprints.keys() == require_reasoning(make(aligners=ours)).keys() | {"features"}
    assert config.identity() == make(aligners=ours).identity()
    episodes = list_episodes(config, open_world(config))
    reasoner = Reasoner(config)
    assert reasoner._thinker.vlm is None
    kept, online = reasoner.run(episodes).to_pylist(), Reasoner(make(aligners=ours)).run(episodes).to_pylist()
    for row, expected in zip(kept, online, strict=True):
        assert row["text"] == expected["text"]
        for answer, other in zip(row["answers"], expected["answers"], strict=True):
            assert answer["row"] == other["row"]
            if answer["picture"] is not None:
                first, second = decode(answer["picture"]).astype(int), decode(other["picture"]).astype(int)
                assert np.abs(first - second).max() <= 2, "states in float16 move a picture by its last bits at most"


@pytest.mark.parametrize(
    ("changes", "evaluation", "message"),
    [
        ({}, {"episodes__count": 1}, "holds features of other episodes: episodes.count was 2, is 1; give the same"),
        ({"seed": 1}, {}, "holds features of other episodes: seed was 1, is 0"),
        ({}, {"thought__max_tokens": 7}, "thought.max_tokens was 6, is 7"),
        ({}, {"names": ("ours", "input")}, "the aligner input reads those of prompts; evaluate it without --features"),
    ],
)
def test_features_of_other_episodes_are_refused_in_one_line(
    changes: dict[str, Any], evaluation: dict[str, Any], message: str,
    of_episodes: Callable[..., ThinkFeaturesConfig], make: Make, parts: dict[str, str],
) -> None:  # fmt: skip
    features = write_features(of_episodes(**changes))
    names = evaluation.pop("names", ("ours",))
    aligners = {"ours": f"ours={parts['text']}", "input": f"input={parts['prompt']}"}
    config = make(features=features, aligners=[aligners[name] for name in names], **evaluation)
    with pytest.raises(DatasetError, match=message) as error:
        require_reasoning(config)
    assert "\n" not in str(error.value)


def test_a_task_without_any_features_is_episodes_with_their_reason(
    of_episodes: Callable[..., ThinkFeaturesConfig], make: Make, parts: dict[str, str]
) -> None:
    features = Path(write_features(of_episodes()))
    shutil.rmtree(features / "shards" / "split=Style-II")
    result = FeaturesResult.read(str(features))
    result.model_copy(update={"per_split": {"Colour-I": 2}}).write(str(features))
    config = make(features=str(features), aligners=[f"ours={parts['text']}"])
    rows = Reasoner(config).run(list_episodes(config, open_world(config))).to_pylist()
    assert [(row["task"], row["error"]) for row in rows] == [
        ("Colour-I", None), ("Colour-I", None), ("Style-II", "no_features"), ("Style-II", "no_features"),
    ]  # fmt: skip


def test_episodes_are_asked_once_and_of_some_task(make: Make) -> None:
    config = make(episodes__shots=[2, 4, 2])
    ids = list_episodes(config, open_world(config))["episode"].to_pylist()
    assert len(ids) == len(set(ids)) == 2 * 2 * 2
    with pytest.raises(ConfigError, match="tasks: there is none; name at least one"):
        list_episodes(make(tasks=[]), open_world(config))


def test_features_of_pictures_and_of_episodes_are_not_taken_for_each_other(
    of_episodes: Callable[..., ThinkFeaturesConfig], features_config: Callable[..., ThinkFeaturesConfig],
    aligner_config: Callable[..., ThinkTrainConfig], make: Make, parts: dict[str, str],
) -> None:  # fmt: skip
    pictures = features_config()
    assert not {"of", "episodes", "tasks", "cobsat"} & pictures.identity().keys(), "what folders have recorded"
    with pytest.raises(
        DatasetError, match="holds features of pictures; give the --out of a covray think features --of"
    ):
        require_reasoning(make(features=write_features(pictures), aligners=[f"ours={parts['text']}"]))
    training = aligner_config(write_features(of_episodes()), train_split="Colour-I")
    with pytest.raises(DatasetError, match="holds features of episodes, which evaluations read; ThinkDiff trains on"):
        train_aligner(training)
    for changes, message in (
        ({"data": "a.csv"}, "data: episodes have none"),
        ({"variant": "clip"}, "episodes are answered by a text; leave variant at lvlm and places at text"),
        ({"of": "pictures"}, "data: is required; give a manifest with words, or of: episodes"),
    ):
        with pytest.raises(ConfigError, match=message):
            of_episodes(**changes)


def test_another_copy_of_cobsat_is_told_from_the_first(make: Make, tmp_path: Path) -> None:
    prints = []
    for number in range(2):
        folder = write_cobsat(tmp_path / str(number), picture(number, 64, 64))
        prints.append(require_reasoning(make(cobsat=str(folder), tasks=["Color-I"], episodes__count=3))["cobsat"])
    assert prints[0] != prints[1]
