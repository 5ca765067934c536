"""What goes into a worker of an evaluation and what comes out: schemas, and the types that travel between its steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, TypedDict

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from covray.config import SamplingConfig
from covray.io.pixels import Picture
from covray.models.lvm.decoding.base import Decoded
from covray.tasks.base import Meta
from covray.training.scored_answers import BEFORE, CANDIDATES, CANDIDATES_TYPE

EPISODE_SCHEMA = pa.schema(
    [("episode", pa.int64()), ("subject", pa.string()), ("task", pa.string()), ("pair_id", pa.int64())]
)
"""What there is to do."""
RESULT_SCHEMA = pa.schema(
    [
        *EPISODE_SCHEMA,
        ("examples", pa.list_(pa.int64())),  # pair ids, in the order of the sentence
        ("values", pa.list_(pa.struct([("metric", pa.string()), ("value", pa.float64())]))),  # null: undefined
        ("counts", pa.list_(pa.list_(pa.int64()))),  # what metrics of a whole set are made of; see ``scores``
        # Tokens written: the frames, then the answer; of a vote every candidate's, the likeliest candidate first.
        ("images", pa.list_(pa.list_(pa.uint16()))),
        ("log_likelihood", pa.float64()),  # of the answer written, in nats; of a vote the candidates' mean
        ("error", pa.string()),
        # With ``score_candidates``: the tokens before the answer's, and all that was written, with its score.
        (BEFORE, pa.list_(pa.uint16())),
        (CANDIDATES, CANDIDATES_TYPE),
    ]
)
"""What was done, one row an episode."""
LARGE_COLUMNS = ("images", BEFORE, CANDIDATES)
"""Columns of tokens, which are most of the size of the rows."""

Tokens = NDArray[np.uint16]


class ValueColumn(TypedDict):
    """A score of an episode."""

    metric: str
    value: float | None


class CandidateColumn(TypedDict, total=False):
    """A candidate that is kept; its score is known once all are decoded."""

    images: list[list[int]]
    score: float | None


class ResultRow(TypedDict, total=False):
    """A row of ``RESULT_SCHEMA``, with the columns that were read."""

    episode: int
    subject: str
    task: str
    pair_id: int
    examples: list[int] | None
    values: list[ValueColumn] | None
    counts: list[list[int]] | None
    images: list[list[int]] | None
    log_likelihood: float | None
    error: str | None


@dataclass
class EpisodeResult:
    """One row of ``RESULT_SCHEMA`` in the making, and what its scores are computed from."""

    episode: int
    subject: str
    task: str
    pair_id: int
    examples: list[int] | None = None
    values: list[ValueColumn] | None = None
    counts: list[list[int]] | None = None
    images: list[list[int]] | None = None
    log_likelihood: float | None = None
    error: str | None = None
    before: list[int] | None = None
    candidates: list[CandidateColumn] | None = None
    chain: Tokens | None = None
    """The pair's own chain, [length, tokens]; no column."""
    prompt: Tokens | None = None
    """The examples' chains and the query's picture, flat; no column."""
    nats: dict[str, float] = field(default_factory=dict)
    """The perplexities' logarithms by metric; no column."""
    probes: dict[str, Tokens] = field(default_factory=dict)
    """The candidates of answers to probes, [n, tokens], by metric; no column."""


@dataclass(frozen=True, eq=False)
class AnswerPictures:
    """An answer, and the pictures it was made of."""

    answer: Picture
    """At the label's size."""
    written: NDArray[np.uint8]
    """What a model wrote, [candidates, images, s, s, 3], the answer last; empty for subjects without a model."""

    @property
    def frames(self) -> int:
        """How many frames a model wrote before the answer."""
        return max(0, self.written.shape[1] - 1)


NOTHING_WRITTEN = np.empty((0, 0, 0, 0, 3), np.uint8)


@dataclass(frozen=True, eq=False)
class Asked:
    """An episode, and what its answer is measured by."""

    result: EpisodeResult
    """With the tokens that a model wrote."""
    label: Picture
    meta: Meta
    """Of the pair's manifest row."""


class Strip(NamedTuple):
    """The pictures of an episode, for people to look at."""

    query: Picture
    frames: NDArray[np.uint8]
    """Those that a model wrote, [frames, s, s, 3]."""
    answer: Picture
    label: Picture


def answer_candidates(decoded: Decoded, number: int, sampling: SamplingConfig) -> tuple[Tokens, NDArray[np.float64]]:
    """Return the candidates that make the answer, [n, images, tokens], and the likelihood of each one's answer.

    All of a vote, the likeliest first; else the likeliest alone.
    """
    # Without a vote the answer is that of the likeliest candidate.
    best = int(decoded.candidate[number])
    order = [best]
    if sampling.vote > 1:
        others = list(range(decoded.candidate_ids.shape[1]))
        others.remove(best)
        order += others
    return decoded.candidate_ids[number, order], decoded.candidate_log_likelihood[number, order, -1]
