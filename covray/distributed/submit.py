"""``covray submit``: run a command, which was checked here, as a job of a Ray cluster."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobStatus, JobSubmissionClient
from rich.console import Console

import covray
from covray.config import Section
from covray.distributed.session import TOKEN_ADVICE
from covray.errors import ConfigError

ADDRESS = "http://127.0.0.1:8265"
"""Where a dashboard answers on its head, and on this machine through ``ray dashboard cluster/gpu.yaml``."""
_FILE = "config.yaml"
_POLL_S = 0.5


def submit(
    step: str,
    config: Section | None,
    arguments: Sequence[str],
    *,
    address: str | None,
    submission_id: str | None,
    wait: bool,
    console: Console,
) -> int:
    """Run ``covray step`` on the cluster.

    The job gets this package and the configuration, and nothing else from here: no data, no caches.

    Args:
        step: The command.
        config: Its resolved configuration; None where it takes none.
        arguments: Passed on as they are.
        address: Of the dashboard; by default RAY_API_SERVER_ADDRESS, or that of a head on this machine.
        submission_id: The job's name; by default Ray makes one.
        wait: Show the job's output, and end when it does.
        console: Where to print.

    Returns:
        The exit code: the job's own; 0 at once without ``wait``; 130 if the job was stopped.

    Raises:
        ConfigError: The cluster does not answer, or does not take the job.
    """
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or ADDRESS
    command = ["python", "-m", "covray", *step.split()]
    if config is not None:
        command += ["--config", _FILE]
    command += arguments
    # They log every package that they send.
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # the client prefers it, and RAY_ADDRESS, to what it is given
    try:
        client = JobSubmissionClient(address)
        with tempfile.TemporaryDirectory() as folder:
            if config is not None:
                Path(folder, _FILE).write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
            # With the package of this machine: the cluster may have another version, or none.
            job = client.submit_job(
                entrypoint=shlex.join(command),
                submission_id=submission_id,
                runtime_env={"working_dir": folder, "py_modules": [str(Path(covray.__file__).parent)]},
                metadata={"covray": covray.__version__, "step": step},
            )
    except (RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"{address}: {_why(error)}") from error
    console.print(f"job {job}: ray job logs {job}, ray job stop {job}", highlight=False, soft_wrap=True)
    if not wait:
        return 0
    return _follow(client, job, address, console)


def _follow(client: JobSubmissionClient, job: str, address: str, console: Console) -> int:
    """Show the output of a job until it ends; return its exit code, 130 if it was stopped. Raises ConfigError."""
    try:
        asyncio.run(_show(client, job, console))
        while not client.get_job_status(job).is_terminal():  # the logs end before the job's status is final
            time.sleep(_POLL_S)
        details = client.get_job_info(job)
    except (RayError, ConnectionError, RuntimeError, OSError) as error:
        raise ConfigError(f"{address}: {_why(error)}; the job {job} may go on: ray job status {job}") from error
    except KeyboardInterrupt:
        console.print(f"the job {job} goes on; to stop it: ray job stop {job}", highlight=False, soft_wrap=True)
        raise
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        console.print("stopped; run the same command again to continue", highlight=False)
        return 130
    return details.driver_exit_code or 1


async def _show(client: JobSubmissionClient, job: str, console: Console) -> None:
    """Print the output of a job until it ends."""
    async for text in client.tail_job_logs(job):
        console.print(text, end="", highlight=False, soft_wrap=True, markup=False)


def _why(error: BaseException) -> str:
    """Return in one line what is wrong and what to do."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, AuthenticationError):
        return f"the cluster does not accept this token; {TOKEN_ADVICE}"
    if "onnect" in str(error):
        return "no Ray cluster answers there; give --address, or open it by ray dashboard cluster/gpu.yaml"
    if "already exists" in str(error):
        return "has a job of this --submission-id; give another"
    return f"did not take the job ({lines[-1]})"
