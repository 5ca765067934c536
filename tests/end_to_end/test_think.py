"""ThinkDiff by commands alone: pictures with words, features, an aligner, a drawn thought, a table."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from covray.config.think import ThinkFeaturesConfig
from covray.thinking.building import FeatureBuilder, read_samples
from covray.thinking.dataset import read_table
from covray.thinking.rows import RESULT_SCHEMA
from tests.support.commands import COVRAY, committed, environment, error_line, wait_for
from tests.support.thinking import write_painter
from tests.support.vlms import picture
from tests.thinking.test_reasoning import write_judge

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end]
Run = Callable[..., subprocess.CompletedProcess[str]]


def rows_of(out: str) -> list[dict[str, Any]]:
    columns = ["sample", "split", "text", "ids", "features", "error"]
    return sorted(read_table(out, columns).to_pylist(), key=lambda row: row["sample"])


def test_from_pictures_to_a_table_of_reasoning(
    think_folders: dict[str, str], features_config: Callable[..., ThinkFeaturesConfig], tmp_path: Path, run_on_ray: Any,
    run_here: Run,
) -> None:  # fmt: skip
    """By commands alone; those that need no Ray run in this process."""
    features, run, painter = (str(tmp_path / name) for name in ("features", "run", "painter"))
    write_painter(Path(painter))
    command = [
        "think", "features", "--data", think_folders["manifest"], "--vlm", think_folders["vlm"], "--out", features,
        "--max-tokens", "6", "--actors", "1", "--set", "rows_per_block=1", "--set", "thought.temperature=1",
        "--set", "thought.top_p=1", "--set", "instructions=[what is it]",
    ]  # fmt: skip
    killed = subprocess.Popen([COVRAY, *command], env=environment(**run_on_ray.keywords))
    wait_for(lambda: committed(Path(features)) >= 3, "three pictures", killed)
    killed.kill()
    killed.wait()
    assert committed(Path(features)) < 12, "the kill came before the end"
    result = json.loads(run_on_ray(*command, "--json").stdout.splitlines()[-1])
    assert (result["samples"], result["failed"], result["reasons"]) == (12, 1, {"not_an_image": 1})
    config = features_config()
    samples = read_samples(config)
    expected = FeatureBuilder(config, samples.root).build(samples.rows).drop_columns(["count"]).to_pylist()
    assert rows_of(features) == sorted(expected, key=lambda row: row["sample"])
    refused = run_here(*command, "--set", "thought.seed=1", code=2)
    assert "thought.seed was 0, is 1" in error_line(refused.stderr)

    small = ("--steps", "3", "--tracking-uri", "none", "--set", "optimizer.batch=4", "--set", "workers.cpus=0.5")
    train = ("think", "train", "--data", features, "--language-model", think_folders["text"], "--out", run, *small)
    trained = json.loads(run_on_ray(*train, "--workers", "2", "--json").stdout.splitlines()[-1])
    assert (trained["steps"], trained["sentences"]) == (3, 12)

    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    draw = ("--kind", "unet", "--painter", painter, "--set", "painter.steps=2")
    asked = ("--image", str(tmp_path / "a.png"), "--word", "red", "--word", "blue")
    answer = run_here("think", "generate", "--run", run, *draw, *asked, "--out", str(tmp_path / "answer"), "--json")
    assert json.loads(answer.stdout)["files"] == ["answer.png", "text.txt"]

    evaluate = [
        "think", "evaluate", "--aligner", f"ours={run}", *draw, "--judge", write_judge(tmp_path / "judge"),
        "--out", str(tmp_path / "eval"), "--shots", "2", "--episodes", "1", "--tracking-uri", "none", "--actors", "1",
        "--set", "tasks=[Colour-I,Style-II]", "--set", "episodes.instruction=what is it",
    ]  # fmt: skip
    results = json.loads(run_on_ray(*evaluate, "--json").stdout.splitlines()[-1])
    assert results["rows"][-1] == "ours"
    assert {score["episodes"] for score in results["scores"] if score["task"] == "mean"} == {2}
    assert (tmp_path / "eval" / "index.html").exists()
    again = json.loads(run_here(*evaluate, "--json").stdout.splitlines()[-1])
    assert again == results, "a finished evaluation only gives its results again"
    assert "answers" in RESULT_SCHEMA.names
