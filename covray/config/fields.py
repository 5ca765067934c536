"""The kinds of values and the sections that several steps share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from covray.config.section import GrownSection, Section
from covray.errors import ConfigError


def _known_task(name: str) -> str:
    """Return ``name`` if a task has it. Raises ValueError."""
    from covray.tasks import TASKS  # here: the tasks import SciPy, which the commands' help does not wait for

    if name not in TASKS:
        raise ValueError(f"no such task; the tasks are {', '.join(TASKS)}")
    return name


TaskName = Annotated[str, AfterValidator(_known_task)]
"""A task of ``covray.tasks``, built in or installed."""


def _known_metric(name: str) -> str:
    """Return ``name`` if an installed package adds this metric to a task. Raises ValueError."""
    from covray.tasks.metrics import require_added

    return require_added(name)


AddedMetric = Annotated[str, AfterValidator(_known_metric)]
"""A metric, ``task/name``, that another package adds to a task."""


def _known_frame_method(name: str) -> str:
    """Return ``name`` if frames can be made so. Raises ValueError."""
    from covray.methods import frame_makers

    try:
        frame_makers().find(name)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return name


def _known_method(name: str) -> str:
    """Return ``name`` if it is a method of chains. Raises ValueError."""
    from covray.methods import NO_FRAMES, frame_makers

    known = [NO_FRAMES, *frame_makers().names]
    if name not in known:
        raise ValueError(f"no such method; the methods are {', '.join(known)}")
    return name


def _ascending(spacing: Any) -> Any:
    """Return ``spacing`` if it is none of alphas, or of some that ascend. Raises ValueError."""
    if isinstance(spacing, tuple) and (not spacing or list(spacing) != sorted(set(spacing))):
        raise ValueError("give even, path, or alphas that ascend")
    return spacing


FrameMethod = Annotated[str, AfterValidator(_known_frame_method)]
"""A method of ``covray.methods`` that makes frames, covray's own or installed; ``copy`` and ``coarse`` are controls."""
ChainMethod = Annotated[str, AfterValidator(_known_method)]
"""How a chain's frames are made; ``none`` leaves them out."""
Length = Annotated[int, Field(ge=2, le=64)]
"""Pictures of a chain, both ends counted."""
Alpha = Annotated[float, Field(gt=0.0, lt=1.0)]
"""Where a frame stands between image (0) and label (1)."""
Spacing = Annotated[Literal["even", "path"] | tuple[Alpha, ...], AfterValidator(_ascending)]
"""At which alphas the frames of a chain are made."""
ExamplePairs = Annotated[int, Field(ge=0, le=63)]
"""Example pairs before a query."""
Scale = Literal["nano", "300m", "600m", "1b", "3b", "7b", "custom"]
"""A size of the LVM family."""
Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""A projection of a LLaMA layer."""


DPM_STEPS = 12
"""Default of ``prior.steps`` with ``prior.solver: dpm``: the fewest that make a whole build three times as fast and
return pictures better than DDIM of 50 steps (docs/solvers.md)."""


class PriorConfig(GrownSection):
    """The pretrained diffusion model that interpolates."""

    path: str = "nano"
    """``nano`` (ships with the package), a diffusers folder, or a hub id."""
    revision: str | None = None
    """Commit, tag or branch of a hub id; pin a commit for anything that is to be repeated."""
    size_px: int | None = Field(default=None, ge=16, le=2048, multiple_of=8)
    """Side of the square pictures it works on, in pixels; by default the size the UNet was trained at."""
    solver: Literal["ddim", "dpm"] = "ddim"
    """How an inversion and a denoising go: ``ddim`` is the paper's; ``dpm``, multistep DPM-Solver++, is more accurate
    with a quarter of the evaluations, and makes other frames."""
    steps: int = Field(default=50, ge=2, le=1000)
    """DDIM steps of an inversion, and of a denoising (the paper: 50). Must divide the model's training steps. With
    ``dpm``, 12 by default, and any number from 8 to 20 is sensible."""
    evaluations: int | None = Field(default=None, ge=2, le=1000)
    """With ``ddim``, the steps at which the UNet is evaluated; at the others its answer is extrapolated. By default
    all; 16 of 50 give nearly the paper's frames in a third of the time."""
    context: Literal["empty", "caption", "aligned"] = "empty"
    """What the prior reads beside a picture: ``empty``, the empty prompt; ``caption``, the manifest's caption of the
    pair's image; or ``aligned``, what a ThinkDiff aligner makes of that image. The last two are an ablation and against
    the paper, whose chains are task-free, made without any text. A pair's ends and frames have one context."""
    text_encoder: str | None = None
    """With ``context: caption``, the T5 whose encoder the prior was trained on: a folder or a hub id. By default the
    CLIP text encoder in the prior's own folder."""
    aligner: str | None = None
    """With ``context: aligned``, a finished run of ``covray think train``, or the folder of an aligner."""
    instruction: str = "Describe the picture."
    """With ``context: aligned``, what the aligner's vision-language model is asked of an image."""

    @model_validator(mode="before")
    @classmethod
    def _steps_of_solver(cls, values: Any) -> Any:
        """Give ``dpm`` its own default of steps."""
        # Before validation: after it a default looks like a value that was given.
        if isinstance(values, dict) and values.get("solver") == "dpm":
            return {"steps": DPM_STEPS} | values
        return values

    @model_validator(mode="after")
    def _evaluations_fit(self) -> PriorConfig:
        if self.evaluations is not None and self.solver != "ddim":
            raise ValueError(f"evaluations: {self.solver} evaluates the UNet once a step; set steps instead")
        if self.evaluations is not None and self.evaluations > self.steps:
            raise ValueError(f"evaluations: {self.evaluations} is more than steps, {self.steps}; set fewer")
        return self

    @model_validator(mode="after")
    def _context_fits(self) -> PriorConfig:
        if self.text_encoder is not None and self.context != "caption":
            raise ValueError("text_encoder: reads captions; set context: caption too, or leave it out")
        if (self.aligner is not None) != (self.context == "aligned"):
            raise ValueError("aligner: goes with context: aligned; give both or neither")
        return self

    def unused_fields(self) -> Iterator[str]:
        """Yield the younger fields that are as in plain DDIM, with one evaluation a step and the empty prompt."""
        if self.solver == "ddim":
            yield "solver"
        # As many as there are steps means all of them, which is what null means.
        if self.evaluations in (None, self.steps):
            yield "evaluations"
        if self.context == "empty":
            yield "context"
        if self.text_encoder is None:
            yield "text_encoder"
        if self.context != "aligned":
            yield from ("aligner", "instruction")

    @property
    def evaluations_each_way(self) -> int:
        """UNet evaluations of one inversion, or of one denoising."""
        return self.evaluations or self.steps


class TokenizerConfig(Section):
    """The VQGAN that writes frames as tokens."""

    path: str = "nano"
    """``nano`` or ``nano-2`` (ship with the package; 64 and 256 tokens a picture), a ``diffusers.VQModel`` folder, or a
    hub id."""
    revision: str | None = None
    """Commit, tag or branch of a hub id; pin a commit for anything that is to be repeated."""
    size_px: int | None = Field(default=None, ge=16, le=2048, multiple_of=8)
    """Side of the square pictures it reads, in pixels; by default the model's ``sample_size``."""


class BackboneConfig(Section):
    """The pretrained vision model that LoRA adapts; its weights stay frozen."""

    scale: Scale = "nano"
    """Size of the LVM family; ``custom`` takes the sizes of the folder at ``path``."""
    path: str | None = None
    """``nano`` or ``nano-2`` (ship with the package, each for the tokenizer of its name), a ``LlamaForCausalLM``
    folder, or a hub id; by default nano, if the scale is nano."""
    revision: str | None = None
    """Commit, tag or branch of a hub id; pin a commit for anything that is to be repeated."""
    init: Literal["pretrained", "random"] = "pretrained"
    """``random`` starts from random weights of the scale's architecture, or of the one in the folder at ``path``: for
    measuring speed, not for pictures."""


class EngineConfig(Section):
    """How the arithmetic runs. Tokens are bit-identical only between builds with the same values here."""

    batch: int | None = Field(default=None, ge=1, le=4096)
    """Rows of the UNet's fixed, padded batch. By default a probe chooses, and the build records the choice."""
    image_batch: int = Field(default=16, ge=1, le=1024)
    """Rows of the fixed, padded batch of the VAE and of the tokenizer."""
    threads: int = Field(default=1, ge=1, le=256)
    """CPU threads of one actor. Results are bit-identical only with one thread: with more, a picture's position in the
    batch can change its last bits. Use more actors instead."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """``auto`` takes an NVIDIA or AMD GPU if there is one. ``mps`` is a Mac's GPU: it has not been run."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the networks; latents stay float32. ``auto``: bfloat16 on a GPU, float32 on a CPU."""
    compile: bool = False
    """Compile the UNet by ``torch.compile``: this takes minutes at the start, and pays for thousands of pairs on a
    GPU."""


MOST_ROWS_PER_BLOCK = 64
"""Rows of the blocks of a large build or evaluation, where the configuration leaves them open."""


class ActorsConfig(Section):
    """The pool of actors that computes. Results do not depend on it."""

    min: int = Field(default=1, ge=1)
    """Actors that are always kept."""
    max: int | None = Field(default=None, ge=1)
    """Actors at most; by default one per GPU, or on CPUs one per ``engine.threads`` cores."""
    gpus: float | None = Field(default=None, ge=0)
    """GPUs of one actor, whole or a fraction; by default 1 where the cluster has GPUs, else 0."""
    cpus: float | None = Field(default=None, gt=0)
    """Logical CPUs that one actor reserves; by default a share that leaves room for reading and writing."""
    node_type: str | None = None
    """Use only nodes that have this custom resource; each node type of ``cluster/gpu.yaml`` has one of its own name."""

    @model_validator(mode="after")
    def _ordered(self) -> ActorsConfig:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max ({self.max}) is smaller than min ({self.min})")
        return self


_YOUNGER_SAMPLING = {
    "keep": 1.0, "vote": 1, "decoder": None, "window": "auto", "relax": 0.0, "block": None, "passes": None,
    "unmask": "even", "threshold": None, "expected": None,
}  # fmt: skip
"""Fields of sampling that the first version did not have, and their defaults."""


class PictureSamplingConfig(Section):
    """What differs in the choice of the tokens of frames, or of the answer."""

    temperature: float | None = Field(default=None, ge=0.0, le=100.0)
    """0: always the likeliest token. Null: ``sampling.temperature``."""
    top_k: int | None = Field(default=None, ge=1)
    """Sample only from this many likeliest tokens. Null: ``sampling.top_k``."""
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    """Sample only from the likeliest tokens that together reach this probability. Null: ``sampling.top_p``."""

    def changes(self) -> dict[str, Any]:
        """Return the values that are set, by name."""
        return self.model_dump(exclude_none=True)


class SamplingConfig(GrownSection):
    """How the model's next token is chosen."""

    temperature: float = Field(default=0.0, ge=0.0, le=100.0)
    """0: always the likeliest token (greedy). 1: the model's own distribution, as LVM samples."""
    top_k: int | None = Field(default=None, ge=1)
    """Sample only from this many likeliest tokens."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Sample only from the likeliest tokens that together reach this probability."""
    expected: float | None = Field(default=None, gt=0.0, le=100.0)
    """For tasks with continuous labels (depth, normals, colorization, low light), in place of the likeliest token: the
    code nearest to the mean of all codes' vectors, each by its probability at this temperature. It has the least
    expected error. Null: never; as in LVM and the paper."""
    frames: PictureSamplingConfig = PictureSamplingConfig()
    """What differs for the tokens of frames; null: as above."""
    answer: PictureSamplingConfig = PictureSamplingConfig()
    """What differs for the tokens of the answer; null: as above."""
    best_of: int = Field(default=1, ge=1, le=1024)
    """Candidates per query; the one that ``choose_by`` ranks first is the answer."""
    choose_by: Literal["answer", "chain", "verifier"] = "answer"
    """What a candidate is ranked by: the likelihood of its answer given its own frames, that of frames and answer
    together, or the verifier of a run that was trained with ``objective: verifier``."""
    keep: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the candidates of ``best_of`` that go on after each picture, at least one: the likeliest so far, or with
    ``choose_by: verifier`` those that it ranks first. Answers of the others are not written at all. 1: all."""
    vote: int = Field(default=1, ge=1, le=1024)
    """Candidates per query whose answers are joined into one: the most frequent class, the median of keypoints and
    metres, the mean of directions, edges and pictures. 1, no vote, is the way of LVM and of the paper."""
    decoder: Literal["sequential", "jacobi", "speculative", "block_diffusion"] | None = None
    """How tokens are computed: one a pass (``sequential``), several a pass, exactly the same tokens in float32
    (``jacobi``; ``speculative`` with the drafts of a run that was trained with ``objective: draft``), or whole blocks
    in a few passes, which are other tokens (``block_diffusion``). Null: blocks for a run that was trained with
    ``objective: block_diffusion``, else ``sequential``."""
    window: Literal["auto"] | Annotated[int, Field(ge=2, le=1024)] = "auto"
    """Tokens that ``jacobi`` and ``speculative`` read a pass. ``auto``: ``jacobi`` times a few passes and takes the
    fastest; where that is the sequential decoder, it is used. ``speculative`` takes one more than drafts were
    trained."""
    relax: float = Field(default=0.0, ge=0.0, le=1.0)
    """Probability that a draft of ``jacobi`` may take over from codes that look like it (LANTERN): fewer passes, other
    tokens. 0: the tokens of ``sequential``."""
    block: int | None = Field(default=None, ge=1, le=8192)
    """Tokens of a block of ``block_diffusion``, a divisor of a picture's. Null: as the run was trained."""
    passes: int | None = Field(default=None, ge=1, le=8192)
    """Passes in which ``block_diffusion`` writes a block: fewer are faster and worse. Null: one for each token."""
    unmask: Literal["even", "cosine", "confidence", "entropy"] = "even"
    """What a pass of ``block_diffusion`` writes: equally many tokens (``even``), few at first (``cosine``), at least as
    many as ``even`` and all above a probability (``confidence``), or as many as a bound on entropy allows
    (``entropy``; ``passes`` is not used)."""
    threshold: float | None = Field(default=None, ge=0, le=1000)
    """Probability of ``confidence`` (null: 0.85), or nats of ``entropy`` (null: 1)."""

    @model_validator(mode="after")
    def _candidates_differ(self) -> SamplingConfig:
        if self.best_of > 1 and self.is_greedy:
            raise ValueError("best_of: greedy candidates are all the same; set a temperature")
        if self.expected is not None and not self.is_greedy:
            raise ValueError("expected: stands for the likeliest token, and none is sampled; set the temperature to 0")
        if self.best_of > 1 and self.vote > 1:
            raise ValueError("vote: joins all candidates, best_of takes the likeliest; set one of them to 1")
        if self.keep < 1 and self.best_of == 1:
            raise ValueError("keep: is a share of the candidates of best_of; set best_of too")
        if self.choose_by == "verifier" and self.best_of == 1:
            raise ValueError("choose_by: verifier ranks the candidates of best_of; set best_of too")
        if self.relax and (self.decoder != "jacobi" or self.window == "auto"):
            raise ValueError(
                "relax: is of decoder: jacobi with a window that is set, as its tokens depend on the window"
            )
        return self

    def unused_fields(self) -> Iterator[str]:
        """Yield the younger fields that are not set."""
        for name, default in _YOUNGER_SAMPLING.items():
            if getattr(self, name) == default:
                yield name
        if not self.frames.changes():
            yield "frames"
        if not self.answer.changes():
            yield "answer"

    @property
    def for_frames(self) -> SamplingConfig:
        """Return how the tokens of frames are chosen."""
        return self._for(self.frames)

    @property
    def for_answer(self) -> SamplingConfig:
        """Return how the tokens of the answer are chosen."""
        return self._for(self.answer)

    def _for(self, pictures: PictureSamplingConfig) -> SamplingConfig:
        # Cleared, so that asking again changes nothing: pictures written one by one do ask again.
        same = {"frames": PictureSamplingConfig(), "answer": PictureSamplingConfig()}
        return self.model_copy(update={**same, **pictures.changes()})

    def for_labels(self, *, continuous: bool) -> SamplingConfig:
        """Return how the tokens of a task's chains are chosen, by whether its labels are continuous."""
        return self if continuous or self.expected is None else self.model_copy(update={"expected": None})

    @property
    def is_greedy(self) -> bool:
        """Whether no token is sampled."""
        return self.for_frames.temperature == 0 and self.for_answer.temperature == 0

    @property
    def candidates(self) -> int:
        """How many candidates the decoder writes for a query."""
        return max(self.best_of, self.vote)


class TrackingConfig(Section):
    """What is logged, and where."""

    to: tuple[str, ...] | None = None
    """Trackers: ``mlflow``, ``tensorboard``, ``wandb``, ``trackio``, or those of installed packages. Null: MLflow, and
    for a build none, unless ``uri`` is given."""
    uri: str | None = None
    """MLflow server or ``sqlite:///`` file; by default ``mlflow.db`` beside the folder that is written. ``none``: no
    MLflow."""
    experiment: str = "covray"
    """MLflow experiment; project of Weights & Biases and of Trackio."""
    log_every_steps: int = Field(default=1, ge=1)
    """Steps between two logged values."""
    parent_run_id: str | None = None
    """MLflow run that this one is a child of; a sweep sets it. A parent has one child of each name."""
