"""What a dataset is, in figures: for people and, as one object, for programs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from covray.chains.dataset import QUALITY, ChainDataset, shard_schema
from covray.io import storage


def describe(dataset_path: str) -> dict[str, Any]:
    """Describe the dataset folder ``dataset_path``, finished or not, as JSON values.

    Reads the narrow columns only. ``per_task`` has counts by split and by reason of rejection, and the medians of the
    quality figures over the good pairs that have them (null where none has). Raises DatasetError for no dataset.
    """
    dataset = ChainDataset(dataset_path, unfinished=True)
    narrow = dataset.table(["task", "split", "quality", "error"], errors=True)
    per_task = {task: _describe_task(narrow.filter(pc.equal(narrow["task"], task))) for task in _names(narrow["task"])}
    good = sum(entry["good"] for entry in per_task.values())
    pictures = 2 + len(dataset.methods) * len(dataset.alphas)
    shards = dataset.shards
    filesystem, inner = storage.resolve(dataset_path)
    sizes = [info.size for info in filesystem.get_file_info([storage.join(inner, name) for name in shards])]
    return {
        "path": dataset_path,
        "status": "unfinished" if dataset.audit is None else "finished",
        "good": good,
        "rejected": len(narrow) - good,
        "per_task": per_task,
        "lengths": list(dataset.config["lengths"]),
        "methods": list(dataset.methods),
        "alphas": list(dataset.alphas),
        "tokens_per_image": dataset.tokens_per_image,
        "tokens": good * pictures * dataset.tokens_per_image,
        "shards": len(shards),
        "unreadable_shards": dataset.unreadable,
        "bytes_on_disk": sum(sizes),
        "schema": {field.name: str(field.type) for field in shard_schema(bool(dataset.config.get("keep_noise")))},
        "fingerprints": dataset.fingerprints,
        "config": dataset.config,
        "audit": None if dataset.audit is None else dataset.audit.to_json(),
    }


def print_description(description: dict[str, Any], console: Console) -> None:
    """Print what ``describe`` returned. Texts of the dataset are printed as they are, never as markup."""
    console.print(f"[bold]{escape(description['path'])}[/]  {description['status']}")
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(description):
        facts.add_row(f"[dim]{name}[/]", escape(value))
    console.print(facts)
    figures = [
        name for name in QUALITY if any(e["quality"][name] is not None for e in description["per_task"].values())
    ]
    tasks = Table(title="pairs per task; quality figures are medians", title_justify="left", title_style="dim")
    for column in ("task", "good", "splits", "rejected"):
        tasks.add_column(column, justify="right" if column == "good" else "left")
    for name in figures:
        tasks.add_column(name.replace("_", "\n", 1), justify="right")
    for task, entry in description["per_task"].items():
        medians = [entry["quality"][name] for name in figures]
        tasks.add_row(
            escape(task),
            f"{entry['good']:,}",
            escape(_lines(entry["splits"])),
            escape(_lines(entry["reasons"]) or "0"),
            *("–" if median is None else f"{median:.3g}" for median in medians),
        )
    console.print(tasks)
    columns = Table.grid(padding=(0, 2))
    console.print("[dim]columns of a shard[/]")
    for name, kind in description["schema"].items():
        columns.add_row(name, f"[dim]{escape(kind)}[/]")
    console.print(columns)


def _facts(description: dict[str, Any]) -> list[tuple[str, str]]:
    config, audit = description["config"], description["audit"]
    facts = [
        ("pairs", f"{description['good']:,} good, {description['rejected']:,} rejected"),
        ("chains", f"lengths {_listed(description['lengths'])}; methods {_listed(description['methods'])}"),
        ("alphas", _listed(f"{alpha:.4g}" for alpha in description["alphas"])),
        ("tokens", f"{description['tokens']:,}, {description['tokens_per_image']} a picture"),
        ("on disk", f"{_size(description['bytes_on_disk'])} in {description['shards']:,} shards"),
        (
            "prior",
            f"{config['prior']['path']}, {config['prior']['steps']} steps, {description['fingerprints']['prior']}",
        ),
        ("tokenizer", f"{config['tokenizer']['path']}, {description['fingerprints']['tokenizer']}"),
        ("codebook", description["fingerprints"]["codebook"]),
    ]
    if audit is not None and audit.get("chains_per_s") is not None:
        facts.append(("speed", f"{audit['chains_per_s']:.3g} chains/s"))
    if description["unreadable_shards"]:
        facts.append(("left out", f"{_listed(description['unreadable_shards'])} (cannot be read)"))
    return facts


def _describe_task(rows: pa.Table) -> dict[str, Any]:
    errors = rows["error"].drop_null()
    good = rows.filter(pc.is_null(rows["error"]))
    return {
        "good": len(good),
        "rejected": len(errors),
        "splits": _count_values(good["split"]),
        "reasons": _count_values(pc.replace_substring_regex(errors, r"(?s):.*", "")),
        "quality": {name: _median(pc.struct_field(good["quality"], name)) for name in QUALITY},
    }


def _median(column: pa.ChunkedArray) -> float | None:
    values = column.drop_null().to_numpy()
    return round(float(np.median(values)), 6) if len(values) else None


def _count_values(column: pa.ChunkedArray) -> dict[str, int]:
    return {
        str(entry["values"]): entry["counts"]
        for entry in sorted(pc.value_counts(column).to_pylist(), key=lambda entry: str(entry["values"]))
    }


def _names(column: pa.ChunkedArray) -> list[str]:
    return sorted(pc.unique(column).to_pylist())


def _lines(counts: dict[str, int]) -> str:
    return "\n".join(f"{name} {count:,}" for name, count in counts.items())


def _listed(values: Any) -> str:
    return ", ".join(str(value) for value in values) or "none"


def _size(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} TB"
