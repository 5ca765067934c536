"""The tables of docs/formats.md, made from the records that write and read the files.

``python scripts/formats.py`` writes the tables of the page again. A table is between the lines ``<!-- record NAME -->``
and ``<!-- end -->``, where ``NAME`` is one of ``RECORDS``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import JsonValue

from covray.chains.records import Audit, DatasetRecord
from covray.distributed.lock import Claim
from covray.evaluation.claims.records import ArmRun, ProgrammeRecord, ProgrammeResults
from covray.evaluation.records import EvaluationRecord, EvaluationResults, VlmEvaluationRecord, VlmEvaluationResults
from covray.generation.records import GenerationRecord
from covray.io.records import Record, RecordPart
from covray.models.aligner.records import AlignerRecord
from covray.models.lvm.records import BackboneRecord, BlockDiffusionRecord, DraftRecord, VerifierRecord
from covray.pairs.records import PairsRecord
from covray.sweeps.records import SweepRecord, SweepResults, TrialRecord
from covray.thinking.records import FeaturesRecord, FeaturesResult, ReasoningRecord, ReasoningResults, ThinkAnswer
from covray.training.records import CheckpointRecord, RunRecord, TrainResult

PAGE = Path(__file__).parents[1] / "docs" / "formats.md"
RECORDS: dict[str, type[Record]] = {
    record.__name__: record
    for record in (
        DatasetRecord, Audit, Claim, RunRecord, TrainResult, CheckpointRecord, GenerationRecord, EvaluationRecord,
        EvaluationResults, VlmEvaluationRecord, VlmEvaluationResults, SweepRecord, TrialRecord, SweepResults,
        AlignerRecord, PairsRecord, BackboneRecord, BlockDiffusionRecord, DraftRecord, VerifierRecord,
        ProgrammeRecord, ArmRun, ProgrammeResults,
        FeaturesRecord, FeaturesResult, ReasoningRecord, ReasoningResults, ThinkAnswer,
    )
}  # fmt: skip
"""Every record of the page."""
_TABLE = re.compile(r"(<!-- record (\w+) -->\n).*?(<!-- end -->\n)", re.DOTALL)
_PLAIN = {
    str: "text", int: "integer", float: "number", bool: "true or false", NoneType: "null", Any: "any value",
    JsonValue: "any value",
}  # fmt: skip


def update_page(page: str) -> str:
    """Return ``page`` with its tables made again. Raises KeyError for the name of no record."""
    return _TABLE.sub(lambda match: match[1] + record_table(RECORDS[match[2]]) + match[3], page)


def record_table(record: type[Record]) -> str:
    """Return the keys of a record as a Markdown table, keys of objects inside it included."""
    lines = ["| key | type | meaning |", "|---|---|---|"]
    if record.VERSION is not None:
        lines.append(f"| `version` | integer | {record.VERSION}. |")
    lines += _rows(record, "")
    return "\n".join(lines) + "\n"


def _rows(part: type[RecordPart], prefix: str) -> Iterator[str]:
    for name, field in part.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        type_name = _type_name(field.annotation)
        if not field.is_required():
            type_name += ", may be absent"
        inner, path = _part_in(field.annotation)
        description = field.description
        if description is None and inner is not None:
            description = (inner.__doc__ or "").partition("\n")[0]
        yield f"| `{key}` | {type_name} | {_cell(description or '')} |"
        if inner is not None:
            yield from _rows(inner, f"{key}{path}.")


def _cell(text: str) -> str:
    """Return a docstring as a cell of a table, with JSON's words for Python's."""
    line = " ".join(text.split()).replace("``", "`").replace("|", "\\|")
    return re.sub(r"\bNone\b", "null", line)


def _part_in(annotation: Any) -> tuple[type[RecordPart] | None, str]:
    """Return the objects that a field holds, and what follows its key in theirs: ``[]`` in a list, ``.*`` by names."""
    if isinstance(annotation, type) and issubclass(annotation, RecordPart):
        return annotation, ""
    origin = get_origin(annotation)
    step = {tuple: "[]", list: "[]", dict: ".*"}.get(origin, "")
    for argument in get_args(annotation):
        part, path = _part_in(argument)
        if part is not None:
            return part, step + path
    return None, ""


def _type_name(annotation: Any) -> str:
    """Return a type as a reader of JSON knows it."""
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_type_name(argument) for argument in arguments)
    if origin is dict and arguments[1] in (Any, JsonValue):
        return "object"
    if origin is dict:
        return f"object of {_plural(arguments[1])}"
    if origin in (tuple, list):
        count = "" if len(arguments) == 1 or arguments[1] is Ellipsis else f"{len(arguments)} "
        return f"list of {count}{_plural(arguments[0])}"
    return "object"


def _plural(annotation: Any) -> str:
    """Return the type of several values."""
    name = _type_name(annotation)
    return name if " " in name or "`" in name else f"{name}s"


def main() -> None:
    """Write the tables of the page again."""
    PAGE.write_text(update_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
