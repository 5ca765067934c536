"""What the chaos tests share: a seed for the moments and the victims, and builds to be disturbed."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import BaseWSGIServer, make_server

from tests.support.commands import error_line, free_port, wait_for


@pytest.fixture
def rng() -> random.Random:
    """Moments and victims; COVRAY_TEST_SEED repeats those of a run that failed."""
    seed = int(os.environ.get("COVRAY_TEST_SEED", random.SystemRandom().randrange(10**6)))
    print(f"COVRAY_TEST_SEED={seed}")
    return random.Random(seed)


def is_alive(process: psutil.Process) -> bool:
    """Return whether ``process`` still runs; one that has ended and waits for its parent to take note does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


@pytest.fixture
def started() -> Iterator[list[psutil.Process]]:
    """Processes that a test saw start: at its end all of them must be gone."""
    processes: list[psutil.Process] = []
    yield processes
    # Ray's agents try for a while to report that their raylet is gone before they go too.
    _, there = psutil.wait_procs(processes, timeout=120)
    alive = [process for process in there if is_alive(process)]
    for process in alive:
        process.kill()
    assert not alive, f"left running: {alive}"


def start_two(start: Callable[[], subprocess.Popen[str]], rng: random.Random) -> subprocess.Popen[str]:
    """Start a command twice in one folder; return the process that works, after the other was refused in one line.

    Args:
        start: Starts the command, with its stderr as a pipe.
        rng: Draws how much later the second starts.
    """
    first = start()
    time.sleep(rng.choice([0, rng.uniform(0, 3)]))
    pair = (first, start())
    wait_for(lambda: any(process.poll() is not None for process in pair), "one of two ends")
    refused, working = sorted(pair, key=lambda process: process.poll() is None)
    message = error_line(refused.communicate()[1])
    assert refused.returncode == 2, message
    assert f"(process {working.pid} on " in message
    assert "is at work in this folder" in message
    return working


def folders_left(out: Path) -> list[str]:
    """Names below ``out`` that only an unfinished build has."""
    return [path.name for path in out.rglob("*") if path.name == "_checkpoint" or path.name.endswith(".part")]


class S3:
    """An S3 server on loopback: slow, now and then overloaded, and it can be stopped and started with what it holds."""

    def __init__(self, rng: random.Random):
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.port = free_port()
        self.refusals = 0.0
        self.requests = 0
        self._rng = rng
        self._store = DomainDispatcherApplication(create_backend_app)
        self._server: BaseWSGIServer | None = None
        self.start()

    def __call__(self, request: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        self.requests += 1
        time.sleep(self._rng.uniform(0, 0.02))
        if self._rng.random() < self.refusals:
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
        answer: Iterable[bytes] = self._store(request, start_response)
        return answer

    def start(self) -> None:
        self._server = make_server("127.0.0.1", self.port, self, threaded=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


def create_bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Create the bucket ``covray`` on a server of S3 and let this process, and what it starts, use that server."""
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "covray",
        "AWS_SECRET_ACCESS_KEY": "covray",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="covray")


@pytest.fixture
def s3(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    server = S3(rng)
    create_bucket(f"http://127.0.0.1:{server.port}", monkeypatch)
    yield server
    server.stop()
