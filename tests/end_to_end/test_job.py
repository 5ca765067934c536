"""``ray job submit`` on a real head with token authentication on: the same build, and none without the token."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end.conftest import COVRAY, FAST, environment, run, tokens_of

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end]
RAY = str(Path(sys.executable).parent / "ray")
PROJECT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Head:
    dashboard: str
    environment: dict[str, str]


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    """A Ray head of our own: own ports, own folder, token authentication; only it is stopped at the end."""
    token = tmp_path / "token"
    token.write_text("covray-test-token-0123456789abcdef")
    token.chmod(0o600)
    folder = tempfile.mkdtemp(prefix="cv", dir="/tmp")  # Ray's sockets need a short path
    variables = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
    ports = free_port(), free_port()
    command = [
        RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={ports[0]}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={ports[1]}", f"--temp-dir={folder}",
        "--num-cpus=2", "--disable-usage-stats", "--dashboard-agent-listen-port", str(free_port()),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    url = f"http://127.0.0.1:{ports[1]}"
    try:
        deadline = time.monotonic() + 120
        while not answers(url):
            assert process.poll() is None, "ray start ended"
            assert time.monotonic() < deadline, "the head did not come up in two minutes"
            time.sleep(0.5)
        yield Head(url, variables)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/api/version", timeout=5)
    except urllib.error.HTTPError:
        return True  # it asks who we are
    except OSError:
        return False
    return True


def submit(head: Head, variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    runtime = json.dumps({"working_dir": str(PROJECT), "excludes": [".git", "tests", "docs", "/benchmarks"]})
    command = [RAY, "job", "submit", "--address", head.dashboard, "--runtime-env-json", runtime, "--", "python"]
    return subprocess.run(
        [*command, "jobs/build_chains.py", *arguments],
        env=variables, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def test_a_submitted_job_builds_what_the_command_builds(
    head: Head, tmp_path: Path, scenes_manifest: Callable[..., Path]
) -> None:
    pairs = scenes_manifest(2)
    out, stranger_out, local = tmp_path / "job", tmp_path / "stranger", tmp_path / "local"
    stranger = {**head.environment, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}
    (tmp_path / "none").write_text("not-the-token-0123456789abcdef")
    refused = submit(head, stranger, "--pairs", str(pairs), "--out", str(stranger_out), *FAST)
    assert refused.returncode != 0
    assert not stranger_out.exists()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{head.dashboard}/api/jobs/", timeout=10)

    done = submit(head, head.environment, "--pairs", str(pairs), "--out", str(out), *FAST)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "14 chains" in done.stdout
    run("build", "--pairs", str(pairs), "--out", str(local), *FAST)
    assert tokens_of(out) == tokens_of(local)

    # The short form, from a folder that is no checkout: checked here, then the same job with the package itself.
    def short(*arguments: str, code: int, **variables: str) -> str:
        given = {**head.environment, **variables}
        command = [COVRAY, "submit", "--address", head.dashboard, *arguments]
        ended = subprocess.run(
            command, cwd=tmp_path, env=given, capture_output=True, text=True, timeout=600, check=False
        )
        assert ended.returncode == code, ended.stdout + ended.stderr
        assert "Traceback" not in ended.stderr
        return ended.stdout + ended.stderr

    build = ("build", "--pairs", str(pairs), "--out", str(tmp_path / "short"), *FAST)
    assert "14 chains" in short("--submission-id", "mine", *build, code=0)
    assert tokens_of(tmp_path / "short") == tokens_of(local)
    assert "has a job of this --submission-id" in short("--submission-id", "mine", *build, code=2)
    assert "does not accept this token" in short(*build, code=2, RAY_AUTH_TOKEN_PATH=str(tmp_path / "none"))
    assert "lengths.0" in short("build", "--pairs", "p", "--out", "o", "--lengths", "99", code=2)
    # A mistake that only the cluster can see has the code that it has there.
    absent = short("build", "--pairs", str(tmp_path / "absent"), "--out", str(out), code=2)
    assert f"{tmp_path}/absent" in absent
