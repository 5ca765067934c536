"""What the literature uses, in its own layouts: COCO's folder, LVM's tokenizer and backbone; by commands alone."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models.tokenizer.test_convert import CODES, SIZE, muse_weights, write_muse
from tests.pairs.test_coco import Panoptic
from tests.support.backbones import write_llama
from tests.support.commands import FAST

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end]
Run = Callable[..., subprocess.CompletedProcess[str]]


def test_from_coco_and_lvm_to_scores(tmp_path: Path, run_on_ray: Run, run_here: Run) -> None:
    """By commands alone; those that need no Ray run in this process."""
    coco, pairs = tmp_path / "coco", tmp_path / "pairs"
    for split, images in (("train", 8), ("val", 3)):
        panoptic = Panoptic(coco, split)
        for number in range(1, images + 1):
            ids = np.full((32, 48), number)
            ids[:, 24:] = 70_000
            panoptic.add(number, ids, {number: 1, 70_000: 92 + number % 2})
        panoptic.write()
        # Of eight images six are drawn, as the paper draws its 10,000.
        said = run_here(
            "pairs", "coco", str(coco), "--split", split, "--count", str(images - images // 4), "--seed", "0",
            "--out", str(pairs / f"{split}.parquet"),
        )  # fmt: skip
        assert str(images - images // 4) in said.stdout
    # LVM's tokenizer is muse's, pickled; its backbone a LLaMA of several fp16 files, whose end of sequence is a code.
    tokenizer, backbone = tmp_path / "vqgan", tmp_path / "lvm"
    run_here("convert", "tokenizer", str(write_muse(tmp_path / "muse", muse_weights())), "--out", str(tokenizer))
    write_llama(backbone, dtype=torch.float16, shard_size="100KB")
    assert len(list(backbone.glob("*.safetensors"))) > 1

    chains, adapter, scores = tmp_path / "chains", tmp_path / "run", tmp_path / "scores"
    build = ("build", "--pairs", str(pairs), "--tokenizer", str(tokenizer), "--out", str(chains), "--actors", "1")
    run_on_ray(*build, *FAST)
    described = json.loads(run_here("inspect", str(chains), "--json").stdout.splitlines()[-1])
    assert described["tokens_per_image"] == (SIZE // 4) ** 2
    run_on_ray(
        "train", "--data", str(chains), "--backbone", str(backbone), "--scale", "custom", "--length", "3",
        "--steps", "2", "--out", str(adapter), "--set", "optimizer.batch_tokens=256", "--tracking-uri", "none",
    )  # fmt: skip
    run_on_ray(
        "evaluate", "--data", str(chains), "--adapter", str(adapter), "--split", "val", "--episodes", "2",
        "--baselines", "ceiling", "--out", str(scores), "--set", "actors.max=1", "--tracking-uri", "none",
    )  # fmt: skip
    table = json.loads((scores / "results.json").read_text())["scores"]
    subjects = {entry["subject"] for entry in table if entry["task"] == "segmentation" and entry["metric"] == "iou"}
    assert subjects == {"run", "untuned", "VQGAN ceiling"}
    # Tokens, frames and answers are of this tokenizer: an adapter is none for chains of another.
    other = run_here(
        "evaluate", "--data", str(chains), "--adapter", str(adapter), "--out", str(tmp_path / "other"),
        "--set", "example_split=test", code=2,
    )  # fmt: skip
    assert "test" in other.stderr
    assert CODES == 64
