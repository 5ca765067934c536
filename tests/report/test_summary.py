from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from rich.console import Console

from covray.errors import DatasetError
from covray.report.summary import describe, print_description

Writer = Callable[..., tuple[str, list[dict[str, Any]]]]


def test_a_description_counts_what_was_written(write_dataset: Writer) -> None:
    rejects = {1: "missing: a: b", 2: "missing: c", 8: "empty: d"}
    out, rows = write_dataset({"depth": 7, "edges": 4}, lengths=(4, 5), rejects=rejects)
    description = describe(out).to_json()
    assert description == json.loads(json.dumps(description))
    good = [row for row in rows if "error" not in row]
    assert (description["good"], description["rejected"]) == (len(good), 3)
    assert description["tokens"] == sum(16 * (2 + len(row["frames"])) for row in good)
    assert description["bytes_on_disk"] == sum(file.stat().st_size for file in Path(out).rglob("*.parquet"))
    assert description["per_task"]["depth"]["reasons"] == {"missing": 2}
    assert description["per_task"]["edges"]["reasons"] == {"empty": 1}
    for task, entry in description["per_task"].items():
        of_task = [row for row in good if row["task"] == task]
        assert entry["good"] == len(of_task)
        assert entry["splits"] == {
            split: sum(row["split"] == split for row in of_task) for split in sorted({row["split"] for row in of_task})
        }
        noise = [row["quality"]["label_noise_rms"] for row in of_task]
        assert entry["quality"]["label_noise_rms"] == pytest.approx(median(noise))
        assert entry["quality"]["source_psnr"] == 25.0  # nulls do not count
        assert entry["quality"]["label_psnr"] is None


def test_an_unfinished_dataset_is_described_too(write_dataset: Writer, tmp_path: Path) -> None:
    out, _ = write_dataset({"depth": 3}, finished=False)
    Path(out, "shards", "task=depth", "torn.parquet").write_bytes(b"")
    description = describe(out).to_json()
    assert (description["status"], description["audit"], description["good"]) == ("unfinished", None, 3)
    assert description["unreadable_shards"] == ["shards/task=depth/torn.parquet"]
    with pytest.raises(DatasetError, match="not a dataset"):
        describe(str(tmp_path / "nothing"))


def test_the_printed_description_is_text_not_markup(write_dataset: Writer) -> None:
    out, _ = write_dataset({"depth": 3}, rejects={0: "[red]boo[/red] [/]: x"})
    description = describe(out)
    stream = io.StringIO()
    print_description(description, Console(file=stream, width=200))
    printed = stream.getvalue()
    assert "[red]boo[/red] [/] 1" in printed
    for expected in (out, "2 good, 1 rejected", "list<", description.fingerprints["codebook"], "2.5 chains/s"):
        assert expected in printed
