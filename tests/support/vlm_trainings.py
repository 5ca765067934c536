"""Trainings of tiny vision-language models: red and blue pictures with a caption and a question each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covray.config import load_config
from covray.config.vlm import VlmTrainConfig
from covray.io.images import Picture, encode_png
from covray.models.vlm.checkpoint import vlm_facts
from covray.pairs.manifest import ManifestWriter, Pair
from covray.pairs.words import CAPTION_TASK, Question, Words
from covray.training.records import RunRecord
from covray.training.run import train
from tests.support.vlms import write_vlm

STEPS = 4


@pytest.fixture(scope="session")
def vlm_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model of each family, and a manifest of pictures with words."""
    root = tmp_path_factory.mktemp("vlm")
    manifest = root / "words.parquet"
    rng = np.random.default_rng(0)
    with ManifestWriter(manifest, captions=True) as writer:
        for number in range(12):
            red = number % 2
            pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
            pixels[..., 0 if red else 2] += 180
            colour = "red" if red else "blue"
            words = Words(f"the ball is {colour}", {}, (Question("colour", "what colour is it", colour),))
            split = "train" if number < 8 else "val"
            writer.add(Pair(CAPTION_TASK, split, Picture(bytes=encode_png(pixels)), Picture(), {}, words))
    names = {family: write_vlm(root / family, family) for family in ("llava", "qwen2_5_vl")}
    return names | {"manifest": str(manifest)}


@pytest.fixture
def vlm_config(vlm_folders: dict[str, str], tmp_path: Path) -> Callable[..., VlmTrainConfig]:
    """Gives resolved configurations of a tiny training, with dotted keys on top."""

    def config(out: str = "run", family: str = "qwen2_5_vl", **changes: Any) -> VlmTrainConfig:
        options = {
            "data": vlm_folders["manifest"], "model": vlm_folders[family], "out": str(tmp_path / out),
            "texts.instruction": "what is it", "lora.rank": 4, "optimizer.steps": STEPS, "optimizer.batch_samples": 6,
            "optimizer.micro_batch_samples": 4, "optimizer.learning_rate": 1e-2, "blocks.size": 4,
            "compute.device": "cpu", "compute.dtype": "float32", "compute.deepspeed": "none", "compute.threads": 1,
            "checkpoints.every_steps": 2, "validate_every_steps": 2, "tracking.uri": "none",
        }  # fmt: skip
        options |= {key.replace("__", "."): value for key, value in changes.items()}
        return load_config(VlmTrainConfig, None, options)

    return config


def trained(config: VlmTrainConfig) -> str:
    """Train in this process, and describe the run as the driver does; return its folder."""
    train(config)
    fingerprints = {"backbone": vlm_facts(config.checkpoint()).fingerprint, "data": None}
    record = RunRecord(
        config=config.model_dump(mode="json"), identity=config.identity(), fingerprints=fingerprints,
        mlflow_run_id=None,
    )  # fmt: skip
    record.write(config.out)
    return config.out
