"""The metrics of a training: every step once, however often it is killed, and followed while they are written."""

from __future__ import annotations

from pathlib import Path

import pytest

from covray.errors import DatasetError
from covray.training.metrics_log import MetricsLog, MetricsTail, read_metrics


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(str(tmp_path), None)
    for step in range(1, 6):
        log.add({"step": step, "loss": 0.1})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "lo')  # killed in the middle of a line
    again = MetricsLog(str(tmp_path), 3)
    again.add({"step": 4, "loss": 0.2})
    assert [(record["step"], record["loss"]) for record in read_metrics(again.path)] == [
        (1, 0.1), (2, 0.1), (3, 0.1), (4, 0.2),
    ]  # fmt: skip
    again.close()
    MetricsLog(str(tmp_path), None).close()
    assert read_metrics(again.path) == [], "without a checkpoint the run begins again"


def test_a_log_on_storage_without_appending_is_complete_after_a_flush(tmp_path: Path) -> None:
    out = f"file://{tmp_path}"  # a URI: written as to an object store
    log = MetricsLog(out, None)
    for step in (1, 2, 3):
        log.add({"step": step, "loss": 0.1})
    log.flush()
    assert [record["step"] for record in read_metrics(f"{out}/metrics.jsonl")] == [1, 2, 3]
    assert [record["step"] for record in MetricsLog(out, 2).records] == [1, 2]


def test_the_tail_gives_every_record_once_though_the_file_is_cut_back(tmp_path: Path) -> None:
    tail = MetricsTail(str(tmp_path))
    assert tail.read_new() == []
    log = MetricsLog(str(tmp_path), None)
    seen = []
    for step in range(1, 8):
        log.add({"step": step, "loss": step / 10, "seconds": 0.123456789})
        if step % 2:
            seen += [record["step"] for record in tail.read_new()]
    log.close()
    for cut in (5, 2):
        with (tmp_path / "metrics.jsonl").open("ab") as file:
            file.write(b'{"step": 8, "lo')
        seen += [record["step"] for record in tail.read_new()]
        log = MetricsLog(str(tmp_path), cut)
        for step in range(cut + 1, 9 if cut == 2 else 7):
            log.add({"step": step, "loss": step / 10})  # shorter lines: the old place is inside one
            seen += [record["step"] for record in tail.read_new()]
        log.close()
    assert seen == list(range(1, 9))


@pytest.mark.parametrize("line", ["half a record", '["step"]', '{"loss": 0.5}', '{"step": "third"}'])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 1, "loss": 0.5}}\n{line}\n')
    for read in (
        lambda: read_metrics(str(file)),
        lambda: MetricsLog(str(tmp_path), 1),
        MetricsTail(str(tmp_path)).read_new,
    ):
        with pytest.raises(DatasetError) as refusal:
            read()
        assert str(file) in str(refusal.value)
        assert repr(line) in str(refusal.value)
