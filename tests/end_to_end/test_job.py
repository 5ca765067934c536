"""``ray job submit`` on a real head with token authentication on: the same build, and none without the token."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.commands import COVRAY, FAST, RAY, Head, committed, computed, tokens_of, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end]
PROJECT = Path(__file__).parents[2]


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    """A head of two CPUs; only it is stopped at the end."""
    head = Head(tmp_path, "--num-cpus=2")
    try:
        head.start()
        yield head
    finally:
        head.stop()


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
    out, stranger_out = tmp_path / "job", tmp_path / "stranger"
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
    assert tokens_of(out) == computed(pairs)

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

    # Stopped, a job says so; the same command continues it.
    more, stopped = scenes_manifest(8, "more.parquet"), tmp_path / "stopped"
    build = ("build", "--pairs", str(more), "--out", str(stopped), *FAST, "--set", "rows_per_block=4")
    command = [COVRAY, "submit", "--address", head.dashboard, "--submission-id", "mine", *build]
    job = subprocess.Popen(command, cwd=tmp_path, env=head.environment, stdout=subprocess.DEVNULL)
    wait_for(lambda: committed(stopped) > 0, "a block", job)
    # What ray job stop asks for; the command itself starts so slowly that the build might be done before.
    token = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    stop = urllib.request.Request(f"{head.dashboard}/api/jobs/mine/stop", headers={"Authorization": f"Bearer {token}"})
    urllib.request.urlopen(stop, data=b"", timeout=60).close()
    assert job.wait(120) == 130
    assert 0 < committed(stopped) < 56
    continued = short(*build, code=0)
    assert "continuing: " in continued
    assert "56 chains" in continued
    assert len(tokens_of(stopped)) == 56

    assert "has a job of this --submission-id" in short("--submission-id", "mine", *build, code=2)
    assert "does not accept this token" in short(*build, code=2, RAY_AUTH_TOKEN_PATH=str(tmp_path / "none"))
    assert "lengths.0" in short("build", "--pairs", "p", "--out", "o", "--lengths", "99", code=2)
    # A mistake that only the cluster can see has the code that it has there.
    absent = short("build", "--pairs", str(tmp_path / "absent"), "--out", str(out), code=2)
    assert f"{tmp_path}/absent" in absent

    # The other steps, on what the first has made.
    small = ("--set", "optimizer.batch_tokens=512", "--tracking-uri", "none")
    trained = short(
        "train", "--scale", "nano", "--data", str(stopped), "--out", str(tmp_path / "run"), "--length", "3",
        "--steps", "1", "--set", "sentences.validation_split=null", *small, code=0,
    )  # fmt: skip
    assert f"adapter in {tmp_path}/run/adapter" in trained
    scored = short(
        "evaluate", "--data", str(stopped), "--adapter", str(tmp_path / "run"), "--out", str(tmp_path / "scores"),
        "--split", "train", "--set", "example_split=train", "--tasks", "depth", "--episodes", "1", "--baselines",
        "copy", "--tracking-uri", "none", code=0,
    )  # fmt: skip
    assert f"{tmp_path}/scores/index.html" in scored
