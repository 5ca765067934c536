"""What the end-to-end tests share: commands run as a user would, trainings, and manifests of rendered scenes."""

from __future__ import annotations

import contextlib
import functools
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from covray.chains.dataset import ChainDataset
from covray.chains.prepare import prepare_block
from covray.cli.app import main
from covray.config import BuildConfig, TrainConfig, load_config
from covray.pairs.manifest import ManifestWriter
from covray.pairs.manifest_reading import check_manifest
from covray.pairs.scenes import scene_pairs

COVRAY = str(Path(sys.executable).parent / "covray")
RAY = str(Path(sys.executable).parent / "ray")
FAST = ("--lengths", "3", "--set", "prior.steps=5", "--set", "engine.batch=16")
"""Fewer steps than anyone would build with: the tests ask whether rows are lost, not how frames look."""


def environment(**changes: str) -> dict[str, str]:
    """The environment of a command: no cluster of others, one thread of OpenMP, this virtual environment first.

    A job's ``python`` is the one on its head's PATH, and tests run without the environment being activated.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return kept | {"OMP_NUM_THREADS": "1", "PATH": path} | changes


def run(*arguments: str, code: int = 0, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run ``covray`` to its end and check its exit code."""
    done = subprocess.run(
        [COVRAY, *arguments], capture_output=True, text=True, env=environment(**changes), timeout=600, check=False
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture
def run_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run`` in this process, for commands that start no Ray: here, what takes seconds to import is there already."""

    def no_ray(*_: Any, **__: Any) -> None:
        raise AssertionError("Ray was started")

    def run_main(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        with monkeypatch.context() as changed:
            changed.setattr("ray.init", no_ray)
            changed.setattr(sys, "argv", ["covray", *arguments])
            with pytest.raises(SystemExit) as end:
                main()
        stdout, stderr = capsys.readouterr()
        assert (end.value.code or 0) == code, f"exit {end.value.code}\n{stdout}\n{stderr}"
        return subprocess.CompletedProcess(["covray", *arguments], code, stdout, stderr)

    return run_main


def error_line(stderr: str) -> str:
    """The one line that answers a mistake, without ``covray:``; on a slow machine lines of progress stand before it."""
    assert "Traceback" not in stderr, stderr
    lines = [line for line in stderr.splitlines() if line.startswith("covray: ")]
    assert len(lines) == 1, stderr
    assert stderr.splitlines()[-1] == lines[0], "nothing follows the error"
    return lines[0].removeprefix("covray: ")


class Done(NamedTuple):
    """How a command ended in this process, and what it printed."""

    code: int
    out: str
    err: str


_TOGETHER = """
import json, sys
from covray.cli.app import main
from covray.distributed.session import ray_session

mark, codes = sys.argv[2], []
with ray_session():
    for arguments in json.loads(sys.argv[1]):
        sys.argv = ["covray", *arguments]
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        codes.append(code)
        for stream in (sys.stdout, sys.stderr):
            print(mark, file=stream, flush=True)
print(json.dumps(codes))
"""
_MARK = "--- the end of a command ---"


def run_together(commands: Sequence[Sequence[str]], **changes: str) -> list[Done]:
    """Run commands one after another, however they end, in one process and one Ray session.

    Of several commands only the first waits for what a process and its workers import.

    Args:
        commands: The arguments of each.
        changes: Of the environment.
    """
    script = [sys.executable, "-c", _TOGETHER, json.dumps(commands), _MARK]
    done = subprocess.run(script, capture_output=True, text=True, env=environment(**changes), timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *outs, codes = done.stdout.split(f"{_MARK}\n")
    *errs, rest = done.stderr.split(f"{_MARK}\n")
    assert rest == "", "nothing is said after the last"
    return [Done(*end) for end in zip(json.loads(codes), outs, errs, strict=True)]


@pytest.fixture(name="run")
def run_to_any_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """``covray`` with these arguments in this process, however it ends."""

    def run_main(*arguments: object) -> Done:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["covray", *map(str, arguments)])
        code: Any = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        assert isinstance(code, int)
        return Done(code, *capsys.readouterr())

    return run_main


@pytest.fixture
def mistake(run: Callable[..., Done]) -> Callable[..., str]:
    """The one line that a mistaken command answers with."""

    def run_mistake(*arguments: object) -> str:
        done = run(*arguments)
        assert done.code == 2
        assert done.out == ""
        line = error_line(done.err)
        assert line.isprintable()
        return line

    return run_mistake


def tokens_of(dataset: Path | str) -> dict[int, Any]:
    """Everything that a pair's identity promises, by pair."""
    rows = ChainDataset(str(dataset)).rows(errors=True)
    found: dict[int, Any] = {}
    for row in rows:
        assert row["pair_id"] not in found, f"pair {row['pair_id']} is there twice"
        frames = row["frames"] or []
        found[row["pair_id"]] = (
            row["task"],
            row["split"],
            row["error"],
            None if row["source"] is None else row["source"].tobytes(),
            None if row["label"] is None else row["label"].tobytes(),
            tuple((frame["method"], frame["alpha"], frame["tokens"].tobytes()) for frame in frames),
        )
    return found


@dataclass(frozen=True)
class Computed:
    """What a build must give."""

    tokens: dict[int, Any]
    """As ``tokens_of`` gives them."""
    evaluations: int
    """Forward passes of the UNet, counted by picture."""


def computed(manifest: Path) -> dict[int, Any]:
    """What ``tokens_of`` a build of ``manifest`` with ``FAST`` must give: computed here, in one block, without Ray."""
    return compute(manifest, [3]).tokens


def compute(manifests: Path, lengths: Sequence[int]) -> Computed:
    """Compute what a build with the settings of ``FAST`` must give: here, in one block, without Ray.

    Args:
        manifests: A manifest or a folder of them.
        lengths: Of the chains.
    """
    from covray.chains.build import BlockBuilder

    options = {"pairs": str(manifests), "out": "nowhere", "lengths": list(lengths)}
    builder = BlockBuilder(load_config(BuildConfig, None, options, [FAST[3], FAST[5]]))
    pairs = pq.read_table(manifests, columns=["pair_id", "task", "split", "image", "label"])
    root = check_manifest(manifests).root
    rows, stats = builder.build(prepare_block(pairs, builder.config, builder.models(), root))

    def data(numbers: list[int] | None) -> bytes | None:
        return None if numbers is None else np.array(numbers, np.uint16).tobytes()

    tokens = {}
    for row in rows.to_pylist():
        frames = tuple((frame["method"], frame["alpha"], data(frame["tokens"])) for frame in row["frames"] or [])
        ends = (data(row["source"]), data(row["label"]))
        tokens[row["pair_id"]] = (row["task"], row["split"], row["error"], *ends, frames)
    return Computed(tokens, stats.evaluations)


def wait_for(condition: Callable[[], bool], what: str, running: subprocess.Popen[Any] | None = None) -> None:
    """Wait until ``condition`` holds; ``running`` must not end before."""
    deadline = time.monotonic() + 600
    while not condition():
        assert running is None or running.poll() is None, f"ended with {running and running.returncode} before {what}"
        assert time.monotonic() < deadline, f"not in ten minutes: {what}"
        time.sleep(0.05)


def committed(out: Path) -> int:
    """Rows of a build or an evaluation whose files are committed."""
    files = [file for file in (out / "_checkpoint").glob("*.parquet") if not file.name.endswith(".pending.parquet")]
    return sum(pq.read_metadata(file).num_rows for file in files)


def is_called(process: psutil.Process, name: str) -> bool:
    """Whether a process, if it still is one, has ``name`` in the title that Ray gave it."""
    with contextlib.suppress(psutil.Error):
        return name in " ".join(process.cmdline()[:1])
    return False


def actors_of(driver: subprocess.Popen[Any], name: str) -> list[psutil.Process]:
    """The processes of the actors of class ``name`` in the Ray that ``driver`` started."""
    return [child for child in psutil.Process(driver.pid).children(recursive=True) if is_called(child, name)]


@pytest.fixture
def scenes_manifest(tmp_path: Path) -> Callable[..., Path]:
    """Writes a manifest of rendered scenes, seven pairs each."""

    def write(scenes: int, name: str = "pairs.parquet", reverse: bool = False) -> Path:
        pairs = list(scene_pairs(scenes))
        with ManifestWriter(str(tmp_path / name)) as writer:
            for pair in reversed(pairs) if reverse else pairs:
                writer.add(pair)
        return tmp_path / name

    return write


def kill_all(processes: Sequence[subprocess.Popen[Any]]) -> None:
    """Kill those that still run, with all that they started."""
    for process in processes:
        if process.poll() is None:
            for child in (*psutil.Process(process.pid).children(recursive=True), process):
                child.kill()


@pytest.fixture
def start_training(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts ``covray train`` with a configuration; nothing of it outlives the test."""
    processes: list[subprocess.Popen[str]] = []

    def begin(config: TrainConfig, **changes: str) -> subprocess.Popen[str]:
        file = tmp_path / f"{Path(config.out).name}.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
        # A driver whose Ray is gone gives up after these seconds (a minute by default).
        variables = environment(RAY_gcs_rpc_server_reconnect_timeout_s="5", **changes)
        command = [COVRAY, "train", "--config", str(file)]
        processes.append(
            subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        )
        return processes[-1]

    yield begin
    kill_all(processes)


def finish_training(process: subprocess.Popen[str]) -> str:
    """Wait for a good end; gives what it said."""
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Head:
    """A Ray head as a user starts one: own ports, own folder, token authentication. It can be killed and started again.

    ``options`` of ``ray start``; ``changes`` of its environment; without a ``dashboard`` it starts sooner.
    """

    def __init__(self, folder: Path, *options: str, dashboard: bool = True, **changes: str):
        token = folder / "token"
        token.write_text("covray-test-token-0123456789abcdef")
        token.chmod(0o600)
        self.environment = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token), **changes)
        self.port, dashboard_port = free_port(), free_port()
        self.dashboard = f"http://127.0.0.1:{dashboard_port}"
        self._has_dashboard = dashboard
        self._options = [
            "--node-ip-address=127.0.0.1", f"--port={self.port}", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard_port}", f"--include-dashboard={str(dashboard).lower()}",
            "--disable-usage-stats", *options,
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self._folders: list[str] = []

    def start(self) -> None:
        """Start, and wait until the head answers."""
        self._folders.append(tempfile.mkdtemp(prefix="cv", dir="/tmp"))  # Ray's sockets need a short path
        command = [RAY, "start", "--head", "--block", *self._options, f"--temp-dir={self._folders[-1]}"]
        command += ["--dashboard-agent-listen-port", str(free_port())]
        self._process = subprocess.Popen(
            command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 120
        while not self._answers():
            assert self._process.poll() is None, "ray start ended"
            assert time.monotonic() < deadline, "the head did not come up in two minutes"
            time.sleep(0.5)

    def processes(self) -> list[psutil.Process]:
        """All that the head started, nodes of a fake provider among them."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if self._folders[-1] in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill(self) -> None:
        """The machine of the head is gone, from one moment to the next."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.stop()

    def stop(self) -> None:
        """End it, and all that it left."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)

    def _answers(self) -> bool:
        if not self._has_dashboard:  # the node's socket comes after that of the cluster
            return Path(self._folders[-1], "session_latest", "sockets", "raylet").exists()
        try:
            urllib.request.urlopen(f"{self.dashboard}/api/version", timeout=5)
        except urllib.error.HTTPError:
            return True  # it asks who we are
        except OSError:
            return False
        return True


@contextlib.contextmanager
def ray_for_commands(folder: Path, **changes: str) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Start a Ray for several commands; gives ``run`` on it. Each command is spared the start of its own.

    Args:
        folder: An empty folder.
        changes: Of the environment of the head, its workers and the commands.
    """
    head = Head(folder, "--num-cpus=2", "--num-gpus=0", "--object-store-memory=200000000", dashboard=False, **changes)
    try:
        head.start()
        access = {name: head.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
        yield functools.partial(run, RAY_ADDRESS=f"127.0.0.1:{head.port}", **access, **changes)
    finally:
        head.stop()


@pytest.fixture(scope="session")
def run_on_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """``run`` on one Ray for all tests that need no Ray of their own."""
    with ray_for_commands(tmp_path_factory.mktemp("ray")) as run_on:
        yield run_on
