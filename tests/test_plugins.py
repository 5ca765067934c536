"""Plug-ins of installed packages: they join covray's own, and one that cannot be used is a line and does no harm."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from PIL import Image

import covray.tasks as tasks
from covray import plugins
from covray.errors import ConfigError
from covray.pairs import plugin_sources
from covray.pairs.manifest import Pair, Picture
from covray.pairs.plugin_sources import find_source
from covray.tasks import TASKS
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
    before = dict(TASKS)
    plugin_sources.pair_sources.cache_clear()
    yield
    TASKS.clear()
    TASKS.update(before)
    plugin_sources.pair_sources.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, *points: Point) -> None:
    monkeypatch.setattr(plugins, "entry_points", lambda group: list(points))


def test_a_task_joins_covrays_own(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Point("toy", toy_task))
    (plugin,) = tasks.load_task_plugins()
    assert (plugin.group, plugin.name, plugin.package, plugin.version) == ("covray.tasks", "brightness", "toy", "1.0")
    assert plugin.problem == ""
    assert list(TASKS)[-1] == "brightness"
    assert json.loads(TASKS["brightness"].export(toy_task.render(0.5, 4))["brightness.json"])["level"] > 0.49


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
    before = list(TASKS)
    with caplog.at_level(logging.WARNING, "covray"):
        broken, whole = tasks.load_task_plugins()
    assert list(TASKS) == [*before, "brightness"]
    assert (whole.problem, broken.problem[: len(reason)]) == ("", reason)
    (line,) = caplog.messages
    assert line.startswith(f"toy 1.0: its covray.tasks broken {reason}")
    assert "\n" not in line


def test_a_name_that_is_claimed_twice_is_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Point("first", toy_task), Point("second", toy_task))
    assert [bool(plugin.problem) for plugin in tasks.load_task_plugins()] == [False, True]


def test_a_source_that_is_none_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Point("numbers", 3), Point("faces", lambda root, *, split, count, seed: []))
    with pytest.raises(ConfigError, match=r"^numbers: no such source of pairs; the installed ones are faces"):
        find_source("numbers")
    assert list(find_source("faces")("here", split="train", count=None, seed=0)) == []


def test_an_entry_point_without_a_package_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("toy", "tests.support.toy_task", "covray.tasks")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point])
    (plugin,) = tasks.load_task_plugins()
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

    listed = {plugin["name"]: plugin for plugin in json.loads(covray("plugins", "--json"))}
    assert listed.keys() == {"brightness", "greys", "broken"}
    assert [bool(plugin["problem"]) for plugin in listed.values()] == [False, False, True]
    assert "greys" in covray("plugins")
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    covray("pairs", "from", "greys", ".", "--split", "val", "--count", "2", "--out", "pairs.parquet")
    rows = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert [(row["task"], row["split"], row["image"]["uri"]) for row in rows] == [
        ("low_light", "val", "0.png"), ("low_light", "val", "1.png"),
    ]  # fmt: skip
