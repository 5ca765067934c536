"""A vision-language model by commands alone: pictures with words, training, answers, scores."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from covray.config.vlm import VlmTrainConfig
from covray.training.run import train as train_in_process
from tests.support.trainings import curve
from tests.support.vlms import picture

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end]
Run = Callable[..., subprocess.CompletedProcess[str]]


def written(config: VlmTrainConfig, path: Path) -> str:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return str(path)


def test_two_workers_with_zero_make_the_losses_of_one_without(
    vlm_config: Callable[..., VlmTrainConfig], tmp_path: Path, run_on_ray: Run
) -> None:
    case = {"objective": "block_diffusion", "optimizer__steps": 6}
    alone = vlm_config("alone", **case)
    train_in_process(alone)
    shared = vlm_config("shared", workers__count=2, workers__cpus=0.5, compute__deepspeed="zero2", **case)
    command = ("vlm", "train", "--config", written(shared, tmp_path / "shared.yaml"))
    result = json.loads(run_on_ray(*command, "--json").stdout.splitlines()[-1])
    losses = [[record["loss"] for record in curve(run) if "loss" in record] for run in (alone, shared)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    again = json.loads(run_on_ray(*command, "--json").stdout.splitlines()[-1])
    assert again == result, "a finished run only gives its result again"
    refused = run_on_ray(*command, "--set", "blocks.size=2", code=2)
    assert "blocks.size was 4, is 2" in refused.stderr


def test_from_pictures_to_scores(vlm_folders: dict[str, str], tmp_path: Path, run_on_ray: Run) -> None:
    words, model = str(tmp_path / "words.parquet"), vlm_folders["llava"]
    first, blocks = str(tmp_path / "first"), str(tmp_path / "blocks")
    run_on_ray("pairs", "portraits", "--count", "40", "--size", "32", "--out", words)
    small = ("--steps", "2", "--tracking-uri", "none", "--set", "optimizer.batch_samples=4")
    run_on_ray("vlm", "train", "--data", words, "--model", model, "--out", first, "--train", "full", *small)
    # What was trained token by token is a checkpoint, and is converted to blocks.
    convert = ("--objective", "block_diffusion", "--preset", "diffusionvl")
    run_on_ray("vlm", "train", "--data", words, "--model", f"{first}/adapter", "--out", blocks, *convert, *small)
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    answer = run_on_ray(
        "vlm", "generate", "--run", blocks, "--image", str(tmp_path / "a.png"), "--prompt", "what is it",
        "--max-tokens", "8", "--json",
    )  # fmt: skip
    assert json.loads(answer.stdout.splitlines()[-1])["prompt"] == "what is it"
    score = ("vlm", "evaluate", "--data", words, "--samples", "9", "--set", "decoding.max_tokens=8", "--json")
    scores = []
    for number, passes in enumerate((8, 2)):
        out = str(tmp_path / f"scores-{number}")
        done = run_on_ray(*score, "--run", blocks, "--out", out, "--passes", str(passes))
        scores.append(json.loads(done.stdout.splitlines()[-1]))
    assert [one["prompts"] for one in scores] == [9, 9]
    assert scores[0]["answer_perplexity"] == scores[1]["answer_perplexity"]
    assert scores[0]["tokens_per_pass"] <= scores[1]["tokens_per_pass"]
