"""What a generator is asked, and what it answers. Pictures are RGB, uint8 [h, w, 3]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from covray.config import SamplingConfig
from covray.io.pixels import Picture
from covray.models.lvm.decoding.base import GREEDY


# Compared and hashed by its bytes: a generator keeps the tokens of prompts by their examples.
@dataclass(frozen=True)
class Example:
    """An image and its label, as encoded picture files."""

    image: bytes
    label: bytes
    name: str = "example"
    """What errors call it."""


# Without ==, as all that holds arrays: comparing two arrays gives an array, which is neither true nor false.
@dataclass(frozen=True, eq=False)
class Request:
    """Queries to answer after the same examples."""

    queries: tuple[Picture, ...]
    """Pictures of any size."""
    examples: tuple[Example, ...] = ()
    task: str | None = None
    """How labels are resized and answers are read; None: that of the run, or plain pictures."""
    classes: int = 21
    """Of a segmentation: by whose colours an answer is read."""
    sampling: SamplingConfig = GREEDY
    seed: int = 0
    """A query's random numbers follow from it and from the query's own tokens."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What the model wrote for one query."""

    query: Picture
    """The query as the model saw it, square, [s, s, 3]."""
    frames: NDArray[np.uint8]
    """[frames, s, s, 3], from the query to the answer; of a vote, those of the likeliest candidate."""
    small: Picture
    """The answer at the tokenizer's size, [s, s, 3]; of a vote, the joined one."""
    picture: Picture
    """The answer at the query's size; with fit ``crop``, of its centre square."""
    spread: Picture | None
    """Where the candidates of a vote disagree, at the answer's size; None without a vote."""
    data: dict[str, bytes]
    """The answer as its task reads it, file name to content, as ``depth_m.npy``."""
    seed: int
    samples: int
    """How many candidates were written for the answer."""
    candidate: int
    """The number of the best of them, by ``sampling.choose_by``."""
    log_likelihood: tuple[float, ...]
    """Of each of its pictures, the answer last, in nats."""
    candidate_tokens: NDArray[np.uint16]
    """The answer of every candidate as the model wrote it, [samples, tokens of a picture]."""
    candidate_log_likelihood: NDArray[np.float64]
    """Of all pictures of every candidate, in nats, [samples]; -inf where it was given up before its answer."""


@dataclass(frozen=True, eq=False)
class ReadAnswer:
    """The answer to one query without what the model said of it."""

    picture: Picture
    """At the query's size; with fit ``crop``, of its centre square."""
    data: dict[str, bytes]
    """The answer as its task reads it, file name to content."""


@dataclass(frozen=True, eq=False)
class WrittenPicture:
    """One picture of an answer, as soon as it is written."""

    query: int
    """Number of the query in the request."""
    number: int
    """Number of the picture: the frames come first, the answer is the last."""
    is_answer: bool
    picture: Picture
    """At the tokenizer's size."""
