"""What ``covray plan --json`` prints."""

from __future__ import annotations

from covray.io.records import RecordPart


class Spread(RecordPart):
    """A figure that depends on chance, over the replicas."""

    mean: float
    low: float
    """The 5th percentile."""
    high: float
    """The 95th percentile."""


class BuildPlan(RecordPart):
    """What a build takes."""

    pairs: int
    blocks: int
    unet_evaluations: int
    solver: str
    """How the prior inverts and denoises."""
    seconds_per_pair: float
    """Of one actor."""
    seconds_per_block: float
    hours: Spread
    """From the command to its end."""
    gpu_hours: Spread
    """All that is paid: useful, lost and waiting."""
    useful_gpu_hours: Spread
    """Work that is kept."""
    lost_gpu_hours: Spread
    """Work that is not."""
    waiting_gpu_hours: Spread
    """Booting, starting, loading, idling."""
    lost_share: Spread
    """Lost hours as a share of those that are paid."""
    interruptions: Spread
    """Nodes that are taken away."""
    money: Spread
    audit_hours: float
    shards: int
    shard_bytes: int
    notes: tuple[str, ...]
    """What decides, or could be better."""


class TrainingPlan(RecordPart):
    """What a training takes."""

    parameters: int
    train_steps: int
    tokens: int
    seconds_per_step: float
    tokens_per_s_per_gpu: float
    hours: Spread
    """From the command to its end."""
    gpu_hours: Spread
    """All that is paid: useful, lost and waiting."""
    useful_gpu_hours: Spread
    """Work that is kept."""
    lost_gpu_hours: Spread
    """Work that is not."""
    waiting_gpu_hours: Spread
    """Booting, starting, loading, idling."""
    lost_share: Spread
    """Lost hours as a share of those that are paid."""
    interruptions: Spread
    """Nodes that are taken away."""
    money: Spread
    checkpoint_bytes: int
    notes: tuple[str, ...]
    """What decides, or could be better."""


class PlanFigure(RecordPart):
    """A figure that a plan rests on."""

    name: str
    value: float
    unit: str
    source: str
    """Where it is from."""


class StageMemory(RecordPart):
    """Bytes of one GPU at a ZeRO stage."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The sum of all terms."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


class VlmPlan(TrainingPlan):
    """What the training of a vision-language model takes."""

    memory: tuple[StageMemory, ...]
    """Of one GPU, by ZeRO stage."""
    figures: tuple[PlanFigure, ...]
    """What the plan rests on, each with its source."""


class Plan(RecordPart):
    """The plan of the steps that were asked for; others are absent."""

    rates: str
    """Where the rates come from."""
    replicas: int
    build: BuildPlan | None = None
    train: TrainingPlan | None = None
    vlm: VlmPlan | None = None
