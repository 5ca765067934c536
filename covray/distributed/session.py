"""A Ray to run on: the cluster that RAY_ADDRESS names, or one of our own on this machine."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray
from ray._private import ray_constants
from ray._private.node import Node
from ray.exceptions import AuthenticationError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from covray.distributed.dashboard import is_dashboard_asked
from covray.errors import ConfigError, one_line
from covray.progress import stage

READING_CPUS = 2
"""Logical CPUs beyond the cores of a Ray of our own. Reading, checking and writing mostly wait for the disk, and the
filter of a build that continues holds one CPU as long as it runs."""

_CORES = "covray_cores"
"""A resource that a Ray of our own has for no other purpose than to say how many of its CPUs are cores."""

TOKEN_ADVICE = "set RAY_AUTH_MODE=token, with the cluster's token in ~/.ray/auth_token or RAY_AUTH_TOKEN_PATH"
_CONNECT_PATIENCE_S = 5.0


@contextmanager
def ray_session(variables: Mapping[str, str] | None = None) -> Iterator[int]:
    """Connect to Ray for the length of the block.

    An initialised Ray is used as it is; else the cluster of ``RAY_ADDRESS`` (which ``ray job submit`` sets); else a
    local one is started on free ports of the loopback interface and stopped at the end.

    Args:
        variables: Environment variables for the workers of this program; not for those of an initialised Ray.

    Yields:
        The CPUs that may compute.

    Raises:
        ConfigError: The named cluster does not answer, or not to us; or no local one starts.
    """
    if ray.is_initialized():
        resources = ray.cluster_resources()
        yield int(resources.get(_CORES, resources.get("CPU", 0)))
        return
    # Ray's own reports go to its log folder; covray itself says what concerns the user.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    address = cluster_address()
    if address is not None:
        try:
            with stage(f"connecting to the Ray cluster at {address}"):
                _require_answer(address)
                with _without_backend_greeting(), _keeping_sigterm_handler():
                    ray.init(
                        address=address, log_to_driver=False, logging_level=logging.ERROR,
                        runtime_env={"env_vars": dict(variables)} if variables else None,
                    )  # fmt: skip
        except AuthenticationError as error:
            raise ConfigError(f"RAY_ADDRESS={address}: {_refusal(error)}; {TOKEN_ADVICE}") from error
        except (ConnectionError, RuntimeError, ValueError) as error:  # the first is also what a wrong token comes to
            raise ConfigError(
                f"RAY_ADDRESS={address}: no Ray cluster answers us there ({one_line(error)}); start it, or unset "
                f"RAY_ADDRESS; or, if it asks for a token, {TOKEN_ADVICE}"
            ) from error
        cores = int(ray.cluster_resources().get("CPU", 0))
    else:
        cores = os.cpu_count() or 1
        os.environ.update(variables or {})  # the processes of a Ray of our own inherit them
        with stage("starting Ray"):
            _start_patiently(cores)
    node = ray._private.worker._global_node
    if node is not None:
        if is_dashboard_asked():
            _announce_dashboard(node.webui_url)
        logging.getLogger("covray").debug("Ray writes its logs to %s", node.get_logs_dir_path())
    try:
        yield cores
    finally:
        ray.shutdown()


def cluster_address() -> str | None:
    """Return the cluster that RAY_ADDRESS names; None where a Ray of our own is started."""
    address = os.environ.get("RAY_ADDRESS", "")
    # By ``local`` Ray, too, means one of its own; ours has more CPUs than cores, see READING_CPUS.
    if address in ("", "local"):
        return None
    return address


def _start_patiently(cores: int) -> None:
    """Start a Ray of our own, in three attempts: Ray gives its node 30 seconds, too few on a busy machine."""
    for attempts_left in (2, 1, 0):
        try:
            with _without_backend_greeting(), _keeping_sigterm_handler(), _stopped_on_failure():
                _start(cores)
            return
        except AuthenticationError as error:
            raise ConfigError(f"{_refusal(error)}; fix it, or unset RAY_AUTH_MODE") from error
        except Exception as error:  # Ray raises no narrower class when a process of its own is late
            if not attempts_left:
                raise ConfigError(
                    f"Ray did not start on this machine ({one_line(error)}); it may be too busy, or out of memory: run "
                    "the same command again"
                ) from error


@contextmanager
def _stopped_on_failure() -> Iterator[None]:
    """Stop the processes of a Ray whose start fails or is interrupted.

    ``ray.shutdown`` stops those of a complete node only. The node of a failed start is known to nobody but the frame of
    its constructor, and its processes would live as long as this program. The agents of its raylet end by themselves:
    after a minute at most, when they were about to connect.
    """
    try:
        yield
    except BaseException as error:
        ray.shutdown()
        for frame, _ in traceback.walk_tb(error.__traceback__):
            node = frame.f_locals.get("self")
            if isinstance(node, Node):
                node.kill_all_processes(check_alive=False, allow_graceful=True)
        raise


def _require_answer(address: str) -> None:
    """Refuse an address where nothing listens, which Ray itself tries for minutes. Raises ConfigError."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal() or "://" in host:  # auto, and what Ray itself refuses
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_PATIENCE_S).close()
    except (OSError, UnicodeError) as error:  # the second: a host's name with an empty or endless part
        raise ConfigError(
            f"RAY_ADDRESS={address}: nothing listens there ({one_line(error)}); start the cluster, or unset RAY_ADDRESS"
        ) from error


def _announce_dashboard(address: str | None) -> None:
    """Say where Ray's dashboard is, and where Prometheus finds the metrics of the first node."""
    where = f"http://{address}" if address else "none runs in this cluster"
    node = ray.nodes()[0]
    metrics = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    logging.getLogger("covray").info("Ray's dashboard: %s; metrics for Prometheus: %s", where, metrics)


def _refusal(error: AuthenticationError) -> str:
    """Return what Ray says of a token, without its paragraph of advice."""
    return str(error).partition(". Ensure that")[0]


def here() -> NodeAffinitySchedulingStrategy:
    """Return where to put an actor that lives as long as its driver: on the driver's node. Others may go any time."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _start(cores: int) -> None:
    """Start a Ray of our own, on free ports of the loopback interface."""
    # On Linux, Ray listens on the machine's address, unless clusters are switched off, as they are on other systems.
    # Its processes read the variable; this process has read it already.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a training's workers among themselves
    ray.init(
        address="local",  # without it Ray would join a cluster that was started on this machine
        num_cpus=cores + READING_CPUS,
        resources={_CORES: cores},
        include_dashboard=is_dashboard_asked(),
        dashboard_host="127.0.0.1",
        log_to_driver=False,
        logging_level=logging.ERROR,
        # A busy machine is no dead node: Ray itself waits 15 s. And Ray warns on the terminal when there are four times
        # as many processes as it starts at once, by default one a core.
        _system_config={
            "health_check_failure_threshold": 100,
            "worker_maximum_startup_concurrency": max(4, cores),
        },
    )


@contextmanager
def _keeping_sigterm_handler() -> Iterator[None]:
    """Keep the program's own handler of SIGTERM, which ``ray.init`` replaces by one that exits with code 15."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def _without_backend_greeting() -> Iterator[None]:
    """Hide the line that Ray's C++ side writes to the file descriptor itself, that it obeys RAY_BACKEND_LOG_LEVEL."""
    sys.stderr.flush()  # what Python holds back would be written to nowhere
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
