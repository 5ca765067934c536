"""What an evaluation reads, tiny: manifests of a dataset's pairs, finished runs, and a runner over both."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from covray.chains.dataset import ChainDataset
from covray.config import EvaluateConfig, LoraConfig
from covray.evaluation.answers import EPISODE_SCHEMA
from covray.evaluation.pair_files import choose_pairs, require_pairs, write_pairs
from covray.evaluation.runner import Runner
from covray.evaluation.subjects import subjects_of
from covray.pairs.manifest import MANIFEST_SCHEMA, METADATA_KEY
from tests.support.trainings import write_finished_run

LORA = LoraConfig(rank=3, alpha=5)
SPLIT = "val"  # the datasets of tests/support/datasets.py have this and train

Row = dict[str, Any]


def png(picture: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG")
    return data.getvalue()


def smooth(seed: int, height: int, width: int) -> np.ndarray:
    """A smooth random picture uint8 [height, width, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def write_manifest(tmp_path: Path) -> Callable[..., str]:
    """Writes the manifest of a dataset's rows: random pictures of 24 x 20 px, but ``images`` and ``labels`` by pair."""

    def write(
        rows: Sequence[Row],
        images: Mapping[int, bytes] | None = None,
        labels: Mapping[int, bytes] | None = None,
        name: str = "pairs.parquet",
        meta: str | None = "{}",
    ) -> str:
        table = [
            {
                "pair_id": row["pair_id"],
                "task": row["task"],
                "split": row["split"],
                "image": {"bytes": (images or {}).get(row["pair_id"], png(smooth(2 * number, 20, 24)))},
                "label": {"bytes": (labels or {}).get(row["pair_id"], png(smooth(2 * number + 1, 20, 24)))},
                "meta": meta,
            }
            for number, row in enumerate(rows)
        ]
        metadata = {METADATA_KEY: json.dumps({"version": 1, "root": None})}
        pq.write_table(pa.Table.from_pylist(table, MANIFEST_SCHEMA.with_metadata(metadata)), tmp_path / name)
        return str(tmp_path / name)

    return write


@pytest.fixture
def write_run(tmp_path: Path, llama_folder: Path) -> Callable[..., str]:
    """Writes the folder of a finished run on ``data``, with an adapter that changes what the tiny backbone says."""

    def write(data: str, name: str = "tuned", **sentences: Any) -> str:
        return write_finished_run(str(tmp_path / "runs" / name), data, llama_folder, LORA, sentences)

    return write


@pytest.fixture
def config_of(vqgan_folder: Path, llama_folder: Path, tmp_path: Path) -> Callable[..., EvaluateConfig]:
    """A configuration as it is when resolved, of the tiny models."""

    def config(data: str, **options: Any) -> EvaluateConfig:
        base: dict[str, Any] = {
            "data": data,
            "out": str(tmp_path / "evaluation"),
            "manifest": str(tmp_path / "pairs.parquet"),
            "tokenizer": {"path": str(vqgan_folder)},
            "split": SPLIT,
            "engine": {"device": "cpu", "dtype": "float32", "batch": 4, "image_batch": 4},
            "batch": 3,
            "tracking": {"uri": "none"},
        }
        if not options.get("adapters"):
            base["backbone"] = {"scale": "custom", "path": str(llama_folder)}
        return EvaluateConfig.model_validate(base | options)

    return config


@pytest.fixture
def runner_of(tmp_path: Path) -> Callable[[EvaluateConfig], tuple[Runner, pa.Table]]:
    """A runner of a configuration, and all its episodes."""

    def prepare(config: EvaluateConfig) -> tuple[Runner, pa.Table]:
        dataset = ChainDataset(config.data)
        subjects = subjects_of(config, dataset)
        parts = [
            choose_pairs(dataset, config.tasks, split, None, config.seed, "split")
            for split in (config.split, config.example_split)
        ]
        assert config.manifest is not None
        root = require_pairs(config.manifest, pa.concat_tables(parts))
        files = [str(tmp_path / name) for name in ("queries.parquet", "examples.parquet")]
        for file, wanted in zip(files, parts, strict=True):
            write_pairs(file, config.manifest, root, wanted)
        episodes = [
            {"episode": number * 1000 + place, "subject": subject.name} | pair
            for number, subject in enumerate(subjects)
            for place, pair in enumerate(parts[0].to_pylist())
        ]
        return Runner(config, subjects, *files), pa.Table.from_pylist(episodes, EPISODE_SCHEMA)

    return prepare
