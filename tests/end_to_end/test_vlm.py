"""A vision-language model by commands alone: pictures with words, training, answers, scores."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from covray.cli.app import app
from covray.config.vlm import VlmTrainConfig
from covray.distributed.train_vlm import train_vlm
from covray.errors import ConfigError
from covray.evaluation.vision_text import read_rows, row_lines
from covray.training.run import train as train_in_process
from tests.support.trainings import curve
from tests.support.vlms import picture

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end]
Run = Callable[..., subprocess.CompletedProcess[str]]


def written(config: VlmTrainConfig, path: Path) -> str:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return str(path)


def captioned_pictures(folder: Path) -> Path:
    """Write nine pictures and a list of their captions."""
    folder.mkdir()
    lines = ["image,caption"]
    for number in range(9):
        Image.fromarray(picture(number)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,the ball is {'red' if number % 2 else 'blue'}")
    (folder / "captions.csv").write_text("\n".join(lines))
    return folder / "captions.csv"


def here(*command: str) -> str:
    """Run a command in this process, and return what it prints."""
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    return done.output


def test_two_workers_with_zero_make_the_losses_of_one_without(
    vlm_config: Callable[..., VlmTrainConfig], tmp_path: Path, run_on_ray: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = {"objective": "block_diffusion", "optimizer__steps": 6}
    alone = vlm_config("alone", **case)
    train_in_process(alone)
    shared = vlm_config("shared", workers__count=2, workers__cpus=0.5, compute__deepspeed="zero2", **case)
    command = ("vlm", "train", "--config", written(shared, tmp_path / "shared.yaml"))
    result = json.loads(run_on_ray(*command, "--json").stdout.splitlines()[-1])
    losses = [[record["loss"] for record in curve(run) if "loss" in record] for run in (alone, shared)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    monkeypatch.setattr("covray.distributed.train.ray_session", lambda: pytest.fail("Ray was started"))
    assert train_vlm(shared).to_json() == result, "a finished run only gives its result again"
    with pytest.raises(ConfigError, match=r"blocks\.size was 4, is 2"):
        train_vlm(vlm_config("shared", **case, blocks__size=2))


def test_from_pictures_to_scores(vlm_folders: dict[str, str], tmp_path: Path, run_on_ray: Run) -> None:
    """A folder of pictures with a list of captions, by commands alone; those that need no Ray run in this process."""
    words = str(captioned_pictures(tmp_path / "pictures"))
    first, start, blocks = str(tmp_path / "first"), str(tmp_path / "start"), str(tmp_path / "blocks")
    small = ("--steps", "2", "--tracking-uri", "none", "--set", "optimizer.batch_samples=4")
    train = ("vlm", "train", "--data", words, "--set", "texts.validation_split=null", *small)
    run_on_ray(*train, "--model", vlm_folders["llava"], "--out", first, "--train", "full")
    # What was trained token by token is a checkpoint, and is converted to blocks.
    here("vlm", "convert", f"{first}/adapter", "--out", start)
    run_on_ray(*train, "--model", start, "--out", blocks, "--objective", "block_diffusion", "--preset", "diffusionvl")
    answer = here(
        "vlm", "generate", "--run", blocks, "--image", str(tmp_path / "pictures" / "0.png"), "--prompt", "what is it",
        "--max-tokens", "8", "--json",
    )  # fmt: skip
    assert json.loads(answer.splitlines()[-1])["prompt"] == "what is it"
    score = ("vlm", "evaluate", "--data", words, "--run", blocks, "--split", "train", "--tracking-uri", "none")
    small = ("--set", "decoding.max_tokens=8", "--set", "batch=2", "--json")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    # An evaluation that was killed in its third batch, as covray 0.1.0 left it: whole batches are kept.
    results = json.loads(run_on_ray(*score, *small, "--out", str(whole)).stdout.splitlines()[-1])
    rows = read_rows((whole / "answers.jsonl").read_text().splitlines())
    assert (results["prompts"], [row.number for row in rows]) == (9, list(range(9)))
    killed.mkdir()
    identity = json.loads((whole / "_evaluation.json").read_text())["identity"]
    (killed / "_evaluation.json").write_text(json.dumps({"version": 1, "identity": identity}))
    kept = [replace(row, answer="kept") for row in rows[:5]]
    (killed / "answers.jsonl").write_text("\n".join(row_lines(kept)))
    run_on_ray(*score, *small, "--out", str(killed))
    written = read_rows((killed / "answers.jsonl").read_text().splitlines())
    expected = kept[:4] + rows[4:]
    assert [replace(row, seconds=0.0) for row in written] == [replace(row, seconds=0.0) for row in expected]
