"""covray: chains of vision, from pictures to models that think in them.

The steps as functions, and what they take and give::

    import covray
    config = covray.BuildConfig(pairs="pairs.parquet", out="chains")
    covray.build(config)
    answer = covray.Pipeline.from_run("runs/first")("room.png", [("a.png", "a_depth.png")], task="depth")

Every name is imported when it is first used: ``import covray`` alone imports only the standard library. docs/python.md
shows more.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from covray.chains.dataset import ChainDataset
    from covray.chains.table import load_chains
    from covray.config import (
        BuildConfig,
        EvaluateConfig,
        GenerateConfig,
        GeneratorConfig,
        PlanConfig,
        SamplingConfig,
        SentencesConfig,
        SweepConfig,
        TrainConfig,
        load_config,
    )
    from covray.distributed.build import build
    from covray.distributed.evaluate import evaluate
    from covray.distributed.sweep import sweep
    from covray.distributed.train import train
    from covray.generation.files import generate
    from covray.generation.generator import Generator
    from covray.generation.pipeline import Pipeline
    from covray.pairs.manifest_reading import check_manifest

__version__ = "0.1.0"

_MODULES = {
    "BuildConfig": "covray.config",
    "ChainDataset": "covray.chains.dataset",
    "EvaluateConfig": "covray.config",
    "GenerateConfig": "covray.config",
    "Generator": "covray.generation.generator",
    "GeneratorConfig": "covray.config",
    "Pipeline": "covray.generation.pipeline",
    "PlanConfig": "covray.config",
    "SamplingConfig": "covray.config",
    "SentencesConfig": "covray.config",
    "SweepConfig": "covray.config",
    "TrainConfig": "covray.config",
    "build": "covray.distributed.build",
    "check_manifest": "covray.pairs.manifest_reading",
    "evaluate": "covray.distributed.evaluate",
    "generate": "covray.generation.files",
    "load_chains": "covray.chains.table",
    "load_config": "covray.config",
    "sweep": "covray.distributed.sweep",
    "train": "covray.distributed.train",
}
"""Public name -> the module that defines it."""

__all__ = [
    "BuildConfig", "ChainDataset", "EvaluateConfig", "GenerateConfig", "Generator", "GeneratorConfig", "Pipeline",
    "PlanConfig", "SamplingConfig", "SentencesConfig", "SweepConfig", "TrainConfig", "__version__", "build",
    "check_manifest", "evaluate", "generate", "load_chains", "load_config", "sweep", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import the public ``name``."""
    if name not in _MODULES:
        raise AttributeError(f"module 'covray' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
