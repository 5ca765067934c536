"""What ``generation.json`` holds."""

from __future__ import annotations

from covray.config.section import JsonObject
from covray.errors import ConfigError
from covray.io.records import Record, RecordPart


class LogLikelihood(RecordPart):
    """Sums of log p over the tokens of pictures, each given all before it, in nats."""

    frames: tuple[float, ...]
    """Of each frame."""
    answer: float


class AnswerRecord(RecordPart):
    """The answer to one query."""

    query: str
    """The picture file."""
    folder: str
    """The folder of its files, below that of ``generation.json``."""
    files: tuple[str, ...]
    seed: int
    """All random numbers of the query follow from it."""
    candidate: int
    """The number of the candidate that is the answer."""
    log_likelihood: LogLikelihood
    """Of that candidate."""
    samples: int = 1
    """Candidates whose answers were joined; absent where there was no vote, and ``candidate`` is the answer."""


class GenerationRecord(Record):
    """What ``covray generate`` did; written last."""

    FILE = "generation.json"
    FIX = "run its covray generate again"
    ERROR = ConfigError

    config: JsonObject
    """The resolved configuration."""
    fingerprints: dict[str, str | None]
    """SHA-256 (hex) of ``prior`` (empty where no example needed it), ``tokenizer``, ``codebook``, ``backbone`` and
    ``adapter`` (null without one)."""
    prompt_tokens: int
    """Tokens of the examples, before each query."""
    answers: tuple[AnswerRecord, ...]
    """In the order of the queries."""
