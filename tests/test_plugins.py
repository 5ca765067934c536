"""Plug-ins of installed packages: they join covray's own, and one that cannot be used is a line and does no harm."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

import covray.tasks as tasks
from covray import methods, plugins
from covray.config import BuildConfig, EvaluateConfig, SentencesConfig
from covray.distributed.plugin_checks import problem_here, used_plugins
from covray.distributed.trackers.base import tracker_registry
from covray.errors import ConfigError, PairError
from covray.pairs import plugin_sources
from covray.pairs.manifest import Pair, Picture
from covray.tasks import metrics as task_metrics
from covray.tasks.base import Metric
from tests.support import toy_task

ROOT = Path(__file__).parents[1]


class Point:
    """An entry point of the package toy 1.0, as ``importlib.metadata`` finds it."""

    dist = SimpleNamespace(name="toy", version="1.0")

    def __init__(self, name: str, target: object):
        self.name, self.value, self._target = name, f"toy:{name}", target

    def load(self) -> object:
        if isinstance(self._target, BaseException):
            raise self._target
        return self._target


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plug-ins of a test are forgotten after it."""
    caches = (plugin_sources.pair_sources, task_metrics.metric_registry, methods.frame_makers, tracker_registry)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def added(registry: plugins.Registry[Any]) -> list[plugins.Plugin]:
    """Return what other packages added."""
    return [plugin for plugin in registry.load_all() if plugin.package != "covray"]


def install(monkeypatch: pytest.MonkeyPatch, *points: Point) -> None:
    monkeypatch.setattr(plugins, "entry_points", lambda group: list(points))


def test_a_task_joins_covrays_own(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Point("toy", toy_task))
    registry = tasks.load_tasks()
    (plugin,) = added(registry)
    assert (plugin.group, plugin.name, plugin.package, plugin.version) == ("covray.tasks", "brightness", "toy", "1.0")
    assert plugin.problem == ""
    assert list(registry.objects) == [*tasks.TASKS, "brightness"]
    assert registry.packages(["depth", "brightness"]) == {"task brightness": "toy 1.0"}
    assert json.loads(registry.objects["brightness"].export(toy_task.render(0.5, 4))["brightness.json"])["level"] > 0.49


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (ImportError("no module\nnamed toy"), "cannot be loaded (no module named toy)"),
        (SystemError(), "cannot be loaded (SystemError)"),
        (SimpleNamespace(**{**vars(toy_task), "name": "depth"}), "has the name of another task, depth"),
        (object(), "is no task: it lacks name, short"),
        (SimpleNamespace(**{name: value for name, value in vars(toy_task).items() if name != "mean"}),
         "is no task: it lacks mean"),
    ],
)  # fmt: skip
def test_a_task_that_cannot_be_used_is_one_line_and_the_others_work(
    task: object, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, Point("broken", task), Point("toy", toy_task))
    with caplog.at_level(logging.WARNING, "covray"):
        registry = tasks.load_tasks()
    broken, whole = added(registry)
    assert list(registry.objects) == [*tasks.TASKS, "brightness"]
    assert (whole.problem, broken.problem[: len(reason)]) == ("", reason)
    (line,) = caplog.messages
    assert line.startswith(f"toy 1.0: its covray.tasks broken {reason}")
    assert "\n" not in line


def test_a_name_that_is_claimed_twice_is_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Point("first", toy_task), Point("second", toy_task))
    first, second = added(tasks.load_tasks())
    assert (first.problem, second.problem) == ("", "has the name of another task, brightness of toy")


def test_a_source_that_is_none_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Point("numbers", 3), Point("faces", lambda root, *, split, count, seed: []))
    sources = plugin_sources.pair_sources()
    with pytest.raises(ConfigError, match=r"^numbers: the source of pairs of toy 1.0 is no source of pairs"):
        sources.find("numbers")
    with pytest.raises(
        ConfigError, match=r"^toy: no such source of pairs; the known ones are coco, .*faces.* \(covray plug"
    ):
        sources.find("toy")
    assert list(sources.find("faces")("here", split="train", count=None, seed=0)) == []


class Contrast:
    """A metric of depth."""

    task = "depth"
    metric = Metric("contrast", "Contrast", "Difference of the pictures' contrasts.", "lower")

    @staticmethod
    def score(answer: np.ndarray, label: np.ndarray, meta: object = None) -> float:
        return abs(float(answer.std()) - float(label.std()))


def test_a_metric_joins_those_of_its_task_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Point("contrast", Contrast))
    config = EvaluateConfig(data="chains", out="scores", metrics=("depth/contrast",))
    assert config.identity()["metrics"] == ["depth/contrast"]
    assert "metrics" not in EvaluateConfig(data="chains", out="scores").identity()
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert task_metrics.added_values("depth", config.metrics, black, white, {}) == {"contrast": 0.0}
    assert task_metrics.added_values("pose", config.metrics, black, white, {}) == {}
    assert task_metrics.metrics_of("depth")[-1] == Contrast.metric
    with pytest.raises(ValidationError, match=r"no such metric of another package; the installed ones are depth/con"):
        EvaluateConfig(data="chains", out="scores", metrics=("depth/sharpness",))
    with pytest.raises(ValidationError, match="depth/abs_rel is scored by its task"):
        EvaluateConfig(data="chains", out="scores", metrics=("depth/abs_rel",))


def changed(**values: object) -> SimpleNamespace:
    return SimpleNamespace(**{"task": "depth", "metric": Contrast.metric, "score": Contrast.score} | values)


@pytest.mark.parametrize(
    ("metric", "reason"),
    [
        (changed(task="clouds"), "is of a task that is not installed, clouds"),
        (changed(metric="contrast"), "is no metric: its metric is no covray.tasks.base.Metric"),
        (changed(metric=Metric("abs_rel", "A", "B", "lower")), "has the name of another metric, depth/abs_rel of cov"),
        (changed(metric=Metric("psnr", "A", "B", "lower")), "has the name of another metric, psnr of colorization"),
        (SimpleNamespace(task="depth", metric=Contrast.metric), "is no metric: it lacks score"),
    ],
)
def test_a_metric_that_cannot_be_used_is_refused(metric: object, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Point("broken", metric))
    (plugin,) = added(task_metrics.metric_registry())
    assert plugin.problem.startswith(reason)


def test_a_metric_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Point("contrast", changed(score=lambda answer, label, meta: float("nan"))))
    black = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ConfigError, match="metrics: depth/contrast returned nan"):
        task_metrics.added_values("depth", ["depth/contrast"], black, black, {})


def test_a_package_that_is_absent_or_of_another_version_is_one_line() -> None:
    recorded = {"task matting": "covray-nowhere 1.0", "task brightness": "numpy 0.1"}
    absent, other = plugins.missing_packages(recorded)
    assert (
        absent == "the task matting is of covray-nowhere 1.0, which is not installed; pip install covray-nowhere==1.0"
    )
    assert other.startswith("the task brightness is of numpy 0.1, and numpy ")
    with pytest.raises(ConfigError, match=r"^chains: the task matting is of covray-nowhere 1.0"):
        plugins.require_packages(recorded, "chains")
    plugins.require_packages(None, "chains")


def test_an_entry_point_without_a_package_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("toy", "tests.support.toy_task", "covray.tasks")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point])
    (plugin,) = added(tasks.load_tasks())
    assert (plugin.package, plugin.problem) == ("an unknown package", "")


def greys(root: str, *, split: str, count: int | None, seed: int) -> Iterator[Pair]:
    """Yield a pair for each picture below ``root``: itself twice."""
    for path in sorted(Path(root).glob("*.png"))[:count]:
        yield Pair("low_light", split, Picture(uri=path.name), Picture(uri=path.name))


def test_an_installed_package_is_listed_and_its_pairs_become_a_manifest(tmp_path: Path) -> None:
    about = tmp_path / "site" / "toy-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[covray.tasks]\nbrightness = tests.support.toy_task\n[covray.pairs]\ngreys = tests.test_plugins:greys\n"
        "broken = no.such.module\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)])}

    def covray(*arguments: str) -> str:
        command = [sys.executable, "-m", "covray", *arguments]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = json.loads(covray("plugins", "--json"))
    listed = {plugin["name"]: bool(plugin["problem"]) for plugin in found if plugin["package"] == "toy"}
    assert listed == {"brightness": False, "brightness/level_error": False, "broken": True, "greys": False}
    own = [plugin for plugin in found if plugin["package"] == "covray"]
    assert {"depth", "depth/abs_rel", "coco"} <= {plugin["name"] for plugin in own}
    assert not any(plugin["problem"] for plugin in own)
    assert "greys" in covray("plugins")
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    covray("pairs", "from", "greys", ".", "--split", "val", "--count", "2", "--out", "pairs.parquet")
    rows = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert [(row["task"], row["split"], row["image"]["uri"]) for row in rows] == [
        ("low_light", "val", "0.png"), ("low_light", "val", "1.png"),
    ]  # fmt: skip


class Fade:
    """An interpolation: cuts from the picture to the label in the middle."""

    @staticmethod
    def frames(source: np.ndarray, label: np.ndarray, alphas: Sequence[float]) -> list[np.ndarray]:
        return [label if alpha > 0.5 else source for alpha in alphas]


def test_an_interpolation_is_a_method_of_frames_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Point("fade", Fade))
    config = BuildConfig(pairs="p", out="o", methods=("linear", "fade"))
    assert config.methods == ("fade", "linear")
    assert SentencesConfig(method="fade").method == "fade"
    assert methods.frame_makers().packages(config.methods) == {"method fade": "toy 1.0"}
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    made = methods.make_frames("fade", black, white, [0.25, 0.75])
    assert [int(frame.mean()) for frame in made] == [0, 255]
    assert [int(frame.mean()) for frame in methods.make_frames("linear", black, white, [0.2])] == [51]
    for name in ("none", "lineer"):
        with pytest.raises(
            ValidationError, match=f"{name}: no such method; the known ones are linear, diffusion, copy, coarse, fade"
        ):
            BuildConfig(pairs="p", out="o", methods=(name,))


@pytest.mark.parametrize(
    ("entry", "maker", "problem"),
    [
        ("linear", Fade, "has the name of another method, linear of covray"),
        ("none", Fade, "has the name of chains without frames, none"),
        ("a/b", Fade, "has a name of other characters"),
        ("fade", object(), "is no method: it lacks frames"),
        ("fade", ImportError("no morpher"), r"cannot be loaded (no morpher)"),
    ],
)
def test_an_interpolation_that_cannot_be_used_is_refused(
    entry: str, maker: object, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, Point(entry, maker))
    (plugin,) = added(methods.frame_makers())
    assert plugin.problem.startswith(problem)
    assert BuildConfig(pairs="p", out="o").methods == ("diffusion", "linear")
    if entry == "fade":
        with pytest.raises(ValidationError, match=f"the method of toy 1.0 {re.escape(problem)}"):
            BuildConfig(pairs="p", out="o", methods=("fade",))


def raise_error(source: object, label: object, alphas: object) -> None:
    raise ValueError("too dark\nto see")


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        (raise_error, r"fade failed \(too dark to see\)"),
        (lambda source, label, alphas: [source], "fade returned 1 frames, not 2"),
        (lambda source, label, alphas: [source / 255] * 2, r"fade returned a frame that is not uint8 \[4, 4, 3\]"),
    ],
)
def test_frames_that_cannot_be_made_reject_their_pair(
    frames: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, Point("fade", SimpleNamespace(frames=frames)))
    black = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(PairError, match=f"^interpolation: {reason}"):
        methods.make_frames("fade", black, black, [0.25, 0.75])


def test_a_node_says_which_plugin_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Point("fade", Fade))
    assert used_plugins(["depth"], ["linear"], []) == {}
    monkeypatch.setattr(plugins, "version", {"toy": "1.0"}.__getitem__)
    assert problem_here({"method fade": "toy 1.0"}) == ""
    assert problem_here({"method fade": "toy 2.0"}).startswith("the method fade is of toy 2.0, and toy 1.0")
    assert problem_here({"task clouds": "toy 1.0"}).startswith("clouds: no such task")
