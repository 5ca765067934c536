"""A Ray that does not come up is one line."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import ray
from ray._private.node import Node
from ray._private.ray_constants import PROCESS_TYPE_GCS_SERVER
from ray._private.services import ProcessInfo
from ray.exceptions import AuthenticationError

from covray.config import TrainConfig, load_config
from covray.distributed.dashboard import VARIABLE
from covray.distributed.session import READING_CPUS, ray_session
from covray.distributed.train import resolve_compute
from covray.errors import ConfigError

ADVICE = ". Ensure that the token is available.\nSee: its page"


@pytest.fixture
def listening() -> Iterator[str]:
    """The address of something that takes connections."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("named", "error", "told"),
    [
        (False, Exception("The current node timed out during startup.\nMore."), "Ray did not start on this machine"),
        (False, AuthenticationError(f"/absent cannot be opened{ADVICE}"), "^/absent cannot be opened; fix it"),
        (True, ConnectionError("no answer"), "no Ray cluster answers us there .*RAY_AUTH_TOKEN_PATH"),
        (True, AuthenticationError(f"token missing{ADVICE}"), "RAY_ADDRESS=.*: token missing; set RAY_AUTH_MODE=token"),
    ],
)
def test_a_ray_that_does_not_come_up_is_one_line(
    monkeypatch: pytest.MonkeyPatch, listening: str, named: bool, error: Exception, told: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if named:
        monkeypatch.setenv("RAY_ADDRESS", listening)

    def late(**_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(ConfigError, match=told) as caught, ray_session():
        raise AssertionError("there is no Ray to work on")
    assert "\n" not in str(caught.value)


def test_a_dead_address_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dead = f"127.0.0.1:{listener.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", dead)
    with pytest.raises(ConfigError, match=f"{dead}: nothing listens there"), ray_session():
        raise AssertionError("Ray itself would have asked for half a minute")


def test_an_address_that_is_no_host_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head..example.org:6379")
    with pytest.raises(ConfigError, match=r"head\.\.example\.org:6379: nothing listens there \(.*idna") as caught:
        ray_session().__enter__()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["", "local"])
def test_an_address_that_names_no_cluster_is_a_ray_of_our_own(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    started: list[dict[str, object]] = []
    monkeypatch.setattr(ray, "init", lambda **options: started.append(options))
    with ray_session() as cores:
        assert started[0]["num_cpus"] == cores + READING_CPUS
    # Nobody will bring further nodes: what does not fit now never will.
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    config = load_config(TrainConfig, None, {"data": "chains", "out": "run", "workers.count": 3})
    with pytest.raises(ConfigError, match="3 workers of 1 CPU do not fit in 2"):
        resolve_compute(config, 2, lambda *_: "none")


def test_a_ray_that_is_late_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    started: list[object] = []

    def late(**options: object) -> None:
        started.append(options)
        if len(started) < 3:
            raise Exception("The current node timed out during startup.")  # as Ray raises it

    monkeypatch.setattr(ray, "init", late)
    with ray_session() as cores:
        assert cores == os.cpu_count()
    assert len(started) == 3


@pytest.mark.parametrize("error", [Exception("The current node timed out during startup."), KeyboardInterrupt()])
def test_a_start_that_fails_leaves_no_processes(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """By Ray's own ``init``; only what its node starts is another process, so that nobody waits."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    started: list[subprocess.Popen[bytes]] = []

    def start_and_fail(node: Node) -> None:
        assert all(process.poll() is not None for process in started), "the attempt before lives on"
        started.append(subprocess.Popen(["sleep", "600"]))
        nothing = dict.fromkeys(ProcessInfo._fields)
        node.all_processes[PROCESS_TYPE_GCS_SERVER] = [ProcessInfo(**nothing | {"process": started[-1]})]
        raise error

    monkeypatch.setattr(Node, "start_head_processes", start_and_fail)
    expected, attempts = (KeyboardInterrupt, 1) if isinstance(error, KeyboardInterrupt) else (ConfigError, 3)
    try:
        with pytest.raises(expected), ray_session():
            raise AssertionError("there is no Ray to work on")
        assert len(started) == attempts
        assert all(process.poll() is not None for process in started)
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.parametrize("asked", [True, False])
def test_a_dashboard_that_is_asked_for_is_started_and_announced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, asked: bool
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv(VARIABLE, "1" if asked else "0")
    node = SimpleNamespace(webui_url="127.0.0.1:8265" if asked else "", get_logs_dir_path=lambda: "/logs")
    started: list[dict[str, object]] = []
    monkeypatch.setattr(ray, "init", lambda **options: started.append(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeManagerAddress": "127.0.0.1", "MetricsExportPort": 8080}])
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    with caplog.at_level(logging.INFO, "covray"), ray_session():
        pass
    assert started[0]["include_dashboard"] is asked
    assert started[0]["dashboard_host"] == "127.0.0.1"
    address = "http://127.0.0.1:8265; metrics for Prometheus: http://127.0.0.1:8080/metrics"
    assert caplog.messages == ([f"Ray's dashboard: {address}"] if asked else [])


def test_variables_reach_the_processes_of_ray(monkeypatch: pytest.MonkeyPatch, listening: str) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("COVRAY_TEST_VARIABLE", "before")
    started: list[dict[str, object]] = []
    monkeypatch.setattr(ray, "init", lambda **options: started.append(options))
    monkeypatch.setattr(ray, "cluster_resources", dict)
    with ray_session({"COVRAY_TEST_VARIABLE": "a"}):
        assert os.environ["COVRAY_TEST_VARIABLE"] == "a"  # a Ray of our own inherits it
    monkeypatch.setenv("RAY_ADDRESS", listening)
    with ray_session({"COVRAY_TEST_VARIABLE": "b"}), ray_session():
        pass
    assert [options.get("runtime_env") for options in started] == [
        None,
        {"env_vars": {"COVRAY_TEST_VARIABLE": "b"}},
        None,
    ]
