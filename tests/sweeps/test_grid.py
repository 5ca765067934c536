"""From a grid to its trials: all combinations, each once, none that cannot be, and what they take."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from covray.config import SweepConfig, load_config
from covray.errors import ConfigError, CovrayError
from covray.sweeps.grid import grid_of
from covray.sweeps.plan import plan_sweep
from covray.training.memory import plan
from tests.support.datasets import TOKENS

Make = Callable[..., SweepConfig]


@pytest.fixture
def make(tmp_path: Path, write_dataset: Callable[..., Any], llama_folder: Path) -> Make:
    """A sweep over a small dataset that has chains of 3 and 5 by both methods."""
    data, _ = write_dataset({"depth": 24, "edges": 24}, lengths=(3, 5))

    def sweep(**options: Any) -> SweepConfig:
        base = {"out": str(tmp_path / "sweep"), "data": data}
        backbone = {"train.backbone.scale": "custom", "train.backbone.path": str(llama_folder)}
        given = {"evaluate.split": "val", "grid.lengths": [2, 3, 5], "grid.pairs": [1]}
        return load_config(SweepConfig, None, base | backbone | given | options)

    return sweep


def test_every_combination_is_one_trial_and_what_has_no_frames_is_one_for_all_lengths(make: Make) -> None:
    config = make(**{"grid.pairs": [1, 2], "grid.seeds": [0, 1]})
    grid = grid_of(config)
    found = {(trial.method, trial.length, trial.pairs, trial.seed) for trial in grid.trials}
    expected = {
        (method, length, pairs, seed)
        for method, length in [("none", 2), ("linear", 3), ("linear", 5), ("diffusion", 3), ("diffusion", 5)]
        for pairs in (1, 2)
        for seed in (0, 1)
    }
    assert found == expected
    assert len(grid.trials) == len(expected) == len({trial.name for trial in grid.trials})
    # Three methods, three lengths, two pairs, two seeds: each combination is a trial or is listed, none is lost.
    assert len(grid.trials) + len(grid.left_out) == 3 * 3 * 2 * 2
    assert all(left.reason.startswith("repeats none-L2-") for left in grid.left_out)
    assert [trial.seed for trial in grid.trials] == sorted(trial.seed for trial in grid.trials), "a seed at a time"


def test_a_trial_trains_and_evaluates_what_it_says(make: Make) -> None:
    config = make(**{"grid.tasks": [None, ["depth"]], "train.optimizer.steps": 7, "evaluate.episodes": 3})
    for trial in grid_of(config).trials:
        train, evaluate = trial.train, trial.evaluate
        assert (train.sentences.method, train.sentences.lengths, train.sentences.pairs) == (
            trial.method, (trial.length,), (trial.pairs,)
        )  # fmt: skip
        assert train.sentences.tasks == trial.tasks == evaluate.tasks
        assert (train.seed, train.optimizer.steps, evaluate.episodes) == (trial.seed, 7, 3)
        assert evaluate.adapters == (train.out,)
        assert not evaluate.untuned
        assert not evaluate.baselines
        assert trial.context_tokens == trial.length * (trial.pairs + 1) * TOKENS
        assert Path(train.out).parent.name == "runs"
        assert Path(train.out).name == trial.name == Path(evaluate.out).name


def test_what_all_trials_share_is_evaluated_once(make: Make) -> None:
    grid = grid_of(make(**{"grid.seeds": [0, 1, 2], "evaluate.baselines": ["copy", "ceiling"]}))
    (references,) = grid.references
    assert references.baselines == ("copy", "ceiling")
    assert not references.adapters
    forms = [(form.method, form.length, form.pairs) for form in references.forms]
    assert sorted(forms) == sorted({(trial.method, trial.length, trial.pairs) for trial in grid.trials})
    assert not grid_of(make(**{"evaluate.baselines": [], "evaluate.untuned": False})).references


def test_a_grid_that_grows_shrinks_or_is_reordered_finds_all_that_is_done(
    write_dataset: Callable[..., Any], tmp_path: Path
) -> None:
    data, _ = write_dataset({"depth": 24, "edges": 24}, lengths=(3, 5))
    small: dict[str, Any] = {"methods": ["none", "linear", "diffusion"], "lengths": [3], "pairs": [1]}
    alike = [
        small,
        small | {"methods": ["diffusion", "none"]},
        small | {"methods": ["linear", "diffusion", "none"], "lengths": [5, 2, 3], "pairs": [0, 2, 1]},
        small | {"seeds": [1, 0]},
        small | {"scales": ["nano"]},
        small | {"scales": ["300m", {"scale": "nano", "init": "random"}, "nano"]},
        small | {"scales": [{"scale": "300m", "path": "there"}, "300m"]},
        small | {"tasks": [["depth"], None]},
        small | {"tasks": [["edges", "depth"], ["depth"]]},
        small | {"tasks": [["depth", "edges"]]},
        small | {"fields": {"lora.rank": [32, 4]}},
        small | {"fields": {"optimizer.learning_rate": [0.5], "lora.rank": [4, 32]}},
        small | {"fields": {"lora.rank": [4], "optimizer.learning_rate": [0.5], "backbone.scale": ["300m", "nano"]}},
    ]
    trials: dict[str, set[str]] = {}
    references: dict[str, set[str]] = {}
    for grid in alike:
        options = {"data": data, "out": str(tmp_path / "sweep"), "evaluate.split": "val", "grid": grid}
        found = grid_of(load_config(SweepConfig, None, options))
        for trial in found.trials:
            what = trial.train.identity() | {"evaluated": trial.evaluate.identity() | {"adapters": None}}
            trials.setdefault(trial.name, set()).add(json.dumps(what, sort_keys=True))
        for reference in found.references:
            what = reference.identity()
            references.setdefault(reference.out, set()).add(json.dumps(what, sort_keys=True))
    for names in (trials, references):
        # A folder is always begun with the same configuration, which has no other folder.
        assert {len(what) for what in names.values()} == {1}
        assert len({what for (what,) in names.values()}) == len(names)
    assert {"none-L2-p1-s0", "linear-L3-p1-s0", "diffusion-L3-p1-s0", "diffusion-L3-p1-300m-s0"} <= trials.keys()
    assert not [name for name in trials if "edges+depth" in name], "a set of tasks has no order"
    assert not {Path(out).name for out in references} & trials.keys()


def test_what_exceeds_the_context_is_left_out_with_the_arithmetic(make: Make) -> None:
    grid = grid_of(make(**{"grid.pairs": [1, 63], "grid.methods": ["diffusion"], "grid.lengths": [5]}))
    assert [trial.name for trial in grid.trials] == ["diffusion-L5-p1-s0"]
    (left,) = grid.left_out
    assert left.name == "diffusion-L5-p63-s0"
    assert f"5 pictures x (63 + 1) chains x {TOKENS} tokens = {5 * 64 * TOKENS}" in left.reason
    with pytest.raises(ConfigError, match="grid: none of 1 combinations fits"):
        grid_of(make(**{"grid.pairs": [63], "grid.methods": ["diffusion"], "grid.lengths": [5]}))


def test_any_field_of_a_training_can_be_swept(make: Make) -> None:
    rates = {"optimizer.learning_rate": [0.01, 0.001], "lora.rank": [2, 4]}
    grid = grid_of(make(**{"grid.fields": rates, "grid.lengths": [3], "grid.methods": ["linear"]}))
    assert {(t.train.optimizer.learning_rate, t.train.lora.rank) for t in grid.trials} == {
        (0.01, 2), (0.01, 4), (0.001, 2), (0.001, 4)
    }  # fmt: skip
    assert len({trial.name for trial in grid.trials}) == len({trial.label for trial in grid.trials}) == 4
    # The name is of the trial alone: a grid that grows finds what is done.
    more = rates | {"lora.rank": [2, 4, 8]}
    grown = grid_of(make(**{"grid.fields": more, "grid.lengths": [3], "grid.methods": ["linear"]}))
    assert {trial.name for trial in grid.trials} < {trial.name for trial in grown.trials}


def test_two_backbones_of_one_scale_are_told_apart(make: Make, llama_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(llama_folder, other)
    scales = [{"scale": "custom", "path": str(path)} for path in (llama_folder, other)]
    config = make(**{"grid.methods": ["linear"], "grid.lengths": [3]})
    given = config.model_dump(mode="json") | {"train": {}}
    given["grid"]["scales"] = scales
    grid = grid_of(load_config(SweepConfig, None, given))
    assert len({trial.name for trial in grid.trials}) == len({trial.label for trial in grid.trials}) == 2
    assert [trial.train.backbone.path for trial in grid.trials] == [scale["path"] for scale in scales]
    assert len(grid.references) == 2, "the untuned backbone of each, the baselines once"
    assert [bool(reference.baselines) for reference in grid.references] == [True, False]


def test_names_are_safe_in_paths(make: Make) -> None:
    hostile = {"compute.deepspeed": ["../../etc/passwd", "none"], "backbone.revision": ["a/b c'\"", "x" * 300]}
    grid = grid_of(make(**{"grid.fields": hostile, "grid.lengths": [3], "grid.methods": ["linear"]}))
    assert len({trial.name for trial in grid.trials}) == 4
    for trial in grid.trials:
        assert "/" not in trial.name
        assert len(trial.name) < 200
        assert not set(trial.name) & set("'\" ="), "= would part a name from a run"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train.optimizer.learning_rat": 1}, "train: optimizer.learning_rat: no such key"),
        ({"train.optimizer.epochs": -1}, "train: optimizer.epochs: Input should be greater than 0"),
        ({"evaluate.episode": 3}, "evaluate: episode: no such key"),
        ({"train.sentences.method": "none"}, "train.sentences.method: is decided by the sweep"),
        ({"evaluate.adapters": ["x"]}, "evaluate.adapters: is decided by the sweep"),
        ({"train.tracking.uri": "none"}, "train.tracking.uri: is decided by the sweep"),
        ({"build.prior.steps": 4}, "build: is for a dataset that the sweep builds"),
        ({"grid.fields": {"seed": [1]}}, "grid.fields.seed: the grid has an entry for it"),
        ({"grid.fields": {"optimizer.rate": [1]}}, "train: optimizer.rate: no such key"),
        ({"grid.scales": ["nano"]}, "train.backbone: is what grid.scales says"),
        ({"grid.lengths": [4]}, "a chain of 4 needs alpha 0.3333, 0.6667, the dataset has 0.25, 0.5, 0.75"),
        ({"train.sentences.split": "nowhere"}, "nowhere"),
        ({"evaluate.split": "tset"}, "no pairs in split tset, only in train, val; set evaluate.split"),
        (
            {"evaluate.example_split": "trian"},
            "no pairs in split trian, only in train, val; set evaluate.example_split",
        ),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CovrayError) as refused:
        grid_of(make(**options))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "options", [{"grid.lengths": []}, {"grid.methods": ["magic"]}, {"grid.fields": {"lora.rank": []}}, {"data": None}]
)
def test_a_grid_of_nothing_is_refused(make: Make, options: dict[str, Any]) -> None:
    given = make().model_dump(mode="json") | {"data": options.pop("data", make().data)}
    with pytest.raises(ConfigError):
        load_config(SweepConfig, None, {**given, **options})


def test_the_plan_is_the_sum_of_the_trainings_plans(make: Make) -> None:
    config = make(**{"grid.seeds": [0, 1], "train.optimizer.epochs": 3.0, "train.optimizer.batch_tokens": 512})
    planned = plan_sweep(config, tokens_per_s=100.0).to_json()
    trials = grid_of(config).trials
    assert [line["name"] for line in planned["trials"]] == [trial.name for trial in trials]
    for trial, line in zip(trials, planned["trials"], strict=True):
        alone = plan(trial.train, tokens_per_s=100.0)
        assert (line["steps"], line["train_tokens"]) == (alone.steps, alone.tokens)
        assert line["gpu_hours"] == pytest.approx(alone.gpu_hours)
    assert planned["total"]["train_tokens"] == sum(line["train_tokens"] for line in planned["trials"])
    assert planned["total"]["gpu_hours"] == pytest.approx(sum(line["gpu_hours"] for line in planned["trials"]))
    assert "gpu_hours" not in plan_sweep(config).to_json()["total"]


def test_two_thousand_trials_are_planned_before_anything_exists(make: Make) -> None:
    fields = {"optimizer.learning_rate": [number / 10000 for number in range(1, 101)]}
    planned = plan_sweep(make(**{"grid.fields": fields, "grid.seeds": [0, 1, 2, 3]})).to_json()
    assert len(planned["trials"]) == 5 * 100 * 4
    assert len({line["name"] for line in planned["trials"]}) == 2000
    assert not Path(make().out).exists()


def test_the_paper_is_planned_from_a_manifest_without_its_weights(
    write_manifest: Callable[..., str], tmp_path: Path
) -> None:
    splits = ("train", "train", "val", "test")
    manifest = write_manifest([{"pair_id": n, "task": "depth", "split": splits[n % 4]} for n in range(40)])
    Path(manifest).parent.joinpath("notes.txt").write_text("mine")
    manifest = str(Path(manifest).parent)  # a folder, in which other things may lie
    config = load_config(
        SweepConfig,
        Path(__file__).parents[2] / "configs" / "paper" / "sweep.yaml",
        {"manifest": manifest, "out": str(tmp_path / "sweep"), "grid.tasks": [["depth"]]},
    )
    planned = plan_sweep(config, tokens_per_s=3000.0).to_json()
    # Of L = 2 with any pairs, 3 to 6 with those that fit 16 pictures of 256 tokens, 8 with one pair; by two methods.
    fit = sum(length * (pairs + 1) <= 16 for length in (3, 4, 6, 8) for pairs in (1, 2, 3))
    assert len(planned["trials"]) == 3 * (3 + 2 * fit)
    assert planned["builds"]["lengths"] == [3, 4, 6, 8]
    assert planned["total"]["gpu_hours"] > 0


Planned = Callable[..., SweepConfig]


@pytest.fixture
def planned(write_manifest: Callable[..., str], tmp_path: Path, vqgan_folder: Path, llama_folder: Path) -> Planned:
    """A sweep that builds its dataset; of edges there are two pairs in train, and none in test."""
    splits = ("train", "train", "val", "test")
    rows = [{"pair_id": n, "task": "depth", "split": splits[n % 4]} for n in range(16)]
    rows += [{"pair_id": n, "task": "edges", "split": split} for n, split in enumerate(("train", "train", "val"), 100)]
    base = {"manifest": write_manifest(rows), "out": str(tmp_path), "build.tokenizer.path": str(vqgan_folder)}
    base |= {"train.backbone": {"scale": "custom", "path": str(llama_folder)}, "grid.pairs": [1]}
    return lambda **options: load_config(SweepConfig, None, base | {"grid.tasks": [["depth"]]} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train.sentences.split": "trian"}, "no pairs in split trian, only in test, train, val; set train.sentences"),
        ({"train.sentences.validation_split": "vla"}, "split vla, only in test, train, val; set train.sentences.valid"),
        ({"evaluate.split": "tset"}, "no pairs in split tset, only in test, train, val; set evaluate.split"),
        ({"evaluate.example_split": "x"}, "no pairs in split x, only in test, train, val; set evaluate.example_split"),
        ({"grid.tasks": [["depth"], ["pose"]]}, "pose has 0 pairs in split train, the grid needs 2"),
        ({"grid.pairs": [2], "grid.tasks": [None]}, "edges has 2 pairs in split train, the grid needs 3; lower grid."),
        ({"grid.tasks": [["edges"]], "grid.pairs": [0]}, "edges has 0 pairs in split test, the grid needs 1"),
        (
            {"grid.pairs": [3], "evaluate.split": "val", "evaluate.example_split": "val"},
            "needs 4; lower grid.pairs, set evaluate.example_split, or name the other tasks in evaluate.tasks",
        ),
    ],
)
def test_splits_are_checked_before_the_dataset_is_built(
    planned: Planned, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CovrayError) as refused:
        grid_of(planned(**options))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("finished", [True, False])
def test_a_dataset_that_was_begun_keeps_its_frames_when_the_grid_shrinks_and_does_not_grow(
    planned: Planned, write_dataset: Callable[..., Any], finished: bool
) -> None:
    options: dict[str, Any] = {"evaluate.split": "val", "grid.lengths": [3, 5], "grid.methods": ["none", "linear"]}
    build = grid_of(planned(**options)).build
    assert build is not None
    assert (build.lengths, build.methods) == ((3, 5), ("linear",))
    data, _ = write_dataset({"depth": 24}, lengths=(3, 5), methods=("linear",), finished=finished)
    assert data == build.out
    for fewer in ({}, {"grid.lengths": [2]}, {"grid.lengths": [3]}, {"grid.methods": ["none"]}):
        assert grid_of(planned(**options | fewer)).build == build
    for more in ({"grid.lengths": [3, 4, 5]}, {"grid.methods": ["linear", "diffusion"]}):
        with pytest.raises(ConfigError, match="was begun with 3, 5 by linear; leave out the others, or give another"):
            grid_of(planned(**options | more))
