"""The configuration of ``covray plan`` and ``covray benchmark``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from covray.config.section import Section


class NodesConfig(Section):
    """Machines of one kind, as an autoscaler brings them and a cloud takes them away."""

    gpu: str = "A100"
    """Kind of GPU, where its rates are assumed: one whose peak is known, as A100, H100, H20."""
    gpus: int = Field(default=1, ge=1, le=100_000)
    """GPUs of all nodes together; each is one actor, or one worker. Without GPUs: actors, or workers."""
    gpus_per_node: int = Field(default=1, ge=1, le=1024)
    price: float = Field(default=0.0, ge=0, le=1e9)
    """Of one GPU for an hour, in any currency."""
    interruptions: float = Field(default=0.0, ge=0, le=100)
    """How often a node is taken away, an hour; 0: never, as on demand."""
    boot_s: float = Field(default=0.0, ge=0, le=1e9)
    """From asking for a node until Ray runs on it; also of one that replaces another."""
    upscaling_speed: float = Field(default=1.0, gt=0, le=100_000)
    """Of the autoscaler: so many times the nodes there are may be under way, or five."""
    idle_timeout_s: float = Field(default=0.0, ge=0, le=1e9)
    """How long a node stays, and is paid, when there is nothing left to do."""

    @model_validator(mode="after")
    def _whole_nodes(self) -> NodesConfig:
        if self.gpus % self.gpus_per_node:
            raise ValueError(f"gpus ({self.gpus}) are not whole nodes of gpus_per_node ({self.gpus_per_node})")
        return self


class AssumedConfig(Section):
    """Rates of hardware that was not measured, where there is no calibration."""

    build_utilisation: float = Field(default=0.386, ge=1e-6, le=1)
    """Share of the GPU's peak that chains reach: published for Stable Diffusion 1.5, batch 16, compiled, on an A100."""
    train_utilisation: float = Field(default=0.406, ge=1e-6, le=1)
    """Share of the peak that a LoRA training reaches: the fastest published, an 8B LLaMA on an H100."""
    start_s: float = Field(default=60.0, ge=0, le=1e9)
    """Of a step, before the first actor or worker starts: Ray, checks, and loading the models once."""
    load_s: float = Field(default=60.0, ge=0, le=1e9)
    """Of an actor or a worker, until it computes."""
    audit_shard_s: float = Field(default=0.006, ge=0, le=1e9)
    """Seconds of the driver for a shard, at the end: three requests of some 30 ms on object storage, 16 at a time."""
    checkpoint_s: float = Field(default=5.0, ge=0, le=1e9)
    """For which a checkpoint holds up the training."""


class PlanConfig(Section):
    """``covray plan`` and ``covray benchmark``: what a build or a training will take, before it is started."""

    steps: tuple[Literal["build", "train"], ...] = ("build",)
    """What is planned."""
    pairs: int = Field(default=70_000, ge=1, le=10**11)
    """Pairs of the build (by default the paper's, 10,000 for each of seven tasks)."""
    train_pairs: int | None = Field(default=None, ge=1, le=10**11)
    """Pairs of the training; null: those of the build."""
    pairs_per_source: float = Field(default=1.0, ge=1)
    """Pairs that follow each other and share their image, which is inverted once a block."""
    tasks_per_block: int = Field(default=1, ge=1, le=7)
    """Tasks that pairs of one block have; each is a shard file."""
    build: dict[str, Any] = Field(default_factory=dict)
    """Keys of ``covray build``, as ``prior: {steps: 20}``."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Keys of ``covray train``."""
    build_on: NodesConfig = NodesConfig()
    train_on: NodesConfig = NodesConfig()
    head_price: float = Field(default=0.0, ge=0, le=1e9)
    """Of the head for an hour."""
    driver_blocks_per_s: float = Field(default=20.0, ge=1e-6, le=1e9)
    """Blocks that the driver can hand out a second."""
    calibration: str | None = None
    """What ``covray benchmark`` measured; null: rates are computed from FLOPs and assumptions."""
    assumed: AssumedConfig = AssumedConfig()
    replicas: int = Field(default=5, ge=1, le=10_000)
    """How often a step is simulated, for the mean and the 90% range."""
    seed: int = Field(default=0, ge=0)

    @field_validator("steps")
    @classmethod
    def _in_order(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value:
            raise ValueError("name build, train, or both")
        return tuple(sorted(set(value)))
