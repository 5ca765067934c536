"""A package that is installed brings a task and more: it goes all the way from a folder of pictures to a page."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from covray.chains.dataset import ChainDataset
from covray.chains.records import DatasetRecord
from covray.config import TokenizerConfig
from covray.config.fields import EngineConfig
from covray.evaluation.records import EvaluationRecord
from covray.models.tokenizer.vqgan import load_tokenizer
from covray.training.records import RunRecord
from tests.support.commands import error_line, ray_for_commands, run
from tests.support.plugins import install_plugin

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end]
Covray = Callable[..., subprocess.CompletedProcess[str]]
PLUGINS = {"task matting": "covray-matting 1.0"}


@pytest.fixture(scope="module")
def python_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH on which the package of tests/plugin is installed."""
    return install_plugin(tmp_path_factory.mktemp("plugin"))


def write_cutouts(folder: Path) -> None:
    """Write six pictures with alpha for each of two splits, and three for the test."""
    for split, count in (("train", 6), ("val", 3), ("test", 3)):
        (folder / split).mkdir(parents=True)
        for number in range(count):
            small = np.random.default_rng(number).integers(0, 256, (4, 4, 4), np.uint8)
            picture = Image.fromarray(small, "RGBA").resize((64, 64), Image.Resampling.BICUBIC)
            picture.save(folder / split / f"{number}.png")


@pytest.fixture
def covray(tmp_path_factory: pytest.TempPathFactory, python_path: str) -> Iterator[Covray]:
    """Runs commands on a Ray whose workers, too, have the package on their PYTHONPATH."""
    with ray_for_commands(tmp_path_factory.mktemp("ray"), PYTHONPATH=python_path) as run_on:
        yield run_on


def test_a_package_goes_all_the_way(tmp_path: Path, covray: Covray, python_path: str) -> None:
    write_cutouts(tmp_path / "cutouts")
    chains, trained, scores, answers = (str(tmp_path / name) for name in ("chains", "run", "eval", "answers"))
    (tmp_path / "pairs").mkdir()
    for split in ("train", "val", "test"):
        manifest = str(tmp_path / "pairs" / f"{split}.parquet")
        covray("pairs", "from", "cutouts", str(tmp_path / "cutouts"), "--split", split, "--out", manifest)
    build = ("build", "--pairs", str(tmp_path / "pairs"), "--out", chains, "--length", "3", "--method", "wipe")
    covray(*build)
    record = DatasetRecord.read(chains)
    assert record.plugins == PLUGINS | {"method wipe": "covray-matting 1.0"}
    require_wiped(chains)

    covray(
        "train", "--scale", "nano", "--data", chains, "--out", trained, "--length", "3", "--method", "wipe",
        "--steps", "2", "--track", "lines", "--set", "optimizer.batch_tokens=768",
    )  # fmt: skip
    assert RunRecord.read(trained).plugins == record.plugins
    lines = [json.loads(line) for line in Path(tmp_path, "run.lines.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert lines[-1] == {"status": "FINISHED"}

    table = covray(
        "evaluate", "--data", chains, "--adapter", trained, "--out", scores, "--baselines", "mean,ceiling",
        "--metrics", "matting/matte_gradient", "--tracking-uri", "none", "--temperature", "1", "--vote", "2",
        "--set", "untuned=false",
    ).stdout  # fmt: skip
    assert "matting" in table
    assert "MAD" in table
    assert EvaluationRecord.read(scores).plugins == PLUGINS | {"metric matting/matte_gradient": "covray-matting 1.0"}
    results = json.loads(Path(scores, "results.json").read_text())
    assert results["failed"] == []
    assert results["tasks"]["matting"]["primary"] == "matte_mad"
    assert {"matte_mad", "matte_gradient"} <= {*results["tasks"]["matting"]["metrics"], *results["lower_is_better"]}
    assert {subject["name"]: subject.get("samples", 1) for subject in results["subjects"]} == {
        "mean label": 1, "run": 2, "VQGAN ceiling": 1,
    }  # fmt: skip
    values = {(row["subject"], row["metric"]): row["mean"] for row in results["scores"]}
    assert 0 < values["VQGAN ceiling", "matte_mad"] < values["run", "matte_mad"] <= 1000
    assert 0 <= values["run", "matte_gradient"] <= 1

    query = str(tmp_path / "cutouts" / "test" / "0.png")
    covray("generate", "--adapter", trained, "--task", "matting", "--query", query, "--out", answers)
    matte = np.array(Image.open(Path(answers, "0", "matte.png")))
    shown = np.array(Image.open(Path(answers, "0", "answer.png")).convert("RGB")).mean(axis=2)
    assert np.abs(matte - shown).max() <= 0.5

    Path(scores, "index.html").unlink()
    covray("report", scores)
    page = Path(scores, "index.html").read_text()
    assert "MAD" in page
    assert "Gradient" in page

    # Without the package, each command says in one line what it lacks.
    absent = "is of covray-matting 1.0, which is not installed; pip install covray-matting==1.0"
    for folder in ("again", "half"):
        shutil.copytree(chains, tmp_path / folder)
    (tmp_path / "half" / "_audit.json").unlink()
    without = ("build", "--pairs", str(tmp_path / "pairs"), "--out", str(tmp_path / "half"), "--length", "3")
    assert absent in error_line(run(*without, code=2).stderr)
    evaluation = ("evaluate", "--data", chains, "--out", str(tmp_path / "other"), "--tracking-uri", "none")
    assert absent in error_line(run(*evaluation, code=2).stderr)


def require_wiped(chains: str) -> None:
    """Check that each chain's frame is the label on its left half and the picture on its right."""
    dataset = ChainDataset(chains)
    tokenizer = load_tokenizer(TokenizerConfig(), EngineConfig())
    rows = list(dataset.rows())
    assert len(rows) == 12
    for row in rows:
        (frame,) = row["frames"]
        assert frame["method"] == "wipe"
        source, middle, label = tokenizer.decode(np.stack([row["source"], frame["tokens"], row["label"]]))
        left, right = slice(None, 20), slice(-20, None)
        for half, same, other in ((left, label, source), (right, source, label)):
            near = np.abs(middle[:, half].astype(int) - same[:, half]).mean()
            assert near < np.abs(middle[:, half].astype(int) - other[:, half]).mean()


def test_a_node_without_the_package_is_refused_before_the_start(
    tmp_path: Path, python_path: str, run_on_ray: Covray
) -> None:
    write_cutouts(tmp_path / "cutouts")
    pairs = str(tmp_path / "pairs.parquet")
    run("pairs", "from", "cutouts", str(tmp_path / "cutouts"), "--out", pairs, PYTHONPATH=python_path)
    build = ("build", "--pairs", pairs, "--out", str(tmp_path / "chains"), "--method", "linear")
    # The workers of this Ray do not have the package.
    message = error_line(run_on_ray(*build, code=2, PYTHONPATH=python_path).stderr)
    assert message.startswith("node ")
    assert "the task matting is of covray-matting 1.0, which is not installed" in message
    assert not (tmp_path / "chains" / "_dataset.json").exists()


def test_a_task_that_cannot_be_loaded_is_one_line_and_the_rest_works(tmp_path: Path, python_path: str) -> None:
    site = tmp_path / "site"
    shutil.copytree(python_path.split(os.pathsep)[0], site)
    path = os.pathsep.join([str(site), python_path.split(os.pathsep)[1]])
    entry = site / "covray_matting-1.0.dist-info" / "entry_points.txt"
    for target, reason in (("no.such.module", "cannot be loaded"), ("covray.tasks.depth", "the name of another task")):
        entry.write_text(f"[covray.tasks]\nmore = {target}\n")
        out = tmp_path / "x.parquet"
        done = run("pairs", "scenes", "--count", "1", "--out", str(out), PYTHONPATH=path)
        (line,) = (line for line in done.stderr.splitlines() if "covray-matting 1.0: its covray.tasks more" in line)
        assert reason in line
        assert "Traceback" not in done.stderr
        assert pq.read_metadata(out).num_rows == 7
        out.unlink()
        done = run("pairs", "scenes", "--task", "more", "--out", str(out), code=2, PYTHONPATH=path)
        assert "--task more: no such task" in done.stderr.splitlines()[-1]
