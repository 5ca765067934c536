"""Paths of configurations: workers run in folders of their own, where a relative path means something else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from covray.config import Section
from covray.config.evaluate import named_run
from covray.config.think import LanguageModelConfig, PainterConfig
from covray.config.vlm import VlmModelConfig
from covray.io.model_folders import NANO_NAMES, is_here
from covray.io.storage import absolute

M = TypeVar("M", VlmModelConfig, LanguageModelConfig, PainterConfig)


def absolute_fields(config: Section, *names: str) -> dict[str, str]:
    """Return the paths in the fields ``names`` of ``config``, made absolute; fields left null are not in it."""
    paths = {}
    for name in names:
        path = getattr(config, name)
        if path is not None:
            paths[name] = absolute(path)
    return paths


def absolute_runs(entries: Iterable[str]) -> tuple[str, ...]:
    """Return entries, ``RUN`` or ``NAME=RUN``, as ``NAME=RUN`` with absolute paths."""
    named = []
    for entry in entries:
        name, run = named_run(entry)
        named.append(f"{name}={absolute(run)}")
    return tuple(named)


def absolute_path(path: str) -> str:
    """Return the path of a model, made absolute; the name of a shipped model, or a hub id, stays."""
    if path in NANO_NAMES or not is_here(path):
        return path
    return absolute(path)


def absolute_model(config: M) -> M:
    """Return the configuration of a model with its path made absolute; see ``absolute_path``."""
    return config.model_copy(update={"path": absolute_path(config.path)})
