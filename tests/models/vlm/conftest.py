"""Tiny models, written once a session."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from covray.config.vlm import VlmModelConfig
from covray.models.vlm.checkpoint import LoadedVlm, load_vlm, vlm_facts
from tests.support.vlms import FAMILIES, write_vlm


@pytest.fixture(scope="session")
def vlm_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Gives the folder of a tiny model of a family."""
    folders: dict[str, str] = {}

    def folder(family: str) -> str:
        if family not in folders:
            folders[family] = write_vlm(tmp_path_factory.mktemp(family), family)
        return folders[family]

    return folder


@pytest.fixture(params=FAMILIES)
def vlm(request: pytest.FixtureRequest, vlm_folder: Callable[[str], str]) -> LoadedVlm:
    """A tiny model of each family, in float32."""
    facts = vlm_facts(VlmModelConfig(path=vlm_folder(request.param)))
    return load_vlm(facts, torch.float32, torch.device("cpu"))
