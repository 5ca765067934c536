"""The configuration of ``covray vlm``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from covray.config.fields import ActorsConfig, TrackingConfig
from covray.config.section import GrownSection, JsonObject, LeftOut, Section
from covray.config.train import AdamWConfig, CheckpointsConfig, ComputeConfig, WorkersConfig

DIFFUSIONVL = {
    "size": 8, "context": "block", "start": "sequence", "low": 0.001, "high": 1.0, "weight": "level",
    "autoregressive": 0.0, "mean": "samples", "shift": False,
}  # fmt: skip
"""``blocks.preset: diffusionvl``: the published values (arXiv:2512.15713 and its code)."""


class VlmModelConfig(Section):
    """The vision-language model: a LLaVA, Qwen2-VL or Qwen2.5-VL checkpoint of transformers."""

    path: str
    """``nano`` (ships with the package), a folder, or a hub id. Only safetensors are read, and no code of a checkpoint
    is run."""
    revision: str | None = None
    """Commit, tag or branch of a hub id; pin a commit for anything that is to be repeated."""
    mask_id: int | None = Field(default=None, ge=0)
    """Id of the mask token. Null: that of the folder, if it was trained for blocks, else the first id of the vocabulary
    that the tokenizer does not use, else one new row."""


class VlmDecodingConfig(GrownSection):
    """How an answer is written."""

    decoder: Literal["autoregressive", "block_diffusion", "speculative"] | None = None
    """One token a pass; whole blocks in a few passes; or drafts by blocks that a causal pass verifies, which are the
    tokens of ``autoregressive`` in float32. Null: blocks for a model that was trained for them, else one by one."""
    max_tokens: int = Field(default=128, ge=1, le=100_000)
    """Tokens of an answer, at most."""
    block: int | None = Field(default=None, ge=1, le=1024)
    """Tokens of a block. Null: as the model was trained."""
    passes: int | None = Field(default=None, ge=1, le=1024)
    """Passes in which a block is written, at most its tokens: fewer are faster and worse. Null: one for each token."""
    unmask: Literal["even", "cosine", "confidence", "entropy"] = "even"
    """What a pass writes: equally many tokens, the surest first (``even``, DiffusionVL's static rule), few at first
    (``cosine``), all that are sure but at least as many as ``even`` (``confidence``, its dynamic rule), or as many as
    keep the sum of their entropies within the threshold (``entropy``)."""
    threshold: float | None = Field(default=None, gt=0)
    """Of ``confidence`` a probability (null: 0.85), of ``entropy`` nats (null: 1)."""
    temperature: float = Field(default=0.0, ge=0.0, le=100.0)
    """0: always the likeliest token (greedy)."""
    top_k: int | None = Field(default=None, ge=1)
    """Sample only from this many likeliest tokens."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Sample only from the likeliest tokens that together reach this probability."""
    cache: bool = True
    """Keep keys and values of the prompt and of what is written. False: every pass reads all again, as models do that
    write an answer in one block by full-sequence diffusion; the answer is the same."""
    seed: int = Field(default=0, ge=0)
    """Everything random follows from it and from the prompt's tokens."""

    def unused_fields(self) -> Iterator[str]:
        """Yield the cache where there is one."""
        if self.cache:
            yield "cache"


class VlmTextsConfig(Section):
    """Which texts of the data are used, and how."""

    root: str | None = None
    """Folder that the pictures of a list are below; null: that of the list."""
    captions: bool = True
    """Use captions; the prompt is ``instruction``."""
    questions: bool = True
    """Use questions, each with its answer."""
    instruction: str = "Describe the picture."
    """The prompt of captions."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not (self.captions or self.questions):
            raise ValueError("use captions, questions, or both")
        return self


class VlmTrainTextsConfig(VlmTextsConfig):
    """Which texts of the data are learned, and how."""

    split: str = "train"
    """Split to train on."""
    validation_split: str | None = "val"
    """Split for the validation loss; null: no validation."""


class VlmBlocksConfig(GrownSection):
    """What ``objective: block_diffusion`` learns: to fill blocks of masked tokens of an answer."""

    preset: Literal["default", "diffusionvl"] = "default"
    """``diffusionvl`` gives all keys below the published values, unless they are set themselves."""
    size: int = Field(default=8, ge=1, le=1024)
    """Tokens of a block."""
    context: Literal["causal", "block"] = "causal"
    """What clean tokens see: what stands before, as the autoregressive model, or also the rest of their block."""
    start: Literal["prompt", "sequence"] = "prompt"
    """Where blocks are counted from: the end of the prompt, or the first token of the sequence."""
    low: float = Field(default=0.001, ge=0, lt=1)
    """Least share of masked tokens of a block."""
    high: float = Field(default=1.0, gt=0, le=1)
    """Largest share of masked tokens of a block."""
    weight: Literal["masked", "level"] = "masked"
    """Estimate of the loss: so many tokens as the share says are masked, and weighed by their number (``masked``), or
    each token is masked with that probability, and weighed by its inverse (``level``)."""
    autoregressive: float = Field(default=1.0, ge=0)
    """Weight of the next-token loss of the same answers; 0 with ``context: block``, whose tokens see what follows."""
    mean: Literal["tokens", "samples"] = "tokens"
    """The loss of a step is a mean over the tokens of all answers, or over the means of the samples."""
    shift: bool = True
    """Predict a token at the place before it, as the autoregressive model does (Fast-dLLM v2), or at its own. Files
    leave it out where it is false."""
    anneal: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = ()
    """Sizes of blocks before ``size``, each for an equal share of the training (Fast-dVLM); empty: ``size`` at once."""

    @model_validator(mode="before")
    @classmethod
    def _values_of_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") == "diffusionvl":
            # Values that were given win over those of the preset.
            return DIFFUSIONVL | values
        return values

    @model_validator(mode="after")
    def _fit(self) -> VlmBlocksConfig:
        if self.low >= self.high:
            raise ValueError("low: must be below high")
        if self.context == "block" and self.autoregressive:
            raise ValueError("autoregressive: must be 0 with context=block, whose clean tokens see the next one")
        if self.start == "sequence" and self.weight == "masked":
            raise ValueError("weight: must be level with start=sequence, as a block can hold tokens of the prompt")
        return self

    def unused_fields(self) -> Iterator[str]:
        """Yield the younger fields that are not set."""
        if not self.shift:
            yield "shift"
        if not self.anneal:
            yield "anneal"


class VlmLoraConfig(Section):
    """The adapter of the language model: W x + (alpha / rank) B A x."""

    rank: int = Field(default=32, ge=1, le=1024)
    """Rank of B and A."""
    alpha: float = Field(default=64.0, gt=0)
    """Scale of the update, before it is divided by the rank."""
    targets: tuple[Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    """Projections that get an update."""


class VlmOptimizerConfig(AdamWConfig):
    """AdamW, with a cosine schedule after a warm-up."""

    batch_samples: int = Field(default=64, ge=1, le=10**9)
    """Pairs of a prompt and an answer in a step, over all workers."""
    micro_batch_samples: int = Field(default=8, ge=1, le=10**9)
    """Pairs that a worker computes at a time."""

    @property
    def step_size(self) -> str:
        """What a step takes."""
        return f"{self.batch_samples} samples"

    @property
    def for_more_steps(self) -> str:
        """What to change to take more steps."""
        return "optimizer.batch_samples"


class VlmTrainConfig(Section):
    """``covray vlm train``: teach a vision-language model to answer, token by token or in blocks."""

    data: str
    """Manifest with words (``covray pairs portraits``), or a list of one's own: LLaVA's or COCO's JSON, JSON lines, CSV
    or Parquet with the columns image and caption, or image, question and answer."""
    out: str
    """Run folder to write."""
    model: str
    """The LLaVA, Qwen2-VL or Qwen2.5-VL checkpoint that is trained: ``nano`` (ships with the package), a folder, or a
    hub id. Only safetensors are read, and no code of a checkpoint is run."""
    revision: str | None = None
    """Commit, tag or branch of a hub id; pin a commit for anything that is to be repeated."""
    mask_id: int | None = Field(default=None, ge=0)
    """Id of the mask token. Null: that of the folder, if it was trained for blocks, else the first id of the vocabulary
    that the tokenizer does not use, else one new row."""
    texts: VlmTrainTextsConfig = VlmTrainTextsConfig()
    objective: Literal["autoregressive", "block_diffusion"] = "autoregressive"
    """What is learned: the next token, or blocks of masked tokens, which converts an autoregressive model."""
    blocks: VlmBlocksConfig = VlmBlocksConfig()
    train: Literal["lora", "language", "full"] = "lora"
    """What is trained: an adapter of the language model, all of the model but its vision tower, or all of it."""
    lora: VlmLoraConfig = VlmLoraConfig()
    optimizer: VlmOptimizerConfig = VlmOptimizerConfig()
    compute: ComputeConfig = ComputeConfig()
    workers: WorkersConfig = WorkersConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    tracking: TrackingConfig = TrackingConfig()
    validate_every_steps: int = Field(default=100, ge=1)
    """Steps between two validations."""
    validation_samples: int = Field(default=64, ge=1, le=10**12)
    """Samples of the validation split, at most."""
    seed: int = Field(default=0, ge=0)
    """Everything random follows from it."""

    @model_validator(mode="after")
    def _known(self) -> VlmTrainConfig:
        """Refuse settings that this command shares with ``covray train`` and has no use for."""
        if self.compute.compile:
            raise ValueError("compute.compile: is not supported for vision-language models")
        return self

    def checkpoint(self) -> VlmModelConfig:
        """Return the checkpoint that is trained."""
        return VlmModelConfig(path=self.model, revision=self.revision, mask_id=self.mask_id)

    def identity(self) -> JsonObject:
        """What decides the losses; a resume must agree in all of it."""
        left_out: LeftOut = {
            **dict.fromkeys(("out", "workers", "checkpoints", "tracking", "validate_every_steps"), True),
            # Of what lies there, the run keeps the fingerprint.
            **dict.fromkeys(("data", "model", "revision"), True),
            "texts": {"root"},
            "compute": {"device", "threads", "recompute", "compile", "deepspeed"},
            "optimizer": {"micro_batch_samples"},
        }
        if self.objective == "autoregressive":
            left_out["blocks"] = True
        if self.train != "lora":
            left_out["lora"] = True
        return self.model_dump(mode="json", exclude=left_out)


class VlmSourceConfig(Section):
    """The model that answers."""

    run: str | None = None
    """Finished run of ``covray vlm train``; null: ``model`` alone."""
    model: str | None = None
    """Checkpoint: ``nano`` (ships with the package), a folder, or a hub id; null: that of the run."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    mask_id: int | None = Field(default=None, ge=0)
    """Id of the mask token; null: as in training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes the GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """``auto``: bfloat16 on a GPU, float32 on a CPU."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        """Require a model: that of a run, or a checkpoint."""
        if self.run is None and self.model is None:
            raise ValueError("give run (a finished covray vlm train) or model (a checkpoint)")
        return self

    def checkpoint(self) -> VlmModelConfig | None:
        """Return the checkpoint, if one is named."""
        if self.model is None:
            return None
        return VlmModelConfig(path=self.model, revision=self.revision, mask_id=self.mask_id)


class VlmGenerateConfig(VlmSourceConfig):
    """``covray vlm generate``: pictures and text in, text out."""

    prompt: str
    """What is asked."""
    images: tuple[str, ...] = ()
    """Picture files, shown before the text."""
    decoding: VlmDecodingConfig = VlmDecodingConfig()


class VlmEvaluateConfig(VlmSourceConfig):
    """``covray vlm evaluate``: facts of captions, accuracy of answers, and speed."""

    data: str
    """Manifest with words (``covray pairs portraits``), or a list of one's own: LLaVA's or COCO's JSON, JSON lines, CSV
    or Parquet with the columns image and caption, or image, question and answer."""
    out: str
    """Folder to write."""
    texts: VlmTextsConfig = VlmTextsConfig()
    split: str = "test"
    """Split to score on."""
    samples: int | None = Field(default=None, ge=1)
    """Prompts at most, the first of the data; null: all of the split."""
    batch: int = Field(default=16, ge=1, le=4096)
    """Prompts answered at a time."""
    decoding: VlmDecodingConfig = VlmDecodingConfig()
    threads: int = Field(default=1, ge=1, le=256)
    """CPU threads of one actor. Use more actors instead, which answer different batches."""
    actors: ActorsConfig = ActorsConfig()
    tracking: TrackingConfig = TrackingConfig()

    def identity(self) -> JsonObject:
        """The settings that decide the answers; data and model are compared by their fingerprints."""
        left_out: LeftOut = {
            **dict.fromkeys(("out", "device", "data", "model", "revision"), True),
            **dict.fromkeys(("threads", "actors", "tracking"), True),
            "texts": {"root"},
        }
        return self.model_dump(mode="json", exclude=left_out)
