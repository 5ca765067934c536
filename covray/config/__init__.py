"""One pydantic model per step; YAML files below, ``--set a.b=c`` on top; unknown keys are refused.

The resolved configuration is written beside every result.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from covray.errors import ConfigError, one_line
from covray.tasks import TASKS


def _known_task(name: str) -> str:
    """Return ``name`` if a task has it. Raises ValueError."""
    if name not in TASKS:
        raise ValueError(f"no such task; the tasks are {', '.join(TASKS)}")
    return name


TaskName = Annotated[str, AfterValidator(_known_task)]
"""A task of ``covray.tasks``, built in or installed."""
Method = Literal["linear", "diffusion"]
Length = Annotated[int, Field(ge=2, le=64)]
Alpha = Annotated[float, Field(gt=0.0, lt=1.0)]
_DEEPEST = 20  # sections in sections; the deepest of ours stand in two


class Section(BaseModel):
    """A part of a configuration: immutable, and strict about what it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class PriorConfig(Section):
    """The pretrained diffusion model that interpolates."""

    path: str = "nano"
    """``nano`` (ships with the package), a diffusers folder, or a hub id."""
    revision: str | None = None
    """Revision of a hub id; pin it for anything that is to be repeated."""
    size_px: int | None = Field(default=None, ge=16, le=2048, multiple_of=8)
    """Side of the square pictures it works on; by default the size the UNet was trained at."""
    steps: int = Field(default=50, ge=2, le=1000)
    """DDIM steps of an inversion, and of a denoising (the paper: 50). Must divide the training steps."""


class TokenizerConfig(Section):
    """The VQGAN that writes frames as tokens."""

    path: str = "nano"
    """``nano`` (ships with the package), a ``diffusers.VQModel`` folder, or a hub id."""
    revision: str | None = None
    size_px: int | None = Field(default=None, ge=16, le=2048, multiple_of=8)
    """Side of the square pictures it reads; by default the model's ``sample_size``."""


class EngineConfig(Section):
    """How the arithmetic runs. Part of the fingerprint: tokens are identical to the bit for one setting of it."""

    batch: int | None = Field(default=None, ge=1, le=4096)
    """Rows of the UNet's fixed, padded batch. By default proposed by a probe, and recorded by the build."""
    image_batch: int = Field(default=16, ge=1, le=1024)
    """Rows of the fixed, padded batch of the VAE and of the tokenizer."""
    threads: int = Field(default=1, ge=1, le=256)
    """CPU threads of one actor. Identity to the bit holds for one: more split a batch, and where a picture then stands
    in it can change its last bits. Use more actors instead."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes the GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Network arithmetic; latents stay float32. ``auto``: bfloat16 on a GPU, float32 on a CPU."""
    compile: bool = False
    """``torch.compile`` the UNet: minutes at the start, worth it for thousands of pairs on a GPU."""


class ActorsConfig(Section):
    """The pool that computes. Not part of the fingerprint: any number of actors writes the same tokens."""

    min: int = Field(default=1, ge=1)
    max: int | None = Field(default=None, ge=1)
    """By default one per GPU, or on CPUs one per ``engine.threads`` cores."""
    gpus: float | None = Field(default=None, ge=0)
    """GPUs of one actor, whole or a fraction; by default 1 where the cluster has GPUs, else 0."""
    cpus: float | None = Field(default=None, gt=0)
    """Logical CPUs one actor reserves; by default a share that leaves room for reading and writing."""
    node_type: str | None = None
    """Only on nodes that have this custom resource; the node types of ``cluster/gpu.yaml`` have one of their name."""

    @model_validator(mode="after")
    def _ordered(self) -> ActorsConfig:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max ({self.max}) is smaller than min ({self.min})")
        return self


class BuildConfig(Section):
    """``covray build``: manifest in, token shards out."""

    pairs: str
    """Manifest: a Parquet file or folder, local or on any filesystem pyarrow knows."""
    out: str
    """Dataset folder to write."""
    lengths: tuple[Length, ...] = (4,)
    """Chain lengths to serve, both ends counted; length L has frames at alpha = k/(L-1)."""
    alphas: tuple[Alpha, ...] = ()
    """Further alphas, beside those the lengths ask for."""
    methods: tuple[Method, ...] = ("diffusion", "linear")
    """How frames are made. The method ``none`` needs no frames: it is every dataset's source and label."""
    prior: PriorConfig = PriorConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    engine: EngineConfig = EngineConfig()
    actors: ActorsConfig = ActorsConfig()
    fit: Literal["stretch", "crop"] = "stretch"
    """How a picture becomes square: ``stretch`` as LVM does, or ``crop`` the centre first."""
    check_endpoints: float = Field(default=0.05, ge=0.0, le=1.0)
    """Share of pairs whose two ends are also denoised, to report how well inversion returns them."""
    keep_noise: bool = False
    """Keep the inverted noise in the shards, so that a later build needs no inversion."""
    noise_from: str | None = None
    """A dataset built with ``keep_noise`` and the same prior: its noise is used where it has the pair, of the same
    pixels."""
    rows_per_block: int = Field(default=64, ge=1, le=100_000)
    """Pairs an actor takes at a time; also the unit that a kill can cost."""

    @field_validator("lengths", "alphas", "methods")
    @classmethod
    def _sorted_set(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(sorted(set(value)))

    def identity(self) -> dict[str, Any]:
        """What decides the tokens of a pair; a resume must agree in all of it."""
        return self.model_dump(mode="json", exclude={"out", "pairs", "actors", "rows_per_block", "noise_from"})


Scale = Literal["nano", "300m", "600m", "1b", "3b", "7b", "custom"]
Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class BackboneConfig(Section):
    """The pretrained vision model that LoRA adapts; its weights stay frozen."""

    scale: Scale = "nano"
    """Size of the LVM family; ``custom`` takes whatever sizes the folder of ``path`` has."""
    path: str | None = None
    """``nano`` (ships with the package), a ``LlamaForCausalLM`` folder, or a hub id; by default nano for that scale."""
    revision: str | None = None
    """Revision of a hub id; pin it for anything that is to be repeated."""
    init: Literal["pretrained", "random"] = "pretrained"
    """``random`` starts from random weights of the scale's architecture, or of the one in the folder of ``path``: for
    measuring speed, not for pictures."""


class LoraConfig(Section):
    """The adapter: W x + (alpha / rank) B A x."""

    rank: int = Field(default=32, ge=1, le=1024)
    alpha: float = Field(default=64.0, gt=0)
    targets: tuple[Target, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Projections that get an update."""
    path: str | None = None
    """An adapter to go on from, a PEFT folder of this rank, alpha and targets (a finished run has one in ``adapter``);
    null: a new one, which changes nothing yet."""

    @field_validator("targets")
    @classmethod
    def _some(cls, value: tuple[Target, ...]) -> tuple[Target, ...]:
        if not value:
            raise ValueError("name at least one projection")
        return tuple(dict.fromkeys(value))


class SentencesConfig(Section):
    """Which visual sentences are made of the chains."""

    method: Literal["none", "linear", "diffusion"] = "diffusion"
    """How the frames between image and label were made; ``none`` leaves them out."""
    lengths: tuple[Length, ...] = (4,)
    """Chain length, both ends counted; of several, each sentence draws one."""
    pairs: tuple[Annotated[int, Field(ge=0, le=63)], ...] = (1,)
    """Example pairs before the query; of several, each sentence draws one."""
    tasks: tuple[TaskName, ...] | None = None
    """Only these; by default all of the dataset."""
    split: str = "train"
    validation_split: str | None = "val"
    """Split for the validation loss; null validates nothing."""
    loss: Literal["all", "chains", "chain", "answer"] = "all"
    """Where loss is taken: every token (as LVM), the frames and answers of examples and query, those of the query, or
    its answer only."""

    @field_validator("lengths", "pairs", "tasks")
    @classmethod
    def _distinct(cls, value: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        if value is not None and not value:
            raise ValueError("give at least one")
        return None if value is None else tuple(sorted(set(value)))


class OptimizerConfig(Section):
    """AdamW on the adapter, cosine schedule with warm-up."""

    learning_rate: float = Field(default=2e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    final: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end, as a share of the highest."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    epochs: float = Field(default=1.0, gt=0, le=1e6)
    """How often each pair is the query."""
    steps: int | None = Field(default=None, ge=1, le=10**9)
    """Steps, in place of ``epochs``."""
    batch_tokens: int = Field(default=172_032, ge=1, le=10**12)
    """Tokens of a step over all workers (the paper: 172K); the loss is their mean, however many workers there are."""
    micro_batch_tokens: int = Field(default=8192, ge=1, le=10**12)
    """Tokens a worker computes at a time; at least one sentence."""


class ComputeConfig(Section):
    """How the arithmetic runs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes the GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen backbone and of the arithmetic; the adapter is float32. ``auto``: bfloat16 on a GPU and on a CPU
    with units for it (AMX, AVX512-BF16), else float32."""
    threads: int | None = Field(default=None, ge=1, le=256)
    """CPU threads of one worker; by default the machine's cores over its workers."""
    recompute: bool = False
    """Compute activations again in the backward pass: a third more work for a fraction of the memory."""
    compile: bool = False
    """``torch.compile`` the layers: a minute at the start, worth it on a GPU."""
    deepspeed: str = "auto"
    """``auto`` by scale and GPU memory, ``none``, ``zero1``, ``zero2``, ``zero3``, ``zero2_offload``,
    ``zero3_offload``, or a DeepSpeed JSON file."""


class WorkersConfig(Section):
    """Ray Train's workers. Any number of them makes the same updates."""

    count: int = Field(default=1, ge=1)
    gpus: float | None = Field(default=None, ge=0)
    """GPUs of one worker; by default 1 where the cluster has GPUs, else 0."""
    cpus: float = Field(default=1.0, gt=0)
    """Logical CPUs one worker reserves."""
    node_type: str | None = None
    """Only on nodes that have this custom resource; the node types of ``cluster/gpu.yaml`` have one of their name."""
    max_failures: int = Field(default=3, ge=-1)
    """Restarts after the loss of a worker before the run is given up; -1: without end."""


class CheckpointsConfig(Section):
    """When the state of a run is kept, and how much of it."""

    every_steps: int = Field(default=100, ge=1)
    keep: int = Field(default=2, ge=1, le=10**9)
    """The last so many, beside the best by validation loss."""


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = None
    """Tracking server or ``sqlite:///`` file; by default ``mlflow.db`` beside the run's folder. ``none``: no MLflow."""
    experiment: str = "covray"
    log_every_steps: int = Field(default=1, ge=1)
    parent_run_id: str | None = None
    """MLflow run that this one is a child of; a sweep sets it. Of one name there is one child."""


class TrainConfig(Section):
    """``covray train``: token shards in, a PEFT adapter out."""

    data: str
    """Dataset of chains: the ``--out`` of a ``covray build``."""
    out: str
    """Run folder to write."""
    backbone: BackboneConfig = BackboneConfig()
    lora: LoraConfig = LoraConfig()
    sentences: SentencesConfig = SentencesConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    compute: ComputeConfig = ComputeConfig()
    workers: WorkersConfig = WorkersConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    tracking: TrackingConfig = TrackingConfig()
    validate_every_steps: int = Field(default=100, ge=1)
    validation_sentences: int = Field(default=64, ge=1, le=10**12)
    """At most so many sentences of the validation split."""
    seed: int = Field(default=0, ge=0)

    def identity(self) -> dict[str, Any]:
        """What decides the losses; a resume must agree in all of it.

        Left out is what only changes the order in which floats are added: workers, micro-batches, threads, ZeRO stage.
        """
        left_out: dict[str, Any] = {
            **dict.fromkeys(("data", "out", "workers", "checkpoints", "tracking", "validate_every_steps"), True),
            "compute": {"device", "threads", "recompute", "compile", "deepspeed"},
            "optimizer": {"micro_batch_tokens"},
            "lora": {"path"},  # of what lies there, the run keeps the fingerprint
        }
        return self.model_dump(mode="json", exclude=left_out)


class SamplingConfig(Section):
    """How the model's next token is chosen."""

    temperature: float = Field(default=0.0, ge=0.0, le=100.0)
    """0: the likeliest token (greedy). 1: the model's own distribution, as LVM samples."""
    top_k: int | None = Field(default=None, ge=1)
    """Only the so many likeliest tokens."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Only the likeliest tokens that together reach this probability."""
    best_of: int = Field(default=1, ge=1, le=1024)
    """Candidates a query, of which the likeliest is given."""
    choose_by: Literal["answer", "chain"] = "answer"
    """What a candidate's likelihood is of: its answer given its own frames, or frames and answer together."""

    @model_validator(mode="after")
    def _candidates_differ(self) -> SamplingConfig:
        if self.best_of > 1 and self.temperature == 0:
            raise ValueError("best_of: greedy candidates are all the same; set a temperature")
        return self

    @property
    def candidates(self) -> int:
        """How many candidates the decoder writes for a query."""
        return self.best_of


class GenerateConfig(Section):
    """``covray generate``: example pairs and queries in, frames and answers out.

    What is null is the run's, or where there is no run the nano family's.
    """

    queries: tuple[str, ...] = Field(min_length=1)
    """Picture files to answer."""
    out: str
    """Folder to write: one folder a query, and ``generation.json``."""
    examples: tuple[tuple[str, str], ...] = ()
    """Picture files of image and label, each pair one example chain of the prompt."""
    adapter: str | None = None
    """A finished run of ``covray train``; null: the untuned backbone."""
    task: TaskName | None = None
    """How labels are resized and answers read as data; null: the run's if it has one, else answers are pictures."""
    classes: int = Field(default=21, ge=1, le=256)
    """Of a segmentation: by whose colours an answer is read (PASCAL VOC has 21, COCO's panoptic labels 134)."""
    backbone: BackboneConfig | None = None
    length: Length | None = None
    """Pictures of a chain, both ends counted; of a run trained at several it must be given. Without a run 4."""
    method: Literal["none", "linear", "diffusion"] | None = None
    """How the examples' frames are made; ``none``: chains have none."""
    prior: PriorConfig | None = None
    tokenizer: TokenizerConfig | None = None
    fit: Literal["stretch", "crop"] | None = None
    """How a picture becomes square; an answer of ``crop`` is of the centre square only."""
    engine: EngineConfig = EngineConfig(batch=4, image_batch=4)
    """Small batches: here are few pictures. The frames have a build's bits at the build's ``batch``, here and there."""
    sampling: SamplingConfig = SamplingConfig()
    batch: int = Field(default=16, ge=1, le=4096)
    """Rows of the fixed, padded batch of the decoder."""
    seed: int = Field(default=0, ge=0)


class FormConfig(Section):
    """A form of chain, as a model reads and writes it."""

    method: Literal["none", "linear", "diffusion"] = "diffusion"
    length: Length = 4
    pairs: Annotated[int, Field(ge=0, le=63)] = 1
    """Example pairs before the query."""


class EvaluateConfig(Section):
    """``covray evaluate``: chains and adapters in, scores with intervals out."""

    data: str
    """Dataset of chains: the ``--out`` of a ``covray build``."""
    out: str
    """Folder to write."""
    adapters: tuple[str, ...] = ()
    """Finished runs of ``covray train``, each ``RUN`` or ``NAME=RUN``; a run's name is by default its folder's."""
    backbone: BackboneConfig | None = None
    """Of the runs, where it has moved since; without runs the untuned backbone to evaluate, by default nano."""
    untuned: bool = True
    """Also evaluate the backbone without its adapter, once for every form of chain that the adapters have."""
    forms: tuple[FormConfig, ...] = ()
    """Further forms of chain for the untuned backbone."""
    baselines: tuple[Literal["copy", "mean", "nearest", "focus", "ceiling"], ...] = (
        "copy", "mean", "nearest", "focus", "ceiling",
    )  # fmt: skip
    """What else stands in the table: the query as its own answer, the mean label, the nearest example's label,
    Chain-of-Focus, and what the tokenizer makes of the label itself."""
    manifest: str | None = None
    """Manifest with the labels as they are; null: the one the dataset was built from."""
    tokenizer: TokenizerConfig | None = None
    """Where the dataset's tokenizer is now; null: where it was."""
    tasks: tuple[TaskName, ...] | None = None
    """Only these; by default all of the dataset."""
    split: str = "test"
    """Whose pairs are the queries."""
    example_split: str = "train"
    """Whose pairs are the examples; it may be the same: no pair is its own example."""
    episodes: int | None = Field(default=None, ge=1)
    """At most so many queries of a task, the same for everyone."""
    pairs: Annotated[int, Field(ge=0, le=63)] | None = None
    """Example pairs before the query; null: as many as a run was trained with, at most."""
    selection: Literal["random", "similar", "focus"] = "random"
    """How examples are chosen: by the seed, by the query's nearest pictures, or as Chain-of-Focus does."""
    lpips: str | None = None
    """AlexNet's weights for LPIPS, torchvision's file; null: where torchvision keeps it, if it is there. Never
    downloaded: without them the metric is named as absent."""
    baseline_examples: int = Field(default=256, ge=1)
    """At most so many examples of a task for the mean and the nearest label."""
    sampling: SamplingConfig = SamplingConfig()
    batch: int = Field(default=16, ge=1, le=4096)
    """Rows of the fixed, padded batch of the decoder."""
    engine: EngineConfig = EngineConfig()
    actors: ActorsConfig = ActorsConfig()
    rows_per_block: int = Field(default=64, ge=1, le=100_000)
    """Episodes an actor takes at a time; also the unit that a kill can cost."""
    tracking: TrackingConfig = TrackingConfig()
    seed: int = Field(default=0, ge=0)

    @field_validator("adapters", "baselines", "tasks")
    @classmethod
    def _distinct(cls, value: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        return None if value is None else tuple(dict.fromkeys(value))

    def identity(self) -> dict[str, Any]:
        """What decides the scores; a resume must agree in all of it."""
        return self.model_dump(mode="json", exclude={"out", "actors", "rows_per_block", "tracking"})


class GridConfig(Section):
    """What the trials of a sweep differ in: every combination of these."""

    methods: tuple[Literal["none", "linear", "diffusion"], ...] = ("none", "linear", "diffusion")
    """How frames are made; ``none`` has no frames, so that it is one trial for all lengths."""
    lengths: tuple[Length, ...] = (2, 3, 4, 6, 8)
    """Chain lengths, both ends counted; length 2 is the method ``none``."""
    pairs: tuple[Annotated[int, Field(ge=0, le=63)], ...] = (1, 2, 3)
    """Example pairs before the query."""
    tasks: tuple[tuple[TaskName, ...] | None, ...] = (None,)
    """Sets of tasks, each a trial's; null: all of the dataset."""
    scales: tuple[BackboneConfig, ...] = ()
    """Backbones: a scale, as ``7b``, or ``{scale: 7b, path: LVM-7B}``. By default that of ``train``."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    fields: dict[str, tuple[Any, ...]] = {}
    """Any other field of a training by its dotted name, as ``optimizer.learning_rate: [0.001, 0.0003]``."""

    @field_validator("scales", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        return [{"scale": entry} if isinstance(entry, str) else entry for entry in value]

    @field_validator("methods", "lengths", "pairs", "tasks", "seeds", "fields")
    @classmethod
    def _some(cls, value: Any) -> Any:
        lists = value.values() if isinstance(value, dict) else [value]
        if any(not entries for entries in lists):
            raise ValueError("give at least one")
        return value if isinstance(value, dict) else tuple(dict.fromkeys(value))


class SweepConfig(Section):
    """``covray sweep``: many trainings and their scores, and what they say together."""

    out: str
    """Folder to write."""
    data: str | None = None
    """Dataset of chains; null: one is built from ``manifest`` into the folder of the sweep, for all lengths at once."""
    manifest: str | None = None
    """Manifest to build the dataset from."""
    grid: GridConfig = GridConfig()
    build: dict[str, Any] = {}
    """Keys of ``covray build`` beside those the grid decides, as ``prior: {steps: 20}``."""
    train: dict[str, Any] = {}
    """Keys of ``covray train`` beside those the grid decides."""
    evaluate: dict[str, Any] = {}
    """Keys of ``covray evaluate``; baselines and the untuned backbone are evaluated once for the whole sweep."""
    concurrency: int | None = Field(default=None, ge=1)
    """Trials at a time; by default as many as the cluster holds."""
    retries: int = Field(default=1, ge=0)
    """How often a trial that failed is tried again; then it is reported, and the others go on."""
    stopping: Literal["none", "asha", "median"] = "none"
    """End trials that do worse than others at equal tokens, by the answer's perplexity on the validation split: by
    successive halving (Li et al. 2020) or below the median. Methods compare only where their answers are equally hard
    to tell from their frames, so this is for sweeps within one."""
    grace: float = Field(default=0.25, gt=0, le=1)
    """Share of a training before which no trial is stopped."""
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _one_source(self) -> SweepConfig:
        if (self.data is None) == (self.manifest is None):
            raise ValueError("give data, a dataset of chains, or manifest, the pairs to build one from")
        return self

    def identity(self) -> dict[str, Any]:
        """What all trials share; the grid may grow, as every trial is checked by itself."""
        shared = {"data", "manifest", "build", "train", "evaluate", "stopping", "grace"}
        return self.model_dump(mode="json", include=shared)


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
    build: dict[str, Any] = {}
    """Keys of ``covray build``, as ``prior: {steps: 20}``."""
    train: dict[str, Any] = {}
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


def differences(theirs: dict[str, Any], ours: dict[str, Any], *, open_matches: bool = False) -> list[str]:
    """Keys in which two identities differ, each as ``key was X, is Y``.

    ``open_matches``: what ours leaves open (null or ``auto``) agrees with anything.
    """
    first, second = dict(leaves(theirs)), dict(leaves(ours))
    return [
        f"{key} was {first.get(key)!r}, is {second.get(key)!r}"
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key) and not (open_matches and second.get(key) in (None, "auto"))
    ]


def leaves(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested dictionaries with its dotted key. Raises ConfigError for one that holds itself."""
    if prefix.count(".") > _DEEPEST:  # by an alias YAML can write a section that stands in itself
        raise ConfigError(f"{prefix.partition('.')[0]}: is nested too deeply, or in itself; give the section's keys")
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from leaves(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


C = TypeVar("C", bound=Section)


def load_config(
    model: type[C], file: str | Path | None, options: dict[str, Any] | None = None, sets: Iterable[str] = ()
) -> C:
    """Resolve a configuration: defaults, then ``file`` (YAML), then ``options``, then ``sets`` (``a.b=value``).

    ``options`` has dotted keys. None is a value like others below a section (``a.b``); in place of a section it leaves
    the defaults, as YAML reads a section whose keys are all commented out. Raises ConfigError with the full key path.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            loaded = read_yaml(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"--config {file}: {one_line(error)}; give an existing YAML file") from error
        except ValueError as error:  # also bytes that are no text
            raise ConfigError(f"--config {file}: not valid YAML: {error}") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"--config {file}: holds {type(loaded).__name__}, not keys and values")
        values = _without_null(loaded or {})
    for key, value in _without_null(options or {}).items():
        _set(values, key, value)
    for assignment in sets:
        key, separator, text = assignment.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {assignment}: write key=value, for example --set engine.batch=32")
        try:
            _set(values, key, read_yaml(text))
        except ValueError as error:
            raise ConfigError(f"--set {assignment}: the value is not valid YAML") from error
    for _ in leaves(values):  # refuses a section that stands in itself
        pass
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_describe(model, entry) for entry in error.errors())) from error


def read_yaml(text: str) -> Any:
    """The value that ``text`` is in YAML. Raises ValueError, in one line: no YAML, or nested too deeply."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: dates of a 13th month
        raise ValueError(one_line(error)) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def require_compiler(field: str, device: str) -> None:
    """Whether ``torch.compile``, which ``field`` asks for, finds what it needs on this machine: on a CPU it writes C++,
    on a GPU Triton writes C, and both use Python's headers. Raises ConfigError."""
    name, default = ("CXX", ("g++",)) if device == "cpu" else ("CC", ("gcc", "clang"))
    compilers = (os.environ[name],) if os.environ.get(name) else default
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not any(shutil.which(compiler) for compiler in compilers):
        lacks, package = f"a compiler, and {' or '.join(compilers)} is not there", "g++"
    elif not header.is_file():
        lacks, package = f"Python's headers, and {header} is not there", "python3-dev"
    else:
        return
    raise ConfigError(f"{field}: torch.compile needs {lacks}; apt-get install {package}, or leave it false")


def _without_null(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` without sections that are null: their keys are all commented out."""
    return {key: value for key, value in values.items() if value is not None or "." in str(key)}


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{key}: {part} is a value, not a section")
    values[last] = value


def _describe(model: type[Section], entry: Any) -> str:
    where = ".".join(str(part) for part in entry["loc"]) or model.__name__
    if entry["type"] == "extra_forbidden":
        return f"{where}: no such key in {model.__name__}; see --help or docs/configuration.md"
    if entry["type"] == "missing":
        return f"{where}: is required"
    if entry["type"] == "tuple_type":
        return f"{where}: give a list, such as [4, 8] (got {entry['input']!r})"
    if entry["type"] == "model_type":
        return f"{where}: is a section; give one of its keys, as {where}.key (got {entry['input']!r})"
    return f"{where}: {entry['msg'].removeprefix('Value error, ')} (got {entry['input']!r})"
