"""The configuration of ``covray plan`` and ``covray benchmark``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from covray.config.section import Section


class NodesConfig(Section):
    """Nodes of one kind, as an autoscaler starts them and a cloud takes them away."""

    gpu: str = "A100"
    """Kind of GPU, for assumed rates: one whose peak is known, such as A100, H100 or H20."""
    gpus: int = Field(default=1, ge=1, le=100_000)
    """GPUs of all nodes together; each is one actor or one worker. Without GPUs: the number of actors or workers."""
    gpus_per_node: int = Field(default=1, ge=1, le=1024)
    """GPUs of one node."""
    price: float = Field(default=0.0, ge=0, le=1e9)
    """Price of one GPU for an hour, in any currency."""
    interruptions: float = Field(default=0.0, ge=0, le=100)
    """How often a node is taken away per hour; 0: never, as on demand."""
    boot_s: float = Field(default=0.0, ge=0, le=1e9)
    """Seconds from asking for a node until Ray runs on it; also for a node that replaces another."""
    upscaling_speed: float = Field(default=1.0, gt=0, le=100_000)
    """The autoscaler may launch ``upscaling_speed`` times the running nodes at once, and never fewer than five."""
    idle_timeout_s: float = Field(default=0.0, ge=0, le=1e9)
    """Seconds that a node stays, and is paid for, when there is nothing left to do."""

    @model_validator(mode="after")
    def _whole_nodes(self) -> NodesConfig:
        if self.gpus % self.gpus_per_node:
            raise ValueError(f"gpus ({self.gpus}) are not whole nodes of gpus_per_node ({self.gpus_per_node})")
        return self


class AssumedConfig(Section):
    """Rates of hardware that was not measured; used without a calibration."""

    build_utilisation: float = Field(default=0.386, ge=1e-6, le=1)
    """Share of the GPU's peak that chains reach: published for Stable Diffusion 1.5, batch 16, compiled, on an A100."""
    train_utilisation: float = Field(default=0.406, ge=1e-6, le=1)
    """Share of the peak that a LoRA training reaches: the fastest published, an 8B LLaMA on an H100."""
    start_s: float = Field(default=60.0, ge=0, le=1e9)
    """Seconds of a step before the first actor or worker starts: Ray, checks, and loading the models once."""
    load_s: float = Field(default=60.0, ge=0, le=1e9)
    """Seconds of an actor or a worker until it computes."""
    audit_shard_s: float = Field(default=0.006, ge=0, le=1e9)
    """Seconds of the driver per shard at the end: three requests of some 30 ms on object storage, 16 at a time."""
    checkpoint_s: float = Field(default=5.0, ge=0, le=1e9)
    """Seconds by which a checkpoint holds up the training."""


class VlmDataConfig(Section):
    """Samples of the training of a vision-language model, in the mean."""

    samples: int = Field(default=738_000, ge=1, le=10**12)
    """Prompts with answers of an epoch; by default the conversations of LLaVA-NeXT, as DiffusionVL counts them."""
    prompt_tokens: int = Field(default=1500, ge=1, le=10**6)
    """Tokens before an answer, of pictures and text; not published."""
    answer_tokens: int = Field(default=200, ge=1, le=10**6)
    """Tokens of an answer; not published."""
    patches: int = Field(default=5000, ge=0, le=10**7)
    """Patches of its pictures, which the vision tower reads; of Qwen2.5-VL four are a token; not published."""


class PlanConfig(Section):
    """``covray plan`` and ``covray benchmark``: what a build or a training will take, before it starts."""

    steps: tuple[Literal["build", "train", "vlm"], ...] = ("build",)
    """What is planned."""
    pairs: int = Field(default=70_000, ge=1, le=10**11)
    """Pairs of the build; by default the paper's, 10,000 for each of seven tasks."""
    train_pairs: int | None = Field(default=None, ge=1, le=10**11)
    """Pairs of the training; null: those of the build."""
    pairs_per_source: float = Field(default=1.0, ge=1)
    """Consecutive pairs that share their image, which is inverted once per block."""
    tasks_per_block: int = Field(default=1, ge=1, le=7)
    """Tasks that the pairs of one block have; each is a shard file."""
    build: dict[str, Any] = Field(default_factory=dict)
    """Keys of ``covray build``, such as ``prior: {steps: 20}``."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Keys of ``covray train``."""
    vlm: dict[str, Any] = Field(default_factory=dict)
    """Keys of ``covray vlm train``; ``model`` is a folder, or the hub id of Qwen2.5-VL-3B or 7B."""
    vlm_data: VlmDataConfig = VlmDataConfig()
    build_on: NodesConfig = NodesConfig()
    """Nodes of the build."""
    train_on: NodesConfig = NodesConfig()
    """Nodes of the training."""
    vlm_on: NodesConfig = NodesConfig()
    """Nodes of the training of a vision-language model."""
    head_price: float = Field(default=0.0, ge=0, le=1e9)
    """Price of the head node for an hour."""
    driver_blocks_per_s: float = Field(default=20.0, ge=1e-6, le=1e9)
    """Blocks that the driver can hand out per second."""
    calibration: str | None = None
    """File that ``covray benchmark`` wrote; null: rates are computed from FLOPs and assumptions."""
    assumed: AssumedConfig = AssumedConfig()
    replicas: int = Field(default=5, ge=1, le=10_000)
    """How often a step is simulated, for the mean and the 90% range."""
    seed: int = Field(default=0, ge=0)
    """Everything random follows from it."""

    @field_validator("steps")
    @classmethod
    def _in_order(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value:
            raise ValueError("name build, train or vlm, or several")
        # The order of the alphabet is that of the work: build, train, vlm.
        return tuple(sorted(set(value)))
