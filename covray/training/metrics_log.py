"""``metrics.jsonl``: the metrics of every step and of every validation of a training, one JSON object a line.

A record of a step has the key ``loss``, a record of a validation ``validation_loss``; both have ``step``. All values
are numbers.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterable

from covray.errors import DatasetError
from covray.io import storage

METRICS_FILE = "metrics.jsonl"
Metrics = dict[str, float]
"""One record; counts are integers."""
_REWRITE_EVERY_S = 5.0


def read_metrics(path: str) -> list[Metrics]:
    """Return the records of the file at ``path``; none where it is absent.

    Raises:
        DatasetError: A line is damaged, as after an edit by hand.
    """
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        return []
    whole_lines = data[: data.rfind(b"\n") + 1]  # a process that was killed leaves half a line
    return _parse(whole_lines, path)


class MetricsLog:
    """The writer of the file, which has every step once, however often the training was killed.

    A local file grows by a line. The objects of a store cannot grow: there the file is written again every few seconds.
    """

    def __init__(self, out: str, step: int | None):
        """Open the file of the run folder ``out``.

        Args:
            out: The run folder, local or on any filesystem pyarrow knows.
            step: The last step to keep, the one of the checkpoint that training continues from. None: keep nothing.
        """
        self.path = storage.join(out, METRICS_FILE)
        self.records: list[Metrics] = []
        # Steps after the checkpoint are trained again: their records would stand twice.
        if step is not None:
            self.records = [record for record in read_metrics(self.path) if record["step"] <= step]
        storage.write_bytes(self.path, _lines(self.records))
        self._file: io.BufferedWriter | None = None
        if "://" not in out:
            self._file = open(storage.resolve(self.path)[1], "ab")  # noqa: SIM115 (closed by close)
        self._written = time.monotonic()

    def add(self, record: Metrics) -> None:
        """Write a record, whose ``step`` is not below those before it."""
        self.records.append(record)
        if self._file is not None:
            self._file.write(_lines([record]))
            self._file.flush()
        elif time.monotonic() - self._written > _REWRITE_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Write all records that are not in the file yet."""
        # A local file has every record at once; an object of a store is written anew, with all records.
        if self._file is None:
            storage.write_bytes(self.path, _lines(self.records))
            self._written = time.monotonic()

    def close(self) -> None:
        """Flush and close the file."""
        self.flush()
        if self._file is not None:
            self._file.close()


class MetricsTail:
    """A reader that follows the file while it grows, and gives each step and each validation once.

    The file is cut back when a training continues from a checkpoint. Steps that were given before are then not given
    again.
    """

    def __init__(self, out: str):
        """Follow the file of the run folder ``out``; it need not exist yet."""
        self._path = storage.join(out, METRICS_FILE)
        self._offset = 0
        self._newest_step = {"loss": -1, "validation_loss": -1}

    def read_new(self) -> list[Metrics]:
        """Return the records that are new since the last call."""
        try:
            data = storage.read_bytes(self._path)
        except FileNotFoundError:
            return []
        # The reader's offset stands behind a line of the old file.
        # Shorter, or no line ends where this reader stopped: a run that continued wrote the file anew.
        was_cut = len(data) < self._offset or data[self._offset - 1 : self._offset] not in (b"", b"\n")
        if was_cut:
            self._offset = 0
        end = data.rfind(b"\n") + 1
        lines = data[self._offset : end]
        self._offset = max(end, self._offset)
        records = []
        for record in _parse(lines, self._path):
            kind = "validation_loss"
            if "loss" in record:
                kind = "loss"
            # Only steps beyond the newest are new: a file that was written anew repeats what was read.
            if record["step"] > self._newest_step[kind]:
                self._newest_step[kind] = int(record["step"])
                records.append(record)
        return records


def _parse(lines: bytes, path: str) -> list[Metrics]:
    """Return the records of whole lines of the file at ``path``. Raises DatasetError for a damaged line."""
    records = []
    for line in lines.splitlines():
        try:
            record = json.loads(line)
            usable = isinstance(record["step"], int)
        except (ValueError, TypeError, KeyError, RecursionError):
            usable = False
        if not usable:
            shown = line[:40].decode(errors="replace")
            raise DatasetError(f"{path}: a line is damaged: {shown!r}; delete it")
        records.append(record)
    return records


def _lines(records: Iterable[Metrics]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()
