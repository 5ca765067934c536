"""What a generator is, decided and checked before any model is loaded: by the caller, else by the run, else nano."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from covray.chains.build import require_reader
from covray.chains.dataset import ChainDataset
from covray.config import (
    BackboneConfig,
    BuildConfig,
    GeneratorConfig,
    PriorConfig,
    SamplingConfig,
    TokenizerConfig,
    TrainConfig,
)
from covray.errors import ConfigError, DatasetError, WeightsError, one_line
from covray.generation.models import ModelSource
from covray.generation.request import Request
from covray.methods import NO_FRAMES
from covray.models.lvm.adapter import read_run, read_run_adapter
from covray.models.lvm.backbone import backbone_facts
from covray.models.lvm.decoding.base import require_context
from covray.tasks import TASKS
from covray.tasks.base import Meta


@dataclass(frozen=True)
class ResolvedGenerator:
    """A generator's configuration with all that its run decides; made and checked before any model is loaded."""

    config: GeneratorConfig
    """Without nulls."""
    source: ModelSource
    task: str | None
    """The task that the run was trained on, if it was one."""
    codebook: str | None
    """Fingerprint of the codebook that the model was trained on, if it is known."""
    tokens_per_image: int | None
    """If it is known before the tokenizer is loaded."""
    classes: Meta | None = None
    """The classes of segmentation that the run was trained on, as a manifest's ``meta`` has them."""

    @property
    def length(self) -> int:
        """Pictures of a chain, both ends counted."""
        if self.config.method == "none":
            return 2
        return self.config.length or 2

    def build_config(self) -> BuildConfig:
        """Return how the chains of examples are made."""
        config = self.config
        # Chains without frames are the two pictures as they are: then the prior is not loaded.
        methods: tuple[str | None, ...] = ()
        spacing: Any = "even"
        if config.method not in (None, NO_FRAMES) and self.length > 2:
            methods, spacing = (config.method,), config.spacing
        return BuildConfig.model_validate(
            {
                "pairs": "", "out": "", "lengths": (self.length,), "methods": methods,
                "prior": config.prior, "tokenizer": config.tokenizer, "fit": config.fit, "engine": config.engine,
                "spacing": spacing, "check_endpoints": 0.0,
            }
        )  # fmt: skip

    def task_of(self, request: Request) -> str | None:
        """Return the task of the request's answers, if it is known."""
        return request.task or self.task

    def sampling_for(self, request: Request) -> SamplingConfig:
        """Return how tokens are chosen for the task. Raises ConfigError where that needs a task, and none is known."""
        task = self.task_of(request)
        if task is None and request.sampling.expected is not None:
            raise ConfigError("sampling.expected: is for tasks with continuous labels; say which task it is")
        return request.sampling.for_labels(continuous=task is not None and TASKS[task].continuous)

    @property
    def most_examples(self) -> int | None:
        """Example pairs that fit the model's context beside a query; None where a picture's tokens are not known."""
        size = self.source.facts.tokens_per_image or self.tokens_per_image
        if size is None:
            return None
        chains = self.source.facts.llama.max_position_embeddings // (self.length * size)
        return max(0, int(chains) - 1)

    def require_context(self, examples: int, tokens_per_image: int | None = None) -> None:
        """Raise ConfigError where so many ``examples``, a query and its answer exceed the model's context.

        Also where frames of examples cannot be made, because the prior of the run reads more than pictures.

        Args:
            examples: Example pairs before the query.
            tokens_per_image: Of the tokenizer, once it is loaded; without it nothing may be known, and refused.
        """
        if examples:
            require_reader(self.build_config(), present=False)
        size = tokens_per_image or self.source.facts.tokens_per_image or self.tokens_per_image
        if size is not None:
            sentence = (examples + 1) * self.length * size
            require_context(sentence, size, self.source.facts.llama.max_position_embeddings)


def resolve_generator(config: GeneratorConfig) -> ResolvedGenerator:
    """Fill in what the run decides, and check what can be checked without loading a model.

    Raises:
        ConfigError: The run cannot be used, or leaves open what ``config`` must say.
        WeightsError: The backbone or the adapter cannot be used, or the adapter is of another backbone.
    """
    run: _Trained | None = None
    if config.adapter is not None:
        run = _read_trained(config.adapter)
    if run is None:
        # Without a run, the defaults are those of the nano models.
        defaults = {
            "backbone": BackboneConfig(), "length": 4, "method": "diffusion", "prior": PriorConfig(),
            "tokenizer": TokenizerConfig(), "fit": "stretch", "spacing": "even",
        }  # fmt: skip
        tokens_per_image = None
    else:
        defaults, tokens_per_image = _run_defaults(config, run)
    # What the caller gave stands: the run decides only what was left open.
    missing = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    config = config.model_copy(update=missing)
    _require_length(config)
    assert config.backbone is not None
    facts = backbone_facts(config.backbone)
    if run is None or config.adapter is None:
        plain = ModelSource(facts, config.backbone, None, config.seed)
        return ResolvedGenerator(config, plain, None, facts.codebook, tokens_per_image)
    if facts.fingerprint != run.backbone:
        raise WeightsError(
            f"{config.adapter}: adapts backbone {run.backbone[:12]}, {config.backbone.path or config.backbone.scale} "
            f"is {facts.fingerprint[:12]}; give --backbone the folder or revision it was trained on"
        )
    adapted = ModelSource(facts, config.backbone, read_run_adapter(config.adapter), config.seed)
    # A backbone that does not record its codebook learned the one of the run's data.
    codebook = facts.codebook or run.codebook
    return ResolvedGenerator(config, adapted, run.task, codebook, tokens_per_image, run.classes)


def _require_length(config: GeneratorConfig) -> None:
    """Refuse chains of another length than the alphas of their frames are for. Raises ConfigError."""
    if config.method == "none" or not isinstance(config.spacing, tuple) or config.length == 2:
        return
    if config.length != len(config.spacing) + 2:
        raise ConfigError(
            f"--length: chains of {config.length} pictures do not have {len(config.spacing)} frames, of which spacing "
            f"gives the alphas; give {len(config.spacing) + 2}, or another spacing"
        )


@dataclass(frozen=True)
class _Trained:
    """What a run says of itself."""

    config: TrainConfig
    backbone: str
    """Fingerprint of its backbone."""
    codebook: str
    """Fingerprint of the codebook of its data."""
    classes: Meta | None
    """The classes of its data's segmentation."""

    @property
    def task(self) -> str | None:
        """The task that the run was trained on, if it was one."""
        tasks = self.config.sentences.tasks
        if tasks is None or len(tasks) != 1:
            return None
        return tasks[0]


def _read_trained(adapter: str) -> _Trained:
    run = read_run(adapter)
    try:
        config = TrainConfig.model_validate(run.config)
        return _Trained(config, str(run.fingerprints["backbone"]), str(run.fingerprints["codebook"]), run.classes)
    except (KeyError, ValidationError) as error:
        raise ConfigError(f"{adapter}/_run.json: does not describe a run; give the --out of a covray train") from error


def _run_defaults(config: GeneratorConfig, run: _Trained) -> tuple[dict[str, Any], int | None]:
    """Return what the run decides where ``config`` says nothing, and its tokens per image if they are known."""
    chosen = run.config.sentences
    defaults = {"backbone": run.config.backbone, "method": chosen.method}
    if config.length is None and (config.method or chosen.method) != "none":
        if len(chosen.lengths) > 1:
            lengths = " and ".join(map(str, chosen.lengths))
            raise ConfigError(f"--length: {config.adapter} was trained on chains of {lengths} pictures; say which")
        defaults["length"] = chosen.lengths[0]
    # Nothing is left for the dataset to say, which may not be there any more.
    if None not in (config.tokenizer, config.prior, config.fit, config.spacing):
        return defaults, None
    tokens_per_image = None
    try:
        dataset = ChainDataset(run.config.data)
        tokens_per_image = dataset.tokens_per_image
        built = BuildConfig.model_validate({"pairs": "", "out": ""} | _build_settings(dataset))
    except (DatasetError, ValidationError) as error:
        if config.tokenizer is None:
            raise ConfigError(
                f"--tokenizer: {config.adapter} was trained on {run.config.data}, which does not say by which "
                f"tokenizer ({one_line(error)}); give it, and --prior"
            ) from error
        built = BuildConfig(pairs="", out="")
    chains = {"prior": built.prior, "tokenizer": built.tokenizer, "fit": built.fit, "spacing": built.spacing}
    return defaults | chains, tokens_per_image


def _build_settings(dataset: ChainDataset) -> dict[str, Any]:
    keys = ("prior", "tokenizer", "fit", "spacing", "lengths")
    return {key: dataset.config[key] for key in keys if key in dataset.config}
