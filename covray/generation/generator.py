"""A generator: models that are loaded once and answer many requests. Knows no ray, and reads and writes no pictures.

examples --prior--> frames --tokenizer--> prompt; query --tokenizer--> tokens
prompt, query --LVM--> frames, answer --tokenizer--> pictures --task--> data
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import ValidationError

from covray.chains.build import BlockBuilder, require_reader
from covray.chains.dataset import ChainDataset
from covray.chains.prepare import prepare_block
from covray.config import (
    BackboneConfig,
    BuildConfig,
    GeneratorConfig,
    PriorConfig,
    SamplingConfig,
    TokenizerConfig,
    TrainConfig,
)
from covray.errors import ConfigError, DatasetError, PairError, WeightsError, one_line
from covray.generation.models import LoadedModel, ModelSource, SharedModels
from covray.generation.request import Answer, Example, ReadAnswer, Request, WrittenPicture
from covray.generation.votes import PLAIN_TASK, draw_spread, join_answers
from covray.io import images
from covray.io.images import resize, square
from covray.io.pixels import Picture
from covray.methods import NO_FRAMES
from covray.models.lvm.adapter import read_run, read_run_adapter
from covray.models.lvm.backbone import backbone_facts
from covray.models.lvm.decoding.base import Decoded, require_context
from covray.models.tokenizer.vqgan import require_same_codebook
from covray.pairs.classes import draw_mask
from covray.pairs.manifest import MANIFEST_SCHEMA, Pair
from covray.seeds import seed_of
from covray.tasks import TASKS, segmentation
from covray.tasks.base import Meta, Resample

_PROMPTS = 8
"""Prompts whose tokens a generator keeps: the chains of their examples need not be made again."""


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
        if config.method not in (None, NO_FRAMES) and self.length > 2:
            methods = (config.method,)
        return BuildConfig.model_validate(
            {
                "pairs": "", "out": "", "lengths": (self.length,), "methods": methods,
                "prior": config.prior, "tokenizer": config.tokenizer, "fit": config.fit, "engine": config.engine,
                "spacing": config.spacing, "check_endpoints": 0.0,
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


class Generator:
    """Answers queries after examples; see ``load``, ``answer`` and ``stream``.

    The answer to a query follows from the configuration, the seed, the examples and the query's own tokens, not from
    the other queries of a request nor from earlier requests.
    """

    def __init__(self, resolved: ResolvedGenerator, shared: SharedModels | None = None):
        """Load tokenizer and model; the prior is loaded by the first request that needs it. See ``load``."""
        config = resolved.config
        assert config.tokenizer is not None
        torch.set_num_threads(config.engine.threads)
        self.resolved = resolved
        self._shared = shared or SharedModels()
        self.tokenizer = self._shared.tokenizer(config.tokenizer, config.engine)
        if resolved.codebook is not None:
            require_same_codebook(resolved.codebook, self.tokenizer.codebook_fingerprint, "--tokenizer")
        codes = resolved.source.facts.codes
        if self.tokenizer.codes > codes:
            raise DatasetError(
                f"--tokenizer: has {self.tokenizer.codes} codes, the backbone knows {codes}; give the backbone's "
                "tokenizer"
            )
        self.model = LoadedModel.load(resolved.source, config.engine, self.tokenizer, config.batch, shared)
        self._builder: BlockBuilder | None = None
        self._prompt_of = functools.lru_cache(maxsize=_PROMPTS)(self._make_prompt)

    @classmethod
    def load(cls, config: GeneratorConfig, shared: SharedModels | None = None) -> Generator:
        """Load the models of ``config``.

        Args:
            config: The models.
            shared: Models that other generators of this thread have loaded, and that they share with this one. Adapters
                of one backbone then hold its weights once.

        Raises:
            CovrayError: A run, backbone or tokenizer that cannot be used, or that do not belong together; where it can
                be, before any model is loaded.
        """
        return cls(resolve_generator(config), shared)

    def answer(self, request: Request) -> list[Answer]:
        """Answer all queries of ``request``, in their order.

        Raises:
            ConfigError: The sentence exceeds the model's context, or an example cannot be used.
        """
        prompt, squares, tokens, seeds = self._read(request)
        sampling, images = self.resolved.sampling_for(request), self.resolved.length - 1
        decoded = self.model.decoder.decode(prompt, tokens, images, sampling, seeds)
        return [
            self._answer(request, number, square_query, seeds[number], decoded)
            for number, square_query in enumerate(squares)
        ]

    def _answer(self, request: Request, number: int, query: Picture, seed: int, decoded: Decoded) -> Answer:
        """Return the answer to one query.

        Args:
            request: All queries.
            number: That of the query.
            query: The query as the model saw it.
            seed: Of the query's random numbers.
            decoded: What was written for all queries.
        """
        best = int(decoded.candidate[number])
        candidates = decoded.candidate_ids[number]  # [N, images, tokens per image]
        *frames, likeliest = self.tokenizer.decode(candidates[best])
        small, spread = likeliest, None
        if request.sampling.vote > 1:
            answers = list(self.tokenizer.decode(candidates[:, -1]))
            small = join_answers(self.resolved.task_of(request), answers, answer_meta(request, self.resolved.classes))
            spread = self._resized(request, number, draw_spread(answers), "bicubic")
        read = self.read_answer(request, number, small)
        return Answer(
            query=query,
            frames=np.array(frames, np.uint8).reshape(-1, *small.shape),
            small=small,
            picture=read.picture,
            spread=spread,
            data=read.data,
            seed=seed,
            samples=len(candidates),
            candidate=best,
            log_likelihood=tuple(decoded.image_log_likelihood[number].tolist()),
            candidate_tokens=candidates[:, -1],
            candidate_log_likelihood=decoded.candidate_log_likelihood[number].sum(-1),
        )

    def stream(self, request: Request) -> Iterator[WrittenPicture]:
        """Write the pictures of ``answer``, and yield each as soon as it is finished; those of one query in order.

        Where a query has several candidates, its pictures are known only when all of them are written.
        """
        count = self.resolved.length - 1
        if request.sampling.candidates > 1:
            for query, answer in enumerate(self.answer(request)):
                for number, picture in enumerate([*answer.frames, answer.small]):
                    yield WrittenPicture(query, number, number == count - 1, picture)
            return
        prompt, _, tokens, seeds = self._read(request)
        for each in self.model.decoder.stream(prompt, tokens, count, self.resolved.sampling_for(request), seeds):
            picture = self.tokenizer.decode(each.ids[None])[0]
            yield WrittenPicture(each.query, each.image, each.image == count - 1, picture)

    def checked(self, check: Callable[[], None]) -> AbstractContextManager[None]:
        """Call ``check`` before each pass of the model within the block; what it raises ends the writing."""
        return self.model.decoder.checked(check)

    def read_answer(self, request: Request, number: int, small: Picture) -> ReadAnswer:
        """Return an answer at its query's size, and as the task reads it.

        Args:
            request: All queries.
            number: That of the query.
            small: The answer at the tokenizer's size, as ``stream`` yields it.
        """
        task = self.resolved.task_of(request)
        picture = self._resized(request, number, small, TASKS[task or PLAIN_TASK].resample)
        if task is None:
            return ReadAnswer(picture, {})
        return ReadAnswer(picture, TASKS[task].export(picture, answer_meta(request, self.resolved.classes)))

    def as_seen(self, query: Picture) -> Picture:
        """Return ``query`` as the model sees it, square, [s, s, 3]."""
        return square(query, self.tokenizer.size_px, self.resolved.config.fit or "stretch")

    def prompt_tokens(self, request: Request) -> int:
        """Return how many tokens stand before a query of ``request``."""
        return len(self._prompt(request))

    def fingerprints(self) -> dict[str, str]:
        """Return the SHA-256 (hex) of the models loaded; of the prior it is empty where no request needed it."""
        prior = ""
        if self._builder is not None:
            prior = self._builder.models().fingerprints["prior"]
        return {
            "prior": prior,
            "tokenizer": self.tokenizer.fingerprint,
            "codebook": self.tokenizer.codebook_fingerprint,
            "backbone": self.resolved.source.facts.fingerprint,
        }

    def _read(self, request: Request) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
        """Return the prompt [P], the queries' squares [B, s, s, 3], their tokens [B, T] and their seeds."""
        self.resolved.require_context(len(request.examples), self.tokenizer.tokens_per_image)
        prompt = self._prompt(request)
        squares = np.stack([self.as_seen(query) for query in request.queries])
        tokens = self.tokenizer.encode(squares)
        seeds = []
        for row in tokens:
            # Of the query's own tokens, so that it gets the same answer alone and among others.
            digest = hashlib.sha256(row.astype("<u2").tobytes()).hexdigest()
            seeds.append(seed_of(request.seed, digest))
        return prompt, squares, tokens, seeds

    def _resized(self, request: Request, number: int, small: Picture, resample: Resample) -> Picture:
        """Return ``small`` at the size of a query, or of its centre square.

        Args:
            request: All queries.
            number: That of the query.
            small: A picture at the tokenizer's size.
            resample: How it is resized.
        """
        height_px, width_px = request.queries[number].shape[:2]
        if self.resolved.config.fit == "crop":
            height_px = width_px = min(height_px, width_px)
        return resize(small, height_px, width_px, resample)

    # --- the prompt --------------------------------------------------------------------------------------------------

    def _prompt(self, request: Request) -> np.ndarray:
        return self._prompt_of(request.examples, self.resolved.task_of(request) or PLAIN_TASK)

    def _make_prompt(self, examples: tuple[Example, ...], task: str) -> np.ndarray:
        """Return the chains of ``examples`` one after another, uint16 [P], as ``covray build`` makes them."""
        if not examples:
            return np.empty(0, np.uint16)
        builder = self._builder = self._builder or self._shared.builder(self.resolved.build_config(), self.tokenizer)
        rows = []
        for example in examples:
            label = self._drawn_label(example, task)
            pair = Pair(task, "", images.Picture(bytes=example.image), images.Picture(bytes=label))
            ends = {"image": {"bytes": example.image}, "label": {"bytes": label}}
            rows.append({"pair_id": pair.pair_id, "task": task, "split": "", "meta": "{}"} | ends)
        table = pa.Table.from_pylist(rows, MANIFEST_SCHEMA)
        built, _ = builder.build(prepare_block(table, builder.config, builder.models(), None))
        chains = []
        for row, example in zip(built.to_pylist(), examples, strict=True):
            if row["error"] is not None:
                raise ConfigError(f"{example.name}: {row['error']}; give another pair")
            chains += [row["source"], *(frame["tokens"] for frame in row["frames"]), row["label"]]
        return np.array(chains, np.uint16).ravel()

    def _drawn_label(self, example: Example, task: str) -> bytes:
        """Return the label of ``example``; a mask of the user's own classes drawn as those that the run has seen."""
        classes = self.resolved.classes
        if task != segmentation.name or classes is None:
            return example.label
        try:
            return draw_mask(example.label, classes)
        except PairError as error:
            raise ConfigError(f"{example.name}: {error}; give another pair") from error


def answer_meta(request: Request, trained: Meta | None) -> Meta:
    """Return the ``meta`` by which the answers of ``request`` are read, as a manifest's row would have it.

    That are the classes that the run was ``trained`` on, unless the request asks for another number of them.
    """
    if trained is not None and request.classes in (Request.classes, len(trained.get("classes", ()))):
        return trained
    return {"classes": [str(number) for number in range(request.classes)]}


# --- before anything expensive ---------------------------------------------------------------------------------------


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
        config = TrainConfig.model_validate(run["config"])
        fingerprints, classes = run["fingerprints"], run.get("classes")
        if not isinstance(classes, dict):
            classes = None
        return _Trained(config, str(fingerprints["backbone"]), str(fingerprints["codebook"]), classes)
    except (KeyError, TypeError, ValidationError) as error:
        raise ConfigError(
            f"{adapter}/_run.json: is no description of a run; give the --out of a covray train"
        ) from error


def _run_defaults(config: GeneratorConfig, run: _Trained) -> tuple[dict[str, Any], int | None]:
    """Return what the run decides where ``config`` says nothing, and its tokens per image if they are known."""
    chosen = run.config.sentences
    defaults = {"backbone": run.config.backbone, "method": chosen.method}
    if config.length is None and (config.method or chosen.method) != "none":
        if len(chosen.lengths) > 1:
            lengths = " and ".join(map(str, chosen.lengths))
            raise ConfigError(f"--length: {config.adapter} was trained on chains of {lengths} pictures; say which")
        defaults["length"] = chosen.lengths[0]
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
