"""``covray doctor``: what this machine, or the cluster that RAY_ADDRESS names, has and lacks, and what to do about it.

A check never ends the command: what goes wrong in it is what it found. Nothing is downloaded, nothing started.
"""

from __future__ import annotations

import os
import platform
import posixpath
import re
import shutil
import socket
import stat
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import torch
from huggingface_hub import constants as hub
from huggingface_hub.errors import LocalEntryNotFoundError
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from pyarrow import fs
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from covray.config import BackboneConfig, EngineConfig, PriorConfig, TokenizerConfig, require_compiler
from covray.distributed.session import ray_session
from covray.errors import ConfigError, CovrayError, one_line
from covray.io import storage
from covray.io.device import choose_device
from covray.io.model_folders import NANO_FOLDER
from covray.models.lvm.model import bfloat16_units

Status = Literal["ok", "note", "problem"]

GIB = 2**30
PROBE_BYTES = 16 * 2**20
"""Written to the storage and read again."""
SLOW_BYTES_PER_S = 20e6
"""Below it a checkpoint of the 7B's adapter and its two moments (1 GB) takes the best part of a minute."""
STORAGE_BYTES = 10 * GIB
"""A million chains of four frames of 256 tokens are 2 GB; 10 checkpoints of the 7B's adapter are 10 GB."""
FULL = 0.95
"""Share in use from which Ray calls a disk full and fails what would spill to it (local_fs_capacity_threshold)."""
OBJECT_STORE_SHARE = 0.3
"""Of the memory: what Ray wants of /dev/shm for its object store."""
SKEW_NOTE_S, SKEW_PROBLEM_S = 2.0, 60.0
"""Object stores keep whole seconds; S3 refuses requests from a clock that is 15 minutes wrong."""
NODE_PATIENCE_S = 60.0
PORTS = {6379: "GCS", 8265: "dashboard and jobs", 10001: "Ray client"}
"""What the head of a cluster listens on."""

_FORESEEN = (CovrayError, OSError, RuntimeError, ValueError, LookupError, ImportError, RayError)
"""What checks of hardware, storage and libraries may raise. A bug of covray's own is still a traceback."""


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    name: str
    status: Status
    """``note``: it works, with a limit worth knowing; ``problem``: something will fail."""
    found: str
    """One line, with figures and units."""
    advice: str = ""
    """What to do, one line; empty when all is well."""


def examine(path: str = ".", prior: str = "nano", tokenizer: str = "nano", backbone: str = "nano") -> Iterator[Finding]:
    """Check this machine, and the cluster that RAY_ADDRESS names.

    ``path``: where data sets and runs are to go, on any storage that covray knows; ``prior``, ``tokenizer``,
    ``backbone``: nano, a folder, or a hub id. On the storage 16 MiB are written, read and removed. Raises nothing: a
    check that fails is a finding.
    """
    address = os.environ.get("RAY_ADDRESS")
    checks: dict[str, Callable[[], Sequence[Finding]]] = {
        "packages": check_packages,
        "processor": check_processor,
        "GPU": check_gpus,
        "compiler": check_compiler,
        "disk": check_disks,
        "storage": lambda: check_storage(path),
        "weights": lambda: check_weights(prior, tokenizer, backbone),
        "token": check_token,
    }
    if address and address != "local":
        checks["cluster"] = lambda: check_cluster(address)
    else:
        checks["ports"] = check_ports
    for name, check in checks.items():
        try:
            yield from check()
        except _FORESEEN as error:
            yield _of_error(name, error)


def check_packages() -> list[Finding]:
    """Python and packages against what the installed covray requires."""
    python = platform.python_version()
    try:
        needed, supported = requires("covray") or [], metadata("covray")["Requires-Python"]
    except PackageNotFoundError:
        return [Finding("packages", "note", "covray is imported, not installed: nothing to compare", "pip install .")]
    findings = []
    if supported and not SpecifierSet(supported).contains(python):
        findings.append(Finding("Python", "problem", f"{python}, covray needs {supported}", f"use {supported}"))
    requirements = [Requirement(line) for line in needed]
    requirements = [each for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]
    for each in requirements:
        extras = f"[{','.join(sorted(each.extras))}]" if each.extras else ""
        advice = f"pip install '{each.name}{extras}{each.specifier}'"
        try:
            found = version(each.name)
        except PackageNotFoundError:
            findings.append(Finding(each.name, "problem", "is not installed", advice))
            continue
        if not each.specifier.contains(found, prereleases=True):
            findings.append(Finding(each.name, "problem", f"{found}, covray needs {each.specifier}", advice))
    if not findings:
        told = f"Python {python}, covray {version('covray')}, ray {version('ray')}, torch {version('torch')}"
        findings.append(Finding("packages", "ok", f"{told}; {len(requirements)} packages as covray needs them"))
    return findings


def check_processor() -> list[Finding]:
    """Cores, memory, and whether bfloat16 is worth it without a GPU."""
    units = bfloat16_units()  # what covray train's compute.dtype=auto asks, too
    bf16 = f"{units}: covray train computes in bfloat16" if units else "no units for bfloat16: float32 is faster"
    return [Finding("processor", "ok", f"{os.cpu_count()} cores, {_memory_bytes() / GIB:.1f} GiB memory; {bf16}")]


def check_gpus() -> list[Finding]:
    """A finding a GPU that torch can use, or why there is none."""
    driver, build = _nvidia_driver(), torch.version.cuda or torch.version.hip
    with warnings.catch_warnings(record=True) as warned:  # torch says by a warning what is wrong with a driver
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        return [_gpu(index, driver) for index in range(torch.cuda.device_count())]
    if driver is None:
        advice = "enough for the nano family; larger priors and backbones need an NVIDIA GPU"
        return [Finding("GPU", "note", f"none; torch {torch.__version__} computes on the CPU", advice)]
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return [Finding("GPU", "note", "hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES to use it")]
    if build is None:
        found = f"driver {driver} is there, but torch {torch.__version__} is built without CUDA"
        return [Finding("GPU", "problem", found, "install a CUDA build of torch (pytorch.org/get-started)")]
    why = f" ({_first_line(str(warned[-1].message))})" if warned else ""
    found = f"driver {driver} is there, but torch, built for CUDA {build}, cannot use it{why}"
    return [Finding("GPU", "problem", found, f"update the driver to one for CUDA {build}, or take an older build")]


def _gpu(index: int, driver: str | None) -> Finding:
    name = f"GPU {index}"
    free, total = torch.cuda.mem_get_info(index)
    capability = torch.cuda.get_device_capability(index)
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    found = f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    found += f"{f', driver {driver}' if driver else ''}, torch for {built}"
    if torch.version.cuda and not _built_for(capability, torch.cuda.get_arch_list()):
        found += f", which has no code for its architecture sm_{capability[0]}{capability[1]}"
        return Finding(name, "problem", found, "install a build of torch for this GPU (pytorch.org/get-started)")
    if torch.version.cuda and capability < (8, 0):
        advice = "set engine.dtype=float32 and compute.dtype=float32"
        return Finding(name, "note", f"{found}; no bfloat16 units", advice)
    if free < total / 2:
        return Finding(name, "note", f"{found}; others use it", "end them, or choose by CUDA_VISIBLE_DEVICES")
    return Finding(name, "ok", found)


def _built_for(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether a build runs on a GPU: binaries (sm_) do within their major version, PTX (compute_) on all later ones."""
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", architecture)
        if match:
            built = (int(match[2]), int(match[3]))
            if built <= capability and (match[1] == "compute" or built[0] == capability[0]):
                return True
    return False


def check_compiler() -> list[Finding]:
    """What ``engine.compile`` and ``compute.compile`` need; nothing does by default."""
    device = choose_device("auto", "engine.device").type
    try:
        require_compiler("engine.compile, compute.compile", device)
    except ConfigError as error:
        found, _, advice = str(error).rpartition("; ")
        return [Finding("compiler", "note", found, advice)]
    return [Finding("compiler", "ok", f"one for torch.compile on {device}, and Python's headers")]


def check_disks() -> list[Finding]:
    """Room in Ray's temporary folder, where objects spill to, and in the shared memory that holds them before."""
    from ray._common.utils import get_default_ray_temp_dir

    folder = _standing(get_default_ray_temp_dir())
    usage = shutil.disk_usage(folder)
    told = f"{folder}: {usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    if usage.free < (1 - FULL) * usage.total:
        advice = "free some, or set RAY_TMPDIR to a folder on a larger disk"
        findings = [Finding("Ray's disk", "problem", f"{told}; Ray calls it full", advice)]
    else:
        findings = [Finding("Ray's disk", "ok", told)]
    shared = "/dev/shm"
    if os.path.isdir(shared):  # only Linux has it
        free, wanted = shutil.disk_usage(shared).free, OBJECT_STORE_SHARE * _memory_bytes()
        told = f"{shared}: {free / GIB:.1f} GiB free, Ray's object store wants {wanted / GIB:.1f}"
        advice = f"free some, or enlarge it (docker run --shm-size={wanted / GIB:.0f}g); else objects go to the disk"
        enough = free >= wanted
        findings.append(Finding("object store", "ok" if enough else "note", told, "" if enough else advice))
    return findings


def check_storage(path: str) -> list[Finding]:
    """Room, speed and clock of the storage that ``path`` is, or will be, on; what does not exist is not created."""
    filesystem, _ = storage.resolve(path)
    target = _standing(path)
    folder = storage.resolve(target)[1]
    if filesystem.get_file_info(folder).type == fs.FileType.File:
        return [Finding("storage", "problem", f"{target}: is a file", "give --path a folder")]
    findings = [_room(folder)] if isinstance(filesystem, fs.LocalFileSystem) else []
    file = storage.join(target, f".covray-doctor-{os.getpid()}")
    inner = storage.resolve(file)[1]
    data = np.random.default_rng(0).bytes(PROBE_BYTES)  # no storage can compress it
    try:
        started, tick = time.time(), time.perf_counter()
        storage.write_bytes(file, data)
        wrote_s, ended = time.perf_counter() - tick, time.time()
        stamp_ns = filesystem.get_file_info(inner).mtime_ns
        if isinstance(filesystem, fs.LocalFileSystem):
            _forget(inner)
        tick = time.perf_counter()
        intact = storage.read_bytes(file) == data
        read_s = time.perf_counter() - tick
    except OSError as error:
        found = f"{target}: cannot be written and read ({one_line(error)})"
        return [*findings, Finding("storage", "problem", found, "mend its rights or room, or give another --path")]
    finally:
        with suppress(OSError):  # what was not written cannot be removed
            filesystem.delete_file(inner)
    write, read = PROBE_BYTES / wrote_s, PROBE_BYTES / read_s
    told = f"{target}: writes {write / 1e6:,.0f} MB/s, reads {read / 1e6:,.0f} MB/s"
    if not intact:
        advice = "do not use it: check the disk, or the server"
        findings.append(Finding("storage", "problem", f"{told}; what is read is not what was written", advice))
    elif min(write, read) < SLOW_BYTES_PER_S:
        advice = "write checkpoints less often (checkpoints.every_steps), or take a faster storage"
        findings.append(Finding("storage", "note", f"{told}: slow", advice))
    else:
        findings.append(Finding("storage", "ok", told))
    findings.append(_clock(started, ended, stamp_ns))
    return findings


def _room(folder: str) -> Finding:
    usage = shutil.disk_usage(folder)
    told = f"{folder}: {usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    if usage.free >= STORAGE_BYTES:
        return Finding("disk", "ok", told)
    status: Status = "problem" if usage.free < GIB else "note"
    return Finding("disk", status, f"{told}: little", "free some, or give a --path on a larger disk")


def _clock(started: float, ended: float, stamp_ns: int | None) -> Finding:
    """This machine's clock against the age of covray's files and the stamp of a file written meanwhile (Unix, s)."""
    if ended < Path(__file__).stat().st_mtime:
        found = f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime(ended))} UTC, which is before covray was installed"
        return Finding("clock", "problem", found, "set the clock (timedatectl set-ntp true)")
    if stamp_ns is None:
        return Finding("clock", "ok", "the storage keeps no times to compare with")
    skew = _outside(stamp_ns / 1e9, started, ended)
    status = _skew_status(skew)
    advice = "" if status == "ok" else "synchronise this machine's clock (timedatectl set-ntp true), or the storage's"
    return Finding("clock", status, f"the storage's is {skew:+.1f} s from this machine's", advice)


def check_weights(prior: str, tokenizer: str, backbone: str) -> list[Finding]:
    """The models: found or not, whole or not, and the first digits of their fingerprints; see ``examine``."""
    # Imported here: model libraries take seconds, and what is broken about them must not hide the other checks.
    from covray.io.model_folders import resolve_folder
    from covray.models.diffusion import prior as priors
    from covray.models.lvm.backbone import backbone_facts
    from covray.models.tokenizer.vqgan import load_tokenizer

    codebooks: dict[str, str | None] = {}

    def find_prior() -> str:
        config = PriorConfig(path=prior)
        patterns = (*priors.NETWORK_PATTERNS, priors.CONTEXT_FILE, *priors.TEXT_PATTERNS)
        folder = resolve_folder(config.path, config.revision, "prior", patterns)
        priors.require_prior_files(folder)  # load_prior's own check, without gigabytes of tensors
        return priors.fingerprint_prior(folder)

    def find_tokenizer() -> str:
        found = load_tokenizer(TokenizerConfig(path=tokenizer), EngineConfig(device="cpu"))
        codebooks["tokenizer"] = found.codebook_fingerprint
        return found.fingerprint

    def find_backbone() -> str:
        named = {} if backbone == "nano" else {"scale": "custom", "path": backbone}
        facts = backbone_facts(BackboneConfig.model_validate(named))
        codebooks["backbone"] = facts.codebook
        return facts.fingerprint

    finders = {"prior": (prior, find_prior), "tokenizer": (tokenizer, find_tokenizer)}
    finders["backbone"] = (backbone, find_backbone)
    with _no_downloads():
        findings = [_model(name, path, find) for name, (path, find) in finders.items()]
    ours, theirs = codebooks.get("tokenizer"), codebooks.get("backbone")
    if ours and theirs and ours != theirs:
        found = f"the backbone's is {theirs[:12]}, the tokenizer's {ours[:12]}"
        advice = "name the tokenizer that the backbone was trained with, or a backbone of this tokenizer"
        findings.append(Finding("codebook", "note", found, advice))
    return findings


def _model(name: str, path: str, find: Callable[[], str]) -> Finding:
    try:
        return Finding(name, "ok", f"{path}{f' in {NANO_FOLDER}' if path == 'nano' else ''}: {find()[:12]}")
    except _FORESEEN as error:
        incomplete = isinstance(error.__cause__, LocalEntryNotFoundError) or " is missing" in str(error)
        if incomplete and path != "nano" and not os.path.isdir(os.path.expanduser(path)):
            found = f"{path}: is not, or not wholly, in the hub's cache {hub.HF_HUB_CACHE}"
            advice = f"the first command that uses it downloads it; beforehand: hf download {path}"
            return Finding(name, "note", found, advice)
        return _of_error(name, error)


@contextmanager
def _no_downloads() -> Iterator[None]:
    """The hub's client looks in its cache only. Its variable is read when it is imported, its constant at every use."""
    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def check_token() -> list[Finding]:
    """Ray's token: whether there is one, and who can read it. It is never read here."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    cluster = bool(os.environ.get("RAY_ADDRESS"))
    if mode and mode != "token":
        advice = "unset RAY_AUTH_MODE, or set it to token"
        found = f"RAY_AUTH_MODE={mode}: whoever reaches a port of Ray's can run code"
        return [Finding("token", "problem" if cluster else "note", found, advice)]
    if os.environ.get("RAY_AUTH_TOKEN"):
        return [Finding("token", "ok", "in RAY_AUTH_TOKEN")]
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"
    try:
        found_stat = file.stat()
    except FileNotFoundError:
        if named:
            found = f"{file}, which RAY_AUTH_TOKEN_PATH names, is not there"
            return [Finding("token", "problem", found, "mend RAY_AUTH_TOKEN_PATH, or unset it")]
        if mode or cluster:
            advice = "ray get-auth-token --generate, or copy the cluster's to that place"
            return [Finding("token", "problem" if mode else "note", f"{file}: is not there", advice)]
        return [Finding("token", "ok", "none yet; Ray makes one when it starts")]
    if found_stat.st_size == 0:
        return [Finding("token", "problem", f"{file}: is empty", "remove it, then ray get-auth-token --generate")]
    rights = stat.S_IMODE(found_stat.st_mode)
    # Ray itself leaves the file to the umask, 644 as a rule; then a closed home keeps it.
    if rights & 0o077 and all(folder.stat().st_mode & 0o011 for folder in file.absolute().parents):
        found = f"{file}: others on this machine can get at it (mode {rights:03o})"
        return [Finding("token", "problem", found, f"chmod 600 {file}")]
    return [Finding("token", "ok", f"{file}, out of others' reach")]


def check_ports() -> list[Finding]:
    """Ports that a head started here would listen on. covray's own local Ray takes free ones."""
    taken = [port for port in PORTS if not _is_free(port)]
    if not taken:
        return [Finding("ports", "ok", f"{', '.join(map(str, PORTS))} are free for a head on this machine")]
    told = ", ".join(f"{port} ({PORTS[port]})" for port in taken)
    advice = "if it is your Ray, set RAY_ADDRESS=auto; else give ray start --head other ports"
    return [Finding("ports", "note", f"taken: {told}; covray's own local Ray needs none of them", advice)]


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed connection's port is free
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True


def check_cluster(address: str) -> list[Finding]:
    """Every node of the cluster at ``address``: versions, disk and clock against this machine's."""

    # Nested, so that it travels by value: a node without covray can answer.
    @ray.remote(num_cpus=0, max_retries=0)
    def look() -> dict[str, Any]:
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
        disk = {"free_bytes": usage.free, "total_bytes": usage.total}
        versions = {"python": platform.python_version(), "ray": ray.__version__, "covray": covray}
        return {**versions, **disk, "time_s": time.time()}

    findings = []
    ours = {"python": platform.python_version(), "ray": ray.__version__, "covray": _own_version()}
    with ray_session():
        nodes = [node for node in ray.nodes() if node["Alive"]]
        total = ray.cluster_resources()
        told = f"{address}: {len(nodes)} nodes, {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"
        findings.append(Finding("cluster", "ok", told))
        tasks = [
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            for node in nodes
        ]
        # The first task of a node starts a worker there, which takes seconds; the clock is read by the second.
        first = [task.remote() for task in tasks]
        done, _ = ray.wait(first, num_returns=len(first), timeout=NODE_PATIENCE_S)
        for node, task, started in zip(nodes, tasks, first, strict=True):
            name = f"node {node['NodeManagerAddress']}"
            if started not in done:
                found = f"did not answer in {NODE_PATIENCE_S:.0f} s"
                findings.append(Finding(name, "problem", found, "look at ray status; it may be overloaded, or lost"))
                continue
            try:
                ray.get(started)
                asked_s = time.time()
                facts = ray.get(task.remote(), timeout=NODE_PATIENCE_S)
                findings.append(judge_node(name, node["Resources"], facts, ours, asked_s, time.time()))
            except RayError as error:
                found = f"a small task failed there ({_last_line(str(error))})"
                findings.append(Finding(name, "problem", found, "look at the node's logs (ray logs), or replace it"))
    return findings


def judge_node(
    name: str,
    resources: Mapping[str, float],
    facts: Mapping[str, Any],
    ours: Mapping[str, str | None],
    asked_s: float,
    answered_s: float,
) -> Finding:
    """A node by what a task on it said.

    ``facts``: ``python``, ``ray``, ``covray`` (None: not installed), ``free_bytes`` and ``total_bytes`` of its
    temporary folder, ``time_s`` of its clock between ``asked_s`` and ``answered_s`` of ours (Unix); ``ours``: the same
    three versions of this machine.
    """
    skew = _outside(facts["time_s"], asked_s, answered_s)
    free, total = facts["free_bytes"], facts["total_bytes"]
    parts = [f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"]
    parts.append(f"{resources.get('memory', 0) / GIB:.1f} GiB memory")
    parts.append(f"disk {free / GIB:.1f} of {total / GIB:.1f} GiB free")
    parts.append(f"Python {facts['python']}, ray {facts['ray']}, covray {facts['covray'] or 'not installed'}")
    found = f"{', '.join(parts)}, clock {skew:+.1f} s"
    differ = [key for key in ("ray", "covray") if facts[key] and facts[key] != ours[key]]
    # Python's patch releases understand each other's pickles.
    if facts["python"].split(".")[:2] != str(ours["python"]).split(".")[:2]:
        differ.insert(0, "python")
    if differ:
        here = ", ".join(f"{key} {ours[key]}" for key in differ)
        return Finding(name, "problem", f"{found}; here: {here}", "install the same versions on nodes and driver")
    if free < (1 - FULL) * total:
        advice = "free some on the node, or give its Ray another temporary folder (ray start --temp-dir)"
        return Finding(name, "problem", f"{found}; Ray calls its disk full", advice)
    if (status := _skew_status(skew)) != "ok":
        return Finding(name, status, found, "synchronise the clocks (timedatectl set-ntp true on node and driver)")
    if facts["covray"] is None:
        return Finding(name, "note", found, "install it there, or send it with the job (covray submit does)")
    return Finding(name, "ok", found)


def _own_version() -> str | None:
    try:
        return version("covray")
    except PackageNotFoundError:
        return None


def _outside(moment: float, low: float, high: float) -> float:
    """How far ``moment`` lies outside ``low`` to ``high``: the skew that no delay explains, with its sign."""
    return moment - min(max(moment, low), high)


def _skew_status(skew_s: float) -> Status:
    if abs(skew_s) < SKEW_NOTE_S:
        return "ok"
    return "note" if abs(skew_s) < SKEW_PROBLEM_S else "problem"


def _standing(path: str) -> str:
    """``path``, or the nearest folder above it that exists, so that a check has nothing to create."""
    target = path.rstrip("/") if "://" in path else storage.resolve(path)[1]
    while not storage.exists(target):
        above = posixpath.dirname(target)
        if above == target or above.endswith(":/"):
            raise ConfigError(f"{path}: nothing of it exists; create its bucket or disk, or give another --path")
        target = above
    return target


def _memory_bytes() -> int:
    """Physical memory, or less where a container's limit is below it."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # no control group, or the word max
        whole = min(whole, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return whole


def _nvidia_driver() -> str | None:
    """Version of the kernel's NVIDIA driver; None where there is none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    match = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return match[0] if match else "unknown"


def _forget(file: str) -> None:
    """Have a file read from its disk, not from memory, where the system can be asked to."""
    if hasattr(os, "posix_fadvise"):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _of_error(name: str, error: BaseException) -> Finding:
    """covray's errors say what to do after their last semicolon; the others say nothing."""
    found, _, advice = one_line(error).rpartition("; ") if isinstance(error, CovrayError) else ("", "", "")
    if found:
        return Finding(name, "problem", found, advice)
    advice = "try it by hand as the same user; the rest of the report stands without it"
    return Finding(name, "problem", f"could not be checked ({one_line(error)})", advice)


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
