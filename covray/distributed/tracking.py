"""MLflow: one run for each training, evaluation or sweep, and the same run after a restart.

The store is a file beside the run, or any server. Training never waits for it and never ends because of it: values that
cannot be logged are kept, and logged when the store is back.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import posixpath
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from covray.config import leaves
from covray.distributed.trackers.base import Status, Tracked
from covray.distributed.tracking_file import (
    ARTEFACTS,
    STORE_FILE,
    beside,
    file_of,
    file_store,
    folder_token,
    move_artefacts,
)
from covray.errors import ConfigError
from covray.io import storage

FLUSH_S = 5.0
"""Metrics are sent together, at most this often."""
RETRY_S = 30.0
"""Pause after the store did not answer."""
_ANSWER_S = 5
_PATIENT_S = 30  # before the first step of a run and after its last, when nothing else waits
_UPLOAD_S = 120  # a server that forwards a file to an object store answers when the file is there
_METRICS_AT_ONCE, _PARAMS_AT_ONCE = 1000, 100  # MLflow's limits for one request
_PARAM_CHARACTERS = 500  # what the oldest servers in use take
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(_ANSWER_S),
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}

_FOLDER_TAG = "covray.folder"
"""The tag of a run that tells which folder it belongs to."""


class MlflowTracker:
    """The MLflow run of a command: the tracker that commands have by default.

    Metrics that the run already has, by name and step, are not logged again, so that after a restart all metrics may be
    handed over. With ``tracking.uri`` "none" every method does nothing.
    """

    def __init__(self, config: Tracked, run_id: str | None, command: str = "covray train"):
        """Prepare the run; MLflow is not asked yet.

        Args:
            config: The configuration: where MLflow is, and what is logged as parameters.
            run_id: The run to continue; None begins one.
            command: The command, as a user knows it.

        Raises:
            ConfigError: The folder of the command is remote, and no store is named.
        """
        self._config, self._run_id, self._command = config, run_id, command
        self._uri = store_of(config)
        self._client: Any = None
        self._pending: list[Any] = []  # mlflow.entities.Metric that the store does not have
        self._newest: dict[str, int] = {}  # the last step of every metric that was handed over
        self._next_try = 0.0
        self._warned = False

    def start(self) -> str | None:
        """Begin or continue the run; return its id, None without tracking.

        A run that the store no longer has is begun anew. Of a run that is begun, other runs of the same folder that are
        still running are ended: their processes were killed.

        Raises:
            ConfigError: The store does not answer.
        """
        if self._uri is None:
            return None
        with _environment(MLFLOW_HTTP_REQUEST_TIMEOUT=str(_PATIENT_S)):
            try:
                self._client = _connect(self._uri)
                if self._config.tracking.uri is None:
                    move_artefacts(beside(self._config.out))
                self._run_id = self._continue() or self._begin()
                self._log_parameters()
            except _errors() as error:
                raise ConfigError(
                    f"MLflow at {_shown(self._uri)} does not answer ({_line(error)}); start it, or give another "
                    "--tracking-uri (none: no tracking)"
                ) from error
        return self._run_id

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Log metrics; never raises because of the store.

        Args:
            step: The step that the metrics are of. Steps between the multiples of ``tracking.log_every_steps`` are left
                out, unless they are of a validation.
            metrics: Values by name; None is left out.
        """
        if self._client is None:
            return
        if step % self._config.tracking.log_every_steps and "validation_loss" not in metrics:
            return
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        for name, value in metrics.items():
            if value is not None and step > self._newest.get(name, -1):
                self._newest[name] = step
                self._pending.append(Metric(name, float(value), now_ms, step))
        if time.monotonic() >= self._next_try:
            self._send()

    def artefacts(self, folder: str, names: Iterable[str]) -> None:
        """Copy the files ``names`` of ``folder``, local or remote, into the run, under the same names."""
        if self._client is None:
            return
        with tempfile.TemporaryDirectory() as local, _environment(MLFLOW_HTTP_REQUEST_TIMEOUT=str(_UPLOAD_S)):
            try:
                for name in names:
                    copy = Path(local, name)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy.write_bytes(storage.read_bytes(storage.join(folder, name)))
                self._client.log_artifacts(self._run_id, local)
            except _errors() as error:
                self._warn(f"files of {folder} could not be copied there ({_line(error)})")

    def finish(self, status: Status) -> bool:
        """Log the values that are left, and close the run; return whether the store has them all."""
        if self._client is None:
            return True
        with _environment(MLFLOW_HTTP_REQUEST_TIMEOUT=str(_PATIENT_S)):
            self._send()
            if self._pending:
                self._warn(f"{len(self._pending)} values could not be logged; metrics.jsonl of the run has them all")
            try:
                self._client.set_terminated(self._run_id, status)
            except _errors() as error:
                self._warn(f"the run could not be closed ({_line(error)})")
                return False
        return not self._pending

    def _continue(self) -> str | None:
        """Return the run that is continued, after setting it running; None when the store does not have it."""
        from mlflow.exceptions import MlflowException

        if self._run_id is None:
            return None
        try:
            run = self._client.get_run(self._run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        # A deleted run is still found, but takes no values.
        if run.info.lifecycle_stage != "active":
            return None
        # Where each metric stopped: a resumed training logs some steps again, and the store must have them once.
        for name in run.data.metrics:
            history = self._client.get_metric_history(self._run_id, name)
            self._newest[name] = max(metric.step for metric in history)
        self._client.update_run(self._run_id, status="RUNNING")
        return self._run_id

    def _begin(self) -> str:
        """Begin a run in the experiment of the configuration; return its id."""
        experiment_id = self._experiment_id()
        run_name = posixpath.basename(self._config.out.rstrip("/"))
        tags = {"mlflow.source.name": self._command, _FOLDER_TAG: folder_token(self._config.out)}
        of_folder = f"tags.`{_FOLDER_TAG}` = '{tags[_FOLDER_TAG]}'"
        parent = self._config.tracking.parent_run_id
        if parent is not None:
            tags["mlflow.parentRunId"] = parent
            # Whoever began it may have been killed before it wrote the id down.
            query = f"{of_folder} AND tags.`mlflow.parentRunId` = '{parent}'"
            for run in self._client.search_runs([experiment_id], query, max_results=1):
                self._run_id = str(run.info.run_id)
                return str(self._continue())
        for run in self._client.search_runs([experiment_id], f"{of_folder} AND attributes.status = 'RUNNING'"):
            # The folder is locked, so nobody works on this run any more.
            self._client.set_terminated(run.info.run_id, "KILLED")
        return str(self._client.create_run(experiment_id, run_name=run_name, tags=tags).info.run_id)

    def _experiment_id(self) -> str:
        """Return the id of the configuration's experiment, which is made if it is absent."""
        name = self._config.tracking.experiment
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None and experiment.lifecycle_stage != "active":
            raise ConfigError(
                f"--set tracking.experiment={name}: was deleted in {_shown(str(self._uri))}; restore it there "
                "(mlflow experiments restore), or give another name"
            )
        if experiment is not None:
            return str(experiment.experiment_id)
        if self._config.tracking.uri is not None:  # the server decides where artefacts are
            return str(self._client.create_experiment(name))
        artefacts = beside(self._config.out) / ARTEFACTS
        return str(self._client.create_experiment(name, artifact_location=artefacts.as_uri()))

    def _log_parameters(self) -> None:
        """Log the resolved configuration; a run that was killed in between gets what it lacks."""
        from mlflow.entities import Param

        logged = self._client.get_run(self._run_id).data.params
        missing = []
        for key, value in leaves(self._config.model_dump(mode="json", exclude={"tracking"})):
            if key not in logged and value is not None:
                missing.append(Param(key, str(value)[:_PARAM_CHARACTERS]))
        for start in range(0, len(missing), _PARAMS_AT_ONCE):
            self._client.log_batch(self._run_id, params=missing[start : start + _PARAMS_AT_ONCE])

    def _send(self) -> None:
        """Send the pending values; those that the store does not take stay pending."""
        with _environment():
            try:
                while self._pending:
                    self._client.log_batch(self._run_id, metrics=self._pending[:_METRICS_AT_ONCE])
                    del self._pending[:_METRICS_AT_ONCE]
            except _errors() as error:
                self._next_try = time.monotonic() + RETRY_S
                if not self._warned:
                    self._warn(
                        f"does not answer ({_line(error)}); training goes on, and the missing values are logged later"
                    )
                self._warned = True
            else:
                self._next_try = time.monotonic() + FLUSH_S

    def _warn(self, text: str) -> None:
        Console(stderr=True, emoji=False).print(
            f"covray: MLflow at {escape(_shown(str(self._uri)))}: {escape(text)}", highlight=False, soft_wrap=True
        )


def store_of(config: Tracked) -> str | None:
    """Return the MLflow store of a run as MLflow names it; None for no tracking.

    Raises:
        ConfigError: The run's folder is remote, where no file can be a database, and no store is named; or MLflow is
            not installed.
    """
    uri = config.tracking.uri
    if uri == "none":
        return None
    if importlib.util.find_spec("mlflow") is None:
        raise ConfigError("tracking.uri: MLflow is not installed; pip install mlflow, or set tracking.uri=none")
    if uri is not None:
        return uri
    if "://" in config.out:
        raise ConfigError(
            f"{config.out}: beside a remote run there can be no mlflow.db; give --tracking-uri (none: no tracking)"
        )
    return file_store(beside(config.out) / STORE_FILE)


def _connect(uri: str) -> Any:
    """Return a client of the store; a file that does not exist is made."""
    from mlflow import MlflowClient

    # Its own reports, and those of the migrations that make a new file's tables, are of no use to the user.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    path = file_of(uri)
    if path is not None:  # MLflow tries for minutes to open a file that it cannot
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _errors() -> tuple[type[Exception], ...]:
    """Return the errors of a store that is wrong or away; ImportError is a database without its driver."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError, ImportError


@contextmanager
def _environment(**changes: str) -> Iterator[None]:
    """Set MLflow's environment variables for short waits and few messages; variables that the user has set stay."""
    added = {key: value for key, value in (_ENVIRONMENT | changes).items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


def _shown(text: str) -> str:
    """Return ``text`` without the password that a URI in it may carry."""
    # Up to the last @ before a slash: passwords hold @, too, though they should not.
    return re.sub(r"(://[^:/@\s]*:)[^/\s]*@", r"\1***@", text)


def _line(error: BaseException) -> str:
    """Return the reason of an error on one line, without a password."""
    text = _shown(" ".join(str(error).split()) or type(error).__name__)
    reason = text.rpartition("Caused by ")[2]  # requests puts the reason at the end
    if len(reason) <= 200:
        return reason
    return f"{reason[:200]}..."
