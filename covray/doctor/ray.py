"""Checks of Ray: its disk and shared memory, token and ports on this machine, and the nodes of a cluster."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from covray.distributed.session import cluster_address, ray_session
from covray.doctor.findings import FULL, GIB, Finding, clock_skew, error_finding, first_line, skew_status
from covray.doctor.machine import memory_bytes
from covray.doctor.storage import nearest_existing

OBJECT_STORE_SHARE = 0.3
"""The share of the memory that Ray wants of /dev/shm for its object store."""
NODE_TIMEOUT_S = 60.0
PORTS = {6379: "GCS", 8265: "dashboard and jobs", 10001: "Ray client"}
"""What the head of a cluster listens on."""
_SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True)
class Versions:
    """What must agree between nodes and driver."""

    python: str
    ray: str
    covray: str | None
    """None: not installed."""

    def differing(self, other: Versions) -> list[str]:
        """Return the names of what differs; Python's patch releases understand each other's pickles."""
        names = []
        if self.python.split(".")[:2] != other.python.split(".")[:2]:
            names.append("python")
        if self.ray != other.ray:
            names.append("ray")
        if self.covray is not None and self.covray != other.covray:
            names.append("covray")
        return names


@dataclass(frozen=True)
class NodeReport:
    """What a task on a node says of it."""

    versions: Versions
    free_bytes: int
    """Of its temporary folder's disk."""
    total_bytes: int
    time_s: float
    """Its clock (Unix)."""
    asked_s: float
    """Our clock before the question, and after the answer."""
    answered_s: float


def check_disks() -> list[Finding]:
    """Check the disk that Ray's objects spill to, and the shared memory that holds them before."""
    from ray._common.utils import get_default_ray_temp_dir

    folder = nearest_existing(get_default_ray_temp_dir())
    usage = shutil.disk_usage(folder)
    message = f"{folder}: {usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    if usage.free < (1 - FULL) * usage.total:
        advice = "free some space, or set RAY_TMPDIR to a folder on a larger disk"
        findings = [Finding("Ray's disk", "problem", f"{message}; Ray calls it full", advice)]
    else:
        findings = [Finding("Ray's disk", "ok", message)]
    if os.path.isdir(_SHARED_MEMORY):  # only Linux has it
        findings.append(_check_shared_memory())
    return findings


def _check_shared_memory() -> Finding:
    free, wanted = shutil.disk_usage(_SHARED_MEMORY).free, OBJECT_STORE_SHARE * memory_bytes()
    message = f"{_SHARED_MEMORY}: {free / GIB:.1f} GiB free, Ray's object store wants {wanted / GIB:.1f}"
    if free >= wanted:
        return Finding("object store", "ok", message)
    advice = f"free some, or enlarge it (docker run --shm-size={wanted / GIB:.0f}g); else objects go to the disk"
    return Finding("object store", "note", message, advice)


def check_token() -> list[Finding]:
    """Check whether Ray's token is there, and who can read it. The token itself is never read."""
    # Ray looks for its token in this order: a variable, the file that a variable names, a file in the home folder.
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    cluster = cluster_address() is not None
    if mode and mode != "token":
        message = f"RAY_AUTH_MODE={mode}: everyone who reaches a port of Ray can run code"
        advice = "unset RAY_AUTH_MODE, or set it to token"
        return [Finding("token", "problem" if cluster else "note", message, advice)]
    if os.environ.get("RAY_AUTH_TOKEN"):
        return [Finding("token", "ok", "in RAY_AUTH_TOKEN")]
    given_path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(given_path).expanduser() if given_path else Path.home() / ".ray" / "auth_token"
    if file.exists():
        return [_check_token_file(file)]
    if given_path:
        message = f"{file}, which RAY_AUTH_TOKEN_PATH names, is not there"
        return [Finding("token", "problem", message, "fix RAY_AUTH_TOKEN_PATH, or unset it")]
    if mode or cluster:
        advice = "ray get-auth-token --generate, or copy the cluster's token to that place"
        return [Finding("token", "problem" if mode else "note", f"{file}: is not there", advice)]
    return [Finding("token", "ok", "none yet; Ray makes one when it starts")]


def _check_token_file(file: Path) -> Finding:
    if file.stat().st_size == 0:
        return Finding("token", "problem", f"{file}: is empty", "delete it, then ray get-auth-token --generate")
    permissions = stat.S_IMODE(file.stat().st_mode)
    # Ray itself leaves the file to the umask, 644 as a rule; then a closed home folder protects it.
    reachable = all(folder.stat().st_mode & 0o011 for folder in file.absolute().parents)
    if permissions & 0o077 and reachable:
        message = f"{file}: others on this machine can read it (mode {permissions:03o})"
        return Finding("token", "problem", message, f"chmod 600 {file}")
    return Finding("token", "ok", f"{file}, not readable by others")


def check_ports() -> list[Finding]:
    """Check the ports that a head started here would listen on. covray's own local Ray takes free ones."""
    taken = [port for port in PORTS if not _is_free(port)]
    if not taken:
        return [Finding("ports", "ok", f"{', '.join(map(str, PORTS))} are free for a head on this machine")]
    listed = ", ".join(f"{port} ({PORTS[port]})" for port in taken)
    advice = "if it is your Ray, set RAY_ADDRESS=auto; else give ray start --head other ports"
    return [Finding("ports", "note", f"taken: {listed}; covray's own local Ray needs none of them", advice)]


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed connection's port is free
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True


def check_cluster(address: str) -> list[Finding]:
    """Compare the versions, disk and clock of every node of the cluster at ``address`` with this machine's."""
    findings = []
    try:
        with ray_session():
            nodes = [node for node in ray.nodes() if node["Alive"]]
            total = ray.cluster_resources()
            message = f"{address}: {len(nodes)} nodes, {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"
            findings.append(Finding("cluster", "ok", message))
            findings += _check_nodes(nodes)
    except RayError as error:
        findings.append(error_finding("cluster", error))
    return findings


def _check_nodes(nodes: list[dict[str, Any]]) -> list[Finding]:
    """Ask every node twice: a first task starts a worker there, which takes seconds, a second reads the clock."""
    ours = Versions(platform.python_version(), ray.__version__, _own_version())
    probe = _node_probe()
    tasks = []
    for node in nodes:
        # Not soft: an answer from another node would say nothing of this one.
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        tasks.append(probe.options(scheduling_strategy=strategy))
    first_answers = [task.remote() for task in tasks]
    answered, _ = ray.wait(first_answers, num_returns=len(first_answers), timeout=NODE_TIMEOUT_S)
    findings = []
    for node, task, first_answer in zip(nodes, tasks, first_answers, strict=True):
        name = f"node {node['NodeManagerAddress']}"
        if first_answer not in answered:
            message = f"did not answer in {NODE_TIMEOUT_S:.0f} s"
            findings.append(Finding(name, "problem", message, "look at ray status; it may be overloaded, or lost"))
            continue
        try:
            ray.get(first_answer)
            asked_s = time.time()
            values = ray.get(task.remote(), timeout=NODE_TIMEOUT_S)
            report = NodeReport(Versions(**values.pop("versions")), asked_s=asked_s, answered_s=time.time(), **values)
            findings.append(judge_node(name, node["Resources"], report, ours))
        except RayError as error:
            last_line = first_line(reversed(str(error).splitlines()))
            message = f"a small task failed there ({last_line})"
            findings.append(Finding(name, "problem", message, "look at the node's logs (ray logs), or replace it"))
    return findings


def _node_probe() -> Any:
    """Return the remote function that reports on the node it runs on."""

    # Nested, so that it travels by value: a node without covray can answer.
    @ray.remote(num_cpus=0, max_retries=0)
    def probe() -> dict[str, Any]:
        import platform
        import shutil
        import time
        from importlib.metadata import PackageNotFoundError, version

        import ray
        from ray._common.utils import get_default_system_temp_dir

        try:
            covray = version("covray")
        except PackageNotFoundError:
            covray = None
        usage = shutil.disk_usage(get_default_system_temp_dir())
        return {
            "versions": {"python": platform.python_version(), "ray": ray.__version__, "covray": covray},
            "free_bytes": usage.free,
            "total_bytes": usage.total,
            "time_s": time.time(),
        }

    return probe


def judge_node(name: str, resources: Mapping[str, float], report: NodeReport, ours: Versions) -> Finding:
    """Return the finding of a node.

    Args:
        name: The name of the finding.
        resources: What Ray says it has; ``memory`` in bytes.
        report: What a task on it said.
        ours: The versions of this machine.
    """
    versions = report.versions
    skew = clock_skew(report.time_s, report.asked_s, report.answered_s)
    parts = [
        f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs",
        f"{resources.get('memory', 0) / GIB:.1f} GiB memory",
        f"disk {report.free_bytes / GIB:.1f} of {report.total_bytes / GIB:.1f} GiB free",
        f"Python {versions.python}, ray {versions.ray}, covray {versions.covray or 'not installed'}",
        f"clock {skew:+.1f} s",
    ]
    message = ", ".join(parts)
    differing = versions.differing(ours)
    if differing:
        here = ", ".join(f"{key} {getattr(ours, key)}" for key in differing)
        return Finding(name, "problem", f"{message}; here: {here}", "install the same versions on nodes and driver")
    if report.free_bytes < (1 - FULL) * report.total_bytes:
        advice = "free some space on the node, or give its Ray another temporary folder (ray start --temp-dir)"
        return Finding(name, "problem", f"{message}; Ray calls its disk full", advice)
    status = skew_status(skew)
    if status != "ok":
        return Finding(name, status, message, "synchronise the clocks (timedatectl set-ntp true on node and driver)")
    if versions.covray is None:
        return Finding(name, "note", message, "install it there, or send it with the job (covray submit does)")
    return Finding(name, "ok", message)


def _own_version() -> str | None:
    try:
        return version("covray")
    except PackageNotFoundError:
        return None
