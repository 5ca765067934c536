"""Runs of tiny models, and pictures to ask them about."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from covray.chains import build as building
from covray.config import LoraConfig, TrainConfig, load_config
from covray.io import storage
from covray.models.diffusion.prior import load_prior
from covray.models.lvm.adapter import save_adapter
from covray.models.lvm.backbone import backbone_facts
from tests.support.backbones import load, write_llama
from tests.support.priors import write_prior

LORA = LoraConfig(rank=3, alpha=5)
ENGINE = {"device": "cpu", "batch": 4, "image_batch": 4}


@pytest.fixture(scope="module")
def prior_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prior(tmp_path_factory.mktemp("prior"))


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", autouse=True)
def _unverified() -> Iterator[None]:
    """Random weights answer noise like no prediction type."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(building, "load_prior", functools.partial(load_prior, verify=False))
        yield


@pytest.fixture
def pictures(tmp_path: Path) -> Callable[..., list[str]]:
    """Writes smooth random pictures and gives their paths."""

    def write(count: int, width: int = 40, height: int = 30, prefix: str = "picture") -> list[str]:
        paths = [tmp_path / f"{prefix}{number}.png" for number in range(count)]
        for number, path in enumerate(paths):
            small = np.random.default_rng([number, width, *prefix.encode()]).integers(0, 256, (4, 4, 3), np.uint8)
            Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)
        return [str(path) for path in paths]

    return write


@pytest.fixture
def write_run(
    tmp_path: Path, write_dataset: Callable[..., Any], llama_folder: Path, prior_folder: Path
) -> Callable[..., str]:
    """Writes the folder of a finished run, with an adapter that changes what the tiny backbone says."""

    def write(**sentences: Any) -> str:
        data, _ = write_dataset({"depth": 4})
        description = storage.read_json(f"{data}/_dataset.json")
        description["config"]["prior"] |= {"path": str(prior_folder), "steps": 4}
        storage.write_json(f"{data}/_dataset.json", description)
        run = str(tmp_path / "run")
        options = {f"sentences.{key}": value for key, value in sentences.items()}
        backbone = {"backbone.scale": "custom", "backbone.path": str(llama_folder)}
        lora = {"lora.rank": LORA.rank, "lora.alpha": LORA.alpha}
        config = load_config(TrainConfig, None, {"data": data, "out": run} | backbone | lora | options)
        fingerprints = {
            "backbone": backbone_facts(config.backbone).fingerprint,
            "codebook": description["fingerprints"]["codebook"],
            "data": "",
        }
        about = {"version": 1, "config": config.model_dump(mode="json"), "fingerprints": fingerprints}
        storage.write_json(f"{run}/_run.json", about)
        storage.write_json(f"{run}/_result.json", {})
        save_adapter(load(llama_folder, LORA), f"{run}/adapter", str(llama_folder))
        return run

    return write
