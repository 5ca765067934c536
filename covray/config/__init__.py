"""The configuration of every step: one pydantic model a step, one file a model.

A configuration is resolved from defaults, a YAML file, a command's options and ``--set a.b=c``, in this order; unknown
keys are refused. The resolved configuration is written into every result.
"""

from covray.config.build import BuildConfig
from covray.config.compiler import require_compiler
from covray.config.evaluate import EvaluateConfig, FormConfig, VotesConfig, named_run
from covray.config.fields import (
    ActorsConfig,
    BackboneConfig,
    EngineConfig,
    PictureSamplingConfig,
    PriorConfig,
    SamplingConfig,
    TokenizerConfig,
    TrackingConfig,
)
from covray.config.generate import GenerateConfig, GeneratorConfig
from covray.config.plan import AssumedConfig, NodesConfig, PlanConfig
from covray.config.section import JsonObject, Section, differences, leaves, load_config, read_yaml, recorded_section
from covray.config.serve import LimitsConfig, ReplicasConfig, ServeConfig
from covray.config.sweep import GridConfig, SweepConfig
from covray.config.train import (
    AdamWConfig,
    CheckpointsConfig,
    ComputeConfig,
    FrameNoiseConfig,
    LoraConfig,
    OptimizerConfig,
    SentencesConfig,
    TrainConfig,
    WorkersConfig,
)

__all__ = [
    "ActorsConfig", "AdamWConfig", "AssumedConfig", "BackboneConfig", "BuildConfig", "CheckpointsConfig",
    "ComputeConfig", "EngineConfig", "EvaluateConfig", "FormConfig", "FrameNoiseConfig", "GenerateConfig",
    "GeneratorConfig", "GridConfig", "JsonObject", "LimitsConfig", "LoraConfig", "NodesConfig", "OptimizerConfig",
    "PictureSamplingConfig", "PlanConfig", "PriorConfig", "ReplicasConfig", "SamplingConfig", "Section",
    "SentencesConfig", "ServeConfig", "SweepConfig", "TokenizerConfig", "TrackingConfig", "TrainConfig",
    "VotesConfig", "WorkersConfig", "differences", "leaves", "load_config", "named_run", "read_yaml",
    "recorded_section", "require_compiler",
]  # fmt: skip
