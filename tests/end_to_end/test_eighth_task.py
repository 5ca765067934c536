"""A task of another package, named in one line of its metadata, goes all the way from a list of files to a page."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support import toy_task
from tests.support.commands import ray_for_commands, run

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def python_path(tmp_path: Path) -> str:
    """A PYTHONPATH on which an installed package brings the task."""
    about = tmp_path / "site" / "toy_task-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-task\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[covray.tasks]\nbrightness = tests.support.toy_task\n")
    return os.pathsep.join([str(tmp_path / "site"), str(ROOT)])


def write_list(folder: Path) -> Path:
    """Write twelve pictures, their labels, and the list of them; return the list."""
    folder.mkdir()
    lines = ["image,label,split"]
    for number in range(12):
        small = np.random.default_rng(number).integers(0, 20 * number + 16, (4, 4, 3), np.uint8)
        picture = Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number}.png")
        label = toy_task.render(float(toy_task.read(np.array(picture))), 64)
        Image.fromarray(label).save(folder / f"{number}_label.png")
        split = ("train", "train", "val", "test")[number % 4]
        lines.append(f"{number}.png,{number}_label.png,{split}")
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder / "list.csv"


@pytest.fixture
def covray(
    tmp_path_factory: pytest.TempPathFactory, python_path: str
) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Runs commands on a Ray whose workers, too, have the task on their PYTHONPATH."""
    with ray_for_commands(tmp_path_factory.mktemp("ray"), PYTHONPATH=python_path) as run_on:
        yield run_on


def test_an_eighth_task_goes_all_the_way(
    tmp_path: Path, covray: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    listed = write_list(tmp_path / "pictures")
    pairs, chains, trained, scores, answers = (
        str(tmp_path / name) for name in ("pairs.parquet", "chains", "run", "eval", "answers")
    )

    covray("pairs", "manifest", str(listed), "--task", "brightness", "--out", pairs)
    covray("build", "--pairs", pairs, "--out", chains, "--lengths", "3", "--methods", "linear")
    covray(
        "train", "--scale", "nano", "--data", chains, "--out", trained, "--length", "3", "--method", "linear",
        "--steps", "2", "--tracking-uri", "none", "--set", "optimizer.batch_tokens=768",
    )  # fmt: skip
    table = covray(
        "evaluate", "--data", chains, "--adapter", trained, "--out", scores, "--baselines", "mean,ceiling",
        "--tracking-uri", "none", "--temperature", "1", "--vote", "2", "--set", "untuned=false",
    ).stdout  # fmt: skip
    assert "bright" in table
    assert "level" in table
    assert "samples" in table
    results = json.loads(Path(scores, "results.json").read_text())
    assert results["failed"] == []
    assert results["tasks"]["brightness"]["primary"] == "level_error"
    assert "level_error" in results["lower_is_better"]
    assert {row["subject"]: row.get("samples", 1) for row in _named(results)} == {
        "mean label": 1, "run": 2, "VQGAN ceiling": 1,
    }  # fmt: skip
    for row in results["scores"]:
        if row["metric"] == "level_error":
            assert 0 <= row["mean"] <= 1

    query = str(listed.parent / "3.png")
    covray("generate", "--adapter", trained, "--task", "brightness", "--query", query, "--out", answers)
    level = json.loads(Path(answers, "3", "brightness.json").read_text())["level"]
    shown = np.array(Image.open(Path(answers, "3", "answer.png")))
    assert level == pytest.approx(shown.mean() / 255)

    Path(scores, "index.html").unlink()
    covray("report", scores)
    assert "Level error" in Path(scores, "index.html").read_text()


def _named(results: dict[str, list[dict[str, object]]]) -> list[dict[str, object]]:
    return [subject | {"subject": subject["name"]} for subject in results["subjects"]]


def test_a_task_that_cannot_be_loaded_is_one_line_and_the_rest_works(tmp_path: Path, python_path: str) -> None:
    entry = Path(python_path.split(os.pathsep)[0], "toy_task-1.0.dist-info", "entry_points.txt")
    for target, reason in (("no.such.module", "cannot be loaded"), ("covray.tasks.depth", "the name of another task")):
        entry.write_text(f"[covray.tasks]\nmore = {target}\n")
        out = tmp_path / "x.parquet"
        done = run("pairs", "scenes", "--count", "1", "--out", str(out), PYTHONPATH=python_path)
        (line,) = (line for line in done.stderr.splitlines() if "toy-task 1.0: its covray.tasks more" in line)
        assert reason in line
        assert "Traceback" not in done.stderr
        assert out.exists()
        out.unlink()
        done = run("pairs", "scenes", "--task", "more", "--out", str(out), code=2, PYTHONPATH=python_path)
        assert "--task more: no such task" in done.stderr.splitlines()[-1]
