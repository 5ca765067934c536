"""The output folder of a command that can be killed anywhere and continued by running it again.

    output folder: a description (written first) -> the command's work -> a result file (written last)

``covray build``, ``train``, ``evaluate`` and ``sweep`` all open their folder as an ``Output``. It decides whether the
command begins, continues or is finished, refuses a folder at work or of another configuration, and keeps the MLflow run
of the description in step with how the command ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from pydantic import JsonValue

from covray.config import differences
from covray.distributed.lock import PREFIX, FolderLock
from covray.distributed.trackers.base import MLFLOW, Status, Tracked, trackers_of
from covray.distributed.trackers.together import RunTrackers
from covray.errors import DatasetError
from covray.io import storage
from covray.io.records import Record
from covray.io.storage import Folder
from covray.progress import stage

R = TypeVar("R", bound=Record)


class TrackedRecord(Protocol):
    """A description that names the runs in trackers; the MLflow run as ``mlflow_run_id``, if it has the field."""

    @property
    def tracker_runs(self) -> dict[str, str] | None:
        """Return the ids of the runs by tracker; None without any."""

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with changed fields."""

    def write(self, folder: Folder | str, name: str | None = None) -> None:
        """Write the file."""


T = TypeVar("T", bound=TrackedRecord)


def run_ids(record: TrackedRecord) -> dict[str, str | None]:
    """Return the ids of the runs that a description names, by tracker."""
    return {MLFLOW: getattr(record, "mlflow_run_id", None)} | (record.tracker_runs or {})


def _with_run_ids(record: T, started: Mapping[str, str]) -> T:
    """Return a description with the ids of the runs that were ``started``, each where its format has it."""
    others = dict(started)
    update: dict[str, Any] = {}
    if hasattr(record, "mlflow_run_id"):
        update["mlflow_run_id"] = others.pop(MLFLOW, None)
    if others:  # else the key is absent, as in the files of earlier versions
        update["tracker_runs"] = others
    return record.model_copy(update=update)


def _listed(trackers: Sequence[str]) -> str:
    return ", ".join(trackers).replace(MLFLOW, "MLflow") or "no tracker"


def mlflow_run_of(begun: Record | None) -> str | None:
    """Return the MLflow run of what a command continues; None where nothing has begun, or where it has none."""
    return getattr(begun, "mlflow_run_id", None)


class Output(Generic[R]):
    """The folder of a command, which nobody else works on for the length of a ``with`` block.

    A finished folder is only read, but for claims of commands that were killed, so that it may be read-only, and may be
    read by any number of commands.
    """

    def __init__(self, out: str, record: type[R], command: str, *, result: str | None = None, patience_s: float = 0.0):
        """Name the folder and the command.

        Args:
            out: The folder.
            record: The class of the description that the command writes first.
            command: The command, as a user knows it: ``covray build``.
            result: The file that the command writes last. None: the command always has something to do.
            patience_s: Seconds to wait for another command at work in the folder, before it is a reason to refuse.
        """
        self.folder = Folder(out)
        self.begun: R | None = None
        """The description of the command that this one continues; None where nothing has begun."""
        self.finished = False
        """Whether the result file is there."""
        self._record, self._command, self._result = record, command, result
        self._lock = FolderLock(self.folder, command, patience_s=patience_s)

    def __enter__(self) -> Self:
        """Lock the folder, unless it is finished, and read its description.

        Raises:
            DatasetError: Another command is at work in the folder, or it holds other files.
            ConfigError: The folder cannot be written.
            CovrayError: The description cannot be used.
        """
        self.finished = self._has_result()
        # A finished folder is only read: several commands may do so at a time. One that was killed after it wrote its
        # result may have left its claim there.
        if self.finished:
            self._lock.delete_ended()
        else:
            self._lock.acquire()
        try:
            self.finished = self._has_result()  # the command that had the lock before may have finished
            self.begun = self._record.read_if_present(self.folder)
            # A folder that holds something else is left alone.
            if self.begun is None:
                self._require_fresh()
        except BaseException:
            self._lock.release()
            raise
        return self

    def inspect(self) -> None:
        """Read the folder as ``__enter__`` does, but lock and write nothing, for a plan of the command.

        Raises:
            DatasetError: The folder holds other files.
            ConfigError: The folder cannot be written.
            CovrayError: The description cannot be used.
        """
        self.finished = self._has_result()
        self.begun = self._record.read_if_present(self.folder)
        if self.begun is None:
            storage.require_writable(self.folder.path)
            self._require_fresh()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Unlock the folder."""
        self._lock.__exit__(kind, error, trace)

    def require_same(
        self, recorded: Mapping[str, JsonValue], current: Mapping[str, JsonValue], *, open_matches: bool = False
    ) -> None:
        """Refuse to continue with another configuration, and say which keys differ.

        Args:
            recorded: What the description says: an identity, or fingerprints.
            current: The same of this command.
            open_matches: Whether a null in ``current`` matches anything, as before it is resolved.

        Raises:
            CovrayError: Of the description's class ``ERROR``.
        """
        differing = differences(dict(recorded), dict(current), open_matches=open_matches)
        if differing:
            raise self._record.ERROR(
                f"{self.folder.path}: was begun with another configuration: {'; '.join(differing)}; "
                "give the same, or another --out"
            )

    @contextmanager
    def tracked(self, config: Tracked, record: T) -> Iterator[tuple[RunTrackers, T]]:
        """Write the description, and open the runs in trackers that it names for the length of the block.

        Args:
            config: The resolved configuration, which says what tracks the command.
            record: The description. New runs are begun where it names none.

        Yields:
            The trackers, and the description with the ids of the runs.

        Raises:
            ConfigError: MLflow does not answer.
        """
        # Commands make their description anew; without these ids every restart would begin other runs.
        earlier = getattr(self.begun, "tracker_runs", None)
        if earlier is not None:
            record = record.model_copy(update={"tracker_runs": earlier})
        # Written twice: what has begun must be continued even when MLflow does not answer now.
        record.write(self.folder)
        tracker = RunTrackers(config, run_ids(record), self._command)
        with stage(f"opening the run in {_listed(trackers_of(config))}"):
            record = _with_run_ids(record, tracker.start())
        record.write(self.folder)
        status: Status = "FAILED"
        try:
            yield tracker, record
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            tracker.finish(status)

    def _has_result(self) -> bool:
        return self._result is not None and self.folder.exists(self._result)

    def _require_fresh(self) -> None:
        """Refuse a folder that holds something else."""
        for name in self.folder.list_files():
            if not (name.startswith(PREFIX) or storage.is_partial(name)):
                raise DatasetError(
                    f"{self.folder.path}: holds files that {self._command} did not write; give another --out"
                )
