"""The configuration of ``covray train``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from covray.config.fields import BackboneConfig, ChainMethod, ExamplePairs, Length, Target, TaskName, TrackingConfig
from covray.config.section import GrownSection, JsonObject, LeftOut, Section, recorded_section


class LoraConfig(Section):
    """The adapter: W x + (alpha / rank) B A x."""

    rank: int = Field(default=32, ge=1, le=1024)
    """Rank of B and A."""
    alpha: float = Field(default=64.0, gt=0)
    """Scale of the update, before it is divided by the rank."""
    targets: tuple[Target, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Projections that get an update."""
    path: str | None = None
    """Adapter to start from: a PEFT folder of this rank, alpha and targets, such as ``adapter`` in a finished run.
    Null: a new adapter, which changes nothing yet."""

    @field_validator("targets")
    @classmethod
    def _some(cls, value: tuple[Target, ...]) -> tuple[Target, ...]:
        if not value:
            raise ValueError("name at least one projection")
        return tuple(dict.fromkeys(value))


class FrameNoiseConfig(Section):
    """What replaces the query's frames in the input of a training; the loss stays on the dataset's own tokens.

    At inference a model reads frames that it wrote itself. Trained on the dataset's frames alone, it trusts them.
    """

    kind: Literal["none", "random", "neighbour", "scheduled", "own"] = "none"
    """What the frames' tokens are replaced by: codes drawn uniformly (``random``), one of the codes nearest to them in
    the tokenizer's codebook (``neighbour``), the model's likeliest tokens in a first pass over the same sentence
    (``scheduled``), or frames that the model has written itself (``own``). Examples' frames are never replaced."""
    share: float = Field(default=0.5, gt=0, le=1)
    """Probability that a token of a frame is replaced; of ``own``, that all frames of a query are."""
    refresh_tokens: int = Field(default=1_000_000, ge=1, le=10**12)
    """Of ``own``: so many trained tokens see frames by one state of the adapter, before they are written again. The
    first of them see the dataset's frames."""

    @property
    def reads_weights(self) -> bool:
        """Whether the frames depend on the weights that are trained."""
        return self.kind in ("scheduled", "own")


class SentencesConfig(GrownSection):
    """Which visual sentences are made of the chains."""

    method: ChainMethod = "diffusion"
    """How the frames between image and label were made; ``none`` leaves them out, ``copy`` and ``coarse`` are
    controls."""
    lengths: tuple[Length, ...] = (4,)
    """Chain lengths, both ends counted; each sentence draws one of them."""
    pairs: tuple[ExamplePairs, ...] = (1,)
    """Numbers of example pairs before the query; each sentence draws one of them."""
    tasks: tuple[TaskName, ...] | None = None
    """Tasks to use; by default all of the dataset."""
    split: str = "train"
    """Split to train on."""
    validation_split: str | None = "val"
    """Split for the validation loss; null: no validation."""
    loss: Literal["all", "chains", "chain", "answer"] = "all"
    """Tokens that the loss is taken on: ``all`` (as LVM), ``chains`` (frames and answers of examples and query),
    ``chain`` (those of the query), or ``answer`` (the query's answer)."""
    frame_noise: FrameNoiseConfig = FrameNoiseConfig()
    drop_worst: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of each task's chains that is not trained on: those of the lowest quality, by the path of the diffused
    frames and the noise of both ends. Chains of every method are dropped with their pair; validation has all."""

    @field_validator("lengths", "pairs", "tasks")
    @classmethod
    def _distinct(cls, value: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        if value is not None and not value:
            raise ValueError("give at least one")
        return None if value is None else tuple(sorted(set(value)))

    def unused_fields(self) -> Iterator[str]:
        """Yield the younger fields that ask for nothing."""
        if self.frame_noise.kind == "none":
            yield "frame_noise"
        if not self.drop_worst:
            yield "drop_worst"


class AdamWConfig(Section):
    """AdamW on the adapter, with a cosine schedule after a warm-up."""

    learning_rate: float = Field(default=2e-4, gt=0)
    """Highest learning rate (``covray train --scale nano``: 0.001)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay of AdamW's two moments."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    final: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end, as a share of the highest."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    epochs: float = Field(default=1.0, gt=0, le=1e6)
    """How often each pair is the query (``covray train --scale nano``: 4)."""
    steps: int | None = Field(default=None, ge=1, le=10**9)
    """Steps of the training, in place of ``epochs``."""

    @property
    def step_size(self) -> str:
        """What a step takes, such as "8192 tokens"."""
        raise NotImplementedError

    @property
    def for_more_steps(self) -> str:
        """What to change to take more steps."""
        raise NotImplementedError


class OptimizerConfig(AdamWConfig):
    """AdamW on the adapter, with a cosine schedule after a warm-up."""

    batch_tokens: int = Field(default=172_032, ge=1, le=10**12)
    """Tokens of a step over all workers (the paper: 172K; ``covray train --scale nano``: 8192). The loss is their mean,
    however many workers there are."""
    micro_batch_tokens: int = Field(default=8192, ge=1, le=10**12)
    """Tokens that a worker computes at a time, at least one sentence (``covray train --scale nano``: 4096)."""

    @property
    def step_size(self) -> str:
        """What a step takes."""
        return f"{self.batch_tokens} tokens"

    @property
    def for_more_steps(self) -> str:
        """What to change to take more steps."""
        return "optimizer.batch_tokens (configs/train/nano.yaml has 8192)"


_NANO_OPTIMIZER = {
    "learning_rate": 1e-3, "epochs": 4.0, "batch_tokens": 8192, "micro_batch_tokens": 4096,
}  # fmt: skip
"""Defaults of ``covray train --scale nano``, for small data; configs/train/nano.yaml says why."""


class ComputeConfig(Section):
    """How the arithmetic runs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes the GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the frozen backbone and of the arithmetic; the adapter is float32. ``auto``: bfloat16 on a GPU
    and on a CPU with units for it (AMX, AVX512-BF16), else float32."""
    threads: int | None = Field(default=None, ge=1, le=256)
    """CPU threads of one worker; by default the machine's cores divided by its workers."""
    recompute: bool = False
    """Compute activations again in the backward pass: a third more work for a fraction of the memory."""
    compile: bool = False
    """Compile the layers by ``torch.compile``: this takes a minute at the start, and pays on a GPU."""
    deepspeed: str = "auto"
    """``auto`` (by scale and GPU memory), ``none``, ``zero1``, ``zero2``, ``zero3``, ``zero2_offload``,
    ``zero3_offload``, or a DeepSpeed JSON file."""


class WorkersConfig(Section):
    """Ray Train's workers. The updates do not depend on their number, up to the order in which floats are added."""

    count: int = Field(default=1, ge=1)
    """Workers, one per GPU."""
    gpus: float | None = Field(default=None, ge=0)
    """GPUs of one worker; by default 1 where the cluster has GPUs, else 0."""
    cpus: float = Field(default=1.0, gt=0)
    """Logical CPUs that one worker reserves."""
    node_type: str | None = None
    """Use only nodes that have this custom resource; each node type of ``cluster/gpu.yaml`` has one of its own name."""
    max_failures: int = Field(default=3, ge=-1)
    """Restarts after lost workers before the command gives up; -1: no limit."""


class CheckpointsConfig(Section):
    """When the state of a run is written, and how many states are kept."""

    every_steps: int = Field(default=100, ge=1)
    """Steps between two checkpoints."""
    keep: int = Field(default=2, ge=1, le=10**9)
    """Newest checkpoints that are kept, beside the best by validation loss."""


class BlockDiffusionConfig(Section):
    """What ``objective: block_diffusion`` learns: to fill blocks of masked tokens, several tokens a pass."""

    block: int = Field(default=8, ge=1, le=8192)
    """Tokens of a block, a divisor of a picture's."""
    low: float = Field(default=0.001, ge=0, lt=1)
    """Least share of masked tokens of a block."""
    high: float = Field(default=1.0, gt=0, le=1)
    """Largest share of masked tokens of a block."""
    weight: Literal["masked", "level"] = "masked"
    """Estimate of the loss: so many tokens as the share says are masked, and weighed by their number (``masked``), or
    each token is masked with that probability, and weighed by its inverse (``level``, as DiffusionVL)."""
    autoregressive: float = Field(default=1.0, ge=0)
    """Weight of the next-token loss of the same tokens, which keeps likelihoods and the cache as they were."""

    @model_validator(mode="after")
    def _ordered(self) -> BlockDiffusionConfig:
        if self.low >= self.high:
            raise ValueError("low: must be below high")
        return self


class DraftConfig(Section):
    """What ``objective: draft`` learns: a second adapter, which drafts what the model with ``lora.path`` writes."""

    tokens: int = Field(default=3, ge=1, le=64)
    """Tokens that are drafted in a pass."""
    rank: int = Field(default=32, ge=1, le=1024)
    """Rank of the draft adapter, on the targets of ``lora``."""
    alpha: float = Field(default=64.0, gt=0)
    """Scale of its update, before it is divided by the rank."""
    share: float = Field(default=0.25, gt=0, le=1)
    """Share of the places with loss behind which drafts are learned, drawn anew for every sentence."""


class VerifierConfig(Section):
    """What ``objective: verifier`` learns: to tell good answers of the run with ``lora.path`` from worse ones."""

    answers: str | None = None
    """Finished evaluation of that run with ``score_candidates``: the answers to learn from."""
    hidden: int = Field(default=64, ge=1, le=4096)
    """Width of the verifier's one hidden layer."""
    validation: float = Field(default=0.1, ge=0, lt=1)
    """Share of the queries that is not trained on, drawn by the seed, for the validation loss; 0: no validation."""


class TrainConfig(Section):
    """``covray train``: turn shards of tokens into a PEFT adapter."""

    data: str
    """Dataset of chains: the ``--out`` of a ``covray build``."""
    data_weight: float = Field(default=1.0, gt=0, le=1000)
    """How often each pair of ``data`` is the query in an epoch; below 1, a share of the pairs takes turns."""
    mix: tuple[str, ...] = ()
    """Further datasets to train on, each as ``PATH`` or ``PATH=WEIGHT``, as ``--data A --data B=0.3`` gives them.
    Datasets without weights are trained on as one dataset of all their pairs. Validation has all pairs."""
    out: str
    """Run folder to write."""
    backbone: BackboneConfig = BackboneConfig()
    lora: LoraConfig = LoraConfig()
    objective: Literal["autoregressive", "block_diffusion", "draft", "verifier"] = "autoregressive"
    """What is learned: the next token; blocks of masked tokens, which converts an autoregressive model; a draft
    adapter, which makes ``sampling.decoder: speculative`` faster; or a verifier, by which ``sampling.choose_by:
    verifier`` ranks candidates. The last two leave the adapter ``lora.path`` as it is."""
    block_diffusion: BlockDiffusionConfig = BlockDiffusionConfig()
    draft: DraftConfig = DraftConfig()
    verifier: VerifierConfig = VerifierConfig()
    sentences: SentencesConfig = SentencesConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    compute: ComputeConfig = ComputeConfig()
    workers: WorkersConfig = WorkersConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    tracking: TrackingConfig = TrackingConfig()
    validate_every_steps: int = Field(default=100, ge=1)
    """Steps between two validations."""
    validation_sentences: int = Field(default=64, ge=1, le=10**12)
    """Sentences of the validation split, at most."""
    seed: int = Field(default=0, ge=0)
    """Everything random follows from it."""

    @model_validator(mode="after")
    def _noise_fits_objective(self) -> TrainConfig:
        if self.sentences.frame_noise.kind != "none" and self.objective != "autoregressive":
            raise ValueError(
                f"sentences.frame_noise.kind: needs objective: autoregressive, not {self.objective}; set it to none"
            )
        return self

    @field_validator("mix")
    @classmethod
    def _weights_are_numbers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            path, weight = weighted_path(entry)
            if not path or not 0 < weight <= 1000:
                raise ValueError(f"{entry}: give PATH or PATH=WEIGHT, with a weight above 0 and up to 1000")
        return value

    @property
    def trained_lora(self) -> LoraConfig:
        """Return the sizes of the adapter that is trained: ``lora``, or a draft adapter on the same targets."""
        if self.objective != "draft":
            return self.lora
        return self.lora.model_copy(update={"rank": self.draft.rank, "alpha": self.draft.alpha})

    @property
    def weighted_data(self) -> tuple[tuple[str, float], ...]:
        """Return the path and the weight of every dataset, ``data`` first."""
        return ((self.data, self.data_weight), *(weighted_path(entry) for entry in self.mix))

    def with_defaults_of_scale(self) -> TrainConfig:
        """Return the configuration with the optimizer of its scale, in the keys that were not set.

        The keys still count as not set: see ``with_defaults_of_run``.
        """
        if self.backbone.scale != "nano":
            return self
        return self._with_unset({key: value for key, value in _NANO_OPTIMIZER.items() if self._is_unset(key)})

    def with_defaults_of_run(self, recorded: JsonObject) -> TrainConfig:
        """Return the configuration with the defaults of the run that it continues, in the keys that were not set.

        A run that was begun before its scale had an optimizer of its own has the defaults of ``OptimizerConfig``.

        Args:
            recorded: The configuration of the run, as JSON.
        """
        kept = {}
        for key in _NANO_OPTIMIZER:
            default = OptimizerConfig.model_fields[key].default
            if self._is_unset(key) and recorded_section(recorded, "optimizer").get(key) == default:
                kept[key] = default
        return self._with_unset(kept)

    def _is_unset(self, key: str) -> bool:
        return key not in self.optimizer.model_fields_set

    def _with_unset(self, values: dict[str, Any]) -> TrainConfig:
        """Return the configuration with ``values`` in the optimizer, which count as not set."""
        optimizer = self.optimizer.model_copy(update=values)
        # A copy counts what it updates as set; a resume asks which keys the user set.
        optimizer.model_fields_set.difference_update(values)
        return self.model_copy(update={"optimizer": optimizer})

    def identity(self) -> JsonObject:
        """What decides the losses; a resume must agree in all of it.

        Left out is what only changes the order in which floats are added: workers, micro-batches, threads, ZeRO stage.
        """
        left_out: LeftOut = {
            **dict.fromkeys(("data", "out", "workers", "checkpoints", "tracking", "validate_every_steps"), True),
            "compute": {"device", "threads", "recompute", "compile", "deepspeed"},
            "optimizer": {"micro_batch_tokens"},
            "lora": {"path"},  # of what lies there, the run keeps the fingerprint
        }
        if self.objective == "autoregressive":  # runs begun before there was a choice have no such keys
            left_out["objective"] = True
        left_out |= dict.fromkeys({"block_diffusion", "draft", "verifier"} - {self.objective}, True)
        if self.objective == "verifier":
            left_out["verifier"] = {"answers"}  # as of lora.path, the run keeps the fingerprint
        identity = self.model_dump(mode="json", exclude=left_out | {"mix": True, "data_weight": True})
        weights = [weight for _, weight in self.weighted_data]
        if weights != [1.0]:  # nor have runs on one dataset
            identity["data_weights"] = weights
        return identity


def weighted_path(text: str) -> tuple[str, float]:
    """Return the path and the weight of ``PATH=WEIGHT``; what stands behind another ``=`` belongs to the path."""
    # From the right: a path may hold an =, a weight cannot.
    path, equals, weight = text.rpartition("=")
    try:
        return (path, float(weight)) if equals else (text, 1.0)
    except ValueError:
        return text, 1.0
