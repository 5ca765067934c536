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
from covray.config import LoraConfig
from covray.io import storage
from covray.models.diffusion.prior import load_prior
from tests.support.backbones import write_llama
from tests.support.priors import write_prior
from tests.support.trainings import write_finished_run

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
        return write_finished_run(str(tmp_path / "run"), data, llama_folder, LORA, sentences)

    return write
