"""MLflow: one run a training or evaluation, and the same run after a restart.

The store is a file beside the run, or any server. Training never waits for it and never ends because of it: what could
not be logged is kept and logged when the store is back.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

from covray.config import EvaluateConfig, SweepConfig, TrainConfig, leaves
from covray.errors import ConfigError
from covray.io import storage

FLUSH_S = 5.0
"""Metrics are sent together, no more often than this."""
RETRY_S = 30.0
"""Pause after a store that did not answer."""
_ANSWER_S = 5
_PATIENT_S = 30  # where nothing waits, as before a run's first step and after its last
_UPLOAD_S = 120  # a server that passes a file on to an object store answers when it is through
_METRICS_AT_ONCE, _PARAMS_AT_ONCE = 1000, 100  # MLflow's limits for one request
_PARAM_CHARACTERS = 500  # what the oldest servers in use take
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(_ANSWER_S),
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a training is nobody's business
    "GIT_PYTHON_REFRESH": "quiet",
}

Tracked = TrainConfig | EvaluateConfig | SweepConfig


class Tracker:
    """The MLflow run of a training, or of what else ``command`` is.

    ``run_id`` continues that run; None begins one. Metrics that the run has already, by name and step, are not logged
    again, so that after a restart the whole curve may be handed over. With ``tracking.uri`` "none" every method does
    nothing. Raises ConfigError when the run's folder is remote and no store is named.
    """

    def __init__(self, config: Tracked, run_id: str | None, command: str = "covray train"):
        self._config, self._run_id, self._command = config, run_id, command
        self._uri = store_of(config)
        self._client: Any = None
        self._pending: list[Any] = []  # mlflow.entities.Metric that the store does not have
        self._newest: dict[str, int] = {}  # the last step of every metric that was handed over
        self._next_try = 0.0
        self._warned = False

    def start(self) -> str | None:
        """Begin or continue the run; gives its id, None without tracking.

        A run that the store no longer has is begun anew. Raises ConfigError when the store does not answer.
        """
        if self._uri is None:
            return None
        with _environment(MLFLOW_HTTP_REQUEST_TIMEOUT=str(_PATIENT_S)):
            try:
                self._client = _connect(self._uri)
                self._run_id = self._continue() or self._begin()
                self._log_parameters()
            except _errors() as error:
                raise ConfigError(
                    f"MLflow at {_shown(self._uri)} does not answer ({_line(error)}); start it, or give another "
                    "--tracking-uri (none: no tracking)"
                ) from error
        return self._run_id

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Log ``metrics`` of ``step``; those that are None are unknown and left out.

        Of training only every ``tracking.log_every_steps`` is kept, of validation every one. Never raises because of
        the store.
        """
        if self._client is None or (step % self._config.tracking.log_every_steps and "validation_loss" not in metrics):
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
        """Copy the files ``names`` of ``folder``, local or remote, into the run, below the same names."""
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

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> bool:
        """Log what is left, and close the run; gives whether the store has it all."""
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
        """The run that was to be continued, running again; None when the store does not have it."""
        from mlflow.exceptions import MlflowException

        if self._run_id is None:
            return None
        try:
            run = self._client.get_run(self._run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        if run.info.lifecycle_stage != "active":
            return None
        for name in run.data.metrics:
            history = self._client.get_metric_history(self._run_id, name)
            self._newest[name] = max(metric.step for metric in history)
        self._client.update_run(self._run_id, status="RUNNING")
        return self._run_id

    def _begin(self) -> str:
        name = self._config.tracking.experiment
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None and experiment.lifecycle_stage != "active":
            raise ConfigError(
                f"--set tracking.experiment={name}: was deleted in {_shown(str(self._uri))}; restore it there "
                "(mlflow experiments restore), or give another name"
            )
        if experiment is not None:
            experiment_id = experiment.experiment_id
        elif self._config.tracking.uri is None:  # artefacts lie beside the default store; elsewhere its server decides
            beside = Path(storage.resolve(self._config.out)[1]).parent / "mlartifacts"
            experiment_id = self._client.create_experiment(name, artifact_location=beside.as_uri())
        else:
            experiment_id = self._client.create_experiment(name)
        run_name = posixpath.basename(self._config.out.rstrip("/"))
        tags = {"mlflow.source.name": self._command}
        parent = self._config.tracking.parent_run_id
        if parent is not None:
            tags["mlflow.parentRunId"] = parent
            # A kill may have come between its beginning and its being written down.
            wanted = f"tags.`mlflow.parentRunId` = '{parent}' AND attributes.run_name = '{run_name}'"
            found = self._client.search_runs([experiment_id], wanted, max_results=1)
            if found:
                self._run_id = str(found[0].info.run_id)
                return str(self._continue())
        return str(self._client.create_run(experiment_id, run_name=run_name, tags=tags).info.run_id)

    def _log_parameters(self) -> None:
        """The resolved configuration; a run that was killed in between gets what it lacks."""
        from mlflow.entities import Param

        had = self._client.get_run(self._run_id).data.params
        values = leaves(self._config.model_dump(mode="json", exclude={"tracking"}))
        missing = [
            Param(key, str(value)[:_PARAM_CHARACTERS]) for key, value in values if key not in had and value is not None
        ]
        for start in range(0, len(missing), _PARAMS_AT_ONCE):
            self._client.log_batch(self._run_id, params=missing[start : start + _PARAMS_AT_ONCE])

    def _send(self) -> None:
        """Send what is pending; what the store does not take stays pending."""
        with _environment():
            try:
                while self._pending:
                    self._client.log_batch(self._run_id, metrics=self._pending[:_METRICS_AT_ONCE])
                    del self._pending[:_METRICS_AT_ONCE]
            except _errors() as error:
                self._next_try = time.monotonic() + RETRY_S
                if not self._warned:
                    self._warn(
                        f"does not answer ({_line(error)}); training goes on, and what it misses is logged later"
                    )
                self._warned = True
            else:
                self._next_try = time.monotonic() + FLUSH_S

    def _warn(self, text: str) -> None:
        Console(stderr=True, emoji=False).print(
            f"covray: MLflow at {escape(_shown(str(self._uri)))}: {escape(text)}", highlight=False, soft_wrap=True
        )


def store_of(config: Tracked) -> str | None:
    """The MLflow store of a run as MLflow names it; None for no tracking.

    Raises ConfigError when the run's folder is remote, where no file can be a database, and no store is named.
    """
    uri = config.tracking.uri
    if uri is not None:
        return None if uri == "none" else uri
    if "://" in config.out:
        raise ConfigError(
            f"{config.out}: beside a remote run there can be no mlflow.db; give --tracking-uri (none: no tracking)"
        )
    return f"sqlite:///{Path(storage.resolve(config.out)[1]).parent / 'mlflow.db'}"


def _connect(uri: str) -> Any:
    """A client of the store, which is made if it is a file that does not exist."""
    from mlflow import MlflowClient

    # Its own reports, and those of the migrations that make a new file's tables, are of no use to the user.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if uri.startswith("sqlite:///"):  # MLflow tries for minutes to open a file that it cannot
        path = Path(uri.removeprefix("sqlite:///"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _errors() -> tuple[type[Exception], ...]:
    """What a store that is wrong or away raises; ImportError is a database without its driver."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError, ImportError


@contextmanager
def _environment(**changes: str) -> Iterator[None]:
    """MLflow is patient and talkative, and reads in the environment not to be; what the user set there holds."""
    added = {key: value for key, value in (_ENVIRONMENT | changes).items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


def _shown(text: str) -> str:
    """``text`` without the password that a URI in it may carry."""
    return re.sub(r"(://[^:/@\s]*:)[^@/\s]*@", r"\1***@", text)


def _line(error: BaseException) -> str:
    text = _shown(" ".join(str(error).split()) or type(error).__name__)
    reason = text.rpartition("Caused by ")[2]  # requests wraps the one thing that matters
    return reason if len(reason) <= 200 else f"{reason[:200]}..."
