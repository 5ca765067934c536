"""Checks of this machine: installed packages, processor, GPUs and compiler."""

from __future__ import annotations

import os
import platform
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from covray.config import require_compiler
from covray.doctor.findings import GIB, Finding, first_line
from covray.errors import ConfigError
from covray.io.device import bfloat16_units, choose_device


def check_packages() -> list[Finding]:
    """Compare Python and the installed packages with what the installed covray requires."""
    python = platform.python_version()
    try:
        required_lines, required_python = requires("covray") or [], metadata("covray")["Requires-Python"]
    except PackageNotFoundError:
        return [Finding("packages", "note", "covray is imported, not installed: nothing to compare", "pip install .")]
    findings = []
    if required_python and not SpecifierSet(required_python).contains(python):
        message = f"{python}, covray needs {required_python}"
        findings.append(Finding("Python", "problem", message, f"use {required_python}"))
    requirements = list(_own_requirements(required_lines))
    for requirement in requirements:
        finding = _check_package(requirement)
        if finding is not None:
            findings.append(finding)
    if not findings:
        versions = f"Python {python}, covray {version('covray')}, ray {version('ray')}, torch {version('torch')}"
        findings.append(Finding("packages", "ok", f"{versions}; {len(requirements)} packages as covray needs them"))
    return findings


def _own_requirements(lines: Sequence[str]) -> Iterator[Requirement]:
    """Yield the requirements that hold on this machine, without those of extras."""
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def _check_package(requirement: Requirement) -> Finding | None:
    """Return what is wrong with an installed package; None where nothing is."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    advice = f"pip install '{requirement.name}{extras}{requirement.specifier}'"
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return Finding(requirement.name, "problem", "is not installed", advice)
    # A specifier by itself leaves out nightly builds, which are pre-releases.
    if requirement.specifier.contains(installed, prereleases=True):
        return None
    return Finding(requirement.name, "problem", f"{installed}, covray needs {requirement.specifier}", advice)


_DRIVERS = {"11": "450.80.02", "12": "525.60.13", "13": "580.65.06"}
"""The oldest driver on Linux by the major version of CUDA."""


def check_processor() -> list[Finding]:
    """Report cores and memory, and whether bfloat16 is worth it without a GPU."""
    units = bfloat16_units()  # `covray train` asks the same for compute.dtype=auto
    arithmetic = "no units for bfloat16: float32 is faster"
    if units:
        arithmetic = f"{units}: covray train computes in bfloat16"
    message = f"{os.cpu_count()} cores, {memory_bytes() / GIB:.1f} GiB memory; {arithmetic}"
    return [Finding("processor", "ok", message)]


def check_gpus() -> list[Finding]:
    """Report every GPU that torch can use, or why there is none."""
    driver, build = _nvidia_driver(), torch.version.cuda or torch.version.hip
    with warnings.catch_warnings(record=True) as caught:  # torch reports an unusable driver as a warning
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        return [_check_gpu(index, driver) for index in range(torch.cuda.device_count())]
    # Without a driver there is no GPU to miss; with one, something keeps torch from it.
    if driver is None:
        advice = "enough for the nano family; larger priors and backbones need an NVIDIA GPU"
        return [Finding("GPU", "note", f"none; torch {torch.__version__} computes on the CPU", advice)]
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return [Finding("GPU", "note", "hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES to use it")]
    if build is None:
        message = f"driver {driver} is there, but torch {torch.__version__} is built without CUDA"
        return [Finding("GPU", "problem", message, "install a CUDA build of torch (pytorch.org/get-started)")]
    needed = _needed_driver(build)
    if needed is not None and _is_older(driver, needed):
        message = f"driver {driver} is too old for torch {torch.__version__}, built for CUDA {build}"
        advice = f"update the driver to {needed} or newer, or install a build of torch for an older CUDA"
        return [Finding("GPU", "problem", message, advice)]
    reason = f" ({first_line(str(caught[-1].message).splitlines())})" if caught else ""
    message = f"driver {driver} is there, but torch, built for CUDA {build}, cannot use it{reason}"
    advice = f"update the driver to one for CUDA {build}, or install a build of torch for an older CUDA"
    return [Finding("GPU", "problem", message, advice)]


def _needed_driver(build: str) -> str | None:
    """Return the oldest driver on Linux for a CUDA version (release notes of CUDA 13.0, table 3); None if unknown."""
    return _DRIVERS.get(build.partition(".")[0])


def _is_older(driver: str, needed: str) -> bool:
    """Return whether a version of the driver is older than another; false where it is unknown."""
    if not re.fullmatch(r"[\d.]+", driver):
        return False
    return [int(part) for part in driver.split(".")] < [int(part) for part in needed.split(".")]


def _check_gpu(index: int, driver: str | None) -> Finding:
    """Return the finding of a GPU that torch can use."""
    name = f"GPU {index}"
    free, total = torch.cuda.mem_get_info(index)
    capability = torch.cuda.get_device_capability(index)
    parts = [torch.cuda.get_device_name(index), f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"]
    if driver is not None:
        parts.append(f"driver {driver}")
    if torch.version.cuda:
        parts.append(f"torch for CUDA {torch.version.cuda}")
    else:
        parts.append(f"torch for ROCm {torch.version.hip}")
    message = ", ".join(parts)
    # What fails stands first, then what limits.
    if torch.version.cuda and not built_for(capability, torch.cuda.get_arch_list()):
        message += f", which has no code for its architecture sm_{capability[0]}{capability[1]}"
        return Finding(name, "problem", message, "install a build of torch for this GPU (pytorch.org/get-started)")
    if torch.version.cuda and capability < (8, 0):
        return Finding(
            name, "note", f"{message}; no bfloat16 units", "set engine.dtype=float32 and compute.dtype=float32"
        )
    if free < total / 2:
        advice = "stop the other programs, or choose a GPU with CUDA_VISIBLE_DEVICES"
        return Finding(name, "note", f"{message}; others use it", advice)
    return Finding(name, "ok", message)


def built_for(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Return whether a build of torch runs on a GPU.

    Binaries (``sm_``) run on later minor versions of their major version, PTX (``compute_``) on all later versions.

    Args:
        capability: The compute capability of the GPU.
        architectures: What the build was compiled for, as in ``torch.cuda.get_arch_list()``.
    """
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", architecture)
        if match:
            built = (int(match[2]), int(match[3]))
            if built <= capability and (match[1] == "compute" or built[0] == capability[0]):
                return True
    return False


def check_compiler() -> list[Finding]:
    """Check what ``engine.compile`` and ``compute.compile`` need; nothing does by default."""
    device = choose_device("auto", "engine.device").type
    try:
        require_compiler("engine.compile, compute.compile", device)
    except ConfigError as error:
        message, _, advice = str(error).rpartition("; ")
        return [Finding("compiler", "note", message, advice)]
    return [Finding("compiler", "ok", f"one for torch.compile on {device}, and Python's headers")]


def memory_bytes() -> int:
    """Return the physical memory, or the limit of a container where that is lower."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # no control group, or the word max
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory


def _nvidia_driver() -> str | None:
    """Return the version of the kernel's NVIDIA driver; None where there is no driver."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    match = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return match[0] if match else "unknown"
