"""The configuration of ``covray evaluate``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from covray.config.fields import (
    ActorsConfig,
    AddedMetric,
    BackboneConfig,
    ChainMethod,
    EngineConfig,
    ExamplePairs,
    Length,
    PictureSamplingConfig,
    SamplingConfig,
    TaskName,
    TokenizerConfig,
    TrackingConfig,
)
from covray.config.section import GrownSection, JsonObject, Section


class FormConfig(Section):
    """A form of chain, as a model reads and writes it."""

    method: ChainMethod = "diffusion"
    """How frames are made."""
    length: Length = 4
    """Pictures of a chain, both ends counted."""
    pairs: ExamplePairs = 1
    """Example pairs before the query."""


def named_run(entry: str) -> tuple[str, str]:
    """Return the name and the folder of an entry of ``adapters``: ``RUN`` or ``NAME=RUN``.

    A "=" below a folder belongs to the path, such as in ``runs/lr=0.1``.
    """
    name, separator, run = entry.partition("=")
    # A row of a table must have a name: "=RUN" is a path that is not there, and refused as one.
    if separator and name and "/" not in name:
        return name, run
    return entry.rstrip("/").rpartition("/")[2], entry


class VotesConfig(Section):
    """Further rows of every adapter, or of the untuned backbone: votes over sampled answers beside its own answer.

    A model with frames votes over chains, each with frames of its own; one without frames over plain answers.
    """

    samples: tuple[Annotated[int, Field(ge=2, le=1024)], ...] = ()
    """Votes of so many samples, a row for each."""
    equal_tokens: bool = True
    """Models without frames also vote over as many answers as take the tokens of the longest chains' votes."""
    temperature: float = Field(default=0.7, gt=0.0, le=100.0)
    """At which frames and answers of votes are sampled."""
    top_k: int | None = Field(default=None, ge=1)
    """Sample only from this many likeliest tokens."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Sample only from the likeliest tokens that together reach this probability."""

    @field_validator("samples")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(value)))


class EvaluateConfig(GrownSection):
    """``covray evaluate``: score adapters, their backbone and baselines on the same queries."""

    data: str
    """Dataset of chains: the ``--out`` of a ``covray build``."""
    out: str
    """Folder to write."""
    adapters: tuple[str, ...] = ()
    """Finished runs of ``covray train``, each ``RUN`` or ``NAME=RUN``; the default name of a run is its folder's."""
    backbone: BackboneConfig | None = None
    """Backbone of the runs, if it has moved; without runs the backbone to evaluate, by default nano."""
    untuned: bool = True
    """Also evaluate the backbone without an adapter, once for every form of chain that the adapters have."""
    forms: tuple[FormConfig, ...] = ()
    """Further forms of chain for the backbone without an adapter."""
    baselines: tuple[Literal["copy", "mean", "nearest", "focus", "ceiling"], ...] = (
        "copy", "mean", "nearest", "focus", "ceiling",
    )  # fmt: skip
    """Further rows of the table: the query as its own answer (copy), the mean label, the nearest example's label,
    Chain-of-Focus, and the label after the tokenizer (ceiling)."""
    manifest: str | None = None
    """Manifest with the labels as they are; by default the one the dataset was built from."""
    tokenizer: TokenizerConfig | None = None
    """The dataset's tokenizer, if it has moved."""
    tasks: tuple[TaskName, ...] | None = None
    """Tasks to use; by default all of the dataset."""
    split: str = "test"
    """Split of the queries."""
    example_split: str = "train"
    """Split of the examples. It may be the queries' split: no pair is its own example."""
    episodes: int | None = Field(default=None, ge=1)
    """Queries per task, at most; the same queries for every subject."""
    pairs: ExamplePairs | None = None
    """Example pairs before the query; by default the largest number that a run was trained with."""
    selection: Literal["random", "similar", "focus"] = "random"
    """How examples are chosen: by the seed (random), by the query's nearest pictures (similar), or as Chain-of-Focus
    does (focus)."""
    lpips: str | None = None
    """AlexNet's weights for LPIPS, in torchvision's file; null: torchvision's cache. They are never downloaded;
    without them the metric is named as absent."""
    baseline_examples: int = Field(default=256, ge=1)
    """Examples per task for the mean and the nearest label, at most."""
    sampling: SamplingConfig = SamplingConfig()
    votes: VotesConfig = VotesConfig()
    lengths: tuple[Length, ...] = ()
    """Chain lengths to ask every adapter for, a row for each; the results name the best one of each task. By default
    the longest that it was trained on."""
    probes: tuple[Literal["reference", "other", "copy", "dummy", "last_frame", "nats", "gain"], ...] = ()
    """What tells why frames help or hurt, of every model that writes some: the score of an answer after the dataset's
    frames (reference), another pair's (other), copies of the query (copy) or one code everywhere (dummy), that of the
    last frame read as the answer (last_frame), the nats of the reference's pictures (nats), and what frames change in
    the likelihood of the reference's answer and of the answer written (gain)."""
    metrics: tuple[AddedMetric, ...] = ()
    """Metrics of other installed packages to compute beside those of the tasks, each ``task/name``; ``covray plugins``
    lists them."""
    score_candidates: bool = False
    """Also score each candidate of ``sampling.best_of`` by itself, and keep its tokens with the score: what
    ``covray train`` with ``objective: verifier`` learns from."""
    batch: int = Field(default=16, ge=1, le=4096)
    """Rows of the fixed, padded batch of the decoder."""
    engine: EngineConfig = EngineConfig()
    actors: ActorsConfig = ActorsConfig()
    rows_per_block: int | None = Field(default=None, ge=1, le=100_000)
    """Episodes that an actor takes at a time; a kill loses at most the blocks at work. By default several blocks for
    every actor, of as many episodes as fill its batches, and of at most 64."""
    tracking: TrackingConfig = TrackingConfig()
    seed: int = Field(default=0, ge=0)
    """Everything random follows from it."""

    @field_validator("lengths")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(value)))

    @field_validator("adapters", "baselines", "tasks", "probes", "metrics")
    @classmethod
    def _distinct(cls, value: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        """Drop what is given twice, in the order of what is given first."""
        return None if value is None else tuple(dict.fromkeys(value))

    def unused_fields(self) -> Iterator[str]:
        """Yield the younger fields that are empty."""
        asked = {
            "probes": self.probes, "votes": self.votes.samples, "lengths": self.lengths, "metrics": self.metrics,
        }  # fmt: skip
        for name, values in asked.items():
            if not values:
                yield name
        if not self.score_candidates:
            yield "score_candidates"

    @model_validator(mode="after")
    def _candidates_are_whole(self) -> EvaluateConfig:
        if self.score_candidates and (self.sampling.best_of == 1 or self.sampling.keep < 1):
            raise ValueError("score_candidates: scores all candidates; set sampling.best_of, and sampling.keep to 1")
        return self

    def sampling_of(self, votes: int, *, has_adapter: bool = True) -> SamplingConfig:
        """Return how a row is answered: by ``sampling``, or for more than one of ``votes`` by ``votes``.

        A model without an adapter has no drafts and no verifier. It decodes one by one in place of ``speculative``, to
        the same tokens, and its candidates are ranked by the likelihood of their answers in place of ``verifier``.
        """
        sampling = self.sampling
        if sampling.decoder == "speculative" and not has_adapter:
            sampling = sampling.model_copy(update={"decoder": "sequential"})
        if sampling.choose_by == "verifier" and (votes > 1 or not has_adapter):
            sampling = sampling.model_copy(update={"choose_by": "answer"})
        if votes == 1:
            return sampling
        # What picks one candidate, or one code, has no place in a vote over samples.
        own = {
            "temperature": self.votes.temperature, "top_k": self.votes.top_k, "top_p": self.votes.top_p,
            "frames": PictureSamplingConfig(), "answer": PictureSamplingConfig(), "best_of": 1, "keep": 1.0,
            "vote": votes, "expected": None,
        }  # fmt: skip
        return sampling.model_copy(update=own)

    def identity(self) -> JsonObject:
        """What decides the scores; a resume must agree in all of it."""
        return self.model_dump(mode="json", exclude={"out", "actors", "rows_per_block", "tracking"})
