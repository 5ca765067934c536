"""A generator: models that are loaded once and answer many requests. Knows no ray, and reads and writes no pictures.

examples --prior--> frames --tokenizer--> prompt; query --tokenizer--> tokens
prompt, query --LVM--> frames, answer --tokenizer--> pictures --task--> data
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy as np
import pyarrow as pa
import torch

from covray.chains.build import BlockBuilder
from covray.chains.prepare import prepare_block
from covray.config import GeneratorConfig
from covray.errors import ConfigError, DatasetError, PairError
from covray.generation.models import LoadedModel, SharedModels
from covray.generation.request import Answer, Example, ReadAnswer, Request, WrittenPicture
from covray.generation.resolving import ResolvedGenerator, resolve_generator
from covray.generation.votes import PLAIN_TASK, draw_spread, join_answers
from covray.io import images
from covray.io.images import resize, square
from covray.io.pixels import Picture
from covray.models.lvm.decoding.base import Decoded
from covray.models.tokenizer.vqgan import require_same_codebook
from covray.pairs.classes import draw_mask
from covray.pairs.manifest import MANIFEST_SCHEMA, Pair
from covray.seeds import seed_of
from covray.tasks import TASKS, segmentation
from covray.tasks.base import Meta, Resample

_PROMPTS = 8
"""Prompts whose tokens a generator keeps: the chains of their examples need not be made again."""


class Generator:
    """Answers queries after examples; see ``load``, ``answer`` and ``stream``.

    The answer to a query follows from the configuration, the seed, the examples and the query's own tokens, not from
    the other queries of a request nor from earlier requests.
    """

    def __init__(self, resolved: ResolvedGenerator, shared: SharedModels | None = None):
        """Load tokenizer and model; the prior is loaded by the first request that needs it. See ``load``."""
        config = resolved.config
        assert config.tokenizer is not None
        # The last bits of sums depend on the number of threads, and with them can depend the choice of a token.
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
        # A cache of this instance: one of the class would keep every generator, with its models, alive.
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
