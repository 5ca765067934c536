"""What a dataset is, in figures: for people and, as one object, for programs."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ConfigDict, Field
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from covray.chains.dataset import ChainDataset
from covray.chains.records import WholeAudit
from covray.chains.shard_rows import QUALITY, shard_schema
from covray.config.section import JsonObject, recorded_section
from covray.io.records import RecordPart
from covray.report.formatting import NONE, listed


class TaskDescription(RecordPart):
    """The pairs of one task."""

    good: int
    rejected: int
    splits: dict[str, int]
    """Good pairs by split."""
    reasons: dict[str, int]
    """Rejected pairs by reason."""
    quality: dict[str, float | None]
    """Medians over the good pairs that have the figure; null where none has."""


class DatasetDescription(RecordPart):
    """What `covray inspect --json` prints."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    path: str
    status: str
    """``finished``, or ``unfinished`` before the audit."""
    good: int
    rejected: int
    per_task: dict[str, TaskDescription]
    lengths: tuple[int, ...]
    methods: tuple[str, ...]
    alphas: tuple[float, ...]
    tokens_per_image: int
    tokens: int
    """Of all pictures of the good pairs."""
    shards: int
    unreadable_shards: tuple[str, ...]
    bytes_on_disk: int
    columns: dict[str, str] = Field(alias="schema")
    """The columns of a shard with their types."""
    fingerprints: dict[str, str]
    config: JsonObject
    audit: WholeAudit | None
    """What ``_audit.json`` holds."""


def describe(dataset_path: str) -> DatasetDescription:
    """Describe a dataset folder, finished or not; reads the narrow columns only. Raises DatasetError for no dataset."""
    # The tokens are most of a shard's bytes, and are not needed.
    dataset = ChainDataset(dataset_path, unfinished=True)
    narrow = dataset.table(["task", "split", "quality", "error"], errors=True)
    per_task = {}
    for task in sorted(pc.unique(narrow["task"]).to_pylist()):
        per_task[task] = _describe_task(narrow.filter(pc.equal(narrow["task"], task)))

    good = sum(of_task.good for of_task in per_task.values())
    # Both ends of a chain and its frames.
    pictures = 2 + len(dataset.methods) * len(dataset.alphas)
    filesystem = dataset.folder.filesystem
    shard_paths = list(map(dataset.folder.inner_path, dataset.shards))
    bytes_on_disk = 0
    for file in filesystem.get_file_info(shard_paths):
        bytes_on_disk += file.size
    # The schema is known without opening a shard: a dataset that has none yet is described, too.
    schema = shard_schema(bool(dataset.config.get("keep_noise")))
    return DatasetDescription(
        path=dataset_path,
        status="unfinished" if dataset.audit is None else "finished",
        good=good,
        rejected=len(narrow) - good,
        per_task=per_task,
        lengths=tuple(dataset.config["lengths"]),
        methods=tuple(dataset.methods),
        alphas=tuple(dataset.alphas),
        tokens_per_image=dataset.tokens_per_image,
        tokens=good * pictures * dataset.tokens_per_image,
        shards=len(dataset.shards),
        unreadable_shards=tuple(dataset.unreadable),
        bytes_on_disk=bytes_on_disk,
        columns={field.name: str(field.type) for field in schema},
        fingerprints=dataset.fingerprints,
        config=dataset.config,
        audit=dataset.audit,
    )


def print_description(description: DatasetDescription, console: Console) -> None:
    """Print a description. Texts of the dataset are printed as they are, never as markup."""
    console.print(f"[bold]{escape(description.path)}[/]  {description.status}")
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(description):
        facts.add_row(f"[dim]{name}[/]", escape(value))
    console.print(facts)
    console.print(_task_table(description))
    columns = Table.grid(padding=(0, 2))
    console.print("[dim]columns of a shard[/]")
    for name, kind in description.columns.items():
        columns.add_row(name, f"[dim]{escape(kind)}[/]")
    console.print(columns)


def _task_table(description: DatasetDescription) -> Table:
    """Return the table of the tasks, with a column for each quality figure that a task has."""
    figures = []
    for name in QUALITY:
        if any(task.quality[name] is not None for task in description.per_task.values()):
            figures.append(name)
    table = Table(title="pairs per task; quality figures are medians", title_justify="left", title_style="dim")
    table.add_column("task")
    table.add_column("good", justify="right")
    table.add_column("splits")
    table.add_column("rejected")
    for name in figures:
        table.add_column(name.replace("_", "\n", 1), justify="right")
    for name, task in description.per_task.items():
        row = [escape(name), f"{task.good:,}", escape(_lines(task.splits)), escape(_lines(task.reasons) or "0")]
        for figure in figures:
            median = task.quality[figure]
            text = NONE
            if median is not None:
                text = f"{median:.3g}"
            row.append(text)
        table.add_row(*row)
    return table


def _facts(description: DatasetDescription) -> list[tuple[str, str]]:
    """Return what is printed above the table, as (name, value)."""
    prior = recorded_section(description.config, "prior")
    tokenizer = recorded_section(description.config, "tokenizer")
    fingerprints, audit = description.fingerprints, description.audit
    facts = [
        ("pairs", f"{description.good:,} good, {description.rejected:,} rejected"),
        ("chains", f"lengths {_listed(description.lengths)}; methods {_listed(description.methods)}"),
        ("alphas", _listed(f"{alpha:.4g}" for alpha in description.alphas)),
        ("tokens", f"{description.tokens:,}, {description.tokens_per_image} a picture"),
        ("on disk", f"{_size(description.bytes_on_disk)} in {description.shards:,} shards"),
        ("prior", f"{prior['path']}, {prior['steps']} steps, {fingerprints['prior']}"),
        ("tokenizer", f"{tokenizer['path']}, {fingerprints['tokenizer']}"),
        ("codebook", fingerprints["codebook"]),
    ]
    if audit is not None and audit.chains_per_s is not None:
        facts.append(("speed", f"{audit.chains_per_s:.3g} chains/s"))
    if description.unreadable_shards:
        facts.append(("left out", f"{_listed(description.unreadable_shards)} (cannot be read)"))
    return facts


def _describe_task(rows: pa.Table) -> TaskDescription:
    errors = rows["error"].drop_null()
    # Rejected pairs have an error and no figures.
    good = rows.filter(pc.is_null(rows["error"]))
    quality = {}
    for name in QUALITY:
        quality[name] = _median(pc.struct_field(good["quality"], name))
    return TaskDescription(
        good=len(good),
        rejected=len(errors),
        splits=_count_values(good["split"]),
        # The reason of an error is what stands before its first colon.
        reasons=_count_values(pc.replace_substring_regex(errors, r"(?s):.*", "")),
        quality=quality,
    )


def _median(column: pa.ChunkedArray) -> float | None:
    values = column.drop_null().to_numpy()
    if not len(values):
        return None
    return round(float(np.median(values)), 6)


def _count_values(column: pa.ChunkedArray) -> dict[str, int]:
    counts = {}
    for entry in pc.value_counts(column).to_pylist():
        counts[str(entry["values"])] = entry["counts"]
    return dict(sorted(counts.items()))


def _lines(counts: dict[str, int]) -> str:
    return "\n".join(f"{name} {count:,}" for name, count in counts.items())


def _listed(values: Iterable[object]) -> str:
    return listed(values, empty="none")


def _size(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} TB"
