"""Answers of a run with their scores, as ``covray evaluate`` with ``score_candidates`` leaves them.

This is what a verifier learns from. An evaluation is written exactly once and resumes after any interruption, so these
answers do, too.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from numpy.typing import NDArray

from covray.config import SentencesConfig
from covray.config.section import JsonObject
from covray.errors import ConfigError
from covray.io.records import Record
from covray.io.storage import Folder
from covray.tasks import TASKS

ROWS = "rows"
"""Folder of an evaluation that holds its rows, by task."""
BEFORE, CANDIDATES = "before", "candidates"
"""Columns of the rows: the tokens of examples and query, and every candidate."""
CANDIDATES_TYPE = pa.list_(
    pa.struct([("images", pa.list_(pa.list_(pa.uint16()))), ("score", pa.float64())])  # the task's primary metric
)
_RESULTS = "results.json"


class AnswersRecord(Record):
    """What is read of the record of an evaluation; ``covray.evaluation.records`` has all of it."""

    FILE = "_evaluation.json"
    FIX = "give the --out of a covray evaluate"
    ERROR = ConfigError

    fingerprints: dict[str, str]
    subjects: list[JsonObject]


@dataclass(frozen=True, eq=False)
class ScoredQuery:
    """All candidates of one query that have a score."""

    task: str
    pair_id: int
    before: NDArray[np.uint16]
    """Tokens of examples and query, [n]."""
    written: NDArray[np.uint16]
    """Tokens of every candidate, [candidates, images, tokens per image]."""
    goodness: NDArray[np.float64]
    """The score of every candidate, so that more is better, [candidates]."""

    @property
    def tokens(self) -> int:
        """Tokens that are read to judge all candidates."""
        return len(self.before) + self.written.size


def read_scored_answers(path: str, adapter: str, sentences: SentencesConfig) -> list[ScoredQuery]:
    """Return the queries of an evaluation that the adapter answered, sorted by task, pair and subject.

    Queries are left out where fewer than two candidates have a score, or all have the same.

    Args:
        path: The folder of a finished evaluation.
        adapter: SHA-256 (hex) of the adapter's weights.
        sentences: Method and lengths of the chains that the run writes.

    Raises:
        ConfigError: The folder is not a finished evaluation of this adapter with scored candidates, or its chains are
            other ones.
    """
    folder = Folder(path)
    record = AnswersRecord.read(folder)
    if not folder.exists(_RESULTS):
        raise ConfigError(f"verifier.answers: {path} is not finished; run its covray evaluate again to continue it")
    subjects = _subjects_of(record, adapter, path)
    partitioning = ds.partitioning(pa.schema([("task", pa.string())]), flavor="hive")
    columns = {"task": pa.string(), "subject": pa.string(), "pair_id": pa.int64(), "error": pa.string()}
    schema = pa.schema([*columns.items(), (BEFORE, pa.list_(pa.uint16())), (CANDIDATES, CANDIDATES_TYPE)])
    rows = ds.dataset(folder.inner_path(ROWS), schema, "parquet", folder.filesystem, partitioning)
    # Rows of rejected episodes have no candidates to learn from.
    is_asked = ds.field("subject").isin(list(subjects)) & ds.field(CANDIDATES).is_valid() & ds.field("error").is_null()
    table = rows.to_table(filter=is_asked)
    if not len(table):
        raise ConfigError(
            f"verifier.answers: {path} has no scored candidates; evaluate with score_candidates=true and "
            "sampling.best_of above 1"
        )
    for name in sorted(set(table["subject"].to_pylist())):
        _require_chains(subjects[name], sentences, path)
    ordered = table.sort_by([("task", "ascending"), ("pair_id", "ascending"), ("subject", "ascending")])
    queries = []
    for row in ordered.to_pylist():
        query = _scored(row)
        # Candidates that are all equally good say nothing of which is better.
        if len(np.unique(query.goodness)) > 1:
            queries.append(query)
    if not queries:
        raise ConfigError(f"verifier.answers: {path}: no query has candidates of different scores; write more answers")
    return queries


def fingerprint_of(queries: list[ScoredQuery]) -> str:
    """Return the SHA-256 (hex) of answers and scores."""
    digest = hashlib.sha256()
    for query in queries:
        # In one byte order, so that all machines agree.
        digest.update(f"{query.task} {query.pair_id} {query.written.shape}".encode())
        for values in (query.before.astype("<u2"), query.written.astype("<u2"), query.goodness.astype("<f8")):
            digest.update(values.tobytes())
    return digest.hexdigest()


def _subjects_of(record: AnswersRecord, adapter: str, path: str) -> dict[str, JsonObject]:
    """Return the rows of the evaluation's table that are of the adapter, by name. Raises ConfigError for none."""
    subjects = {}
    for subject in record.subjects:
        name = str(subject.get("name"))
        if record.fingerprints.get(f"{name}.adapter") == adapter:
            subjects[name] = subject
    if not subjects:
        raise ConfigError(
            f"verifier.answers: {path} has no answers of the adapter {adapter[:12]} of lora.path; evaluate that run"
        )
    return subjects


def _require_chains(subject: JsonObject, sentences: SentencesConfig, path: str) -> None:
    """Refuse answers of other chains than the verifier's run will write. Raises ConfigError."""
    method, length = subject.get("method"), subject.get("length")
    known = (2,) if sentences.method == "none" else sentences.lengths
    if length not in known or (length != 2 and method != sentences.method):
        raise ConfigError(
            f"verifier.answers: {path}: {subject.get('name')} writes chains of {length} pictures by {method}; set "
            "sentences.method and sentences.lengths as the run has them"
        )


def _scored(row: dict[str, Any]) -> ScoredQuery:
    """Return what is known of one query; candidates whose score is undefined are left out."""
    # Goodness is turned so that more is better, whatever the metric.
    sign = -1.0 if TASKS[row["task"]].metrics[0].better == "lower" else 1.0
    written, goodness = [], []
    for candidate in row[CANDIDATES]:
        if candidate["score"] is not None:
            written.append(candidate["images"])
            goodness.append(sign * candidate["score"])
    return ScoredQuery(
        task=row["task"],
        pair_id=row["pair_id"],
        before=np.array(row[BEFORE], np.uint16),
        written=np.array(written, np.uint16),
        goodness=np.array(goodness, np.float64),
    )
