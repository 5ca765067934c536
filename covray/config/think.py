"""The configuration of ThinkDiff: its parts, and of each command of ``covray think`` a model made of them.

One file, such as ``paper/thinkdiff-lvlm``, may serve all four commands: each leaves out the parts of the others.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from covray.config.evaluate import named_run
from covray.config.fields import ActorsConfig, EngineConfig, TrackingConfig
from covray.config.section import JsonObject, LeftOut, Section
from covray.config.train import CheckpointsConfig, ComputeConfig, WorkersConfig
from covray.config.vlm import VlmModelConfig


class ThoughtConfig(Section):
    """How the vision-language model writes the text whose features are taken."""

    max_tokens: int = Field(default=64, ge=1, le=100_000)
    """Tokens of a text, at most."""
    min_tokens: int = Field(default=1, ge=1, le=100_000)
    """Tokens of a text, at least: so long it does not end. As many as ``max_tokens``: all texts are equally long."""
    temperature: float = Field(default=0.6, ge=0.0, le=100.0)
    """0: always the likeliest token (greedy)."""
    top_p: float = Field(default=0.9, gt=0.0, le=1.0)
    """Sample only from the likeliest tokens that together reach this probability."""
    seed: int = Field(default=0, ge=0)
    """The random numbers of a text follow from it and from the prompt's tokens."""

    @model_validator(mode="after")
    def _bounds_agree(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is over max_tokens {self.max_tokens}; give fewer")
        return self


class LanguageModelConfig(Section):
    """The frozen language model whose decoder the aligner learns to write for: a T5."""

    path: str
    """Folder of the model, or a hub id."""
    revision: str | None = None
    """Commit, tag or branch of a hub id; pin a commit for anything that is to be repeated."""
    max_tokens: int = Field(default=128, ge=2, le=4096)
    """Tokens of a text to write, at most, its end token among them."""


class AlignerConfig(Section):
    """The aligner between the two models."""

    norm: Literal["encoder", "ones", "none"] = "encoder"
    """What it ends with: a norm that starts as the language encoder's, one that starts as 1, or none."""
    seed: int = Field(default=0, ge=0)
    """Of its first weights."""


class SplitConfig(Section):
    """How a caption is parted into what is read and what is written."""

    mode: Literal["prefix", "tokens", "none"] = "prefix"
    """``prefix``: the features before a random cut, the tokens after it (the authors' code); ``tokens``: a random half
    of the tokens (the paper's words); ``none``: everything is read and written, an ablation of the paper."""
    longest: int = Field(default=128, ge=1, le=100_000)
    """The longest prefix, in tokens."""


class AlignmentConfig(Section):
    """The training of the aligner: AdamW, a linear warm-up, then a cosine."""

    steps: int = Field(default=25_000, ge=1)
    """Steps of the training."""
    batch: int = Field(default=96, ge=1, le=65_536)
    """Captions of a step, over all workers."""
    micro_batch: int = Field(default=32, ge=1, le=65_536)
    """Captions that a worker computes at a time."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """The highest learning rate."""
    warmup_steps: int = Field(default=2000, ge=0)
    """Steps in which the learning rate rises."""
    warmup_from: float = Field(default=1e-6, ge=0)
    """Where it begins."""
    final: float = Field(default=8e-5, ge=0)
    """Where the cosine ends."""
    cosine_steps: int = Field(default=200_000, ge=1)
    """Steps of the whole cosine, the warm-up's among them; a training of fewer steps ends before it does."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Of AdamW."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Of the matrices; biases and the norm have none."""
    clip: float | None = Field(default=None, gt=0)
    """The largest norm of a step's gradient; null: none is cut."""
    seed: int = Field(default=42, ge=0)
    """The order of the captions and their splits follow from it."""

    @property
    def step_size(self) -> str:
        """What a step takes."""
        return f"{self.batch} captions"

    @property
    def for_more_steps(self) -> str:
        """What to change to take more steps."""
        return "optimizer.steps"


class EpisodesConfig(Section):
    """The reasoning episodes of CoBSAT's rule."""

    shots: tuple[int, ...] = Field(default=(2, 4), min_length=1)
    """Demonstrations of an episode, 1 to 8; each number makes a set of episodes of its own."""
    count: int = Field(default=1000, ge=1, le=1_000_000)
    """Episodes of each task and number of shots."""
    seed: int = Field(default=123, ge=0)
    """Of the permutations; those of CoBSAT's own file have none."""
    instruction: str = (
        "I give you several words and pictures. First, please analyse what the next picture is. Then give me a "
        "detailed diffusion prompt to describe the next picture. Please only provide me the detailed prompt and start "
        "the answer with 'Create an image'."
    )
    """The text that the vision-language model reads before the demonstrations."""

    @field_validator("shots")
    @classmethod
    def _shots_fit(cls, shots: tuple[int, ...]) -> tuple[int, ...]:
        for number in shots:
            if not 1 <= number <= 8:
                raise ValueError(f"{number} shots: of ten values an episode takes 1 to 8; give others")
        # Twice the same number would be the same episodes twice, counted as if there were twice as many.
        return tuple(dict.fromkeys(shots))


class PainterConfig(Section):
    """The diffusion model that draws from aligned features, and how it draws."""

    kind: Literal["unet", "flux", "sd3", "pixart", "cogvideox"]
    """``unet``: a prior's folder whose UNet reads the features, sampled with covray's schedule. The others are
    pipelines of diffusers: FLUX, Stable Diffusion 3, PixArt-Alpha or Sigma, CogVideoX."""
    path: str
    """Folder of the model in diffusers' layout, or a hub id."""
    revision: str | None = None
    """Commit, tag or branch of a hub id; pin a commit for anything that is to be repeated."""
    steps: int = Field(default=28, ge=1, le=1000)
    """Steps of a picture. With ``unet`` they must divide the model's training steps."""
    guidance: float = Field(default=3.5, ge=1.0, le=100.0)
    """Scale of the guidance; 1: none. FLUX reads the number and needs no second pass."""
    size_px: int | None = Field(default=None, ge=8, le=4096, multiple_of=8)
    """Side of the square pictures in pixels; null: the model's own."""
    frames: int = Field(default=49, ge=1, le=1000)
    """Frames of a video, with ``cogvideox``."""
    words: int = Field(default=128, ge=1, le=1024)
    """T5 tokens of the words that stand after the features, where there are words; with ``cogvideox`` words fill what
    the features leave of its text."""
    seed: int = Field(default=42, ge=0)
    """Of the noise that every picture begins with."""


class JudgeConfig(Section):
    """What decides which detail and which object a picture shows."""

    kind: Literal["nano", "clip", "vlm"] = "nano"
    """``nano``: covray's judge of rendered portraits. ``clip``: the captions nearest to the picture in a CLIP model,
    CoBSAT's second score. ``vlm``: two questions of ten options to a vision-language model, CoBSAT's first."""
    path: str | None = None
    """Folder of the model, or a hub id; null: the one that ships with the package, for ``nano`` only."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.kind != "nano" and self.path is None:
            raise ValueError(f"path: kind {self.kind} needs one; give the folder of a model, or a hub id")
        return self


class ThinkConfig(Section):
    """The models and settings of ThinkDiff, from features to pictures: what a file for all four commands may hold."""

    variant: Literal["lvlm", "clip"]
    """Whose features are aligned: a vision-language model's of its own text, or a vision tower's of a picture."""
    vlm: VlmModelConfig
    """The model that the features are of; with ``clip`` its vision tower."""
    language_model: LanguageModelConfig
    painter: PainterConfig
    thought: ThoughtConfig = ThoughtConfig()
    """With ``lvlm`` only."""
    patches: int = Field(default=2, ge=1, le=64)
    """With ``clip``: how many times smaller the grid of patches is made, on each side."""
    aligner: AlignerConfig = AlignerConfig()
    split: SplitConfig = SplitConfig()
    """With ``lvlm`` only; captions of ``clip`` are cut at a random word."""
    optimizer: AlignmentConfig = AlignmentConfig()
    episodes: EpisodesConfig = EpisodesConfig()
    judge: JudgeConfig = JudgeConfig()


class ThinkStep(Section):
    """A command of ``covray think``; it leaves out the parts of ``ThinkConfig`` that other commands read."""

    @model_validator(mode="before")
    @classmethod
    def _without_other_parts(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for key, value in values.items():
            if key in cls.model_fields or key not in ThinkConfig.model_fields:
                kept[key] = value
        return kept


class ThinkFeaturesConfig(ThinkStep):
    """``covray think features``: captioned pictures, or reasoning episodes, to the features that an aligner reads."""

    data: str | None = None
    """Manifest with words (``covray pairs portraits``), or a list of one's own: LLaVA's or COCO's JSON, JSON lines, CSV
    or Parquet with the columns image and caption. Required with pictures; episodes have none."""
    out: str
    """Folder to write."""
    vlm: VlmModelConfig
    """The model that the features are of; with ``variant: clip`` a CLIP or a BLIP-2, for its vision tower."""
    variant: Literal["lvlm", "clip"] = "lvlm"
    """Whose features are taken: a vision-language model's of the text that it writes of a picture, or a vision tower's
    of the picture."""
    of: Literal["pictures", "episodes"] = "pictures"
    """``pictures``: captioned pictures, for trainings. ``episodes``: the few-shot episodes of an evaluation, with
    ``lvlm`` only; ``covray think evaluate --features`` reads them, and no training does."""
    episodes: EpisodesConfig = EpisodesConfig()
    """With ``of: episodes``: how many, of how many shots, and what is asked."""
    cobsat: str | None = None
    """With ``of: episodes``: copy of CoBSAT's repository with its data set; null: rendered portraits."""
    tasks: tuple[str, ...] | None = None
    """With ``of: episodes``: tasks to use, such as ``Colour-I``; null: all ten."""
    thought: ThoughtConfig = ThoughtConfig()
    """With ``lvlm`` only."""
    places: Literal["text", "prompt"] = "text"
    """Whose states are features, with ``lvlm``: those that the text's tokens were sampled from, or those of the
    prompt's tokens, an ablation of the paper."""
    instructions: tuple[str, ...] = Field(default=("Describe the picture.",), min_length=1)
    """What the vision-language model is asked, with ``lvlm``; each picture draws one of them."""
    patches: int = Field(default=2, ge=1, le=64)
    """With ``clip``: how many times smaller the grid of patches is made, on each side."""
    root: str | None = None
    """Folder that the pictures of a list are below; null: that of the list."""
    samples: int | None = Field(default=None, ge=1)
    """Pictures of each split, at most, the first of the data; null: all."""
    engine: EngineConfig = EngineConfig()
    actors: ActorsConfig = ActorsConfig()
    rows_per_block: int | None = Field(default=None, ge=1, le=100_000)
    """Pictures that an actor takes at a time; a kill loses at most the blocks at work. By default several blocks for
    every actor, of at most 64."""
    seed: int = Field(default=0, ge=0)
    """Which instruction a picture gets follows from it, or how the pictures of episodes are rendered."""

    @field_validator("instructions")
    @classmethod
    def _say_something(cls, instructions: tuple[str, ...]) -> tuple[str, ...]:
        for instruction in instructions:
            if not instruction.strip():
                raise ValueError("one is empty; write what the model is asked")
        return instructions

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if self.of == "pictures" and self.data is None:
            raise ValueError("data: is required; give a manifest with words, or of: episodes")
        if self.of == "episodes" and self.data is not None:
            raise ValueError("data: episodes have none; leave it out, and give cobsat for CoBSAT's own")
        if self.of == "episodes" and (self.variant != "lvlm" or self.places != "text"):
            raise ValueError("of: episodes are answered by a text; leave variant at lvlm and places at text")
        return self

    def identity(self) -> JsonObject:
        """What decides the features; a resume must agree in all of it."""
        left_out: LeftOut = {
            **dict.fromkeys(("out", "actors", "rows_per_block"), True),
            # Of what lies there, the folder keeps the fingerprint.
            **dict.fromkeys(("data", "root", "vlm", "cobsat"), True),
            "engine": {"device", "compile", "image_batch"},
        }
        # Fields without effect on these features may differ: they do not refuse a resume.
        unused = ["patches"] if self.variant == "lvlm" else ["thought", "places", "instructions", "seed"]
        unused += ["places", "instructions", "samples"] if self.of == "episodes" else ["of", "episodes", "tasks"]
        return self.model_dump(mode="json", exclude=left_out | dict.fromkeys(unused, True))


class ThinkTrainConfig(ThinkStep):
    """``covray think train``: features to an aligner, through a frozen language decoder."""

    data: str
    """Features: the ``--out`` of a ``covray think features``."""
    out: str
    """Run folder to write."""
    language_model: LanguageModelConfig
    """The frozen T5 whose decoder writes the captions."""
    aligner: AlignerConfig = AlignerConfig()
    split: SplitConfig = SplitConfig()
    """With features of a vision-language model; captions beside a vision tower's are cut at a random word."""
    optimizer: AlignmentConfig = AlignmentConfig()
    compute: ComputeConfig = ComputeConfig()
    workers: WorkersConfig = WorkersConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    tracking: TrackingConfig = TrackingConfig()
    train_split: str = "train"
    """Split of the features to train on."""
    validation_split: str | None = "val"
    """Split for the validation loss; null: no validation."""
    validate_every_steps: int = Field(default=100, ge=1)
    """Steps between two validations."""
    validation_samples: int = Field(default=64, ge=1, le=10**12)
    """Captions of the validation split, at most."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.compute.compile:
            raise ValueError("compute.compile: is not supported for an aligner")
        if self.compute.recompute:
            raise ValueError("compute.recompute: is not supported for an aligner")
        if self.compute.deepspeed not in ("auto", "none"):
            raise ValueError("compute.deepspeed: an aligner is small and needs none; give none")
        return self

    def identity(self) -> JsonObject:
        """What decides the losses; a resume must agree in all of it."""
        left_out: LeftOut = {
            **dict.fromkeys(("out", "workers", "checkpoints", "tracking", "validate_every_steps"), True),
            # Of what lies there, the run keeps the fingerprint.
            "data": True,
            "language_model": {"path", "revision"},
            "compute": {"device", "threads", "recompute", "compile", "deepspeed"},
            "optimizer": {"micro_batch"},
        }
        return self.model_dump(mode="json", exclude=left_out)


class ThinkModelsConfig(ThinkStep):
    """The models between pictures and words, and a picture."""

    vlm: VlmModelConfig | None = None
    """The model whose features are aligned; null: that of the run's features."""
    language_model: LanguageModelConfig | None = None
    """The language model of the run; null: where it was in training. Only its encoder is used, for words."""
    painter: PainterConfig
    """The diffusion model that draws."""
    thought: ThoughtConfig | None = None
    """Null: as the features of the run were taken."""
    engine: EngineConfig = EngineConfig()


class ThinkGenerateConfig(ThinkModelsConfig):
    """``covray think generate``: pictures and words in, the model's text and the drawn answer out."""

    run: str
    """Finished run of ``covray think train``, or the folder of an aligner; then ``vlm`` must be given."""
    out: str
    """Folder to write."""
    images: tuple[str, ...] = ()
    """Picture files."""
    words: tuple[str, ...] = ()
    """A word for each picture and one more, which asks for the next picture; for a vision-language model."""
    prompt: str = ""
    """Text beside the pictures: what a vision-language model is asked after them, or, with a vision tower, what the
    painter reads after their features."""
    instruction: str = EpisodesConfig.model_fields["instruction"].default
    """What a vision-language model reads before the words."""
    route: Literal["aligned", "text"] = "aligned"
    """What is drawn: the aligned features, or the model's text, through the encoder of the language model."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.words and len(self.words) != len(self.images) + 1:
            raise ValueError(
                f"words: {len(self.words)} words for {len(self.images)} pictures; give one for each, and one to ask for"
            )
        if self.words and self.prompt:
            raise ValueError("prompt: does not go with words; give one of them")
        if not (self.images or self.prompt):
            raise ValueError("give images, a prompt, or both")
        return self


class ThinkEvaluateConfig(ThinkModelsConfig):
    """``covray think evaluate``: reasoning episodes, answered by aligners and by what they are compared with."""

    out: str
    """Folder to write."""
    aligners: tuple[str, ...] = ()
    """Finished runs of ``covray think train`` or folders of aligners, each ``RUN`` or ``NAME=RUN``."""
    rows: tuple[Literal["truth", "caption", "text", "bridge", "untrained", "copy"], ...] = (
        "truth", "caption", "text", "bridge", "untrained", "copy",
    )  # fmt: skip
    """Further rows of the table: the answer's own picture; its caption, drawn; the model's text, read by its words
    without a picture; that text, drawn; an aligner before any training; the last picture that was shown."""
    episodes: EpisodesConfig = EpisodesConfig()
    cobsat: str | None = None
    """Copy of CoBSAT's repository with its data set; null: rendered portraits."""
    tasks: tuple[str, ...] | None = None
    """Tasks to use, such as ``Colour-I``; null: all ten."""
    features: str | None = None
    """Features of the same episodes, the ``--out`` of a ``covray think features --of episodes``: their texts and states
    are read, and the vision-language model is not loaded. Null: it writes them here."""
    judge: JudgeConfig = JudgeConfig()
    actors: ActorsConfig = ActorsConfig()
    rows_per_block: int | None = Field(default=None, ge=1, le=100_000)
    """Episodes that an actor takes at a time; a kill loses at most the blocks at work. By default several blocks for
    every actor, of at most 64."""
    tracking: TrackingConfig = TrackingConfig()
    seed: int = Field(default=0, ge=0)
    """Of the rendered pictures and of the intervals."""

    @field_validator("aligners", "rows", "tasks")
    @classmethod
    def _distinct(cls, value: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        return None if value is None else tuple(dict.fromkeys(value))

    @model_validator(mode="after")
    def _named(self) -> Self:
        names = [named_run(entry)[0] for entry in self.aligners]
        for name in names:
            if names.count(name) > 1 or name in ThinkEvaluateConfig.model_fields["rows"].default:
                raise ValueError(f"aligners: {name} names two rows of the table; give NAME=RUN")
        if not (self.rows or names):
            raise ValueError("give aligners, rows, or both")
        # An untrained aligner has the sizes of the first one that is named: without any there is none.
        if "untrained" in self.rows and not names:
            return self.model_copy(update={"rows": tuple(row for row in self.rows if row != "untrained")})
        return self

    def identity(self) -> JsonObject:
        """What decides the scores; a resume must agree in all of it."""
        left_out: LeftOut = {
            **dict.fromkeys(("out", "actors", "rows_per_block", "tracking"), True),
            # Of what lies there, the evaluation keeps the fingerprints.
            **dict.fromkeys(("vlm", "language_model", "cobsat", "aligners", "features"), True),
            "painter": {"path", "revision"},
            "judge": {"path", "revision"},
            "engine": {"device", "compile"},
        }
        identity = self.model_dump(mode="json", exclude=left_out)
        identity["aligners"] = [named_run(entry)[0] for entry in self.aligners]
        return identity
